"""Distributed alignment search: whether a learned subspace carries a variable, beside random ones, the whole vector and none."""

from __future__ import annotations

import pandas as pd

from mechscope.report.marks.curves import layer_curves
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.tables import Cell, Shown, Table
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.shared import few_texts
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import interval, label, percent
from mechscope.report.theme import number as written

_METHODS = {
    "das": "learned subspace",
    "random": "random subspaces, mean",
    "full": "whole vector",
    "none": "nothing exchanged",
}
DAS = table(
    "One row per layer and subspace.",
    component="the place",
    site="residual, attention_output, mixer_output, mlp_output, neuron, embedding or z (a head's output)",
    layer="its layer",
    head="its head, −1 where there is none",
    position="the tokens whose representation was exchanged",
    among="among which tokens the likeliest was sought: vocabulary, or right and wrong answers",
    method="das (the learned subspace), random (one row per draw), full (the whole vector is exchanged), none (nothing is)",
    draw="which random subspace, −1 for the others",
    dimensions="dimensions of the subspace",
    n="pairs that were judged on and not learned from",
    correct="pairs whose likeliest token after the exchange is an answer",
    accuracy=number("their share, with Wilson's interval", "share", "low", "high", bare=True),
    width=(
        "of the learned subspace, how many dimensions the variable needs, as a boundless search found (the narrowest that does as well as the best on pairs "
        "set aside); none where the number was given or a training it rests on has not converged"
    ),
    converged="whether its training converged, by one rule for all that is trained (methods.md); true for what is not learned",
    late_share=number("change of the loss in the last quarter of the training, of its whole change; below 0: it rose", "share"),
    unconverged="why the training does not count as converged; empty where it does",
)


def _by_layer(das: pd.DataFrame) -> pd.DataFrame:
    """Return a row per layer with the accuracy of every method; that of the learned subspace with its interval, random draws averaged."""
    layers = das.groupby("layer", as_index=False).agg(n=("n", "max"))
    for method in _METHODS:
        own = das[das["method"] == method].set_index("layer")
        if len(own):
            layers[method] = layers["layer"].map(own.groupby(level=0)["accuracy"].mean())
    learned = das[das["method"] == "das"].set_index("layer")
    return layers.assign(das_low=layers["layer"].map(learned["low"]), das_high=layers["layer"].map(learned["high"]))


def _figures(tables: Tables) -> list[Figure]:
    layers = _by_layer(tables["das"])
    return [
        layer_curves(
            layers,
            {method: words for method, words in _METHODS.items() if method in layers},
            name="das",
            title="Interchange accuracy",
            axis="share of pairs answered right",
            caption="Band: Wilson's 95\u202f% interval over held-out pairs, of the learned subspace.",
            share=True,
            counted_in="pairs",
        )
    ]


def _views(tables: Tables) -> list[Shown]:
    das = tables["das"]
    das = das.assign(method=[_METHODS.get(str(method), str(method)).removesuffix("s, mean") for method in das["method"]])
    view = (
        Table(das).words("component", "place").words("position", "tokens").words("method", "exchanged").numbers("dimensions", "dimensions")
    )
    view = view.numbers("accuracy", "right", ends=("low", "high")).numbers("correct", "pairs right").numbers("n", "pairs")
    if das["width"].notna().any():
        view = view.numbers("width", "dimensions needed")
    view = view.cells("converged", "converged", lambda row: Cell("yes" if row["converged"] else "no"))
    return [Shown("Exchanges", view.view(), terminal=True)]


def _best(das: pd.DataFrame) -> pd.Series:
    return das[das["method"] == "das"].sort_values("accuracy", ascending=False, kind="stable").iloc[0]


def _findings(tables: Tables) -> list[Finding]:
    das = tables["das"]
    best = _best(das)
    here = (("layer", "==", best["layer"]), ("head", "==", best["head"]))
    rivals = {method: Derived("das", (*here, ("method", "==", method)), "accuracy", "max") for method in ("random", "full", "none")}
    reached = {method: percent(rival.of(tables)) for method, rival in rivals.items()}
    controls, many = Derived("das", (*here, ("method", "==", "random"))), Derived("das", (("method", "==", "das"),), "layer", "distinct")
    beside = ""
    if controls.of(tables):
        above = best["low"] > rivals["random"].of(tables)
        verdict = f"its interval {'lies' if above else 'does not lie'} above all of them"
        beside = f". {controls.written(tables)} random subspaces of equal size reach {reached['random']} at most: {verdict}"
    chosen = f", the best of {many.written(tables)} layers" if many.of(tables) > 1 else ""
    dimensions = f"{written(int(best['dimensions']))} {'dimension' if best['dimensions'] == 1 else 'dimensions'}"
    found = [
        Finding(
            f"Exchanging a learned subspace of {dimensions} of {label(best['component'])}{chosen} makes {percent(best['accuracy'])} "
            f"{interval(100 * best['low'], 100 * best['high'])} of held-out pairs right; the whole vector {reached['full']}, nothing {reached['none']}{beside}",
            n=best["n"],
            unit="held-out pairs",
            rows=(best,),
            derived=(*rivals.values(), controls, many),
            effect=float(best["accuracy"]),
            card=Card(percent(best["accuracy"]), f"of pairs right after exchanging {dimensions}", f"of {label(best['component'])}"),
            table="das",
        )
    ]
    if not best["converged"]:
        said = "what the subspace says of the variable, its number of dimensions and how much a better one would move"
        why = f"its training had not converged ({best['unconverged']}); give it more epochs"
        found.append(Finding(said, n=best["n"], unit="held-out pairs", rows=(best,), withheld=why, table="das"))
    elif pd.notna(best["width"]):
        needed = int(best["width"])
        found.append(
            Finding(
                f"Of the widths that were learned, {written(needed)} {'dimension is' if needed == 1 else 'dimensions are'} the fewest of "
                f"{label(best['component'])} that do as well as the best, up to noise, on pairs set aside",
                n=best["n"],
                unit="held-out pairs",
                rows=(best,),
                table="das",
            )
        )
    return found


def _caveats(tables: Tables) -> list[Caveat]:
    return [
        Caveat("A layer that is the best of several was chosen on the pairs it is judged on: its accuracy is a little too high."),
        Caveat("A learned subspace can also work through directions that the model itself does not use (Makelov et al. 2023)."),
        *few_texts(tables, "das"),
    ]


SECTION = Section(
    id="das",
    heading="Alignment search",
    intro=(
        "A rotation is learned so that exchanging its first dimensions between the runs of two texts makes the model answer as if the variable had the other "
        "text's value; the model's weights stay (Geiger et al. 2024, “Finding Alignments Between Interpretable Causal Variables and Distributed Neural "
        "Representations”; with a learned number of dimensions Wu et al. 2023). It is judged on pairs that were not learned from, beside three controls: "
        "random subspaces of equal size, the whole vector (the most that the place can do) and no exchange."
    ),
    unit="held-out pairs",
    tables={"das": DAS},
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
