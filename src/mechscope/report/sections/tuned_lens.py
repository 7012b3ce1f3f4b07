"""The tuned lens judged: whether each of its maps arrived, and whether it comes nearer to the model than no map."""

from __future__ import annotations

from mechscope.report.marks.heatmaps import Q_SIGNIFICANT
from mechscope.report.marks.tables import Cell, Shown, Table
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.shared import by_model, few_texts, worse_than_none
from mechscope.report.statements import Derived, Finding

TABLES = {
    "lens_judged": table(
        "One row per model and map of the tuned lens, judged on the texts that are read with it, none of which it learned from.",
        model="base, tuned or model",
        site="residual: the residual stream behind a layer",
        layer="its layer, −1 for the embedding",
        head="−1: no head",
        component="its name: embed, resid3 (after block 3)",
        n="texts",
        kl_logit_lens=number("KL(final ‖ lens) without a map", "nats", "se", "low", "high"),
        kl_tuned=number("the same through the trained map", "nats", "se", "low", "high"),
        kl_change=number("with the map minus without, paired by text", "nats", "se", "low", "high", "p", "q"),
        verdict="nearer (the map brings the lens nearer to the model, q < .05), farther (it is worse than none) or undecided",
        converged="whether the map's training converged, by one rule for all that is trained (methods.md)",
        late_share=number("change of the loss in the last quarter of the training, of its whole change; below 0: it rose", "share"),
        unconverged="why the training does not count as converged; empty where it does",
    ),
}


def _views(tables: Tables) -> list[Shown]:
    rows = Table(tables["lens_judged"]).mapped("model", "model").words("component", "place")
    rows = rows.numbers("kl_logit_lens", "KL without map, nats", ends=("kl_logit_lens_low", "kl_logit_lens_high"))
    rows = rows.numbers("kl_tuned", "with map", ends=("kl_tuned_low", "kl_tuned_high"))
    rows = rows.numbers("kl_change", "change", ends=("kl_change_low", "kl_change_high"), sign=True).numbers("kl_change_q", "q", digits=2)
    rows = rows.words("verdict", "the map").cells("converged", "converged", lambda row: Cell("yes" if row["converged"] else "no"))
    words = "On the texts read here, none of which the maps learned from, beside the logit lens."
    return [Shown("What the maps are worth", rows.numbers("n", "texts").view(), words, terminal=True)]


def _findings(tables: Tables) -> list[Finding]:
    """Say of each model what its maps are worth; of those whose training has not converged only that."""
    found = []
    for whose, own in by_model(tables["lens_judged"]):
        here = (("model", "==", own["model"].iloc[0]),)
        all_of_them, arrived = Derived("lens_judged", here), Derived("lens_judged", (*here, ("converged", "==", True)))
        nearer, farther = (Derived("lens_judged", (*arrived.where, ("verdict", "==", verdict))) for verdict in ("nearer", "farther"))
        if arrived.of(tables):
            found.append(
                Finding(
                    f"In {whose} the tuned lens's map is nearer to the final prediction than the logit lens at {nearer.written(tables)} of "
                    f"{arrived.written(tables)} places{worse_than_none(farther, tables)} (q < {Q_SIGNIFICANT}, on texts that were not learned from)",
                    n=own["n"].max(),
                    derived=(nearer, arrived, farther),
                    effect=nearer.of(tables) / arrived.of(tables),
                    table="lens_judged",
                )
            )
        if len(own) > arrived.of(tables):
            left, reason = (
                Derived("lens_judged", (*here, ("converged", "==", False))),
                own.loc[~own["converged"].astype(bool), "unconverged"].iloc[0],
            )
            said = f"what the tuned lens says at {left.written(tables)} of {all_of_them.written(tables)} places of {whose}"
            why = f"the training of their maps had not converged (the first: {reason}); give it more steps"
            found.append(Finding(said, n=own["n"].max(), derived=(left, all_of_them), withheld=why, table="lens_judged"))
    return found


SECTION = Section(
    id="tuned-lens",
    heading="The tuned lens, judged",
    intro=(
        "A tuned lens is learned, so it is judged by what it returns: how far its prediction is from the model's own on texts that it did not learn from, "
        "beside the logit lens, which is no map at all (Belrose et al. 2023, “Eliciting Latent Predictions from Transformers with the Tuned Lens”)."
    ),
    tables=TABLES,
    views=_views,
    findings=_findings,
    caveats=lambda tables: few_texts(tables, "lens_judged"),
    question="parts",
)
