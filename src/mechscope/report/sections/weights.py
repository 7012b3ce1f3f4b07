"""Weights: how far fine-tuning moved every matrix, and in how many directions."""

from __future__ import annotations

import pandas as pd

from mechscope.report.beside import Beside
from mechscope.report.marks.control_maps import matrix_maps_beside
from mechscope.report.marks.controls import KIND_SHORT
from mechscope.report.marks.curves import scree
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import matrix_heatmap
from mechscope.report.marks.tables import Shown, View, value, words
from mechscope.report.section import Column, Section, Tables, number, table
from mechscope.report.shared import NO_CAUSE, NO_DOCUMENTS
from mechscope.report.statements import Derived, Finding
from mechscope.report.theme import label, percent

_KEY_BIAS = "key_bias"
_NO_EFFECT = "no effect: softmax ignores a constant added to all scores of a query"

NUMBERED = {"sv": Column("singular values of ΔW, the largest first, zero beyond its rank; none for a vector")}
COLUMNS: dict[str, Column | str] = {
    "name": "its name in the model, with [query], [key] or [value] where these share a parameter",
    "layer": "its layer, −1 outside the blocks",
    "kind": "query, key, value, output, mlp, norm, embedding, position, unembedding; `_bias` where it is one",
    "rows": "its rows",
    "columns": "its columns, 1 for a vector",
    "norm_base": number("Frobenius norm before fine-tuning"),
    "change": number("Frobenius norm of the change ΔW"),
    "relative_change": number("norm of the change over the norm before", "share"),
    "effective_rank": number("exponential of the entropy of ΔW's singular values; 0 where nothing changed, none for a vector"),
    "stable_rank": number("sum of the squared singular values of ΔW over the largest squared; 0 where nothing changed, none for a vector"),
    "intruders": number("top singular directions of the tuned matrix that the base matrix does not have; none for a vector"),
}
"""Columns of the table `weights`, which `control_weights` has as well."""
WEIGHTS = table(
    "One row per weight matrix or vector; query, key and value are separate matrices whatever the model's storage.", NUMBERED, **COLUMNS
)


def _figures(tables: Tables) -> list[Figure]:
    weights = tables["weights"]
    inside = weights[weights["layer"] >= 0]
    if inside.empty:
        return []
    beside = Beside.read(tables, "weights", ("name", "layer", "kind", "rows", "columns"))

    def heatmap(column: str, *, name: str, title: str, legend: str, caption: str) -> Figure:
        # the spectrum of noise is that of one draw
        spread = beside.spread(column)
        counts = {str(kind): int(count) for kind, count in spread.groupby("model", sort=False)["count"].max().items()}
        caption += NO_DOCUMENTS
        if spread.empty:
            return matrix_heatmap(weights, column, name=name, title=title, legend=legend, caption=caption)
        caption += beside.caption("mean", counts)
        return matrix_maps_beside(weights, spread, column, name=name, title=title, legend=legend, caption=caption)

    drawn = [
        heatmap(
            "relative_change", name="weight-change", title="Weight change by matrix and layer", legend="relative norm of ΔW, √ scale",
            caption="Frobenius norm of the change relative to the matrix before fine-tuning.",
        )
    ]  # fmt: skip
    if inside["effective_rank"].notna().any():
        drawn.append(
            heatmap(
                "effective_rank",
                name="effective-rank",
                title="Effective rank of the change",
                legend="effective rank, √ scale",
                caption="The exponential of the entropy of ΔW's singular values: in how many directions a matrix moved.",
            )
        )
    if "sv1" in inside and (inside["sv1"] > 0).any():
        caption = (
            "Thin: layers. Thick: geometric mean over layers. A steep fall means that few directions carry the change, which suits LoRA."
        )
        controls = beside.rows[beside.rows["sv1"] > 0] if beside.counts else beside.rows
        counts = {str(kind): int(own["control"].nunique()) for kind, own in controls.groupby("model", sort=False)}
        controls = controls.assign(model=controls["model"].map(KIND_SHORT))
        caption += NO_DOCUMENTS + beside.caption("geometric means", counts)
        drawn.append(scree(weights, name="singular-values", title="Singular values of ΔW", caption=caption, controls=controls))
    return drawn


def _views(tables: Tables) -> list[Shown]:
    beside = Beside.read(tables, "weights", ("place", "kind"), _placed).over(
        ("relative_change", "effective_rank", "stable_rank", "intruders")
    )
    words = f"By the mean relative change, the largest first.{beside.caption('range')}"
    return [Shown("Change by kind of matrix", _by_kind(tables["weights"], beside), words)]


def _placed(weights: pd.DataFrame) -> pd.DataFrame:
    """Say of every matrix whether it lies in a layer: what lies outside has lines of its own."""
    return weights.assign(place=["layers" if layer >= 0 else "outside" for layer in weights["layer"]])


def _by_kind(weights: pd.DataFrame, beside: Beside) -> View:
    """Return the changes by kind of matrix, the largest mean relative change first."""
    relative, effective = beside.cell("relative_change"), beside.cell("effective_rank")
    idle = key_bias_is_idle(weights)
    rows = []
    for (place, kind), group in _placed(weights).groupby(["place", "kind"], sort=False):
        largest = group.sort_values("relative_change", ascending=False, kind="stable").iloc[0]
        here = {"place": place, "kind": kind}
        rows.append(
            (
                words(f"{kind}{'' if place == 'layers' else ' (no layer)'}", note=_NO_EFFECT if idle and kind == _KEY_BIAS else ""),
                value(len(group)),
                value(group["relative_change"].mean()),
                *([relative(here)] if beside.counts else []),
                value(largest["relative_change"]),
                words(largest["name"]),
                value(group["effective_rank"].mean()),
                *([effective(here)] if beside.counts else []),
                value(group["stable_rank"].mean()),
                value(int(group["intruders"].fillna(0).sum())),
            )
        )
    controls = (lambda of: [f"controls: {of}"]) if beside.counts else (lambda of: [])
    columns = (
        *("matrix", "count", "relative change", *controls("relative change"), "largest", "where"),
        *("effective rank", *controls("effective rank"), "stable rank", "intruder dimensions"),
    )
    return View(columns, tuple(sorted(rows, key=lambda row: -(row[2].sort or 0.0))))


def key_bias_is_idle(weights: pd.DataFrame) -> bool:
    """Tell whether a model's key biases change nothing, from the names and kinds of its weights.

    A bias b of the keys adds q·b to all scores of a query, and a softmax ignores what is added to all its scores. That holds where position is
    learned and added to the embedding (GPT-2, OPT). It does not hold where keys are turned by their position after the bias (rotary embedding), are
    normalised, or compete with a sink that has no key; such a model has no table of positions, or has norms or sinks of that name.
    """
    learned = bool((weights["kind"] == "position").any())
    between = weights["name"].str.contains(r"(?:\b|_)(?:q|k|qk|query|key)_?(?:layer)?_?(?:norm|ln)\b|sinks?\b", case=False, regex=True)
    return learned and not bool(between.any())


def _findings(tables: Tables) -> list[Finding]:
    """Say how far weights moved; they are no sample, so there is no n."""
    weights = tables["weights"]
    moved, every = Derived("weights", (("change", ">", 0),)), Derived("weights")
    if not moved.of(tables):
        return []
    telling = weights[weights["kind"] != _KEY_BIAS] if key_bias_is_idle(weights) else weights
    top = telling.iloc[int(telling["relative_change"].to_numpy(dtype=float).argmax())]
    return [
        Finding(
            f"{moved.written(tables)} of {every.written(tables)} weight matrices and vectors moved, most {label(top['name'])}, by "
            f"{percent(top['relative_change'], digits=1)} of its norm",
            rows=(top,),
            derived=(moved, every),
            table="weights",
            folded=True,
        )
    ]


SECTION = Section(
    id="weights",
    heading="Weights",
    intro=(
        "Relative change is the Frobenius norm of ΔW over that of W. An intruder dimension is a top singular direction of the tuned matrix that the base "
        "matrix does not have."
    ),
    unit="",
    tables={"weights": WEIGHTS},
    figures=_figures,
    views=_views,
    findings=_findings,
    question="where",
    caveats=lambda tables: [NO_CAUSE],
    adds="mechscope diff BASE TUNED --data DATA --out NEW_RUN",
)
