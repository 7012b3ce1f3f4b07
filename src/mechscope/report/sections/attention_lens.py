"""Attention lens: how near each head's output comes to the model's prediction, through a trained map and without."""

from __future__ import annotations

import pandas as pd

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import Q_SIGNIFICANT, head_heatmap
from mechscope.report.marks.series import curves
from mechscope.report.marks.tables import Cell, Shown, Table
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.shared import estimated, few_texts, worse_than_none
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import label
from mechscope.report.theme import number as written

_TOP = 40

TABLES = {
    "attention_lens": table(
        "One row per head, on texts that were not learned from: means over a text's tokens first, over texts then.",
        site="head_output",
        layer="the head's layer",
        head="its number",
        component="its name, a3.h5",
        n="texts",
        kl_logit_lens=number("KL(final ‖ lens) of what the head writes, without a map", "nats", "se", "low", "high"),
        kl_tuned=number("the same through its trained map", "nats", "se", "low", "high"),
        kl_change=number("with the map minus without, paired by text", "nats", "se", "low", "high", "p", "q"),
        verdict="nearer (the map brings the head nearer to the prediction, q < .05), farther (it is worse than none) or undecided",
        converged="whether the map's training converged, by one rule for all that is trained (methods.md)",
        late_share=number("change of the loss in the last quarter of the training, of its whole change; below 0: it rose", "share"),
        unconverged="why the training does not count as converged; empty where it does",
    ),
    "attention_lens_training": table(
        "One row per training step and head.",
        step="the step, from 0",
        component="the head, a3.h5",
        kl=number("KL(final ‖ lens) on the step's tokens, before the step", "nats"),
        converged="whether the map's training converged, by one rule for all that is trained (methods.md)",
        late_share=number("change of the loss in the last quarter of the training, of its whole change; below 0: it rose", "share"),
        unconverged="why the training does not count as converged; empty where it does",
    ),
}


def _figures(tables: Tables) -> list[Figure]:
    judged, drawn = tables.get("attention_lens"), list[Figure]()
    if judged is not None:
        common = {
            "n": "texts",
            "kl_logit_lens": "without map, nats",
            "kl_tuned": "with map, nats",
            "kl_change": "change, nats",
            "kl_change_q": "q",
        }
        drawn = [
            head_heatmap(
                judged, "kl_tuned", name="attention-lens", title="Distance of heads' words from the prediction", legend="KL(final ‖ lens), nats, √ scale",
                caption="Through the trained map, on texts that were not learned from. Small: what the head writes tells the prediction.", tooltip=common,
            ),
            head_heatmap(
                judged, "kl_change", name="attention-lens-change", title="What the trained map adds", legend="change of KL(final ‖ lens), nats",
                caption="With the map minus the logit lens on the same texts; below zero: nearer to the prediction.", scale="change", tooltip=common,
                significance="kl_change_q",
            ),
        ]  # fmt: skip
    return drawn + _training(tables.get("attention_lens_training"))


def _training(curve: pd.DataFrame | None) -> list[Figure]:
    if curve is None:
        return []
    by_step = curve.groupby("step", as_index=False)["kl"].agg(value="mean", low="min", high="max")
    by_step = by_step.assign(series="heads, mean", chance=False, step=by_step["step"] + 1)
    caption = "Mean over heads, on the tokens of each step; band: from the nearest head to the farthest."
    return curves(
        by_step,
        name="attention-lens-training",
        title="Training",
        caption=caption,
        x=("step", "step"),
        axis="KL(final ‖ lens), nats",
        unit=False,
    )


def _views(tables: Tables) -> list[Shown]:
    judged = tables.get("attention_lens")
    if judged is None:
        return []
    view = Table(judged.sort_values("kl_tuned", kind="stable").head(_TOP)).words("component", "head")
    view = view.numbers("kl_tuned", "KL with map, nats", ends=("kl_tuned_low", "kl_tuned_high"))
    view = view.numbers("kl_logit_lens", "without", ends=("kl_logit_lens_low", "kl_logit_lens_high"))
    view = view.numbers("kl_change", "change", ends=("kl_change_low", "kl_change_high"), sign=True, bold="kl_change_q")
    view = view.numbers("kl_change_q", "q", digits=2).words("verdict", "the map")
    view = view.cells("converged", "converged", lambda row: Cell("yes" if row["converged"] else "no")).numbers("n", "texts")
    return [Shown("Heads nearest to the prediction", view.view(), terminal=True)]


def _findings(tables: Tables) -> list[Finding]:
    judged = tables.get("attention_lens")
    if judged is None:
        return []
    every, arrived = Derived("attention_lens"), Derived("attention_lens", (("converged", "==", True),))
    left, found = Derived("attention_lens", (("converged", "==", False),)), list[Finding]()
    if arrived.of(tables):
        best = arrived.rows(tables).nsmallest(1, "kl_tuned").iloc[0]
        nearer, farther = (Derived("attention_lens", (*arrived.where, ("verdict", "==", verdict))) for verdict in ("nearer", "farther"))
        found.append(
            Finding(
                f"On texts that were not learned from, what {label(best['component'])} writes comes nearest to the model's prediction, of "
                f"{arrived.written(tables)} heads: KL {estimated(best, 'kl_tuned')} nats through its trained map, {written(best['kl_logit_lens'])} without. "
                "The "
                f"maps bring {nearer.written(tables)} of {arrived.written(tables)} heads nearer (q < {Q_SIGNIFICANT}){worse_than_none(farther, tables)}",
                n=best["n"],
                rows=(best,),
                derived=(arrived, nearer, farther),
                effect=nearer.of(tables) / arrived.of(tables),
                card=Card(label(best["component"]), "tells the prediction best of all heads", f"{written(best['kl_tuned'])} nats from it"),
                table="attention_lens",
            )
        )
    if left.of(tables):
        reason = left.rows(tables)["unconverged"].iloc[0]
        said = f"what the maps of {left.written(tables)} of {every.written(tables)} heads say"
        why = f"their training had not converged (the first: {reason}); give it more steps"
        found.append(Finding(said, n=judged["n"].max(), derived=(left, every), withheld=why, table="attention_lens"))
    return found


def _caveats(tables: Tables) -> list[Caveat]:
    return [
        Caveat(
            "A map learns what goes with a head's output in these texts, word frequency included: what it says need not be what the model makes of the head."
        ),
        Caveat("The nearest head was chosen on the texts it is judged on."),
        *few_texts(tables, "attention_lens"),
    ]


SECTION = Section(
    id="attention-lens",
    heading="Attention lens",
    intro=(
        "For every head a map is trained from what it writes to the model's final prediction at that token, by KL divergence (Sakarvadia et al. "
        "2023, “Attention Lens: A Tool for Mechanistically Interpreting the Attention Head Information Retrieval Mechanism”; here a map ends in the "
        "residual stream, and the model's own norm and unembedding follow). It is judged on texts that were not learned from, beside its control, "
        "the same head's output read without a map (logit lens)."
    ),
    tables=TABLES,
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
