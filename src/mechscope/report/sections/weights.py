"""Weights: how far fine-tuning moved every matrix, and in how many directions."""

from __future__ import annotations

from mechscope.report.marks.curves import scree
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import matrix_heatmap
from mechscope.report.marks.tables import Shown, View, value, words
from mechscope.report.section import Column, Section, Tables, number, table
from mechscope.report.shared import NO_CAUSE

WEIGHTS = table(
    "One row per weight matrix or vector; query, key and value are separate matrices whatever the model's storage.",
    {"sv": Column("singular values of ΔW, the largest first, zero beyond its rank; none for a vector")},
    name="its name in the model, with [query], [key] or [value] where these share a parameter",
    layer="its layer, −1 outside the blocks",
    kind="query, key, value, output, mlp, norm, embedding, position, unembedding; `_bias` where it is one",
    rows="its rows",
    columns="its columns, 1 for a vector",
    norm_base=number("Frobenius norm before fine-tuning"),
    change=number("Frobenius norm of the change ΔW"),
    relative_change=number("norm of the change over the norm before", "share"),
    effective_rank=number("exponential of the entropy of ΔW's singular values; 0 where nothing changed, none for a vector"),
    stable_rank=number("sum of the squared singular values of ΔW over the largest squared; 0 where nothing changed, none for a vector"),
    intruders=number("top singular directions of the tuned matrix that the base matrix does not have; none for a vector"),
)


def _figures(tables: Tables) -> list[Figure]:
    weights = tables["weights"]
    inside = weights[weights["layer"] >= 0]
    if inside.empty:
        return []
    drawn = [
        matrix_heatmap(
            weights, "relative_change", name="weight-change", title="Weight change by matrix and layer", legend="relative norm of ΔW, √ scale",
            caption="Frobenius norm of the change relative to the matrix before fine-tuning.",
        )
    ]  # fmt: skip
    if inside["effective_rank"].notna().any():
        drawn.append(
            matrix_heatmap(
                weights,
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
        drawn.append(scree(weights, name="singular-values", title="Singular values of ΔW", caption=caption))
    return drawn


def _views(tables: Tables) -> list[Shown]:
    return [Shown("Change by kind of matrix", _by_kind(tables))]


def _by_kind(tables: Tables) -> View:
    """Return the changes by kind of matrix; what lies outside the layers has lines of its own."""
    weights, rows = tables["weights"], []
    inside = weights.assign(place=["layers" if layer >= 0 else "outside" for layer in weights["layer"]])
    for (place, kind), group in inside.groupby(["place", "kind"], sort=False):
        largest = group.sort_values("relative_change", ascending=False, kind="stable").iloc[0]
        rows.append(
            (
                words(f"{kind}{'' if place == 'layers' else ' (no layer)'}"),
                value(len(group)),
                value(group["relative_change"].mean()),
                value(largest["relative_change"]),
                words(largest["name"]),
                value(group["effective_rank"].mean()),
                value(group["stable_rank"].mean()),
                value(int(group["intruders"].fillna(0).sum())),
            )
        )
    columns = ("matrix", "count", "relative change", "largest", "where", "effective rank", "stable rank", "intruder dimensions")
    return View(columns, tuple(rows))


SECTION = Section(
    id="weights",
    heading="Weights",
    intro=(
        "Relative change is the Frobenius norm of ΔW over that of W. An intruder dimension is a top singular direction of the tuned matrix that the base "
        "matrix does not have."
    ),
    tables={"weights": WEIGHTS},
    figures=_figures,
    views=_views,
    caveats=lambda tables: [NO_CAUSE],
    adds="mechscope diff BASE TUNED --data DATA --out NEW_RUN",
)
