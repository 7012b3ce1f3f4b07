"""Gradient directions: the leading singular directions of weight gradients, in tokens."""

from __future__ import annotations

import pandas as pd

from mechscope.report.marks.curves import layer_curves
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.tables import Shown, Table, tokens
from mechscope.report.section import Section, Tables, number, optional, table
from mechscope.report.shared import few_texts
from mechscope.report.statements import Card, Caveat, Finding
from mechscope.report.theme import name_of, percent

_TOP = 60

DIRECTIONS = table(
    "One row per matrix and direction.",
    layer="the matrix's layer",
    matrix="its kind: query_key_value, attention_output, mlp_up or mlp_down",
    module="its module",
    direction="number of the direction, 0 the strongest",
    singular_value=number("its singular value in the gradient of the mean loss", "of the gradient"),
    share=number("its share of the gradient's squared Frobenius norm", "share"),
    side="what is read: gradient (what a step writes for the mean input) or input (what the matrix read)",
    top_ids="tokens that it raises most: ids",
    top_tokens="the same as text",
    bottom_ids="tokens that it lowers most: ids",
    bottom_tokens="the same as text",
    n="texts whose mean loss it is",
    repeated=optional(
        "several texts only: its top tokens that are among those of some direction of the matrix in both halves of the texts", "share"
    ),
)


def _figures(tables: Tables) -> list[Figure]:
    """Draw the share of each matrix's strongest direction, and how well its tokens repeat."""
    first = tables["gradient_directions"]
    first = first[first["direction"] == 0]
    measures = {
        "share": ("Share of the strongest direction", "share of the squared norm", "1: the whole gradient is one direction."),
        "repeated": (
            "Repeated in both halves of the texts",
            "share of top tokens",
            "Top tokens of the strongest direction that each half of the texts gives too.",
        ),
    }
    drawn = []
    for measure, (title, axis, caption) in measures.items():
        if measure not in first:
            continue
        layers = first[["layer", "n"]].drop_duplicates("layer").sort_values("layer", kind="stable")
        for matrix, own in first.groupby("matrix", sort=False):
            layers[str(matrix)] = layers["layer"].map(own.groupby("layer")[measure].mean())
        series = {str(matrix): name_of(matrix) for matrix in first["matrix"].unique()}
        name = f"gradient-{measure}"
        drawn.append(layer_curves(layers, series, name=name, title=title, axis=axis, caption=caption, share=True, counted_in="texts"))
    return drawn


def _views(tables: Tables) -> list[Shown]:
    ordered = tables["gradient_directions"].sort_values("singular_value", ascending=False, kind="stable").head(_TOP)
    view = Table(ordered).numbers("layer", "layer").mapped("matrix", "matrix").numbers("direction", "direction")
    view = view.numbers("singular_value", "singular value").numbers("share", "share").token_lists("top_tokens", "raised", most=5)
    view = view.token_lists("bottom_tokens", "lowered", most=5).numbers("repeated", "repeated").numbers("n", "texts")
    return [Shown("The strongest directions", view.view(), terminal=True)]


def _top(tables: Tables) -> pd.Series:
    directions = tables["gradient_directions"]
    return directions.nlargest(1, "singular_value").iloc[0]


def _findings(tables: Tables) -> list[Finding]:
    top = _top(tables)
    repeated = f"; {percent(top['repeated'])} of its top tokens are given by each half of the texts too" if "repeated" in top else ""
    verb = "raises" if top["side"] == "gradient" else "would answer to inputs like"
    place = f"{name_of(top['matrix'])} of layer {int(top['layer'])}"
    return [
        Finding(
            f"Of the mean loss of the texts the strongest direction of a gradient is in {place}, with {percent(top['share'])} of that gradient's "
            "squared norm: a "
            f"step {verb} {tokens(top['top_tokens'], most=5)}{repeated}",
            n=top["n"],
            rows=(top,),
            effect=float(top["share"]),
            card=Card(percent(top["share"]), "of a gradient is its strongest direction", place),
            table="gradient_directions",
        )
    ]


def _caveats(tables: Tables) -> list[Caveat]:
    return [
        Caveat(
            "These are directions of one gradient, of the texts' mean loss: they have no interval. What repeats in both halves of the texts is all that "
            "is known "
            "of other texts."
        ),
        *few_texts(tables, "gradient_directions"),
    ]


SECTION = Section(
    id="gradient-directions",
    heading="Gradient directions",
    intro=(
        "The gradient of the texts' mean loss, for each weight matrix, is taken apart into singular directions; the side that lives in the residual stream is "
        "read through the unembedding, turned as a step of training turns it (Katz et al. 2024, “Backward Lens: Projecting Language Model Gradients into the "
        "Vocabulary Space”). Each half of the texts by itself is the control: which of a direction's tokens come back."
    ),
    tables={"gradient_directions": DIRECTIONS},
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
