"""Layers: what fine-tuning did to each layer's attention, residual stream and weights."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from mechscope.report.marks.curves import layer_curves
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.tables import Cell, Shown, Table, View, kinds
from mechscope.report.section import Card, Column, Section, Tables, number, table
from mechscope.report.shared import NO_CAUSE, THIS_PAIR, UNEQUAL_LENGTHS, chosen_layers, few_documents, of_rows
from mechscope.report.theme import interval, name_of, percent
from mechscope.report.theme import number as written
from mechscope.report.verdicts import VERDICT, in_words, smallest_of

# attention that differs by less than this (nats) differs by rounding only; a model compared with itself stays below it
_SAME = 1e-6
_SURE = ("se", "low", "high")

_COLUMNS: dict[str, Column | str] = {
    "rows": "query rows that were averaged: all, document, summary",
    "layer": "layer",
    "n": "documents",
    "kl_base_tuned": number("KL(base ‖ tuned) of the attention rows, mean over heads", "nats", *_SURE),
    "kl_tuned_base": number("KL(tuned ‖ base) of the attention rows, mean over heads", "nats", *_SURE),
    "entropy_change": number("change of attention entropy, mean over heads", "nats", *_SURE),
    "write_change": number("change of what its heads write on the same input over what the base's write, mean over heads", "share", *_SURE),
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
LAYERS = table("One row per kind of query rows and layer; means over documents.", **_COLUMNS)
PAIRS = table(
    "One row per further pair of models, kind of query rows and layer; the columns of `layers`.",
    **_COLUMNS,
    pair="the pair, such as base–LoRA: KL is of the second model's attention from the first's",
)


def _figures(tables: Tables) -> list[Figure]:
    if "layers" not in tables:
        return []
    layers, selected = tables["layers"], chosen_layers(tables)

    def curves(
        columns: Mapping[str, str], name: str, title: str, axis: str, caption: str, *, zero: bool = False, share: bool = False
    ) -> Figure:
        return layer_curves(layers, columns, name=name, title=title, axis=axis, caption=caption, selected=selected, zero=zero, share=share)

    further = [_pairs(layers, tables["pairs"], selected)] if "pairs" in tables else []
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
            {"write_change": "heads", "mlp_write_change": "MLP"},
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


def _pairs(layers: pd.DataFrame, pairs: pd.DataFrame, selected: list[int]) -> Figure:
    """Draw the attention KL of all pairs of models that were measured, side by side."""
    joined, columns = layers[["rows", "layer", "n"]], {}
    for index, (name, part) in enumerate([("base–tuned", layers), *pairs.groupby("pair", sort=False)]):
        names = {f"kl_base_tuned{end}": f"pair{index}{end}" for end in ("", "_low", "_high") if f"kl_base_tuned{end}" in part}
        joined = joined.merge(part[["rows", "layer", *names]].rename(columns=names), on=["rows", "layer"], how="left")
        columns[f"pair{index}"] = str(name)
    return layer_curves(
        joined, columns, name="layer-pairs", title="Attention KL of each pair of models", axis="mean KL over heads (nats)",
        caption="KL of the second model's attention from the first's; LoRA in every layer, trained beside the full fine-tuning.",
        selected=selected,
    )  # fmt: skip


def _views(tables: Tables) -> list[Shown]:
    if "layers" not in tables:
        return []
    layers, selected = tables["layers"], set(chosen_layers(tables))
    return [Shown("Layers in numbers", _numbers(layers, kind, selected)) for kind in kinds(layers)]


def _numbers(layers: pd.DataFrame, kind: str, selected: set[int]) -> View:
    view = Table(layers[layers["rows"] == kind].sort_values("layer"))
    view.cells("layer", "layer", lambda row: Cell(str(row["layer"]), sort=float(row["layer"]), strong=row["layer"] in selected))
    view.numbers("kl_base_tuned", "KL(base||tuned)", ends=("kl_base_tuned_low", "kl_base_tuned_high"))
    view.numbers("kl_tuned_base", "KL(tuned||base)", ends=("kl_tuned_base_low", "kl_tuned_base_high"))
    view.numbers("write_change", "heads write", ends=("write_change_low", "write_change_high"))
    view.numbers("mlp_write_change", "MLP writes", ends=("mlp_write_change_low", "mlp_write_change_high"))
    view.numbers("entropy_change", "entropy change", ends=("entropy_change_low", "entropy_change_high"), sign=True)
    view.cells("share_focused", "focused", lambda row: Cell(percent(row["share_focused"]), sort=float(row["share_focused"])))
    view.numbers("activation_norm_base", "norm base").numbers("activation_norm_tuned", "tuned").numbers("cosine_distance", "1 − cosine")
    return view.numbers("cka", "CKA").numbers("rsa", "RSA").numbers("weight_change", "ΔW").view(kind)


def _findings(tables: Tables) -> list[str]:
    if "layers" not in tables:
        return []
    layers, kind = of_rows(tables["layers"])
    top = layers.sort_values("kl_base_tuned", ascending=False, kind="stable")
    first, count = top.iloc[0], written(int(layers["n"].max()))
    if float(first["kl_base_tuned"]) < _SAME:
        return [f"Over {count} documents the two models attend alike: no layer's mean KL reaches {_SAME:g} nats."]
    if not (layers["kl_base_tuned_verdict"] == "changed").any():
        # no layer is named first among changes that are too small, or too unsure, to be one
        return [f"{sentence.removesuffix('.')}." for sentence in _sized(tables, layers)]
    others = [str(layer) for layer in top["layer"].iloc[1:3]]
    then = f", then layer{'s' * (len(others) > 1)} {' and '.join(others)}" if others else ""
    measured = f"{written(first['kl_base_tuned'])} nats {interval(first.get('kl_base_tuned_low'), first.get('kl_base_tuned_high'))}".strip()
    return [
        f"Over {count} documents ({name_of(kind)}), attention changed most in layer {first['layer']} "
        f"(mean KL {measured}; the median layer: {written(layers['kl_base_tuned'].median())}){then}.",
        *(f"{sentence.removesuffix('.')}." for sentence in _sized(tables, layers)),
    ]


def _sized(tables: Tables, layers: pd.DataFrame) -> list[str]:
    """Return how many layers changed by more than what matters, by what they attend to and by what their heads and MLP write."""
    said = (
        ("kl_base_tuned", "moved their attention", "nats of mean KL"),
        ("write_change", "changed what their heads write", "of it"),
        ("mlp_write_change", "changed what their MLP writes", "of it"),
    )
    return [in_words(layers, name, smallest_of(tables, "layers", name), of="layers", what=what, unit=unit) for name, what, unit in said]


def _cards(tables: Tables) -> list[Card]:
    if "layers" not in tables:
        return []
    layers, _ = of_rows(tables["layers"])
    top = layers.sort_values("kl_base_tuned", ascending=False, kind="stable").iloc[0]
    documents = Card(written(int(layers["n"].max())), "documents", "on which the difference was measured")
    if not (layers["kl_base_tuned_verdict"] == "changed").any():
        return [documents]
    return [
        documents,
        Card(f"layer {top['layer']}", "changed its attention most", f"mean KL {written(top['kl_base_tuned'])} nats"),
    ]


def _caveats(tables: Tables) -> list[str]:
    return [*few_documents(tables), NO_CAUSE, UNEQUAL_LENGTHS, THIS_PAIR]


SECTION = Section(
    id="layers",
    heading="Layers",
    intro="The residual stream and the heads of each layer. Bands are 95 % intervals over documents where the run has them.",
    tables={"layers": LAYERS, "pairs": PAIRS},
    figures=_figures,
    views=_views,
    findings=_findings,
    cards=_cards,
    caveats=_caveats,
    adds="mechscope diff BASE TUNED --data DATA --out NEW_RUN",
)
