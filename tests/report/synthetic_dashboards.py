"""Invented dashboards: latents with examples, tokens and relations, of any number."""

from __future__ import annotations

import numpy as np
import pandas as pd

WINDOW, TOP, DECILES = 25, 8, 10


def tables(
    latents: int = 12, *, vocabulary: int = 300, of_decile: int = 2, name: str = "resid6-2000", seed: int = 0
) -> dict[str, pd.DataFrame]:
    """Return the tables of a dashboard."""
    random = np.random.default_rng(seed)
    words = [f" word{token}" for token in range(vocabulary)]
    components = [f"resid6.f{latent}" for latent in range(latents)]
    largest = random.uniform(2, 9, latents)
    listed, examples, related, chance = [], [], [], []
    for latent, component in enumerate(components):
        counts = random.integers(1, 500, 20)
        listed.append(
            {
                "dictionary": name, "component": component, "n": 400, "tokens": 90_000, "active": int(counts.sum()), "density": counts.sum() / 90_000,
                "share": 0.5 / (1 + latent) / 9, "largest": largest[latent], "bar": 60, "counts": counts.tolist(),
                "promotes": random.choice(words, 8).tolist(), "suppresses": random.choice(words, 8).tolist(), "sampled": 99, "sample": 16_384,
                "effect": float(random.normal()), "class": str(random.choice(["shared", "tuned_only", ""])),
                "explanation": f"what number {latent} stands for" if latent % 2 else None,
            }
        )  # fmt: skip
        for decile in range(DECILES + 1):
            for place in range(1, (of_decile if decile else TOP) + 1):
                value = float(largest[latent] * (1 if place == 1 and not decile else random.uniform(0.05, 0.9)))
                values = np.where(random.random(WINDOW) < 0.2, random.uniform(0, value, WINDOW), 0.0)
                values[16] = value
                start = int(random.integers(0, 400))
                examples.append(
                    {
                        "dictionary": name, "component": component, "decile": decile, "place": place, "value": value, "text": f"text-{random.integers(400)}",
                        "position": start + 16, "start": start, "ids": random.integers(0, vocabulary, WINDOW).tolist(), "values": values.tolist(),
                    }
                )  # fmt: skip
        for kind, others in (("latent", components), ("head", [f"a{layer}.h{head}" for layer in range(7) for head in range(4)])):
            for other in random.choice(others, 5, replace=False) if len(others) > 5 else []:
                related.append(
                    {
                        "dictionary": name,
                        "component": component,
                        "kind": kind,
                        "other": str(other),
                        "correlation": float(random.uniform(-0.5, 0.9)),
                    }
                )
            chance.append({"dictionary": name, "component": component, "kind": kind, "largest": 0.4, "shuffled": 0.03})
    return {
        "dashboard_latents": pd.DataFrame(listed),
        "dashboard_examples": pd.DataFrame(examples),
        "dashboard_tokens": pd.DataFrame({"token": range(vocabulary), "text": words}),
        "dashboard_correlations": pd.DataFrame(related),
        "dashboard_chance": pd.DataFrame(chance),
    }
