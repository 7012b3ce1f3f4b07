"""All figures of a report, by section, from the tables that are there.

This is the one list of what is drawn; how it is drawn is in `heatmaps`, `curves`, `comparisons` and `causal`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import pandas as pd

from mechscope.report.causal import effects_figures, matters
from mechscope.report.comparisons import differences, parameter_price, rouge
from mechscope.report.curves import layer_curves, learning_curves, scree
from mechscope.report.figure import Figure
from mechscope.report.heatmaps import Scale, head_heatmap, matrix_heatmap, rule_heatmap
from mechscope.report.theme import METRIC_NAMES, name_of

Tables = Mapping[str, pd.DataFrame]

# what a reader is told about the head under the pointer, in every heatmap of heads
_HEAD_TOOLTIP = {
    "kl_base_tuned": "KL(base || tuned), nats",
    "kl_base_tuned_se": "its standard error",
    "kl_tuned_base": "KL(tuned || base), nats",
    "entropy_base": "entropy, base, nats",
    "entropy_tuned": "entropy, tuned, nats",
    "entropy_change": "entropy change, nats",
    "entropy_change_low": "95 % from",
    "entropy_change_high": "to",
    "entropy_change_q": "q",
    "distance_change": "distance change, tokens",
    "sink_change": "first-token mass, change",
    "z_cosine_distance": "1 − cosine of z",
    "weight_change": "weight change, relative",
    "n": "documents",
}


def main_rule(selection: pd.DataFrame | None, kind: str) -> str | None:
    """Return the rule whose choice the figures outline: the first by attention KL, else the first that is not a control; None without any.

    Args:
        selection: The selection table, or None.
        kind: ``layer`` or ``head``.
    """
    if selection is None:
        return None
    rules = [str(rule) for rule in dict.fromkeys(selection.loc[selection["kind"] == kind, "rule"])]
    # random and last layers are what a selection is compared with
    rules = [rule for rule in rules if not rule.startswith(("random", "last"))]
    return next((rule for rule in rules if "kl" in rule.lower()), rules[0] if rules else None)


def chosen(selection: pd.DataFrame | None, kind: str) -> list[tuple[int, int]]:
    """Return (layer, head) of what `main_rule` chose, sorted; the head of a layer is -1."""
    rule = main_rule(selection, kind)
    if selection is None or rule is None:
        return []
    rows = selection[(selection["rule"] == rule) & (selection["kind"] == kind) & selection["chosen"]]
    return sorted((int(layer), int(head)) for layer, head in zip(rows["layer"], rows["head"], strict=True))


def figures(tables: Tables) -> dict[str, list[Figure]]:
    """Return the figures of each section for which there is a table: effects, attention, layers, weights, selection, matters, bakeoff."""
    drawn = {
        "effects": effects_figures(tables),
        "attention": _attention(tables),
        "layers": _layers(tables),
        "weights": _weights(tables),
        "selection": _selection(tables),
        "matters": matters(
            tables, [layer for layer, _ in chosen(tables.get("selection"), "layer")], chosen(tables.get("selection"), "head")
        ),
        "bakeoff": _bakeoff(tables),
    }
    return {section: found for section, found in drawn.items() if found}


def _with_changes(heads: pd.DataFrame) -> pd.DataFrame:
    return heads.assign(
        distance_change=heads["distance_tuned"] - heads["distance_base"], sink_change=heads["sink_tuned"] - heads["sink_base"]
    )


def _attention(tables: Tables) -> list[Figure]:
    if "heads" not in tables:
        return []
    heads, selected = _with_changes(tables["heads"]), chosen(tables.get("selection"), "head")

    def heatmap(
        value: str, name: str, title: str, legend: str, caption: str, *, scale: Scale = "magnitude", significance: str | None = None
    ) -> Figure:
        return head_heatmap(
            heads, value, name=name, title=title, legend=legend, caption=caption, scale=scale, selected=selected,
            tooltip=_HEAD_TOOLTIP, significance=significance,
        )  # fmt: skip

    return [
        heatmap(
            *("kl_base_tuned", "attention-kl", "How far attention moved", "KL(base || tuned), nats, √ scale"),
            "Mean over documents of the divergence between the two models' attention rows, per head.",
        ),
        heatmap(
            *("entropy_change", "entropy-change", "Which heads became more focused", "entropy change, nats (blue: more focused)"),
            "Attention entropy, tuned minus base.",
            scale="change",
            significance="entropy_change_q",
        ),
        heatmap(
            *("z_cosine_distance", "head-output-change", "How far head outputs turned", "1 − cosine of z, √ scale"),
            "Direction of each head's output before the output projection, base against tuned.",
        ),
        heatmap(
            *("sink_change", "first-token-change", "Change of attention on the first token", "share of attention, tuned − base"),
            "The first token is where heads with nothing to do put their attention.",
            scale="change",
        ),
        heatmap(
            *("distance_change", "distance-change", "Change of how far back heads look", "tokens, tuned − base"),
            "Mean distance between a token and what it attends to.",
            scale="change",
        ),
        heatmap(
            *("weight_change", "head-weight-change", "How far each head's own weights moved", "relative norm, √ scale"),
            "Change of the head's slices of query, key, value and output projection.",
        ),
    ]


def _layers(tables: Tables) -> list[Figure]:
    if "layers" not in tables:
        return []
    layers, selected = tables["layers"], [layer for layer, _ in chosen(tables.get("selection"), "layer")]

    def curves(
        columns: Mapping[str, str], name: str, title: str, axis: str, caption: str, *, zero: bool = False, share: bool = False
    ) -> Figure:
        return layer_curves(layers, columns, name=name, title=title, axis=axis, caption=caption, selected=selected, zero=zero, share=share)

    models = {"activation_norm_base": "base", "activation_norm_tuned": "tuned"}
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
            {"share_focused": "share focused"},
            *("layer-focused", "Heads that became more focused", "share of the layer's heads", "Share of heads whose mean entropy fell."),
            share=True,
        ),
        curves(
            models,
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
            *(
                "layer-similarity",
                "Similarity of representations",
                "similarity (1 = same geometry)",
                "How alike the models arrange the same documents.",
            ),
        ),
        curves(
            {"weight_change": "weight change"},
            *("layer-weights", "Weight change by layer", "relative norm of ΔW", "All matrices of the layer together."),
        ),
        *further,
    ]


def _pairs(layers: pd.DataFrame, pairs: pd.DataFrame, selected: list[int]) -> Figure:
    """Draw the attention KL of all pairs of models that were measured, side by side."""
    table, columns = layers[["rows", "layer", "n"]], {}
    for index, (name, part) in enumerate([("base–tuned", layers), *pairs.groupby("pair", sort=False)]):
        names = {f"kl_base_tuned{end}": f"pair{index}{end}" for end in ("", "_low", "_high") if f"kl_base_tuned{end}" in part}
        table = table.merge(part[["rows", "layer", *names]].rename(columns=names), on=["rows", "layer"], how="left")
        columns[f"pair{index}"] = str(name)
    return layer_curves(
        table, columns, name="layer-pairs", title="Attention KL of each pair of models", axis="mean KL over heads (nats)",
        caption="KL of the second model's attention from the first's; LoRA in every layer, trained beside the full fine-tuning.",
        selected=selected,
    )  # fmt: skip


def _weights(tables: Tables) -> list[Figure]:
    weights = tables.get("weights")
    if weights is None or not (weights["layer"] >= 0).any():
        return []
    drawn = [
        matrix_heatmap(
            weights, "relative_change", name="weight-change", title="Weight change by matrix and layer", legend="relative norm of ΔW, √ scale",
            caption="Frobenius norm of the change relative to the matrix before fine-tuning.",
        )
    ]  # fmt: skip
    if (weights["layer"].ge(0) & weights["effective_rank"].notna()).any():
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
    if (weights["layer"].ge(0) & (weights["sv1"] > 0)).any():
        caption = (
            "Thin: layers. Thick: geometric mean over layers. A steep fall means that few directions carry the change, which suits LoRA."
        )
        drawn.append(scree(weights, name="singular-values", title="Singular values of ΔW", caption=caption))
    return drawn


def _selection(tables: Tables) -> list[Figure]:
    selection = tables.get("selection")
    if selection is None:
        return []
    drawn = []
    by_layer = selection[selection["kind"] == "layer"]
    if len(by_layer):
        caption = "How often each rule chose each layer when the documents were resampled. Outlined: chosen on all documents."
        drawn.append(rule_heatmap(by_layer, name="layer-selection", title="Stability of the selected layers", caption=caption))
    by_head = selection[selection["kind"] == "head"]
    for i, rule in enumerate(dict.fromkeys(by_head["rule"])):
        part = by_head[by_head["rule"] == rule]
        drawn.append(
            head_heatmap(
                part,
                "frequency",
                name=f"head-selection-{i + 1}-{_slug(str(rule))}",
                title=f"Stability: {name_of(rule)}",
                legend="chosen in … of resamples",
                caption="How often the rule chose each head when the documents were resampled.",
                scale="share",
                selected=[
                    (int(a), int(b)) for a, b, is_chosen in zip(part["layer"], part["head"], part["chosen"], strict=True) if is_chosen
                ],
                tooltip={"frequency": "chosen in (share)", "score": "score", "rank": "rank", "n_resamples": "resamples"},
            )
        )
    return drawn


def _bakeoff(tables: Tables) -> list[Figure]:
    drawn: list[Figure] = []
    curves, summary, arms = tables.get("learning_curves"), tables.get("bakeoff_summary"), tables.get("bakeoff")
    if curves is not None:
        protocols = list(dict.fromkeys(curves["protocol"]))
        for protocol in [p for p in protocols if p != "reference"] or protocols:
            # full fine-tuning belongs to no protocol and is drawn in each, as the mark to reach
            part = curves[curves["protocol"].isin([protocol, "reference"])]
            title, caption = (
                f"Learning curves, {name_of(protocol)}",
                "Thin: seeds. Thick: their mean. Click a strategy in the legend to single it out.",
            )
            drawn.append(learning_curves(part, name=f"learning-{_slug(str(protocol))}", title=title, caption=caption))
    if arms is not None and (arms["trainable_parameters"] > 0).any():
        drawn.append(parameter_price(arms))
    if summary is not None:
        drawn += [rouge(summary, metric) for metric in METRIC_NAMES if (summary["metric"] == metric).any()]
        for protocol in dict.fromkeys(summary["protocol"]):
            drawn += [figure for baseline in ("standard", "random") if (figure := differences(summary, protocol, baseline)) is not None]
    return drawn


def _slug(text: str) -> str:
    """Return `text` as a piece of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "rule"
