"""What the latents that fine-tuning added carry of its gain: put into the base and taken out of the tuned model, beside as many others."""

from __future__ import annotations

import math

import pandas as pd

from mechscope.report.gains import MAIN, beside_said, sets_of, share_said
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.intervals import interval_plot
from mechscope.report.marks.tables import Cell, Row, Shown, Table
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.shared import few_texts
from mechscope.report.statements import Caveat, Finding
from mechscope.report.theme import number as written
from mechscope.report.theme import percent

TABLES = {
    "feature_differences": table(
        "One row per latent of the dictionary of differences.",
        component="the latent, by the first place that it writes: difference:resid6.f1024",
        tokens="tokens in which it is active",
        density=number("the same as a share of all tokens that were read", "share"),
        squares=number("mean f² per token", "squares"),
    ),
    "feature_carried": table(
        "One row per dictionary, set of latents and change of a model.",
        comparison="the dictionary: crosscoder or difference",
        set="the latents: new (beyond control), new by thresholds, lost, strongest, other latents (as many, those whose part of the difference "
        "is nearest in size), random vectors (as long), all latents, the mean difference, or the whole difference",
        change="put into base, or taken from tuned",
        latents=number("how many; 0 for all latents, and where the difference itself is taken", "latents"),
        draws=number("draws that are taken together", "draws"),
        n="texts",
        energy=number("mean squared length of what is put in or taken out, per token", "squared activations"),
        loss=number("loss on the summary of the changed model", "nats per token"),
        share=number(
            "its part of the gain of fine-tuning: loss that is gained in the base, or lost in the tuned model", "share", "low", "high"
        ),
        least=number("smallest share of a draw", "share"),
        most=number("largest share of a draw", "share"),
        withheld="why shares are not given; empty where they are",
        gain=number("mean loss of the base minus that of the tuned model", "nats per token"),
        more=number(
            "of the set in question: its share less the mean share of as many other latents; see the energy of both", "share", "low", "high"
        ),
    ),
}


def _figures(tables: Tables) -> list[Figure]:
    found: list[Figure] = []
    carried = tables.get("feature_carried")
    if carried is not None and (drawn := carried[carried["share"].notna()]).size:
        rows = drawn.sort_values(["change", "comparison"], kind="stable")
        names = [
            f"{row['set']}{'' if row['comparison'] == MAIN else ' of differences'}, {row['change']}" for row in rows.to_dict("records")
        ]
        values = {
            name: rows[column].to_numpy() for name, column in (("value", "share"), ("low", "share_low"), ("high", "share_high"), ("n", "n"))
        }
        found.append(
            interval_plot(
                pd.DataFrame({"row": names, **values}),
                name="feature-carried",
                title="What latents carry of the gain",
                caption="Share of the loss that fine-tuning gained on summaries: gained by the base when the latents are put in, lost by the tuned model when "
                "they are taken out. Intervals (95 %) over texts; draws of one kind are averaged.",
                axis="share of the gain",
            )
        )
    return found


def _views(tables: Tables) -> list[Shown]:
    shown: list[Shown] = []
    if "feature_carried" in tables:
        view = (
            Table(tables["feature_carried"])
            .words("set", "latents", strong=lambda row: row["set"] == "new")
            .words("comparison", "dictionary")
        )
        view = view.words("change", "change").cells("latents", "how many", _how_many)
        view = view.shares("share", "share of the gain", ends=("share_low", "share_high")).cells("draws", "draws, least to most", _draws)
        view = (
            view.numbers("more", "more than other latents", ends=("more_low", "more_high"))
            .numbers("energy", "energy")
            .numbers("n", "texts")
        )
        shown.append(Shown("What latents carry of the gain on summaries", view.view(), table="feature_carried"))
    return shown


def _how_many(row: Row) -> Cell:
    return Cell(written(int(row["latents"])), sort=float(row["latents"])) if row["latents"] else Cell("–")


def _draws(row: Row) -> Cell:
    if int(row["draws"]) == 1 or math.isnan(float(row["least"])):
        return Cell("–")
    return Cell(f"{written(int(row['draws']))}: {percent(row['least'])} to {percent(row['most'])}")


def _findings(tables: Tables) -> list[Finding]:
    """Say what the tuned model loses without the new latents, and what the strongest of the dictionary of differences carry."""
    carried = tables.get("feature_carried")
    if carried is None:
        return []
    found = []
    out = dict(sets_of(carried, "taken from tuned"))
    # without the other half of the documents, the controls stand beside what is new by thresholds
    by = "new by thresholds" if "new" not in out and "random vectors" in out else "new"
    if (new := out.get(by)) is not None and not new["withheld"]:
        whose = "new latents" if by == "new" else "latents that are new by thresholds"
        said = f"Without its {written(int(new['latents']))} {whose} the tuned model loses {share_said(new)} of the gain{beside_said(out, 'without')}"
        found.append(Finding(said, n=new["n"], rows=tuple(out.values()), effect=float(new["share"]), table="feature_carried"))
    both = dict(sets_of(carried, "put into base")) | dict(sets_of(carried, "put into base", "difference"))
    if (strongest := both.get("strongest")) is not None:
        what = f"the {written(int(strongest['latents']))} strongest latents of the dictionary of differences"
        rows = tuple(both.values())
        if strongest["withheld"]:
            return [
                *found,
                Finding(
                    f"what {what} carry of the gain", n=strongest["n"], rows=rows, withheld=strongest["withheld"], table="feature_carried"
                ),
            ]
        most = "".join(
            f"; the {name} there carries {share_said(both[name])}" for name in ("mean difference", "whole difference") if name in both
        )
        said = f"Put into the base, {what} carry {share_said(strongest)} of the gain{beside_said(both, 'for')}{most}"
        found.append(Finding(said, n=strongest["n"], rows=rows, effect=float(strongest["share"]), table="feature_carried"))
    return found


def _caveats(tables: Tables) -> list[Caveat]:
    if "feature_carried" not in tables:
        return []
    said = "What latents carry is tested with what they say of the undisturbed runs, at these places alone; the layers behind stay those of each model."
    return [*few_texts(tables, "feature_carried"), Caveat(said, weakens="feature_carried")]


SECTION = Section(
    id="feature-carried",
    heading="What the new latents carry",
    intro=(
        "Both models read a document and its summary, and the dictionary reads both. What a set of latents says of their difference is then put into the "
        "base, and taken out of the tuned model; all that the dictionary misses stays as it is. Shares are of the loss on the summary that fine-tuning "
        "gained. Beside a set stand as many other latents, those whose part of the difference is nearest in size (where they write less than half "
        "as much, the random vectors are the control), its own values with random vectors as long, all latents, and the whole difference at these places."
    ),
    tables=TABLES,
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
