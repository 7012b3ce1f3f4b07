"""The invented tables of a run of `mechscope weights`: heads that pair tokens in base, tuned and the change between them, and neurons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
            model=model,
            ov_norm=rng.gamma(4, 1, count),
            qk_norm=rng.gamma(4, 2, count),
            copying=np.clip(copying + 0.05 * m, -1, 1),
            positive=np.clip(0.5 + copying / 2, 0, 1),
            copied=np.clip(copying, 0, 1),
            suppressed=np.clip(-copying, 0, 1),
        )
        for m, model in enumerate(models)
    ]
    known = (*models, "change") if len(models) > 1 else tuple(models)
    made = {
        "weight_heads": pd.concat(described, ignore_index=True),
        "weight_tokens": tokens_table(names[:40], known),
        "weight_singular": singular_table(names[:20], known),
        "composition": composition_table(names, models),
        "neurons": neurons_table(layers, models, rng),
        "neuron_contexts": contexts_table(layers, models),
    }
    if len(models) > 1:
        moved = {f"{matrix}_relative": rng.gamma(2, 0.02, count) for matrix in ("ov", "qk")}
        changes = per_head.assign(**moved, ov_norm=2.0, qk_norm=3.0, ov_change=0.1, qk_change=0.1)
        places = {f"{matrix}_place": changes[f"{matrix}_relative"].rank(ascending=False).astype("Int64") for matrix in ("ov", "qk")}
        made |= {"weight_changes": changes.assign(**places), "neuron_changes": neuron_changes(layers)}
    return made


def tokens_table(heads: Sequence[tuple[int, int, str]], models: Sequence[str]) -> pd.DataFrame:
    rows = [
        (
            model,
            matrix,
            component,
            layer,
            head,
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
    return pd.DataFrame(rows, columns=["model", "matrix", "component", "layer", "head", "place", "sign", "source", "target", "value"])


def singular_table(heads: Sequence[tuple[int, int, str]], models: Sequence[str]) -> pd.DataFrame:
    rows = [
        (model, matrix, component, layer, head, index, 8.0 / index, side, sign, f"' {side} {sign}' ' the'")
        for model in models
        for matrix in SIDES
        for layer, head, component in heads
        for index in (1, 2, 3)
        for side in SIDES[matrix]
        for sign in ("positive", "negative")
    ]
    return pd.DataFrame(rows, columns=["model", "matrix", "component", "layer", "head", "index", "value", "side", "sign", "tokens"])


def composition_table(heads: Sequence[tuple[int, int, str]], models: Sequence[str]) -> pd.DataFrame:
    pairs = [(one, two) for one in heads[:12] for two in heads[-12:] if one[0] < two[0]]
    rows = [
        (model, kind, source[2], target[2], *source[:2], *target[:2], 0.1 + 0.02 * (i % 9), 0.1, 0.01, 2.0 * (i % 9))
        for model in models
        for i, (source, target) in enumerate(pairs)
        for kind in ("q", "k", "v")
    ]
    places = ["from_layer", "from_head", "to_layer", "to_head"]
    return pd.DataFrame(rows, columns=["model", "kind", "source", "target", *places, "score", "random", "sd", "z"])


def neurons_table(layers: int, models: Sequence[str], rng: np.random.Generator) -> pd.DataFrame:
    names = [(model, layer, neuron, f"m{layer}.n{neuron}") for model in models for layer in range(layers) for neuron in range(40)]
    table = pd.DataFrame(names, columns=["model", "layer", "neuron", "component"])
    promotes = np.where(table["neuron"] == 3, "' harbour', ' port'", "")
    table = table.assign(n=8, n_tokens=900, mean=0.1, mean_se=0.02, mean_low=0.05, mean_high=0.15, active=rng.random(len(table)))
    table = table.assign(active_se=0.01, active_low=table["active"] - 0.02, active_high=table["active"] + 0.02, sd=1.0, minimum=-0.2)
    table = table.assign(maximum=rng.gamma(4, 1, len(table)), active_tokens=400, dead=table["neuron"] % 17 == 0, active_bound=np.nan)
    table = table.assign(
        position_r2=0.2, position_r2_chance=0.1, positional=False, contexts=5, token_purity=0.6, token_id=7, token_bound=False
    )
    return table.assign(reads="", promotes=promotes, suppresses="")


def contexts_table(layers: int, models: Sequence[str]) -> pd.DataFrame:
    rows = [
        (
            model,
            layer,
            3,
            f"m{layer}.n3",
            place,
            9.0 - place,
            "t1",
            40,
            " harbour",
            "approved the new «harbour»",
            " on",
            [" on", " in"],
            True,
            7,
            8,
        )
        for model in models
        for layer in range(layers)
        for place in range(1, 5)
    ]
    columns = ["model", "layer", "neuron", "component", "place", "activation", "text", "position", "token", "context", "next", "promoted"]
    return pd.DataFrame(rows, columns=[*columns, "agrees", "token_id", "next_id"])


def neuron_changes(layers: int) -> pd.DataFrame:
    names = [(layer, neuron, f"m{layer}.n{neuron}") for layer in range(layers) for neuron in range(40)]
    table = pd.DataFrame(names, columns=["layer", "neuron", "component"]).assign(n=8)
    change = np.linspace(-0.5, 0.6, len(table))
    q = np.where(np.abs(change) > 0.3, 0.001, 0.5)
    for name, moved in (("mean", change), ("active", change / 2)):
        columns: dict[str, Any] = {
            "base": 0.1,
            "tuned": 0.1 + moved,
            "change": moved,
            "change_se": 0.05,
            "change_low": moved - 0.1,
            "change_high": moved + 0.1,
        }
        for end, values in {**columns, "change_p": q / 2, "change_q": q}.items():
            table[f"{name}_{end}"] = values
    table = table.assign(mean_change_sd=change * 2, dead_base=False, dead_tuned=False, contexts_overlap=0.4)
    return table.assign(rank=table["mean_change_sd"].abs().rank(ascending=False, method="first").astype(int))
