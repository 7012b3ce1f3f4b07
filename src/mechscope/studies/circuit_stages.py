"""Circuits as stages of a run: scores of each model, judged circuits, and what fine-tuning changed in them.

Edges are scored on one part of the pairs and circuits are judged on the other (`held_out`): a circuit that was found on the texts it is judged on
looks better than it is. Scores are kept as tensors, so a killed run does not score a model twice.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from mechscope.adapt.places import critical_layers
from mechscope.circuits.change import edge_shift, overlap_table
from mechscope.circuits.choosing import choose
from mechscope.circuits.discovery import SEEDED, discover
from mechscope.circuits.gain import tuned_edges
from mechscope.circuits.graph import Circuit, Graph
from mechscope.circuits.overlap import overlap
from mechscope.circuits.scores import Cost, Scores, to_json
from mechscope.data.documents import Corpus
from mechscope.data.salience import salience_pairs
from mechscope.data.template import Template
from mechscope.errors import DataError, SettingsError
from mechscope.progress import Progress
from mechscope.selection import default_number
from mechscope.store.run import RunFolder
from mechscope.studies.circuit_checks import check_size
from mechscope.studies.circuit_judging import FALLBACK, FEWEST, Asked, judge, plain
from mechscope.studies.pair_settings import DiscoverySettings
from mechscope.studies.role_names import named_roles, scored_roles
from mechscope.subject import Components, Pair, Subject

log = logging.getLogger(__name__)

# sizes at which two models' circuits are compared and tuned edges are put into the base
OVERLAP_FRACTIONS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
# random circuits of each size in a whole study
_FEW = 5
# random pairs of circuits behind each null
_DRAWS = 200
# tokens of a batch where nobody asked for a number
_TOKENS = 1024
GAIN_FRACTIONS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def scores_stage(run: RunFolder, label: str, subject: Subject, asked: Asked, *, progress: Progress | None) -> Scores:
    """Score a model's edges and keep the scores as tensors."""
    name = f"circuit_scores_{plain(label)}"
    with run.stage(name, {"model": subject.fingerprint, "dtype": str(subject.dtype), **asked.inputs}) as stage:
        if not stage.done:
            found = discover(
                subject,
                asked.found_on,
                method=asked.settings.method,
                steps=asked.settings.steps,
                points=asked.settings.points,
                source=asked.source(subject),
                fraction=asked.share_of(Graph.of(subject)) or FALLBACK,
                seed=asked.seed,
                progress=progress,
                **asked.running,
            )
            kept = {"mean": torch.from_numpy(found.mean)}
            if found.per_text is not None:
                kept["per_text"] = torch.from_numpy(np.ascontiguousarray(found.per_text))
            graph = found.graph
            about = {"n_layers": graph.n_layers, "n_heads": graph.n_heads, "parallel": graph.parallel}
            cost = {"forward": found.cost.forward, "backward": found.cost.backward}
            stage.write_tensors(name, kept, meta={"graph": about, "method": found.method, "cost": cost, "notes": found.notes})
    return _read(run, name)


def _read(run: RunFolder, name: str) -> Scores:
    tensors, meta = run.tensors(name)
    per_text = tensors["per_text"].numpy() if "per_text" in tensors else None
    return Scores(Graph(**meta["graph"]), tensors["mean"].numpy(), per_text, meta["method"], Cost(**meta["cost"]), meta["notes"])


def circuits_stage(
    run: RunFolder, subjects: Mapping[str, Subject], asked: Asked, *, progress: Progress | None
) -> dict[str, tuple[Scores, Circuit]]:
    """Find and judge the circuit of every model; write the tables `circuit_…` and each circuit's file.

    Args:
        run: The run.
        subjects: Models by label, for example `base` and `tuned`.
        asked: Pairs, metric and settings.
        progress: Called with what is being done.

    Returns:
        Scores and circuit by label.
    """
    if len({plain(label).lower() for label in subjects}) < len(subjects):
        raise SettingsError(f"the labels {', '.join(subjects)} of the models would share a file: name them differently")
    for subject in subjects.values():
        check_size(asked.settings, Graph.of(subject))
    scores = {label: scores_stage(run, label, subject, asked, progress=progress) for label, subject in subjects.items()}
    again = _other_seeds(run, subjects, asked, progress)
    inputs = {**{label: subject.fingerprint for label, subject in subjects.items()}, **asked.inputs, "roles": scored_roles(run)}
    with run.stage("circuit", inputs) as stage:
        if not stage.done:
            judged = {
                label: judge(subject, scores[label], asked, other_seed=again.get(label), progress=progress)
                for label, subject in subjects.items()
            }
            for label, found in judged.items():
                cards = found.tables["circuit_components"]
                cards["role"] = cards["component"].map(named_roles(run, label)).fillna("")
            for name in ("circuit_edges", "circuit_nodes", "circuit_curve", "circuit_summary", "circuit_components"):
                parts = [found.tables[name].assign(model=label) for label, found in judged.items()]
                stage.write_table(name, pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True))
            for label, found in judged.items():
                subject = subjects[label]
                text = to_json(
                    found.circuit,
                    found.scores,
                    model=subject.source,
                    fingerprint=subject.fingerprint,
                    d_model=subject.anatomy.d_model,
                )
                stage.write_text(f"circuits/{plain(label)}.json", text)
    edges = run.table("circuit_edges")
    return {
        label: (scores[label], Circuit(scores[label].graph, edges.loc[edges["model"] == label, "in_circuit"].to_numpy(bool)))
        for label in subjects
    }


def _other_seeds(run: RunFolder, subjects: Mapping[str, Subject], asked: Asked, progress: Progress | None) -> dict[str, Scores]:
    """Score every model once more with another seed, on the same pairs, where the method draws."""
    if asked.settings.method not in SEEDED:
        return {}
    other = replace(asked, seed=asked.seed + 1)
    return {label: scores_stage(run, f"{label} other seed", subject, other, progress=progress) for label, subject in subjects.items()}


def change_stage(
    run: RunFolder,
    pair: Pair,
    found: Mapping[str, tuple[Scores, Circuit]],
    asked: Asked,
    *,
    on_the_way: Sequence[str] = (),
    progress: Progress | None,
) -> Components:
    """Write the tables `circuit_overlap`, `circuit_shift`, `circuit_gain` and, with checkpoints, `circuit_time`.

    Args:
        run: A run whose circuits are found.
        pair: The models.
        found: Scores and circuits by label; `base` and `tuned` are compared.
        asked: Pairs, metric and settings.
        on_the_way: Labels of checkpoints between them, in order.
        progress: Called with what is being done.

    Returns:
        The critical layers: those whose edges' scores changed most, as many as layers are selected by default.
    """
    inputs = {"circuit": run.manifest["stages"]["circuit"]["outputs"], "on_the_way": list(on_the_way), **asked.inputs}
    (base, base_circuit), (tuned, tuned_circuit) = found["base"], found["tuned"]
    with run.stage("circuit-change", inputs) as stage:
        if not stage.done:
            options = {**asked.choice, "resamples": asked.settings.circuit_resamples, "seed": asked.seed}
            if base.per_text is None:
                log.warning(
                    "method %s keeps no scores of single texts: overlap with the models' own noise and shifts are left out", base.method
                )
            else:
                stage.write_table("circuit_shift", edge_shift(base, tuned, base_circuit, tuned_circuit))
                if (texts := len(base.per_text)) >= FEWEST:
                    stage.write_table("circuit_overlap", overlap_table(base, tuned, OVERLAP_FRACTIONS, **options))
                else:
                    log.warning(
                        "edges were scored on %d texts, which cannot be halved: overlap with the models' own noise needs %d", texts, FEWEST
                    )
            if asked.metric != "kl":
                gain = tuned_edges(
                    pair,
                    asked.judged_on,
                    fractions=GAIN_FRACTIONS,
                    scored_on=asked.found_on,
                    random=asked.settings.random_circuits,
                    seed=asked.seed,
                    progress=progress,
                    **asked.running,
                )
                if gain.note is not None:
                    log.warning("the gain of fine-tuning: %s", gain.note)
                stage.write_table("circuit_gain", gain.table)
            if on_the_way:
                stage.write_table("circuit_time", over_time(run, found, ["base", *on_the_way, "tuned"], asked))
    return critical_layers(base.graph, base.mean, tuned.mean, number=default_number(base.graph.n_layers))


def summarization_circuit(
    run: RunFolder, pair: Pair, corpus: Corpus, settings: Any, *, progress: Progress | None
) -> tuple[Components, Components]:
    """Find the circuit of summarizing in both models, and compare them.

    The pairs are held-out documents with their summaries, clean and without their salient sentence; the metric is the loss on the summary: the circuit
    is what brings a document's salient content into its summary.

    Args:
        run: The run.
        pair: The models.
        corpus: Held-out documents.
        settings: `CircuitStudySettings`, `MeasureSettings` and `DataSettings` together.
        progress: Called with what is being done.

    Returns:
        The heads and MLPs of the tuned model's circuit, and the layers whose edges changed most. The first is empty where it is the whole model.
    """
    longest = min(settings.max_tokens, pair.base.anatomy.max_positions)
    try:
        texts = salience_pairs(
            corpus, pair.base.tokenizer, template=Template(settings.template), max_tokens=longest, seed=settings.seed
        ).first(settings.circuit_documents)
    except DataError as error:
        # the rest of the study does not need it
        log.warning("the circuit of summarizing is left out: %s", error)
        return Components(), Components()
    options = DiscoverySettings(
        method=settings.circuit_method, circuit_fraction=settings.circuit_size, random_circuits=_FEW, criteria=False
    )
    asked = Asked.of(texts, options, metric="loss", tokens_per_batch=settings.tokens_per_batch or _TOKENS, seed=settings.seed)
    found = circuits_stage(run, {"base": pair.base, "tuned": pair.tuned}, asked, progress=progress)
    critical = change_stage(run, pair, found, asked, progress=progress)
    components, anatomy = found["tuned"][1].components(), pair.tuned.anatomy
    if len(components) in (0, anatomy.n_layers * (anatomy.n_heads + 1)):
        log.warning("the circuit takes in %s, so LoRA cannot be placed by it", "every head and MLP" if components else "no head or MLP")
        components = Components()
    return components, critical


def over_time(run: RunFolder, found: Mapping[str, tuple[Scores, Circuit]], order: Sequence[str], asked: Asked) -> pd.DataFrame:
    """Follow the circuit over checkpoints.

    Circuits of different sizes overlap less the more their sizes differ, so overlaps are of circuits chosen at one share of all edges: the one that
    was asked for, else 5 %. Faithfulness is that of each model's own circuit.

    Returns:
        One row per model in order: `model`, `order`, `edges` and `faithfulness` with `low`, `high` (of its own circuit); `fraction` at which circuits are
        compared, and Jaccard indices of edges and nodes with the base's and with the model's before: `jaccard_base`, `jaccard_previous`, `nodes_base`,
        `nodes_previous`, each with `_null`, what layer-matched random circuits of these sizes share.
    """
    summary = run.table("circuit_summary")
    fraction = asked.share_of(found["base"][0].graph) or FALLBACK
    circuits = {label: choose(found[label][0], fraction=fraction, **asked.choice) for label in order}
    rows = []
    for place, label in enumerate(order):
        own = summary[(summary["model"] == label) & (summary["measure"] == "faithfulness")].iloc[0]
        row = {
            "model": label,
            "order": place,
            "edges": len(found[label][1]),
            **own[["value", "low", "high"]].rename({"value": "faithfulness"}),
        }
        row["fraction"] = fraction
        for name, other in (("base", "base"), ("previous", order[max(0, place - 1)])):
            table = overlap(circuits[label], circuits[other], draws=_DRAWS, seed=asked.seed).table
            matched = table[table["null"] == "layer-matched"].set_index("of")
            for of, column in (("edges", f"jaccard_{name}"), ("nodes", f"nodes_{name}")):
                row |= {column: matched.loc[of, "jaccard"], f"{column}_null": matched.loc[of, "expected"]}
        rows.append(row)
    return pd.DataFrame(rows)
