"""The invented tables of runs that read a model: lenses, attribution, roles, token attention and weights, of one model or of base and tuned.

They pretend to a model whose prediction forms in its middle layers, earlier after fine-tuning; whose head `a1.h0` attends to the previous token, `a2.h1`
is an induction head and became stronger; so that a reader of the page (and a test) knows what the figures must show.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from tests.report.synthetic_weights import weights_tables

PAIR = ("base", "tuned")
TOKENS = tuple(
    re.findall(r"\S+", "The council of Ardmore approved the new harbour on Tuesday after three hours of debate , said mayor Ines Okafor .")
)
ROLES = ("previous-token", "duplicate-token", "induction", "copying", "attention-sink", "summary-to-document", "retrieval", "name-mover")


def tokens_of(count: int) -> list[str]:
    return [("" if i == 0 else " ") + TOKENS[i % len(TOKENS)] if i % 40 != 39 else "\n" for i in range(count)]


def lens_tokens(texts: Sequence[str], count: int) -> pd.DataFrame:
    names = tokens_of(count + 1)
    half = int(0.75 * count)
    parts = [
        {
            "text": text, "position": i, "token": names[i], "target": names[i + 1] if i + 1 < count else "",
            "segment": "document" if i < half else "summary",
        }
        for text in texts
        for i in range(count)
    ]  # fmt: skip
    return pd.DataFrame(parts)


def lens_grid(
    texts: Sequence[str], count: int, layers: int, models: Sequence[str], lenses: Sequence[str], *, seed: int = 0
) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    vocabulary, names, parts = np.array([*(f" {word.lower()}" for word in TOKENS), " and", " the", ",", " of"]), tokens_of(count + 1), []
    rows = [("embed", -1), *((f"resid{layer}", layer) for layer in range(layers))]
    for text in texts:
        hard = rng.uniform(0.3, 1.0, count)
        for m, model in enumerate(models):
            for lens in lenses:
                for component, layer in rows:
                    depth = (layer + 1) / layers
                    known = 1 / (1 + np.exp(-14 * (depth - hard + 0.12 * m + 0.1 * (lens == "tuned"))))
                    probability = np.clip(known * rng.uniform(0.4, 1.0, count), 1e-9, 1)
                    shares = np.sort(rng.dirichlet(np.ones(6), count), axis=1)[:, ::-1]
                    shares[:, 0] = np.maximum(shares[:, 0], probability)
                    part = pd.DataFrame(
                        {
                            "model": model, "lens": lens, "text": text, "site": "residual", "layer": layer, "head": -1, "component": component,
                            "position": np.arange(count), "token": names[:count], "target": [*names[1:count], None],
                            "probability": probability, "rank": np.floor(1 + 40000 * (1 - known) ** 6).astype(int),
                            "entropy": 9 * (1 - known) + 0.2, "kl": 12 * (1 - depth) * (1 - known) + 1e-3 * (1 - depth),
                        }
                    )  # fmt: skip
                    for k in range(1, 6):
                        word = vocabulary[rng.integers(0, len(vocabulary), count)]
                        part[f"top_{k}"] = np.where(known > 0.6, names[1:], word) if k == 1 else word
                        part[f"p_{k}"] = shares[:, k - 1]
                    part.loc[count - 1, ["probability"]] = np.nan
                    part.loc[count - 1, ["rank"]] = 0
                    parts.append(part)
    return pd.concat(parts, ignore_index=True)


def lens_summary(layers: int, heads: int, models: Sequence[str], lenses: Sequence[str], *, seed: int = 1) -> pd.DataFrame:
    rng, records = np.random.default_rng(seed), []
    sites = [("residual", "embed", -1, -1), *(("residual", f"resid{layer}", layer, -1) for layer in range(layers))]
    sites += [
        (site, f"{short}{layer}", layer, -1) for site, short in (("attention_output", "a"), ("mlp_output", "m")) for layer in range(layers)
    ]
    sites += [("head_output", f"a{layer}.h{head}", layer, head) for layer in range(layers) for head in range(heads)]
    for m, model in enumerate(models):
        for lens in lenses:
            for site, component, layer, head in sites:
                depth = (layer + 1) / layers if site == "residual" else 0.3 * (layer + 1) / layers
                known = float(np.clip(depth**2 + 0.08 * m * depth + 0.1 * (lens == "tuned") * (1 - depth), 0, 1))
                record: dict[str, object] = {
                    "model": model,
                    "lens": lens,
                    "site": site,
                    "layer": layer,
                    "head": head,
                    "component": component,
                    "rows": "target",
                    "n": 64,
                }
                values = {
                    "log_probability": -10 + 7 * known,
                    "entropy": 8.5 - 6 * known,
                    "kl": 8 * (1 - known),
                    "agreement": known * float(rng.uniform(0.95, 1.0)),
                    "reciprocal_rank": 0.9 * known,
                }
                for name, x in values.items():
                    half = 0.05 if name in ("agreement", "reciprocal_rank") else 0.15
                    record |= {name: x, f"{name}_se": half / 2, f"{name}_low": x - half, f"{name}_high": x + half}
                records.append(record)
    return pd.DataFrame(records)


def lens_change(summary: pd.DataFrame) -> pd.DataFrame:
    keys, parts = ["site", "layer", "head", "component"], summary[summary["lens"] == "logit"]
    wide = parts[parts["model"] == "base"].merge(
        parts[parts["model"] == "tuned"], on=keys, suffixes=("_base", "_tuned"), validate="one_to_one"
    )
    table = wide[keys].assign(rows="target", n=64, lens="logit")
    for name in ("log_probability", "entropy", "kl"):
        change = wide[f"{name}_tuned"] - wide[f"{name}_base"]
        table = table.assign(**{f"{name}_base": wide[f"{name}_base"], f"{name}_tuned": wide[f"{name}_tuned"], f"{name}_change": change})
        p = np.exp(-0.5 * (change / 0.05) ** 2)
        table = table.assign(
            **{
                f"{name}_change_se": 0.05,
                f"{name}_change_low": change - 0.1,
                f"{name}_change_high": change + 0.1,
                f"{name}_change_p": p,
                f"{name}_change_q": np.minimum(1, 1.5 * p),
            }
        )
    return table


def lens_training(layers: int, models: Sequence[str]) -> pd.DataFrame:
    rows = [(model, step, f"resid{layer}", 2.0 / (1 + step + layer)) for model in models for step in range(5) for layer in range(layers)]
    table = pd.DataFrame(rows, columns=["model", "step", "component", "kl"])
    return table.assign(converged=True, late_share=0.01, unconverged="")


def lens_judged(layers: int, models: Sequence[str]) -> pd.DataFrame:
    table = pd.DataFrame([{"model": model, "layer": layer} for model in models for layer in range(layers)])
    table = table.assign(site="residual", head=-1, component=[f"resid{layer}" for layer in table["layer"]], n=64)
    means = {"kl_logit_lens": 2.0 / (1 + table["layer"]), "kl_tuned": 1.0 / (1 + table["layer"])}
    for name, mean in {**means, "kl_change": means["kl_tuned"] - means["kl_logit_lens"]}.items():
        for column, value in ((name, mean), (f"{name}_se", 0.02), (f"{name}_low", mean - 0.04), (f"{name}_high", mean + 0.04)):
            table[column] = value
    table = table.assign(kl_change_p=0.001, kl_change_q=0.002, verdict="nearer", converged=True, late_share=0.01, unconverged="")
    # one map has not arrived
    table.loc[0, "converged"] = False
    table.loc[0, "unconverged"] = "its last quarter still lowered the loss by 30\u202f% of the whole change"
    return table


def attribution(layers: int, heads: int, models: Sequence[str], *, seed: int = 2) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    places = [("embed", "embedding", -1, -1), ("position", "position", -1, -1)]
    for layer in range(layers):
        places += [(f"a{layer}.h{head}", "head", layer, head) for head in range(heads)]
        places += [
            (f"a{layer} bias", "attention bias", layer, -1),
            (f"m{layer}", "mlp", layer, -1),
            (f"m{layer} bias", "mlp bias", layer, -1),
        ]
    places.append(("constant", "constant", -1, -1))
    effects = rng.standard_t(2.2, len(places)) * 0.12
    parts = []
    for m, model in enumerate(models):
        effect = effects * (1 + 0.4 * m * rng.random(len(places))) + 0.15 * m * (rng.random(len(places)) < 0.1)
        table = pd.DataFrame(places, columns=["component", "kind", "layer", "head"]).assign(model=model, effect=effect, n=64)
        se = 0.08 * np.abs(effect) + 0.01
        table = table.assign(low=effect - 2 * se, high=effect + 2 * se, p=np.exp(-0.5 * (effect / se) ** 2))
        parts.append(table.assign(q=np.minimum(1, 2 * table["p"])))
    return pd.concat(parts, ignore_index=True)


def attribution_change(table: pd.DataFrame) -> pd.DataFrame:
    base, tuned = (table[table["model"] == model].reset_index(drop=True) for model in PAIR)
    change = tuned["effect"] - base["effect"]
    p = np.exp(-0.5 * (change / 0.02) ** 2)
    made = base[["component", "kind", "layer", "head"]].assign(base=base["effect"], tuned=tuned["effect"], change=change)
    return made.assign(low=change - 0.04, high=change + 0.04, p=p, q=np.minimum(1, 3 * p), n=64)


def role_definitions() -> pd.DataFrame:
    rows = [
        (role, f"Attention of the heads that do {role}.", "a paper, section 2", 0.0, 1.0, "What an even head scores.", 0.3)
        for role in ROLES
    ]
    return pd.DataFrame(rows, columns=["role", "definition", "source", "low", "high", "null", "least"])


def head_roles(layers: int, heads: int, models: Sequence[str], *, seed: int = 3) -> pd.DataFrame:
    rng, records = np.random.default_rng(seed), []
    for r, role in enumerate(ROLES):
        null = 0.02 + 0.01 * r
        scores = np.clip(null + rng.exponential(0.03, (layers, heads)), 0, 1)
        scores[(1 + r) % layers, r % heads] = 0.9 - 0.06 * r
        scores[(3 + 2 * r) % layers, (2 * r + 1) % heads] = 0.5
        for m, model in enumerate(models):
            for layer in range(layers):
                for head in range(heads):
                    score = float(np.clip(scores[layer, head] * (1 + 0.15 * m * (r % 3 - 0.5)), 0, 1))
                    excess = score - null
                    records.append(
                        {
                            "model": model, "role": role, "layer": layer, "head": head, "component": f"a{layer}.h{head}", "n": 80, "score": score,
                            "low": score - 0.02, "high": score + 0.02, "null": null, "excess": excess, "excess_low": excess - 0.02,
                            "excess_high": excess + 0.02, "threshold": 0.1, "q": float(np.exp(-excess * 40)), "has_role": score > 0.3,
                        }
                    )  # fmt: skip
    return pd.DataFrame(records)


def head_role_changes(roles: pd.DataFrame) -> pd.DataFrame:
    base, tuned = (roles[roles["model"] == model].reset_index(drop=True) for model in PAIR)
    made = base[["role", "layer", "head", "component", "n"]].assign(base=base["score"], tuned=tuned["score"])
    made = made.assign(gained=tuned["has_role"] & ~base["has_role"], lost=base["has_role"] & ~tuned["has_role"])
    whole = made.groupby("role", sort=False, as_index=False).agg(n=("n", "max"), base=("base", "mean"), tuned=("tuned", "mean"))
    whole = whole.assign(component="all", layer=-1, head=-1, gained=False, lost=False)
    made = pd.concat([whole, made], ignore_index=True)
    change = made["tuned"] - made["base"]
    se = np.where(made["component"] == "all", 0.001, 0.01)
    p = np.exp(-0.5 * (change / se) ** 2)
    return made.assign(change=change, low=change - 2 * se, high=change + 2 * se, p=p, q=np.minimum(1, 2 * p))


def head_cards(models: Sequence[str]) -> pd.DataFrame:
    rows = [(model, "a2.h1", 2, "induction", "the token behind the last same token", " one, two") for model in models]
    return pd.DataFrame(rows, columns=["model", "component", "layer", "role", "attends_to", "top_tokens"])


def attention_edges(
    texts: Sequence[str], count: int, components: Sequence[str], models: Sequence[str], *, keys: int = 8, seed: int = 4
) -> pd.DataFrame:
    rng, parts = np.random.default_rng(seed), []
    for text in texts:
        for c, component in enumerate(components):
            for m, model in enumerate(models):
                query = np.repeat(np.arange(count), keys)
                place = np.tile(np.arange(keys), count)
                # the last words, the last same word, the first token: as heads do
                key = np.where(place < 3 + c, query - place, np.where(place == keys - 1, 0, query - len(TOKENS) * (place - 2 - c)))
                weight = np.abs(rng.normal(0.0, 0.02, len(key))) + 0.6 / (1 + np.abs(place - 2 * c - m)) ** 1.7
                table = pd.DataFrame({"query": query, "key": key, "weight": weight})
                table = table[(table["key"] >= 0) & (table["weight"] >= 0.01)].drop_duplicates(["query", "key"])
                total = table.groupby("query")["weight"].transform("sum")
                parts.append(table.assign(weight=0.9 * table["weight"] / total, model=model, text=text, component=component))
    return pd.concat(parts, ignore_index=True)


def lens_tables(
    layers: int = 12,
    heads: int = 12,
    *,
    positions: int = 96,
    models: Sequence[str] = PAIR,
    texts: Sequence[str] = ("samsum-0001", "samsum-0002"),
    lenses: Sequence[str] = ("logit", "tuned"),
) -> dict[str, pd.DataFrame]:
    """Return the tables of a run of `mechscope lens`."""
    summary, parts = lens_summary(layers, heads, models, lenses), attribution(layers, heads, models)
    made = {
        "lens_tokens": lens_tokens(texts, positions),
        "lens_grid": lens_grid(texts, positions, layers, models, lenses),
        "lens_summary": summary,
        "logit_attribution": parts,
        **({"lens_training": lens_training(layers, models), "lens_judged": lens_judged(layers, models)} if "tuned" in lenses else {}),
    }
    return {**made, "lens_change": lens_change(summary), "logit_attribution_change": attribution_change(parts)} if len(models) > 1 else made


def heads_tables(layers: int = 12, heads: int = 12, *, positions: int = 300, models: Sequence[str] = PAIR) -> dict[str, pd.DataFrame]:
    """Return the tables of a run of `mechscope heads`."""
    roles, texts = head_roles(layers, heads, models), ("samsum-0001", "samsum-0002")
    made = {
        "head_roles": roles,
        "role_definitions": role_definitions(),
        "head_cards": head_cards(models),
        "attention_tokens": lens_tokens(texts, positions).drop(columns="target"),
        "attention_edges": attention_edges(texts, positions, ("a1.h0", "a2.h1", "a3.h2"), models),
    }
    return {**made, "head_role_changes": head_role_changes(roles)} if len(models) > 1 else made


def all_tables(layers: int = 4, heads: int = 4, *, positions: int = 40) -> dict[str, pd.DataFrame]:
    """Return the tables of every kind of reading, of a small model."""
    return {
        **lens_tables(layers, heads, positions=positions),
        **heads_tables(layers, heads, positions=positions),
        **weights_tables(layers, heads),
    }
