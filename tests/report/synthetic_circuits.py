"""The invented tables of circuit runs: a model of any shape whose scores fall off as real ones do, with a chosen circuit and everything measured of it.

The base model's circuit is the first 200 strongest edges; the tuned model's scores are its own, with a few edges moved. Saliences are arranged so
that a reader of the page knows what it must show: strong edges run through `a5.h1` and `m0`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from mechscope.circuits.graph import Graph

FRACTIONS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
TOKENS = "<script>alert('token')</script>"


def edges_table(model: str, graph: Graph, *, chosen: int = 200, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    senders, receivers = graph.edges.T
    sender, receiver = np.array(graph.senders, dtype=object)[senders], np.array(graph.receivers, dtype=object)[receivers]
    # heavy tails, and two nodes that much of the task goes through
    strength = 0.002 * rng.pareto(1.6, len(graph))
    hubs = np.isin(sender, ["a5.h1", "m0", "embed"]) | np.isin(graph.owner[receivers], [graph.senders.index("m0")])
    score = strength * np.where(hubs, 4.0, 1.0) * np.where(rng.random(len(graph)) < 0.72, -1.0, 1.0)
    se = 0.1 * np.abs(score) + 1e-4
    p = np.exp(-0.5 * (score / se) ** 2)
    layers = (np.array(graph.layer_of(names)) for names in (sender, receiver))
    table = pd.DataFrame({"model": model, "edge": graph.names, "sender": sender, "receiver": receiver})
    table["sender_layer"], table["receiver_layer"] = layers
    table = table.assign(score=score, n=64, se=se, low=score - 2 * se, high=score + 2 * se, p=p, q=np.minimum(1, 2 * p))
    table["in_circuit"] = np.abs(score) >= np.sort(np.abs(score))[-min(chosen, len(graph) // 3)]
    return table


def nodes_table(model: str, graph: Graph, edges: pd.DataFrame) -> pd.DataFrame:
    score = edges.groupby("sender", sort=False)["score"].sum().reindex(graph.senders).fillna(0.0).to_numpy()
    table = pd.DataFrame({"model": model, "node": graph.senders, "layer": graph.layer_of(graph.senders), "score": score})
    used = set(edges.loc[edges["in_circuit"], "sender"])
    return table.assign(
        n=64, se=0.01, low=score - 0.02, high=score + 0.02, p=0.5, q=0.8, in_circuit=[name in used for name in graph.senders]
    )


def curve_table(model: str, graph: Graph, *, speed: float = 1.0) -> pd.DataFrame:
    fraction = np.array(FRACTIONS)
    faithfulness = np.where(fraction > 0, 1 - np.exp(-speed * (fraction * 150) ** 0.6), 0.0)
    faithfulness[-1] = 1.0
    random = fraction**1.5
    return pd.DataFrame(
        {
            "model": model, "fraction": fraction, "edges": np.round(fraction * len(graph)).astype(int), "metric": "logit-diff", "n": 64,
            "value": 3 * faithfulness,
            "faithfulness": faithfulness, "low": faithfulness - 0.05, "high": faithfulness + 0.04, "withheld": "",
            "random": random, "random_low": random - 0.04, "random_high": random + 0.06,
        }
    )  # fmt: skip


def summary_table(model: str, *, chosen: int = 200, nodes: int = 70) -> pd.DataFrame:
    rows = [
        ("faithfulness", 0.861, 0.812, 0.903, 0.07, 0.01, 0.16),
        ("CPR", 0.742, 0.7, 0.78, 0.31, 0.28, 0.35),
        ("CMD", 0.258, 0.22, 0.3, 0.69, 0.65, 0.72),
        ("completeness", 0.13, 0.08, 0.19, 0.8, 0.7, 0.9),
        ("edges", chosen, np.nan, np.nan, np.nan, np.nan, np.nan),
        ("nodes", nodes, np.nan, np.nan, np.nan, np.nan, np.nan),
    ]
    columns = ["measure", "value", "low", "high", "random", "random_low", "random_high"]
    return pd.DataFrame(rows, columns=columns).assign(model=model, withheld="")


def components_table(model: str) -> pd.DataFrame:
    rows = [
        ("a5.h1", 5, -0.91, 0.22, 0.001, 0.003, "the token after the last same token", " one, two", "induction"),
        ("m0", 0, -0.64, 0.11, 0.004, 0.006, "", "the, a", ""),
        ("a9.h9", 9, 0.2, 0.01, 0.4, 0.4, TOKENS, "]]><b>x</b>", None),
    ]
    names = ["component", "layer", "score", "minimality", "minimality_p", "minimality_q", "attends_to", "top_tokens", "role"]
    table = pd.DataFrame(rows, columns=names)
    return table.assign(model=model, low=table["score"] - 0.1, high=table["score"] + 0.1)


def circuit_tables(layers: int = 12, heads: int = 12, *, model: str = "model", chosen: int = 200, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Return the tables of a run of `mechscope circuit`."""
    graph = Graph(layers, heads)
    edges = edges_table(model, graph, chosen=chosen, seed=seed)
    return {
        "circuit_edges": edges,
        "circuit_nodes": nodes_table(model, graph, edges),
        "circuit_curve": curve_table(model, graph, speed=1.0 + 0.4 * seed),
        "circuit_summary": summary_table(model, chosen=chosen),
        "circuit_components": components_table(model),
    }


def of_models(models: Sequence[str], layers: int = 12, heads: int = 12) -> dict[str, pd.DataFrame]:
    """Return the same tables of several models, one after the other."""
    each = [circuit_tables(layers, heads, model=model, chosen=200 + 60 * i, seed=i) for i, model in enumerate(models)]
    return {name: pd.concat([tables[name] for tables in each], ignore_index=True) for name in each[0]}


def diff_tables(layers: int = 12, heads: int = 12) -> dict[str, pd.DataFrame]:
    """Return the tables of a run of `mechscope circuit-diff`."""
    tables = of_models(("base", "tuned"), layers, heads)
    edges = tables["circuit_edges"]
    base, tuned = (edges[edges["model"] == model].reset_index(drop=True) for model in ("base", "tuned"))
    shift = base[["edge", "sender", "receiver", "sender_layer", "receiver_layer"]].assign(base=base["score"], tuned=tuned["score"])
    change = shift["tuned"] - shift["base"]
    shift = shift.assign(shift=change, se=0.005, low=change - 0.01, high=change + 0.01)
    shift = shift.assign(p=np.where(change.abs() > 0.02, 1e-4, 0.5), q=np.where(change.abs() > 0.02, 0.001, 0.8))
    shift = shift.assign(in_base=base["in_circuit"], in_tuned=tuned["in_circuit"])
    overlap = pd.DataFrame(
        [
            {
                "what": what, "fraction": fraction, "base_size": 200, "tuned_size": 260, "n": 64, "null_p": 0.001, "jaccard": 0.285 + lift + 0.1 * fraction,
                "exchanged": 0.74 + lift, "exchanged_low": 0.71 + lift, "exchanged_high": 0.77 + lift,
                "change": 0.455 - 0.1 * fraction, "p": 0.005,
                "null": fraction / (2 - fraction), "null_low": 0.8 * fraction / 2, "null_high": 1.2 * fraction / 2 + 0.01,
            }
            for what, lift in (("nodes", 0.2), ("edges", 0.0))
            for fraction in FRACTIONS[1:-2]
        ]
    )  # fmt: skip
    gain = pd.DataFrame(
        [
            {
                "fraction": count / len(base), "edges": count, "n": 64, "kind": kind, "value": 3 * share, "share": share,
                "low": share - 0.08, "high": share + 0.08, "random_sets": 40, "withheld": "",
                "p_random": 1 / 41 if kind == "tuned" else np.nan, "p_less": 1.0 if kind == "tuned" else np.nan,
            }
            for kind, power in (("tuned", 0.25), ("random", 1.2))
            for count in (10, 30, 100, 300, 1000, 3000, 10000, len(base))
            for share in [(count / len(base)) ** power]
            if count <= len(base)
        ]
    )  # fmt: skip
    return {**tables, "circuit_overlap": overlap, "circuit_shift": shift, "circuit_gain": gain}


def time_tables(layers: int = 4, heads: int = 4) -> dict[str, pd.DataFrame]:
    """Return the tables of a run over the checkpoints of a training."""
    models = ("step 0", "step 100", "step 1000", "final")
    time = pd.DataFrame(
        {
            "model": models, "order": range(4), "edges": (120, 150, 190, 200), "faithfulness": (0.2, 0.5, 0.8, 0.86), "low": (0.1, 0.4, 0.7, 0.81),
            "high": (0.3, 0.6, 0.9, 0.9), "fraction": 0.05, "jaccard_base": (1.0, 0.4, 0.2, 0.15), "jaccard_base_null": 0.03,
            "jaccard_previous": (np.nan, 0.4, 0.5, 0.8), "jaccard_previous_null": 0.03, "nodes_base": (1.0, 0.6, 0.5, 0.4), "nodes_base_null": 0.3,
            "nodes_previous": (np.nan, 0.6, 0.7, 0.9), "nodes_previous_null": 0.3,
        }
    )  # fmt: skip
    return {**of_models(models, layers, heads), "circuit_time": time}
