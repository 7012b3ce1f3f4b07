"""Run folders invented for the tests of the report: every table of the contract, with numbers that look like a real study's.

The fine-tuning they pretend to describe sharpened heads in layers 2, 3 and 5 and hardly touched the rest, so that a reader of the page (and a
test) knows what the figures must show. `write_run` makes a whole folder; `hostile` puts markup, quotes, right-to-left text and endless
words wherever a user's or a model's string can reach the page.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from tests.report.synthetic_bakeoff import bakeoff_tables
from tests.report.synthetic_causal import causal_tables
from tests.report.synthetic_controls import controls_tables

# the sections of a study's page, as its job names them
STUDY = ("claims", "controls", "heads", "layers", "weights", "outputs", "selection", "matters", "bakeoff", "samples")
ROWS = ("all", "document", "summary")
CIRCUIT = (2, 3, 5)
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    '"><img src=x onerror=alert(3)>',
    "' onmouseover='alert(4)",
    "<!-- comment --> <![CDATA[ {{ 7*7 }} {% raw %}",
    "\u2028line\u2029separators\u202eright to left override",
    "שלום עולם مرحبا بالعالم",
    "🔬👩‍🔬🧠 emoji",
    "w" * 5000,
)


def quarter(layers: int) -> tuple[int, ...]:
    """Return the layers that the invented fine-tuning changed most."""
    return tuple(layer for layer in CIRCUIT if layer < layers)


# invented smallest effects of interest
SMALLEST = {"entropy_change": 0.004, "kl_base_tuned": 0.008, "write_change": 0.06, "cosine_distance": 0.004, "mlp_write_change": 0.06}


def _sure(name: str, mean: float, se: float) -> dict[str, float]:
    return {name: mean, f"{name}_se": se, f"{name}_low": mean - 1.96 * se, f"{name}_high": mean + 1.96 * se}


def _verdict(low: float, high: float, smallest: float) -> str:
    return "changed" if low > smallest else "negligible" if high < smallest else "undecided"


def smallest_table() -> pd.DataFrame:
    kinds = [("heads", name) for name in ("entropy_change", "kl_base_tuned", "write_change")]
    kinds += [("layers", name) for name in ("kl_base_tuned", "cosine_distance", "write_change", "mlp_write_change")]
    rows = [
        {
            "table": table,
            "quantity": name,
            "smallest": SMALLEST[name],
            "unit": "nats",
            "source": "twice what the base model differs by in bfloat16 against float32",
            "floor": SMALLEST[name] / 2,
            "n": 8,
        }
        for table, name in kinds
    ]
    return pd.DataFrame(rows)


def heads_table(layers: int, heads: int, rng: np.random.Generator) -> pd.DataFrame:
    records = []
    hot = {(layer, head): rng.gamma(2.0, 0.022) for layer in quarter(layers) for head in range(heads)}
    # one head far above the others, as the previous-token head 4.11 is in GPT-2
    hot[(min(4, layers - 1), heads - 1)] = 0.13
    for rows, factor in zip(ROWS, (1.0, 0.92, 1.35), strict=True):
        for layer in range(layers):
            for head in range(heads):
                kl = factor * (hot.get((layer, head), 0.0) + rng.gamma(2.0, 0.0025))
                change = float(rng.normal(-2.2 * kl if rng.random() < 0.7 else 1.2 * kl, 0.012))
                se = 0.004 + 0.06 * abs(change)
                p = float(np.clip(np.exp(-0.5 * (change / se) ** 2), 1e-30, 1))
                base, distance, sink = float(rng.uniform(0.6, 4.2)), float(rng.uniform(1, 90)), float(rng.uniform(0.1, 0.8))
                records.append(
                    {
                        "rows": rows,
                        "layer": layer,
                        "head": head,
                        "component": f"a{layer}.h{head}",
                        "n": 200,
                        "entropy_base": base,
                        "entropy_tuned": base + change,
                        "entropy_change": change,
                        "entropy_change_se": se,
                        "entropy_change_low": change - 1.96 * se,
                        "entropy_change_high": change + 1.96 * se,
                        "entropy_change_p": p,
                        "entropy_change_q": min(1.0, 1.8 * p),
                        "relative_entropy_base": base / 5,
                        "relative_entropy_tuned": (base + change) / 5,
                        "kl_base_tuned": kl,
                        "kl_base_tuned_se": 0.05 * kl,
                        "kl_tuned_base": kl * float(rng.uniform(0.85, 1.1)),
                        "kl_tuned_base_se": 0.05 * kl,
                        "distance_base": distance,
                        "distance_tuned": distance + 120 * float(rng.normal(0, kl)),
                        "sink_base": sink,
                        "sink_tuned": sink + float(rng.normal(0, kl)),
                        "z_cosine_distance": kl * 0.8,
                        **_sure("write_change", 0.9 * kl**0.5, 0.02 * kl**0.5),
                        "write_change_n": 32,
                        **_sure("write_change_own", kl**0.5, 0.02 * kl**0.5),
                        "write_change_own_n": 200,
                        "weight_change": 0.01 + 0.4 * kl,
                        "entropy_change_verdict": _verdict(abs(change) - 1.96 * se, abs(change) + 1.96 * se, SMALLEST["entropy_change"]),
                        "kl_base_tuned_verdict": _verdict(0.9 * kl, 1.1 * kl, SMALLEST["kl_base_tuned"]),
                        "write_change_verdict": _verdict(0.86 * kl**0.5, 0.94 * kl**0.5, SMALLEST["write_change"]),
                    }
                )
    return pd.DataFrame(records)


def layers_table(heads: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    records = []
    for (rows, number), group in heads.groupby(["rows", "layer"], sort=False):
        layer = int(str(number))
        kl, change = float(group["kl_base_tuned"].mean()), float(group["entropy_change"].mean())
        norm = 45.0 + 9.0 * layer**1.3
        # a mean, and half of its interval
        measured = {
            "kl_base_tuned": (kl, 0.07 * kl),
            "kl_tuned_base": (float(group["kl_tuned_base"].mean()), 0.08 * float(group["kl_tuned_base"].mean())),
            "entropy_change": (change, 0.01),
            "activation_norm_base": (norm, 0.4),
            "activation_norm_tuned": (norm * float(rng.uniform(1.0, 1.08)), 0.4),
            "activation_abs_base": (norm / 35, 0.01),
            "activation_abs_tuned": (norm / 34, 0.01),
            "cosine_distance": (0.002 * (layer + 1) ** 1.2, 0.0001),
            "write_change": (0.9 * kl**0.5, 0.01),
            "write_change_own": (kl**0.5, 0.01),
            "mlp_write_change": (0.5 * kl**0.5, 0.01),
            "mlp_write_change_own": (0.6 * kl**0.5, 0.01),
        }
        records.append(
            {
                "rows": rows,
                "layer": layer,
                "n": 200,
                **{name: mean for name, (mean, _) in measured.items()},
                "share_focused": float((group["entropy_change"] < 0).mean()),
                "cka": 1 - 0.001 * (layer + 1) ** 1.5,
                "rsa": 1 - 0.002 * (layer + 1) ** 1.4,
                "weight_change": 0.2 + 3 * kl,
                "score": kl * 10,
                **{f"{name}_n": 200 if name.endswith("own") else 32 for name in measured if "write_change" in name},
                **{
                    f"{name}_verdict": _verdict(measured[name][0] - measured[name][1], sum(measured[name]), SMALLEST[name])
                    for name in ("kl_base_tuned", "cosine_distance", "write_change", "mlp_write_change")
                },
                **{f"{name}_se": half / 1.96 for name, (_, half) in measured.items()},
                **{f"{name}_low": mean - half for name, (mean, half) in measured.items()},
                **{f"{name}_high": mean + half for name, (mean, half) in measured.items()},
            }
        )
    return pd.DataFrame(records)


def weights_table(layers: int, rng: np.random.Generator) -> pd.DataFrame:
    matrices = [
        ("query", "attn.c_attn", 768, 768),
        ("key", "attn.c_attn", 768, 768),
        ("value", "attn.c_attn", 768, 768),
        ("output", "attn.c_proj", 768, 768),
        ("mlp", "mlp.c_fc", 768, 3072),
        ("mlp", "mlp.c_proj", 3072, 768),
        ("norm", "ln_1", 768, 1),
        ("norm", "ln_2", 768, 1),
    ]
    records = []
    for layer in [*range(layers), -1]:
        for kind, path, rows, columns in (
            matrices if layer >= 0 else [("embedding", "transformer.wte", 50257, 768), ("norm", "ln_f", 768, 1)]
        ):
            matrix = kind not in ("norm",)
            top = float(rng.uniform(0.4, 1.0)) * (1.8 if layer in CIRCUIT else 1.0)
            values = top * np.exp(-0.25 * np.arange(8))
            records.append(
                {
                    "name": f"transformer.h.{layer}.{path}.weight" if layer >= 0 else f"{path}.weight",
                    "layer": layer,
                    "kind": kind,
                    "rows": rows,
                    "columns": columns,
                    "norm_base": 100.0,
                    "change": top * 2,
                    "relative_change": top * 0.02,
                    "effective_rank": float(rng.uniform(20, 90)) if matrix else np.nan,
                    "stable_rank": float(rng.uniform(4, 12)) if matrix else np.nan,
                    **{f"sv{i + 1}": float(v) if matrix else np.nan for i, v in enumerate(values)},
                    "intruders": int(rng.integers(0, 3)) if matrix else 0,
                }
            )
    return pd.DataFrame(records)


def outputs_table() -> pd.DataFrame:
    records = []
    for rows, before, after, kl in (("all", 3.31, 3.21, 0.11), ("document", 3.29, 3.27, 0.07), ("summary", 3.58, 3.02, 0.48)):
        change = after - before
        records.append(
            {
                "rows": rows,
                "n": 200,
                "kl_base_tuned": kl,
                "kl_base_tuned_se": 0.004,
                "kl_base_tuned_low": kl - 0.008,
                "kl_base_tuned_high": kl + 0.008,
                "kl_tuned_base": kl * 0.9,
                "kl_tuned_base_se": 0.004,
                "kl_tuned_base_low": kl * 0.9 - 0.008,
                "kl_tuned_base_high": kl * 0.9 + 0.008,
                "loss_base": before,
                "loss_tuned": after,
                "loss_change": change,
                "loss_change_se": 0.01,
                "loss_change_low": change - 0.02,
                "loss_change_high": change + 0.02,
                "loss_change_p": 1e-12,
                "kl_base_tuned_verdict": "changed",
                "loss_change_verdict": "changed",
            }
        )
    return pd.DataFrame(records)


def selection_table(heads: pd.DataFrame, layers: int, rng: np.random.Generator) -> pd.DataFrame:
    all_rows = heads[heads["rows"] == "all"]
    by_layer = all_rows.groupby("layer")["kl_base_tuned"].mean()
    head_scores = all_rows.set_index("component")
    n_heads = int(all_rows["head"].max()) + 1
    tables = []
    depth = pd.Series(np.arange(layers, dtype=float), index=by_layer.index)
    for rule, score in (("layers_by_kl", by_layer), ("last_layers", depth)):
        part = pd.DataFrame({"layer": score.index, "head": -1, "score": score.to_numpy()})
        part["component"] = [f"layers:{layer}" for layer in part["layer"]]
        part["kind"], part["rule"] = "layer", rule
        tables.append((part, max(1, layers // 4)))
    for rule, score in (("heads_by_kl", head_scores["kl_base_tuned"]), ("heads_by_entropy", head_scores["entropy_change"].abs())):
        part = pd.DataFrame({"component": score.index, "score": score.to_numpy()})
        part["layer"], part["head"] = head_scores["layer"].to_numpy(), head_scores["head"].to_numpy()
        part["kind"], part["rule"] = "head", rule
        tables.append((part, max(1, layers * n_heads // 8)))
    for part, k in tables:
        part["rank"] = part["score"].rank(ascending=False, method="first").astype(int)
        part["chosen"] = part["rank"] <= k
        part["frequency"] = np.clip(
            1 / (1 + np.exp(np.clip((part["rank"] - k - 0.5) * 0.8, -50, 50))) + rng.normal(0, 0.01, len(part)), 0, 1
        )
        part["n_resamples"] = 500
    return pd.concat([part for part, _ in tables], ignore_index=True)


def claims_table() -> pd.DataFrame:
    """Return six claims with every verdict among them."""
    columns = ["claim", "verdict", "value", "low", "high", "paper", "measured", "statement", "note"]
    together = "layers 2, 3, 5 (chosen together in 97\u202f% of resamples)"
    rouge = "Targeted LoRA reaches at least the ROUGE-1 of standard LoRA."
    steps = "Targeted LoRA needs fewer steps to standard LoRA's best loss."
    rows = [
        (
            "changed",
            "supported",
            0.97,
            0.94,
            0.99,
            "layers 2, 3, 5",
            together,
            "The layers whose attention changed most are 2, 3 and 5.",
            "",
        ),
        (
            "focused",
            "supported",
            0.64,
            0.55,
            0.72,
            "62\u202f% of heads",
            "64\u202f% of heads",
            "Most heads became more focused.",
            "All heads, all query rows.",
        ),
        (
            "selected",
            "supported",
            0.69,
            0.53,
            0.82,
            "62\u202f% (ambiguous)",
            "69\u202f% of 36 heads",
            "Most heads of the selected layers became focused.",
            "",
        ),
        (
            "rouge",
            "contradicted",
            -0.006,
            -0.010,
            -0.002,
            "at least equal",
            "−0.006 ROUGE-1 at equal rank",
            rouge,
            "Bootstrap over documents.",
        ),
        ("steps", "undecided", np.nan, np.nan, np.nan, "6 instead of 10 epochs", "never reached in 2 of 3 seeds", steps, ""),
        (
            "parameters",
            "supported",
            -0.75,
            -0.75,
            -0.75,
            "−75\u202f%",
            "−75.0\u202f%",
            "Targeted LoRA trains 75\u202f% fewer parameters.",
            "",
        ),
    ]
    return pd.DataFrame(rows, columns=columns)


def summaries_table(n: int) -> pd.DataFrame:
    sentence = "The council of Ardmore approved the new harbour on Tuesday after three hours of debate, said mayor Ines Okafor. "
    return pd.DataFrame(
        {
            "id": [f"newsroom-{i:04d}" for i in range(n)],
            "document": [sentence * (3 + 9 * i) for i in range(n)],
            "reference": ["Ardmore's council approved a new harbour on Tuesday."] * n,
            "base": ["The council said that the mayor said that the council said"] * n,
            "tuned": ["The council of Ardmore approved the new harbour."] * n,
            "standard_lora": ["Ardmore approved a harbour on Tuesday, the mayor said."] * n,
        }
    )


def pairs_table(layers: pd.DataFrame) -> pd.DataFrame:
    """Return the two further pairs of models: half and a third of the base–tuned divergence."""
    parts = {"base–LoRA": 0.5, "tuned–LoRA": 1 / 3}
    return pd.concat([layers.assign(kl_base_tuned=layers["kl_base_tuned"] * factor, pair=name) for name, factor in parts.items()])


def rouge_table() -> pd.DataFrame:
    rows = [
        {
            "model": model,
            "metric": metric,
            "mean": mean,
            "low": mean - 0.011,
            "high": mean + 0.012,
            "withheld": "",
            "n": 57,
            "tokenizer": "english",
        }
        for model, mean in (("base", 0.1375), ("tuned", 0.1864))
        for metric in ("rouge1", "rouge2", "rougeL", "rougeLsum")
    ]
    return pd.DataFrame(rows)


def tables(layers: int = 12, heads: int = 12, *, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Return every table of the contract for a model of the given shape."""
    rng = np.random.default_rng(seed)
    head_table = heads_table(layers, heads, rng)
    layer_table = layers_table(head_table, rng)
    difference = {
        "heads": head_table,
        "layers": layer_table,
        "weights": weights_table(layers, rng),
        "outputs": outputs_table(),
        "selection": selection_table(head_table, layers, rng),
    }
    return {
        **difference,
        "pairs": pairs_table(layer_table),
        "rouge": rouge_table(),
        "smallest_effects": smallest_table(),
        "claims": claims_table(),
        "summaries": summaries_table(8),
        **controls_tables(difference, seed=seed),
        **bakeoff_tables(rng),
        **causal_tables(head_table, rng),
    }


def manifest() -> dict[str, object]:
    return {
        "kind": "summarization",
        "created": "2026-01-02T03:04:05+00:00",
        "settings": "5d1c",
        "stages": {},
        "environment": {
            "mechscope": "0.1.0",
            "code": "b5bb9d8014a0f9b1d61e21e796d78dccdf1352f23cd32812f4850b878ae4944c",
            "python": "3.11.2",
            "dependencies": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.0"},
            "machine": {"system": "Linux x86_64", "cpus": 2, "threads": 1, "memory_gib": 7.8, "accelerators": []},
        },
        "commands": [
            ["mechscope", "study", "summarization", "--base", "models/gpt2-news-7m", "--data", "data/samsum.jsonl", "--out", "runs/my run"]
        ],
        "models": {
            "base": {"source": "models/gpt2-news-7m", "fingerprint": "9c1f0a"},
            "tuned": {"source": "runs/samsum/tuned", "fingerprint": "77be21"},
        },
        "data": {
            "source": "data/samsum.jsonl",
            "hash": "b94d27",
            "problems": {"empty": 3, "duplicate": 17, "too_short": 0, "truncated": 41},
        },
        "seeds": {"study": 0, "training": [0, 1, 2]},
        "page": {"title": "What fine-tuning changed in gpt2-news-7m", "sections": list(STUDY)},
    }


def settings() -> dict[str, object]:
    return {
        "study": "summarization",
        "base": "models/gpt2-news-7m",
        "tuned": None,
        "data": {"source": "data/samsum.jsonl", "limit": 200, "template": "Article: {document}\nSummary: {summary}"},
        "selection": {"layers": 3, "heads": 18},
        "bakeoff": {"rank": 8, "seeds": [0, 1, 2]},
    }


def hostile(made: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Return the tables with hostile text in every string that a user, a document or a model can supply."""
    made = {name: table.copy() for name, table in made.items()}
    nasty = [HOSTILE[i % len(HOSTILE)] for i in range(max(len(table) for table in made.values()))]
    for column in ("document", "reference", "base", "tuned"):
        made["summaries"][column] = [f"{HOSTILE[0]} {text}" for text in nasty[: len(made["summaries"])]]
    made["summaries"]["id"] = nasty[: len(made["summaries"])]
    made["summaries"] = made["summaries"].rename(columns={"standard_lora": HOSTILE[2]})
    for column in ("statement", "paper", "measured", "note"):
        made["claims"][column] = nasty[: len(made["claims"])]
    made["weights"]["name"] = nasty[: len(made["weights"])]
    made["bakeoff"]["components"] = nasty[: len(made["bakeoff"])]
    for name in ("bakeoff", "bakeoff_rouge", "bakeoff_summary", "learning_curves"):
        made[name]["strategy"] = made[name]["strategy"].replace(
            {"last_layers": HOSTILE[0], "random_layers": HOSTILE[1], "none": HOSTILE[8]}
        )
    made["selection"]["rule"] = made["selection"]["rule"].replace({"last_layers": HOSTILE[0], "heads_by_entropy": HOSTILE[3]})
    for name in ("cross_model", "ablation", "layer_sets"):
        made[name]["component"] = (nasty * len(made[name]))[: len(made[name])]
    made["heads"]["component"] = nasty[: len(made["heads"])]
    return made


def write_run(
    folder: Path, made: dict[str, pd.DataFrame], *, study: dict[str, object] | None = None, record: dict[str, object] | None = None
) -> Path:
    """Write a run folder that holds exactly these tables."""
    (folder / "tables").mkdir(parents=True)
    for name, table in made.items():
        table.to_parquet(folder / "tables" / f"{name}.parquet", index=False)
    (folder / "study.yaml").write_text(yaml.safe_dump(study if study is not None else settings(), sort_keys=False), encoding="utf-8")
    (folder / "manifest.json").write_text(json.dumps(record if record is not None else manifest()), encoding="utf-8")
    return folder
