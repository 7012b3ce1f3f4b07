"""The invented tables of a run of `mechscope weights`: heads that pair tokens in base, tuned and the change between them, and neurons."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

WORDS = tuple(f" word{i}" for i in range(20))
SIGNS = {"ov": ("promoted", "suppressed"), "qk": ("attended", "avoided")}
SIDES = {"ov": ("in", "out"), "qk": ("query", "key")}


def weights_tables(
    layers: int = 12, heads: int = 12, *, models: Sequence[str] = ("base", "tuned"), seed: int = 5
) -> dict[str, pd.DataFrame]:
    rng = np.random.default_rng(seed)
    names = [(layer, head, f"a{layer}.h{head}") for layer in range(layers) for head in range(heads)]
    per_head = pd.DataFrame(names, columns=["layer", "head", "component"])
    copying, count = rng.uniform(-0.6, 1.0, len(names)), len(names)
    described = [
        per_head.assign(
            model=model, ov_norm=rng.gamma(4, 1, count), qk_norm=rng.gamma(4, 2, count), copying=np.clip(copying + 0.05 * m, -1, 1)
        )
        for m, model in enumerate(models)
    ]
    known = (*models, "change") if len(models) > 1 else tuple(models)
    found = {
        "weight_heads": pd.concat(described, ignore_index=True),
        "weight_tokens": tokens_table(names[:40], known),
        "weight_singular": singular_table(names[:20], known),
        "composition": composition_table(names, models),
        "neurons": neurons_table(layers, models, rng),
        "neuron_contexts": contexts_table(layers, models),
    }
    if len(models) > 1:
        moved = {f"{matrix}_relative": rng.gamma(2, 0.02, count) for matrix in ("ov", "qk")}
        found |= {"weight_changes": per_head.assign(**moved, ov_change=0.1, qk_change=0.1), "neuron_changes": neuron_changes(layers)}
    return found


def tokens_table(heads: Sequence[tuple[int, int, str]], models: Sequence[str]) -> pd.DataFrame:
    rows = [
        (
            model,
            matrix,
            component,
            place,
            sign,
            WORDS[(place + head) % 20],
            WORDS[(place + m) % 20],
            (9.0 - place - 0.1 * layer) * (1 - 2 * s),
        )
        for m, model in enumerate(models)
        for matrix in SIGNS
        for layer, head, component in heads
        for s, sign in enumerate(SIGNS[matrix])
        for place in range(1, 7)
    ]
    return pd.DataFrame(rows, columns=["model", "matrix", "component", "place", "sign", "source", "target", "value"])


def singular_table(heads: Sequence[tuple[int, int, str]], models: Sequence[str]) -> pd.DataFrame:
    rows = [
        (model, matrix, component, index, 8.0 / index, side, sign, f"' {side} {sign}' ' the'")
        for model in models
        for matrix in SIDES
        for _, _, component in heads
        for index in (1, 2, 3)
        for side in SIDES[matrix]
        for sign in ("positive", "negative")
    ]
    return pd.DataFrame(rows, columns=["model", "matrix", "component", "index", "value", "side", "sign", "tokens"])


def composition_table(heads: Sequence[tuple[int, int, str]], models: Sequence[str]) -> pd.DataFrame:
    pairs = [(one[2], two[2]) for one in heads[:12] for two in heads[-12:] if one[0] < two[0]]
    rows = [
        (model, kind, source, target, 0.1 + 0.02 * (i % 9), 0.1, 0.01, 2.0 * (i % 9))
        for model in models
        for i, (source, target) in enumerate(pairs)
        for kind in ("q", "k", "v")
    ]
    return pd.DataFrame(rows, columns=["model", "kind", "source", "target", "score", "random", "sd", "z"])


def neurons_table(layers: int, models: Sequence[str], rng: np.random.Generator) -> pd.DataFrame:
    names = [(model, layer, neuron, f"m{layer}.n{neuron}") for model in models for layer in range(layers) for neuron in range(40)]
    table = pd.DataFrame(names, columns=["model", "layer", "neuron", "component"])
    promotes = np.where(table["neuron"] == 3, "' harbour', ' port'", "")
    table = table.assign(n=8, mean=0.1, mean_low=0.05, mean_high=0.15, active=rng.random(len(table)), maximum=rng.gamma(4, 1, len(table)))
    return table.assign(dead=table["neuron"] % 17 == 0, position_r2=0.2, token_purity=0.6, reads="", promotes=promotes, suppresses="")


def contexts_table(layers: int, models: Sequence[str]) -> pd.DataFrame:
    rows = [
        (model, f"m{layer}.n3", place, 9.0 - place, " harbour", "approved the new «harbour»", " on", [" on", " in"])
        for model in models
        for layer in range(layers)
        for place in range(1, 5)
    ]
    return pd.DataFrame(rows, columns=["model", "component", "place", "activation", "token", "context", "next", "promoted"])


def neuron_changes(layers: int) -> pd.DataFrame:
    names = [(layer, neuron, f"m{layer}.n{neuron}") for layer in range(layers) for neuron in range(40)]
    table = pd.DataFrame(names, columns=["layer", "neuron", "component"])
    change = np.linspace(-0.5, 0.6, len(table))
    table = table.assign(
        mean_base=0.1, mean_tuned=0.1 + change, mean_change=change, mean_change_low=change - 0.1, mean_change_high=change + 0.1
    )
    table = table.assign(mean_change_q=np.where(np.abs(change) > 0.3, 0.001, 0.5), mean_change_sd=change * 2, contexts_overlap=0.4)
    return table.assign(rank=table["mean_change_sd"].abs().rank(ascending=False, method="first").astype(int))
