"""The invented bake-off of a run: arms, scores per document, their summary and the learning curves, of eight strategies over three seeds."""

from __future__ import annotations

import numpy as np
import pandas as pd

STRATEGIES = ("standard", "targeted_layers", "targeted_heads", "more_rank", "random_layers", "last_layers", "full", "none")
METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def bakeoff_tables(rng: np.random.Generator, *, seeds: int = 3, documents: int = 60) -> dict[str, pd.DataFrame]:
    """Return bakeoff, bakeoff_rouge, bakeoff_summary and learning_curves."""
    quality = {
        "standard": 0.0,
        "targeted_layers": -0.006,
        "targeted_heads": -0.012,
        "more_rank": 0.004,
        "random_layers": -0.014,
        "last_layers": -0.02,
    }
    quality |= {"full": 0.02, "none": -0.055}
    parameters = {"equal_rank": {"standard": 294912, "more_rank": 368640, "targeted_heads": 49152}, "equal_parameters": {}}
    arms, rouge, curves = [], [], []
    for protocol in ("equal_rank", "equal_parameters", "reference"):
        for strategy in STRATEGIES:
            if (strategy in ("full", "none")) != (protocol == "reference"):
                continue
            for seed in range(1 if strategy == "none" else seeds):
                count = {"full": 124439808, "none": 0}.get(strategy) if protocol == "reference" else parameters[protocol].get(strategy)
                if count is None:
                    count = 73728 if protocol == "equal_rank" else 294912
                effect = quality[strategy] + (0.004 if protocol == "equal_parameters" and strategy.startswith("targeted") else 0)
                last = 10 if strategy == "full" else int(rng.integers(13, 17))
                best = np.inf
                for step in range(last + 1) if strategy != "none" else ():
                    loss = 3.05 - 3 * effect + 0.55 * np.exp(-step / 3.5) + float(rng.normal(0, 0.006))
                    best = min(best, loss)
                    curves.append(
                        {
                            "protocol": protocol,
                            "strategy": strategy,
                            "seed": seed,
                            "step": step * 50,
                            "tokens": step * 50 * 4096,
                            "train_loss": loss - 0.05 if step else np.nan,
                            "validation_loss": loss,
                        }
                    )
                scores = {
                    m: 0.2 * f + effect * f + rng.normal(0, 0.03, documents) for m, f in zip(METRICS, (1.0, 0.25, 0.68, 0.9), strict=True)
                }
                for i in range(documents):
                    rouge.append(
                        {
                            "protocol": protocol,
                            "strategy": strategy,
                            "seed": seed,
                            "id": f"doc-{i}",
                            **{m: float(scores[m][i]) for m in METRICS},
                            "tokenizer": "english",
                        }
                    )
                targets = {
                    "targeted_layers": "layers:2,3,5",
                    "targeted_heads": "a2.h1,a3.h4,a5.h0,a5.h7,a4.h11",
                    "random_layers": "layers:1,6,8",
                }
                arms.append(
                    {
                        "protocol": protocol,
                        "strategy": strategy,
                        "seed": seed,
                        "components": targets.get(strategy, "layers:9,10,11" if strategy == "last_layers" else "all"),
                        "rank": "none" if protocol == "reference" else "8" if protocol == "equal_rank" or strategy == "standard" else "32",
                        "trainable_parameters": count,
                        "trainable_share": count / 124439808,
                        "best_loss": best if strategy != "none" else 3.6,
                        "best_step": last * 50,
                        "tokens_to_best": last * 50 * 4096,
                        "steps_to_standard_best": float(last * 45) if effect >= 0 else np.nan,
                        "stopped_early": last < 16,
                        "converged": last < 16,
                        "unconverged": "" if last < 16 else "its last quarter still lowered the loss by 12\u202f% of the whole change",
                        **{m: float(scores[m].mean()) for m in METRICS},
                        "n_documents": documents,
                    }
                )
    rouge_table, summary = pd.DataFrame(rouge), []
    standard = rouge_table[rouge_table["strategy"] == "standard"].groupby("protocol")[list(METRICS)].mean()
    random = rouge_table[rouge_table["strategy"] == "random_layers"].groupby("protocol")[list(METRICS)].mean()
    for (within, arm), group in rouge_table.groupby(["protocol", "strategy"], sort=False):
        for metric in METRICS:
            mean, wide = float(group[metric].mean()), 0.006
            row: dict[str, object] = {
                "protocol": within,
                "strategy": arm,
                "metric": metric,
                "mean": mean,
                "low": mean - wide,
                "high": mean + wide,
            }
            row |= {"n_seeds": group["seed"].nunique(), "n_documents": documents}
            for other, table in (("standard", standard), ("random", random)):
                of = "equal_rank" if within == "reference" else str(within)
                itself = arm == ("standard" if other == "standard" else "random_layers")
                difference = np.nan if itself else mean - float(table[metric][of])
                ends = {"low": difference - 0.004, "high": difference + 0.004, "sd": difference * 0 + 0.002}
                ends |= {"documents_low": difference - 0.003, "documents_high": difference + 0.003}
                row |= {f"vs_{other}": difference, **{f"vs_{other}_{end}": value for end, value in ends.items()}}
            row["withheld"] = ""
            summary.append(row)
    written = {"id": ["doc-0", "doc-1"], "document": ["A harbour."] * 2, "reference": ["Harbour."] * 2, "base": ["The council"] * 2}
    return {
        "bakeoff": pd.DataFrame(arms),
        "bakeoff_rouge": rouge_table,
        "bakeoff_summaries": pd.DataFrame(written | {"targeted_layers_equal_rank": ["A new harbour."] * 2}),
        "bakeoff_summary": pd.DataFrame(summary),
        "learning_curves": pd.DataFrame(curves),
    }
