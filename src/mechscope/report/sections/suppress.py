"""Suppressed bands: what the model loses when directions of the residual stream are taken out, beside random directions."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import Q_SIGNIFICANT
from mechscope.report.marks.place_curves import place_curves
from mechscope.report.marks.tables import Shown, Table, strongest
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.shared import estimated, few_texts, sized
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import label
from mechscope.report.theme import number as written

_TOP = 40

SUPPRESS = table(
    "One row per layer and set of directions that was taken out behind it.",
    site="residual",
    layer="the layer behind which they were taken out, −1 for the embedding",
    head="−1",
    component="its name: embed, resid3 (after block 3)",
    rows="which next tokens' loss: all, or those of the target",
    n="texts",
    loss=number("loss of the whole model, mean over texts", "nats per token"),
    loss_suppressed=number("loss without those directions", "nats per token"),
    loss_change=number("its change, paired by text; q over the layers of one set", "nats per token", "se", "low", "high", "p", "q"),
    directions="what was taken out: bands, or random (as many random orthogonal directions, the control)",
    draw="which random set, from 0; −1 for the bands",
    suppressed="the bands that were named, 0 the one that the unembedding amplifies most",
    count="directions that were taken out",
    width="directions of the residual stream",
)


def _parts(tables: Tables) -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = tables["suppress"]
    return rows[rows["directions"] == "bands"], rows[rows["directions"] == "random"]


def _figures(tables: Tables) -> list[Figure]:
    bands, controls = _parts(tables)
    words = f"bands {bands['suppressed'].iloc[0]}"
    parts = [bands.assign(series=words, dash="bands", low=bands["loss_change_low"], high=bands["loss_change_high"])]
    for draw, own in controls.groupby("draw", sort=False):
        parts.append(own.assign(series=f"random {int(str(draw)) + 1}", dash="random", low=np.nan, high=np.nan))
    points = pd.concat(parts, ignore_index=True)
    points = points.assign(value=points["loss_change"], place=["embed" if layer < 0 else str(layer) for layer in points["layer"]])
    return [
        place_curves(
            points[["place", "series", "dash", "value", "low", "high", "n"]],
            name="suppress",
            title="Loss without those directions",
            axis="change of the loss, nats per token",
            caption=(
                f"{int(bands['count'].iloc[0])} of {int(bands['width'].iloc[0])} directions taken out behind one layer at a time, "
                "at every token. Band: 95\u202f% "
                "over texts; random directions are dashed."
            ),
            words={"series": "directions", "dash": "kind"},
        )
    ]


def _views(tables: Tables) -> list[Shown]:
    bands, controls = _parts(tables)
    by_layer = controls.groupby("layer")["loss_change"]
    top = strongest(bands, "loss_change", _TOP)
    if len(controls):
        top = top.assign(control=top["layer"].map(by_layer.max()))
    view = Table(top).words("component", "behind").numbers("loss", "loss").numbers("loss_suppressed", "without")
    view = view.numbers("loss_change", "change", ends=("loss_change_low", "loss_change_high"), sign=True, bold="loss_change_q")
    view = view.numbers("control", "random, largest", sign=True).numbers("loss_change_q", "q", digits=2).numbers("n", "texts")
    return [Shown("Losses without the bands", view.view(), terminal=True)]


def _findings(tables: Tables) -> list[Finding]:
    bands, controls = _parts(tables)
    top = bands.nlargest(1, "loss_change").iloc[0]
    here, rows, beside = controls[controls["layer"] == top["layer"]], [top], ""
    random = Derived("suppress", (("directions", "==", "random"), ("layer", "==", top["layer"])))
    if len(here):
        highest = here.nlargest(1, "loss_change").iloc[0]
        rows.append(highest)
        verdict = "lies above all of them" if top["loss_change_low"] > highest["loss_change"] else "does not lie above all of them"
        most = written(highest["loss_change"], sign=True)
        beside = f"; {random.written(tables)} random sets of as many directions change it by {most} at most, and the interval {verdict}"
    same = (("directions", "==", "bands"),)
    surely, every = Derived("suppress", (*same, ("loss_change_q", "<", Q_SIGNIFICANT))), Derived("suppress", same)
    change = written(top["loss_change"], sign=True)
    return [
        Finding(
            f"Taking bands {label(top['suppressed'])} ({int(top['count'])} of {int(top['width'])} directions) out of the residual stream raises the loss "
            "most at "
            f"{label(top['component'])}: from {written(top['loss'])} by {estimated(top, 'loss_change', sign=True)} nats per token{beside}. It changes at "
            f"{surely.written(tables)} of {every.written(tables)} layers at q < {Q_SIGNIFICANT}",
            n=top["n"],
            rows=tuple(rows),
            derived=(surely, every, random),
            effect=sized(top, "loss_change", "loss_change_se"),
            card=Card(f"{change} nats", f"of loss without bands {label(top['suppressed'])}", f"at {label(top['component'])}"),
            table="suppress",
        )
    ]


def _caveats(tables: Tables) -> list[Caveat]:
    return [
        Caveat("Random directions hold as many dimensions, not as much of the norm: mechscope spectrum says how much stands in the bands."),
        Caveat("The layer where most is lost was chosen on these texts."),
        *few_texts(tables, "suppress"),
    ]


SECTION = Section(
    id="suppress",
    heading="Suppressed bands",
    intro=(
        "The directions of the residual stream are ordered by how strongly the unembedding answers to them and cut into bands of equal width; some bands are "
        "taken out behind one layer at a time, at every token, and the blocks after it go on without them (Cancedda 2024, “Spectral Filters, Dark Signals, and "
        "Attention Sinks”). As many random directions, taken out in the same way, are the control."
    ),
    tables={"suppress": SUPPRESS},
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
