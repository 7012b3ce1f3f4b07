"""What weights say, as figures and tables: heads that copy, tokens that heads pair, singular directions, composition, neurons and their contexts.

Base, tuned and the change between them stand beside each other: the change of W_OV or W_QK is a matrix of its own, read in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from mechscope.report.figure import Figure
from mechscope.report.heatmaps import head_heatmap
from mechscope.report.tabled import Shown, Table, strongest, token
from mechscope.report.theme import name_of, number, percent
from mechscope.report.views import Cell, View, words

TOP_HEADS = 30
"""Heads whose tokens are shown, those with the largest values first."""
TOP_ROWS = 60
"""Singular vectors, compositions, neurons and contexts shown per model."""

_PAIRS = 5
_MATRICES = {"ov": "OV: attended → written", "qk": "QK: query → key"}
_NUMBERS = {
    "copying": "copying (−1 to 1)",
    "ov_norm": "norm of W_OV",
    "qk_norm": "norm of W_QK",
    "ov_relative": "change of W_OV, relative",
    "qk_relative": "change of W_QK, relative",
}


def weight_figures(tables: Mapping[str, pd.DataFrame]) -> list[Figure]:
    """Return a map of the heads' copying scores per model, and maps of how far their circuits moved."""
    heads, changes, drawn = tables.get("weight_heads"), tables.get("weight_changes"), list[Figure]()
    if heads is not None and "copying" in heads and heads["copying"].notna().any():
        caption = "Sum of the eigenvalues of W_OV, seen from the vocabulary, over the sum of their sizes."
        groups = list(heads.groupby("model", sort=False))
        for i, (model, own) in enumerate(groups):
            end, whose = (f"-{i + 1}", f": {name_of(model)}") if len(groups) > 1 else ("", "")
            drawn.append(
                head_heatmap(
                    own, "copying", name=f"copying{end}", title=f"Which heads copy{whose}", legend="eigenvalue copying score (orange: copies)",
                    caption=caption, scale="change", tooltip={column: words_ for column, words_ in _NUMBERS.items() if column in own},
                )
            )  # fmt: skip
    for column, what in (("ov_relative", "what heads write (W_OV)"), ("qk_relative", "what heads look for (W_QK)")):
        if changes is not None and column in changes and changes[column].notna().any():
            tooltip = {name: words_ for name, words_ in _NUMBERS.items() if name in changes}
            caption = "Frobenius norm of the change relative to the matrix before fine-tuning."
            drawn.append(
                head_heatmap(
                    changes, column, name=column.replace("_", "-"), title=f"How far fine-tuning moved {what}", legend="relative norm, √ scale",
                    caption=caption, tooltip=tooltip,
                )
            )  # fmt: skip
    return drawn


def weight_views(tables: Mapping[str, pd.DataFrame]) -> list[Shown]:
    """Return the tables of heads' weights: tokens, singular vectors, composition, all heads."""
    found = []
    if "weight_tokens" in tables:
        found += _tokens(tables["weight_tokens"])
    if "composition" in tables:
        for model, own in tables["composition"].groupby("model", sort=False):
            whose = f", {name_of(model)}" if tables["composition"]["model"].nunique() > 1 else ""
            table = (
                Table(strongest(own, "z", TOP_ROWS))
                .words("source", "writes")
                .words("target", "reads")
                .mapped("kind", "as", lambda kind: str(kind).upper())
            )
            table = (
                table.numbers("score", "score").numbers("random", "random").numbers("sd", "its SD", digits=2).numbers("z", "z", sign=True)
            )
            said = "How much of what one head writes another reads by its query, key or value, beside random matrices; the farthest from random first."
            found.append(Shown(f"Heads that compose{whose}", table.view(), said))
    if "weight_singular" in tables:
        found += _singular(tables["weight_singular"])
    if "weight_heads" in tables:
        for model, own in tables["weight_heads"].groupby("model", sort=False):
            whose = f", {name_of(model)}" if tables["weight_heads"]["model"].nunique() > 1 else ""
            table = Table(own).words("component", "head")
            for column in own.columns:
                if column not in ("model", "layer", "head", "component") and pd.api.types.is_numeric_dtype(own[column]):
                    table = table.numbers(column, _NUMBERS.get(column, name_of(column)))
            found.append(Shown(f"All heads{whose}", table.view(), folded=True))
    return found


def _tokens(table: pd.DataFrame) -> list[Shown]:
    """Return a table per matrix: a line per head (and sign), the first pairs of every model and of the change beside one another."""
    models = list(dict.fromkeys(table["model"]))
    table = table.assign(sign=table.get("sign", ""))
    found = []
    for matrix, own in table.groupby("matrix", sort=False):
        ranking = own.assign(size=own["value"].astype(float).abs()).groupby("component", sort=False)["size"].max()
        ranking = ranking.sort_values(ascending=False, kind="stable")
        rows = []
        for component in ranking.head(TOP_HEADS).index:
            for sign, part in own[own["component"] == component].groupby("sign", sort=False):
                cells = [_pairs(part[part["model"] == model]) for model in models]
                rows.append((words(component, note=_sign(sign), sort=float(ranking[component])), *cells))
        heading = _MATRICES.get(str(matrix), name_of(matrix))
        view = View(("head", *(name_of(model) for model in models)), tuple(rows))
        more = f" The {TOP_HEADS} of {len(ranking)} heads with the largest values." if len(ranking) > TOP_HEADS else ""
        found.append(Shown(f"Tokens that heads pair, {heading}", view, f"The first {_PAIRS} pairs of tokens with their values.{more}"))
    return found


def _pairs(part: pd.DataFrame) -> Cell:
    if "place" in part:
        part = part.sort_values("place", kind="stable")
    pairs = [f"{token(row['source'])} → {token(row['target'])} ({number(row['value'])})" for row in part.head(_PAIRS).to_dict("records")]
    return Cell("\n".join(pairs) or "–")


def _sign(sign: object) -> str:
    return "" if sign == "" else name_of(sign)


def _singular(table: pd.DataFrame) -> list[Shown]:
    """Return a table per model and matrix: a line per direction and end, with the tokens on both sides."""
    found, several = [], table["model"].nunique() > 1
    table = table.assign(sign=table.get("sign", ""))
    keys = ["component", "index", "sign"]
    for (model, matrix), own in table.groupby(["model", "matrix"], sort=False):
        wide = own.drop_duplicates([*keys, "side"]).pivot(index=keys, columns="side", values="tokens")
        top = own.drop_duplicates(keys).set_index(keys)[["value"]].join(wide).reset_index()
        view = Table(strongest(top, "value", TOP_ROWS)).words("component", "head").numbers("index", "direction").mapped("sign", "end")
        view = (
            view.numbers("value", "singular value").texts("in", "read").texts("out", "written").texts("query", "query").texts("key", "key")
        )
        heading = f"Singular directions of W_{str(matrix).upper()}{f', {name_of(model)}' if several else ''}"
        found.append(Shown(heading, view.view(), "Tokens at both ends of each direction, on its two sides.", folded=True))
    return found


def neuron_views(tables: Mapping[str, pd.DataFrame]) -> list[Shown]:
    """Return the neurons that changed most, those written out or with the largest activations, and the contexts that make neurons fire."""
    found: list[Shown] = []
    if "neuron_changes" in tables:
        found.append(_changed_neurons(tables["neuron_changes"]))
    for whose, own in _of_models(tables.get("neurons")):
        found.append(_neurons(own, whose))
    for whose, own in _of_models(tables.get("neuron_contexts")):
        table = Table(own.head(4 * TOP_ROWS)).words("component", "neuron").numbers("activation", "activation").tokens("token", "at")
        table = (
            table.texts("context", "context")
            .tokens("next", "next token")
            .cells("promoted", "promotes there", lambda row: Cell(_listed(row["promoted"])))
        )
        said = "The strongest activations, with the token after each and the tokens that the neuron promotes there."
        found.append(Shown(f"Where neurons fire most{whose}", table.view(), said, folded=True))
    return found


def _of_models(table: pd.DataFrame | None) -> list[tuple[str, pd.DataFrame]]:
    """Return every model's words behind a heading (nothing where there is one model) and its rows."""
    if table is None:
        return []
    several = table["model"].nunique() > 1
    return [(f", {name_of(model)}" if several else "", own) for model, own in table.groupby("model", sort=False)]


def _neurons(own: pd.DataFrame, whose: str) -> Shown:
    written = own["promotes"].fillna("").astype(bool) if "promotes" in own else pd.Series(False, index=own.index)
    # those with words come first: they are the ones the run chose to write out
    order = own.assign(written=written).sort_values(["written", *(["maximum"] if "maximum" in own else [])], ascending=False, kind="stable")
    top = order.head(TOP_ROWS)
    table = Table(top).words("component", "neuron").numbers("maximum", "largest activation")
    table = table.numbers("mean", "mean", ends=("mean_low", "mean_high"))
    table = table.cells("active", "active", lambda row: Cell(percent(row["active"], digits=1), sort=_sortable(row["active"])))
    table = table.numbers("position_r2", "by position (R²)").numbers("token_purity", "one token (purity)")
    table = table.texts("reads", "reads").texts("promotes", "promotes").texts("suppresses", "suppresses")
    dead = f" {number(int(own['dead'].fillna(False).astype(bool).sum()))} never fired on these texts." if "dead" in own else ""
    return Shown(
        f"Neurons{whose}", table.view(), f"{len(top)} of {number(len(own))} neurons: those written out, then the largest activations.{dead}"
    )


def _changed_neurons(changes: pd.DataFrame) -> Shown:
    top = changes.sort_values("rank", kind="stable").head(TOP_ROWS)
    table = Table(top).words("component", "neuron").numbers("mean_base", "mean activation, base").numbers("mean_tuned", "tuned")
    table = table.numbers("mean_change", "change", ends=("mean_change_low", "mean_change_high"), sign=True, bold="mean_change_q")
    table = table.numbers("mean_change_q", "q", digits=2).numbers("mean_change_sd", "in SD over tokens", sign=True)
    table = table.numbers("contexts_overlap", "contexts shared (Jaccard)")
    words_ = f"The {len(top)} of {number(len(changes))} neurons whose mean activation changed most, in units of its spread over tokens; bold: significant."
    return Shown("Neurons that fine-tuning changed", table.view(), words_)


def _listed(tokens: object) -> str:
    """Return a list of tokens (a list or an array in the table) as text."""
    return ", ".join(token(each) for each in tokens) if hasattr(tokens, "__iter__") and not isinstance(tokens, str) else token(tokens)


def _sortable(share: float) -> float | None:
    return None if pd.isna(share) else float(share)
