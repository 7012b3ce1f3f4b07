"""Places for LoRA that nobody names one by one: random controls, a circuit read from a file, a circuit's critical layers.

A control keeps how much is adapted and changes only where, so it is drawn with the shape of what it controls for: as many layers, or as many heads
per layer and as many MLPs. Controls may overlap with their original, as any random choice may, but are never equal to it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from mechscope.circuits.graph import Graph
from mechscope.circuits.scores import from_json
from mechscope.errors import DataError, SettingsError
from mechscope.subject.components import Components


def random_layers(n_layers: int, avoid: Sequence[int], seed: int) -> tuple[int, ...]:
    """Draw as many layers as `avoid` has, any set but exactly that one.

    Raises:
        SettingsError: There is no other set: the targeted layers are none or all.
    """
    if not 0 < len(avoid) < n_layers:
        raise SettingsError(
            f"random layers need another choice than the targeted {len(avoid)} of {n_layers} layers: target at least one layer, and not all"
        )
    generator = random.Random(f"random layers {seed}")
    while True:
        drawn = tuple(sorted(generator.sample(range(n_layers), len(avoid))))
        if drawn != tuple(sorted(avoid)):
            return drawn


def random_circuit(circuit: Components, n_layers: int, n_heads: int, seed: int) -> Components:
    """Draw a circuit of the same shape: as many heads in each layer, and as many MLPs in any layers, but never the circuit itself.

    Where every layer has all or none of its heads, so that no layer has others to offer, the numbers of heads are dealt to the layers anew. Heads that
    share a key/value head cost less than heads that do not, so with grouped queries the trainable parameters at equal rank can differ a little.

    Raises:
        SettingsError: There is no other circuit of that shape: it has all heads or none, and all MLPs or none.
    """
    if len(circuit.heads) in (0, n_layers * n_heads) and len(circuit.mlps) in (0, n_layers):
        raise SettingsError(
            f"a random circuit needs another choice than the {len(circuit.heads)} heads and {len(circuit.mlps)} MLPs of circuit {circuit}, which are "
            "all or none of the model's: give a smaller circuit, or leave the strategy random_circuit out"
        )
    counts = [sum(number == layer for number, _ in circuit.heads) for layer in range(n_layers)]
    movable = any(0 < count < n_heads for count in counts)
    generator = random.Random(f"random circuit {seed}")
    while True:
        dealt = counts if movable else generator.sample(counts, n_layers)
        heads = [(layer, head) for layer, count in enumerate(dealt) for head in generator.sample(range(n_heads), count)]
        drawn = Components(tuple(heads), tuple(generator.sample(range(n_layers), len(circuit.mlps))))
        if drawn != circuit:
            return drawn


def critical_layers(graph: Graph, before: Float[np.ndarray, " edge"], after: Float[np.ndarray, " edge"], *, number: int) -> Components:
    """Return the layers whose edges changed most, by which CircuitLoRA (arXiv 2502.11812) gives rank.

    An edge counts for the layer that sends it, as in the authors' code; edges from the embedding count for layer 0. It is a sum, so early layers,
    which send more edges, are favoured.

    Args:
        graph: The edges.
        before: Score of every edge before fine-tuning; NaN where it was not scored, which counts as no change.
        after: The same after fine-tuning.
        number: How many layers.

    Raises:
        SettingsError: There are no scores for each edge, or not that many layers.
    """
    if before.shape != (len(graph),) or after.shape != (len(graph),):
        raise SettingsError(
            f"the edge scores have shapes {before.shape} and {after.shape}, but this model has {len(graph):,} edges: score each"
        )
    if not 0 < number <= graph.n_layers:
        raise SettingsError(f"{number} critical layers cannot be chosen of {graph.n_layers}: choose from 1 to {graph.n_layers}")
    change = np.nan_to_num(np.abs(after - before))
    sender_layers = np.maximum(graph.layer_of(graph.senders), 0)
    sums = np.bincount(sender_layers[graph.edges[:, 0]], weights=change, minlength=graph.n_layers)
    return Components.of_layers(np.argsort(-sums, kind="stable")[:number])


def read_circuit(text: str, subject: Any) -> Components:
    """Return the heads and MLPs of a circuit given by name or by file.

    The file may come from the base or from a model fine-tuned from it: only the shape of the model has to agree.

    Args:
        text: For example `"a3.h5,m3"`, or the path of a circuit file in the JSON format of MIB and EAP-IG, which ends in `.json`.
        subject: The `Subject` that the circuit is in.

    Raises:
        SettingsError: The text is not understood, or names what the model lacks.
        DataError: The file cannot be read, is of another model, or holds a circuit without heads and MLPs.
    """
    if not text.endswith(".json"):
        return Components.parse(text).validate(subject.anatomy)
    circuit, _ = from_json(text, Graph.of(subject))
    components = circuit.components()
    if not len(components):
        raise DataError(f"circuit file {text!r} has no edge at a head or MLP, so there is nothing to adapt: give a larger circuit")
    return components
