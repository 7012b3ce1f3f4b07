"""Layers: what fine-tuning did to each layer's attention, residual stream and weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd

from mechscope.report.beside import Beside
from mechscope.report.marks.controls import TUNED, beside_curves, curve_of, curves_of_controls
from mechscope.report.marks.curves import layer_curves
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.tables import Cell, Row, Shown, Table, View, kinds, value
from mechscope.report.section import Column, Section, Tables, number, table
from mechscope.report.shared import NO_CAUSE, NO_DOCUMENTS, THIS_PAIR, UNEQUAL_LENGTHS, chosen_layers, count_of, counted_in, few_documents
from mechscope.report.statements import Caveat, Finding
from mechscope.report.theme import number as written
from mechscope.report.theme import percent
from mechscope.report.verdicts import VERDICT, negligible, parts_finding

_SURE = ("se", "low", "high")
_JUDGED = ("kl_base_tuned", "write_change", "mlp_write_change", "cosine_distance")
_SHOWN = {
    "kl_base_tuned": "KL(base||tuned)",
    "write_change": "heads write",
    "mlp_write_change": "MLP writes",
    "entropy_change": "entropy change",
    "cosine_distance": "1 − cosine",
}

COLUMNS: dict[str, Column | str] = {
    "rows": "query rows that were averaged: all, document, summary",
    "layer": "layer",
    "n": "documents",
    "kl_base_tuned": number("KL(base ‖ tuned) of the attention rows, mean over heads", "nats", *_SURE),
    "kl_tuned_base": number("KL(tuned ‖ base) of the attention rows, mean over heads", "nats", *_SURE),
    "entropy_change": number("change of attention entropy, mean over heads", "nats", *_SURE),
    "write_change": number(
        "change of what its heads write on the same input over what the base's write, mean over heads; where it does not attend, of its mixer",
        "share",
        *_SURE,
    ),
    "write_change_n": "documents on which tuned blocks also ran on the base's residual stream; 0 for further pairs",
    "write_change_own": number("the same, each model on its own residual stream", "share", *_SURE),
    "write_change_own_n": "documents of that",
    "share_focused": number("heads whose mean entropy fell", "share"),
    "activation_norm_base": number("L2 norm of the residual stream after the block, base model", "", *_SURE),
    "activation_norm_tuned": number("the same of the tuned model", "", *_SURE),
    "activation_abs_base": number("mean absolute value of the residual stream after the block, base model", "", *_SURE),
    "activation_abs_tuned": number("the same of the tuned model", "", *_SURE),
    "cosine_distance": number("1 − cosine of the two models' residual streams after the block, mean over tokens", "", *_SURE),
    "mlp_write_change": number(
        "change of what its MLP writes on the same input (the base's residual stream behind the base's attention) over what the base's writes",
        "share",
        *_SURE,
    ),
    "mlp_write_change_n": "documents of that",
    "mlp_write_change_own": number("the same, each model on its own residual stream", "share", *_SURE),
    "mlp_write_change_own_n": "documents of that",
    "cka": number("linear CKA (debiased) of the documents' mean residual streams; 1: same geometry"),
    "rsa": number("Spearman correlation of the documents' mutual distances in the two models; 1: same geometry"),
    "weight_change": number("norm of the change of all weights of the block, over their norm"),
    "score": number(
        "combined score: mean rank by attention KL, |entropy change|, 1 − cosine, what heads and MLP write, and weight change", "share"
    ),
    "kl_base_tuned_verdict": VERDICT,
    "cosine_distance_verdict": VERDICT,
    "write_change_verdict": VERDICT,
    "mlp_write_change_verdict": VERDICT,
}
"""Columns of the table `layers`, which `pairs` and `control_layers` have as well."""
LAYERS = table("One row per kind of query rows and layer; means over documents.", **COLUMNS)
PAIRS = table(
    "One row per further pair of models, kind of query rows and layer; the columns of `layers`.",
    **COLUMNS,
    pair="the pair, such as base–LoRA: KL is of the second model's attention from the first's",
)


def _figures(tables: Tables) -> list[Figure]:
    if "layers" not in tables:
        return []
    layers, selected = tables["layers"], chosen_layers(tables)
    beside = Beside.read(tables, "layers", ("rows", "layer"))

    def curves(
        columns: Mapping[str, str], name: str, title: str, axis: str, caption: str, *, zero: bool = False, share: bool = False
    ) -> Figure:
        first = next(iter(columns))
        caption = (
            f"{caption}{NO_DOCUMENTS}" if first == "weight_change" else counted_in(caption, layers, "documents", count_of(layers, first))
        )
        if not beside.counts:
            return layer_curves(
                layers, columns, name=name, title=title, axis=axis, caption=caption, selected=selected, zero=zero, share=share
            )
        # what base and tuned model have apart is one picture; what is measured twice of the two is one picture of each
        sides = any(column.startswith("activation") for column in columns)
        parts = [
            curve_of(layers, column, series if sides else TUNED, panel="" if sides or len(columns) == 1 else series)
            for column, series in columns.items()
        ]
        controlled = [column for column in columns if not (sides and column.endswith("_base"))]
        for column in controlled:
            parts.append(curves_of_controls(beside.spread(column), panel="" if len(controlled) == 1 else columns[column]))
        caption += beside.caption("mean and range", documents=first != "weight_change")
        return beside_curves(
            pd.concat(parts, ignore_index=True), name=name, title=title, axis=axis, caption=caption, selected=selected, zero=zero, share=share
        )  # fmt: skip

    further = [_pairs(layers, tables["pairs"], beside, selected)] if "pairs" in tables else []
    return [
        curves(
            {"kl_base_tuned": "KL(base || tuned)", "kl_tuned_base": "KL(tuned || base)"},
            *("layer-kl", "Attention KL by layer", "mean KL over heads (nats)", "Both directions; their difference is no error."),
        ),
        curves(
            {"entropy_change": "entropy change"},
            *("layer-entropy", "Entropy change by layer", "mean entropy change (nats)", "Below zero: attention became more focused."),
            zero=True,
        ),
        curves(
            {"write_change": _writers(layers), "mlp_write_change": "MLP"},
            *("layer-writes", "Change of what each layer writes", "share of what the base's writes"),
            "Both models given the base's residual stream: only the layer's own weights make a difference.",
        ),
        curves(
            {"share_focused": "share focused"},
            *("layer-focused", "Heads that became more focused", "share of the layer's heads", "Share of heads whose mean entropy fell."),
            share=True,
        ),
        curves(
            {"activation_norm_base": "base", "activation_norm_tuned": "tuned"},
            *("layer-norm", "Activation magnitude", "mean L2 norm per token", "Residual stream after each block, before the final norm."),
        ),
        curves(
            {"activation_abs_base": "base", "activation_abs_tuned": "tuned"},
            *("layer-abs", "Activation size per coordinate", "mean absolute value", "The same activations by another norm."),
        ),
        curves(
            {"cosine_distance": "1 − cosine"},
            *("layer-cosine", "Residual stream, base against tuned", "1 − cosine, mean over tokens", "Zero: the same direction."),
        ),
        curves(
            {"cka": "linear CKA (debiased)", "rsa": "RSA (Spearman)"},
            *("layer-similarity", "Similarity of representations", "similarity (1 = same geometry)"),
            "How alike the models arrange the same documents.",
        ),
        curves(
            {"weight_change": "weight change"},
            *("layer-weights", "Weight change by layer", "relative norm of ΔW", "All matrices of the layer together."),
        ),
        *further,
    ]


def _pairs(layers: pd.DataFrame, pairs: pd.DataFrame, beside: Beside, selected: list[int]) -> Figure:
    """Draw the attention KL of all pairs of models that were measured, side by side."""
    parts = [curve_of(part, "kl_base_tuned", str(name)) for name, part in [("base–tuned", layers), *pairs.groupby("pair", sort=False)]]
    caption = "KL of the second model's attention from the first's; LoRA in every layer, trained beside the full fine-tuning."
    return beside_curves(
        pd.concat([*parts, curves_of_controls(beside.spread("kl_base_tuned"))], ignore_index=True),
        name="layer-pairs",
        title="Attention KL of each pair of models",
        axis="mean KL over heads (nats)",
        caption=counted_in(caption, layers, "documents") + beside.caption("mean and range"),
        selected=selected,
    )


def _views(tables: Tables) -> list[Shown]:
    if "layers" not in tables:
        return []
    layers, selected = tables["layers"], set(chosen_layers(tables))
    beside, shown = Beside.read(tables, "layers", ("rows", "layer")), []
    for kind in kinds(layers):
        own = layers[layers["rows"] == kind].sort_values("kl_base_tuned", ascending=False, kind="stable")
        small = negligible(own, _JUDGED)
        if not small.all():
            words = f"By the mean KL of attention (nats), the largest first. Bold layers are selected.{beside.caption('range')}"
            view, brief = _numbers(own[~small], kind, selected, beside), _brief(own[~small])
            shown.append(Shown("Layers that changed most", view, words, terminal=kind == kinds(layers)[0], brief=brief, table="layers"))
        if small.any():
            heading = f"{written(int(small.sum()))} negligible layer{'' if small.sum() == 1 else 's'}"
            words = "Shown to have changed by less than the smallest effect of interest in what they attend to, write and leave in the residual stream."
            shown.append(Shown(heading, _numbers(own[small], kind, selected, beside), words, folded=True))
    return shown


def _writers(layers: pd.DataFrame) -> str:
    """Say what writes in these layers besides MLPs: in a hybrid stack those without attention have a mixer instead of heads."""
    return "heads or mixer" if (layers["kl_base_tuned"].isna() & layers["write_change"].notna()).any() else "heads"


def _brief(layers: pd.DataFrame) -> View:
    """Return what fits a terminal: where a layer attends and what its heads write, with intervals."""
    view = (
        Table(layers).words("layer", "layer").numbers("kl_base_tuned", "KL of attention", ends=("kl_base_tuned_low", "kl_base_tuned_high"))
    )
    view.numbers("write_change", f"{_writers(layers)} write", ends=("write_change_low", "write_change_high"))
    return view.numbers("mlp_write_change", "MLP writes", ends=("mlp_write_change_low", "mlp_write_change_high")).view()


def _numbers(layers: pd.DataFrame, kind: str, selected: set[int], beside: Beside) -> View:
    view = Table(layers)
    view.cells("layer", "layer", lambda row: Cell(str(row["layer"]), sort=float(row["layer"]), strong=row["layer"] in selected))
    for quantity, heading in {**_SHOWN, "write_change": f"{_writers(layers)} write"}.items():
        sign = quantity == "entropy_change"
        view.numbers(quantity, heading, ends=(f"{quantity}_low", f"{quantity}_high"), sign=sign)
        if beside.counts:
            view.cells(quantity, f"controls: {heading}", beside.cell(quantity, sign=sign))

    def small(quantity: str) -> Callable[[Row], Cell]:
        lines = beside.lines(quantity)
        return lambda row: value(row[quantity], note=lines(row))

    focused = beside.lines("share_focused", share=True)
    view.cells("share_focused", "focused", lambda row: Cell(percent(row["share_focused"]), focused(row), float(row["share_focused"])))
    view.numbers("activation_norm_base", "norm base").cells("activation_norm_tuned", "tuned", small("activation_norm_tuned"))
    return (
        view.cells("cka", "CKA", small("cka"))
        .cells("rsa", "RSA", small("rsa"))
        .cells("weight_change", "ΔW", small("weight_change"))
        .view(kind)
    )


def _findings(tables: Tables) -> list[Finding]:
    if "layers" not in tables:
        return []
    said = (
        ("kl_base_tuned", "moved their attention", "nats of mean KL", "layers moved their attention"),
        ("write_change", "changed what their heads write", "of it", ""),
        ("mlp_write_change", "changed what their MLP writes", "of it", ""),
    )
    return [parts_finding(tables, "layers", name, of="layers", what=what, unit=unit, card=card) for name, what, unit, card in said]


def _caveats(tables: Tables) -> list[Caveat]:
    return [*few_documents(tables, "layers"), NO_CAUSE, UNEQUAL_LENGTHS, THIS_PAIR]


SECTION = Section(
    id="layers",
    heading="Layers",
    intro=(
        "The residual stream and the heads of each layer. The band of a solid line is its 95\u202f% interval over documents, that of a dashed one the range "
        "of several controls."
    ),
    unit="documents",
    tables={"layers": LAYERS, "pairs": PAIRS},
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
    question="where",
    adds="mechscope diff BASE TUNED --data DATA --out NEW_RUN",
)
