"""Invented tables of a tuned model beside its controls."""

from __future__ import annotations

import numpy as np
import pandas as pd

MODELS = (
    ("tuned", "tuned"),
    ("seed 1", "seed"),
    ("mixed 0", "shuffled"),
    ("mixed 1", "shuffled"),
    ("noise 0", "noise"),
    ("noise 1", "noise"),
)


def controls_tables(layers: int, heads: int, *, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Return `controls`, `control_heads` and `control_layers` of six models."""
    random = np.random.default_rng(seed)
    places = pd.DataFrame(
        [(rows, layer, head) for rows in ("all", "document", "summary") for layer in range(layers) for head in range(heads)],
        columns=["rows", "layer", "head"],
    )
    places["component"] = [f"a{layer}.h{head}" for layer, head in zip(places["layer"], places["head"], strict=True)]
    parts = []
    for name, kind in MODELS:
        kl = np.exp(random.normal(-5, 1, len(places)))
        change = random.normal(-0.02 if kind != "noise" else 0.0, 0.05, len(places))
        parts.append(
            places.assign(
                n=48, kl_base_tuned=kl, kl_base_tuned_se=kl / 10, entropy_change=change, entropy_change_se=0.005, control=name, kind=kind
            )
        )
    of_heads = pd.concat(parts, ignore_index=True)
    grouped = of_heads.assign(focused=of_heads["entropy_change"] < 0).groupby(
        ["control", "kind", "rows", "layer"], as_index=False, sort=False
    )
    of_layers = grouped[["n", "kl_base_tuned", "kl_base_tuned_se", "entropy_change", "entropy_change_se"]].mean()
    of_layers["share_focused"] = grouped["focused"].mean()["focused"]
    of_layers["cosine_distance"] = 0.01
    of_layers["cosine_distance_se"] = 0.001
    models = pd.DataFrame(
        [
            {
                "control": name,
                "kind": kind,
                "seed": at if kind != "shuffled" else None,
                "source": f"runs/{name}",
                "n": 48,
                "loss_change": -0.1 if kind != "noise" else 0.01,
                "loss_change_low": -0.2 if kind != "noise" else 0.0,
                "loss_change_high": 0.0 if kind != "noise" else 0.02,
                "weight_change": 0.01,
            }
            for at, (name, kind) in enumerate(MODELS)
        ]
    ).astype({"seed": "Int64"})
    return {"controls": models, "control_heads": of_heads, "control_layers": of_layers}
