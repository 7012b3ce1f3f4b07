"""Invented interventions: who carries the gain of fine-tuning, what the selected heads cost, and a single sweep of patches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd


def causal_tables(heads: pd.DataFrame, rng: np.random.Generator) -> dict[str, pd.DataFrame]:
    """Return cross_model, layer_sets, ablation and importance; a layer carries the more the more its attention changed."""
    measured = heads[heads["rows"] == "all"]
    layers = measured.groupby("layer")["kl_base_tuned"].mean()
    return {
        "cross_model": _cross_model(measured, layers / layers.sum(), rng),
        "layer_sets": _layer_sets(len(layers)),
        "ablation": _ablation(rng),
        "importance": _importance(len(layers), len(measured)),
    }


def _effect(effect: float, n: int = 24) -> dict[str, Any]:
    se = 0.02 + 0.05 * abs(effect)
    ends = {"low": effect - 1.96 * se, "high": effect + 1.96 * se, "p": 0.01, "q": 0.03}
    return {"feature": -1, "positions": "all", "metric": "loss", "n": n, "value": 3.0 + effect, "effect": effect, "se": se, **ends}


def _share(share: float) -> dict[str, Any]:
    return {"normalised": share, "normalised_low": share - 0.03, "normalised_high": share + 0.03, "withheld": ""}


def _cross_model(measured: pd.DataFrame, shares: pd.Series, rng: np.random.Generator) -> pd.DataFrame:
    rows = []
    for into, sign in (("into_base", -1), ("into_tuned", 1)):
        for by in ("activations", "weights"):
            for layer, share in shares.items():
                named = {"component": f"layers:{layer}", "site": "layer", "layer": layer, "head": -1, "by": by, "into": into}
                rows.append({**named, **_effect(sign * 0.5 * float(share)), **_share(float(share))})
        for layer, head, component in zip(measured["layer"], measured["head"], measured["component"], strict=True):
            share = float(rng.normal(0.01, 0.02))
            named = {"component": component, "site": "z", "layer": layer, "head": head, "by": "activations", "into": into}
            rows.append({**named, **_effect(sign * 0.5 * share), **_share(share)})
    return pd.DataFrame(rows)


def _layer_sets(layers: int) -> pd.DataFrame:
    shares = [0.62, *np.linspace(0.2, 0.5, 4)]
    sets = pd.DataFrame({"component": [f"layers:{i},{(i + 1) % layers}" for i in range(5)], "selected": [True] + [False] * 4})
    sets = sets.assign(gain=[0.5 * share for share in shares], share=shares, n=24, withheld="")
    first = [True] + [False] * 4
    selected = {"more": 0.27, "more_low": 0.2, "more_high": 0.34, "p_random": 0.2, "p_less": 1.0}
    return sets.assign(**{name: np.where(first, value, np.nan) for name, value in selected.items()})


def _ablation(rng: np.random.Generator) -> pd.DataFrame:
    costs = [0.9, *rng.normal(0.3, 0.1, 40)]
    rows = [
        {"component": f"a0.h{i % 2},a1.h{i % 3}", "site": "set", "layer": -1, "head": -1, **_effect(float(cost))}
        for i, cost in enumerate(costs)
    ]
    kinds, p = ["selected"] + ["random"] * 40, [1 / 41] + [np.nan] * 40
    return pd.DataFrame(rows).assign(kind=kinds, p_random=p, p_less=[1.0] + [np.nan] * 40, withheld="")


def _importance(layers: int, heads: int) -> pd.DataFrame:
    parts = [("layer", by, into, layers) for by in ("activations", "weights") for into in ("into_base", "into_tuned")]
    parts += [("head", "activations", into, heads) for into in ("into_base", "into_tuned")]
    rows = [
        {"level": level, "by": by, "into": into, "rho": 0.4, "low": -0.1, "high": 0.8, "p": 0.09, "n": n} for level, by, into, n in parts
    ]
    return pd.DataFrame(rows)


def effects_table(layers: int = 4, heads: int = 4) -> pd.DataFrame:
    """Return a sweep of patches over heads, at two sets of positions, and over the residual stream."""
    rng, rows = np.random.default_rng(0), []
    for positions in ("all", "subject"):
        for layer in range(layers):
            places = [(f"a{layer}.h{head}", "z", head) for head in range(heads)] + [(f"resid{layer}", "residual", -1)]
            for component, site, head in places:
                named = {"component": component, "site": site, "layer": layer, "head": head}
                effect = float(rng.normal(0, 0.3))
                rows.append({**named, **_effect(effect), "positions": positions, "metric": "logit_difference", **_share(effect)})
    return pd.DataFrame(rows)
