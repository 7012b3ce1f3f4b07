"""The large numbers of runs that only read a model, and what a reader must keep in mind of lenses, attribution, roles and weights."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from mechscope.report.heatmaps import Q_SIGNIFICANT
from mechscope.report.reading_summary import FOUND, KINDS, by_model, first_found, having
from mechscope.report.summary import Card
from mechscope.report.theme import label, number, percent

Tables = Mapping[str, pd.DataFrame]

FEW_TEXTS = 30
"""Fewer texts than these make an interval worth little: the page says so."""


def reading_cards(tables: Tables) -> list[Card]:
    """Return the large numbers of runs that only read a model: at most three per kind of run."""
    found = [
        Card(label(row["component"]), f"already names the prediction of {whose}", "in half of the positions, by the logit lens")
        for whose, row, _ in first_found(tables)[-2:]
    ]
    table = tables.get("logit_attribution")
    if table is not None:
        whose, own = by_model(table)[-1]
        top = own.iloc[int(own["effect"].abs().to_numpy().argmax())]
        found.append(
            Card(
                label(top["component"]),
                f"largest direct part in {whose}",
                f"{number(top['effect'], sign=True)} of {number(own['effect'].sum(), sign=True)} logits",
            )
        )
    for whose, own, count in having(tables)[-2:]:
        found.append(Card(f"{number(own['component'].nunique())} of {number(count)}", f"heads of {whose} with a role", ""))
    changes = tables.get("head_role_changes")
    if changes is not None:
        heads = changes[changes["component"] != "all"]
        turned = [int(heads[name].fillna(False).astype(bool).sum()) for name in ("gained", "lost") if name in heads]
        note = f"{turned[0]} roles gained, {turned[1]} lost" if len(turned) == 2 else ""
        found.append(
            Card(number(int((heads["q"] < Q_SIGNIFICANT).sum())), f"scores of {number(len(heads))} changed (q < {Q_SIGNIFICANT})", note)
        )
    return [*found, *_weight_cards(tables)]


def _weight_cards(tables: Tables) -> list[Card]:
    heads, moved, neurons, found = tables.get("weight_heads"), tables.get("weight_changes"), tables.get("neurons"), list[Card]()
    if heads is not None and "copying" in heads:
        whose, own = by_model(heads)[-1]
        found.append(
            Card(
                f"{number(int((own['copying'] > FOUND).sum()))} of {number(len(own))}",
                f"heads of {whose} copy",
                f"copying score above {FOUND:g}",
            )
        )
    if moved is not None and "ov_relative" in moved:
        top = moved.iloc[int(moved["ov_relative"].to_numpy().argmax())]
        found.append(
            Card(label(top["component"]), "moved most in what it writes", f"W_OV by {percent(top['ov_relative'], digits=1)} of its norm")
        )
    if neurons is not None and "dead" in neurons:
        whose, own = by_model(neurons)[-1]
        found.append(
            Card(
                percent(own["dead"].fillna(False).astype(float).mean(), digits=1),
                f"of the neurons of {whose} never fire",
                f"of {number(len(own))} on these texts",
            )
        )
    return found


def reading_caveats(tables: Tables) -> list[str]:
    """Return what a reader must keep in mind of what is there."""
    found = []
    counts = [int(tables[name]["n"].max()) for name in ("lens_summary", "logit_attribution") if name in tables and "n" in tables[name]]
    if counts and min(counts) < FEW_TEXTS:
        found.append(f"Only {min(counts)} texts were read; intervals from fewer than {FEW_TEXTS} are rough.")
    if any(name in tables for name in ("lens_summary", "lens_grid")):
        found.append(
            "A lens shows what a direction of the residual stream means to the last layer. Early layers may hold the same in other directions: the logit "
            "lens then reads nothing where something is. The tuned lens corrects this, but what it says was learned and may not be what the model uses."
        )
    if any(name in tables for name in ("logit_attribution", "logit_attribution_change")):
        found.append(
            "Direct attribution counts what a part writes straight to the logits, not what later parts make of it, and holds the final norm's scale fixed."
        )
    if any(name in tables for name in ("head_roles", "head_role_changes")):
        found.append(
            "A role is what a head does on the texts made to ask for it. A head can have several roles, and do something else on other texts."
        )
    if any(name in tables for name in KINDS["weights"]):
        found.append(
            "Weights seen through the vocabulary leave out norms, attention patterns and the layers between: they say what a head could do, not what it does."
        )
    return found
