"""The attribution graph of a prompt: what each active latent, each error and each token adds to every later latent and to the likeliest logits.

1. `FrozenRun`: the prompt's run; patterns and scales of norms are held.
2. `Replacement`: active latents, errors, constants.
3. Rows of the logits: their edges (`Backward`).
4. Rows of latents, a block at a time. Where not all are wanted, those that matter most to the logits so far come first (Ameisen et al. 2025, §3.2.2).
5. The graph: nodes, sparse edges. Of latents without a row the effects are kept as one number of each target, so that its sum stays whole.

    value of a target = Σ edges + bias + rest
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import sparse
from torch import Tensor

from mechscope.errors import SettingsError
from mechscope.features.dictionary import Dictionary
from mechscope.features.graphs.edges import TOKENS_PER_BLOCK, Backward, Rows, frozen_direction
from mechscope.features.graphs.frozen import FrozenRun
from mechscope.features.graphs.influence import influence, normalised
from mechscope.features.graphs.replacement import Replacement
from mechscope.instrument import Execution
from mechscope.settings.graph import GraphSettings
from mechscope.shapes import by_shape
from mechscope.subject import Subject

KINDS = ("latent", "error", "token", "logit")


@dataclass(frozen=True)
class AttributionGraph:
    """The graph of one prompt, not pruned.

    Attributes:
        nodes: One row per node: latents (by layer and position), errors, tokens, logits. `node` (`m3.f1024@5`, `m3.error@5`, `embed@5`, `logits.t262@5`),
            `kind`, `component`, `layer` (−1 for tokens, the number of layers for logits), `position`, `index` (of a latent in its group, of a token in the
            vocabulary), `value` (f; of logits the logit less the mean, before a soft cap; else NaN), `probability` (of logits), `bias` and `rest` (what
            constants, and latents without a row, bring to a target; 0 for others).
        edges: ``(node, node)``: what a source (column) adds to a target (row); rows of errors and tokens are empty.
        weights: ``(node)``: the logits' probabilities, 0 for others.
        ids: The prompt.
        layers: Number of blocks.
        first: Tokens at the beginning at which MLPs count as constants.
        latents: Active latents that were found.
        without: Layers that no dictionary writes.
        rows: ``(node)``: of latents, their place among all active ones; −1 for others.
        replacement: What it was made of, for interventions.
    """

    nodes: pd.DataFrame
    edges: sparse.csr_matrix
    weights: np.ndarray
    ids: tuple[int, ...]
    layers: int
    first: int
    latents: int
    without: tuple[int, ...]
    rows: np.ndarray
    replacement: Replacement = field(repr=False)

    __repr__ = by_shape

    def where(self, kind: str) -> np.ndarray:
        """Return the numbers of the nodes of a kind."""
        return np.flatnonzero(self.nodes["kind"] == kind)


def attribution_graph(
    subject: Subject,
    dictionaries: Mapping[str, Dictionary],
    ids: Sequence[int],
    *,
    settings: GraphSettings | None = None,
    other_model: bool = False,
    execution: Execution = Execution(),
) -> AttributionGraph:
    """Attribute the likeliest next tokens of a prompt, and the latents behind them, to what was written before.

    Args:
        subject: The model.
        dictionaries: Transcoders of layers, or a cross-layer transcoder, by any name. A layer without one has errors alone.
        ids: The prompt.
        settings: Which logits, how many latents, which tokens count as constants; None for the defaults.
        other_model: Allow dictionaries of a model with other weights.
        execution: Tokens times targets of a block, progress.

    Raises:
        SettingsError: The prompt or a dictionary does not fit.
        ModelError: The model cannot be taken apart, or a dictionary is another model's.
    """
    settings = settings or GraphSettings()
    if not settings.first < len(ids):
        raise SettingsError(
            f"the prompt has {len(ids)} tokens, and at the first {settings.first} MLPs count as constants: give a longer prompt, or a smaller 'first'"
        )
    run = FrozenRun(subject, ids)
    replacement = Replacement(run, dictionaries, first=settings.first, other_model=other_model)
    backward = Backward(replacement, tokens_per_block=execution.tokens(TOKENS_PER_BLOCK))
    chosen, probabilities = likeliest(run, settings.logits, settings.probability)
    directions, constants = frozen_direction(run, chosen)
    of_logits = backward.logits(directions)
    table = _Table(backward.sources, len(replacement), probabilities)
    table.add(np.arange(len(chosen)) + backward.sources, of_logits)
    most = min(settings.latents, len(replacement))
    everyone = torch.arange(len(replacement), device=run.embedding.device)
    while table.known < most:
        wanted = everyone if most == len(everyone) else everyone.new_tensor(table.next(most))
        for block in backward.blocks(wanted):
            table.add(block.cpu().numpy(), backward.latents(block))
            execution.told("edges", table.known, most)
    values = [replacement.value, (run.last @ directions.T) + constants]
    offsets = torch.cat([replacement.constants, constants]).cpu().double().numpy()
    return _assembled(replacement, table, chosen, probabilities, torch.cat(values).cpu().double().numpy(), offsets)


def likeliest(run: FrozenRun, count: int, probability: float) -> tuple[Tensor, Tensor]:
    """Return the likeliest next tokens until their probabilities add up to `probability`, at most `count`, and their probabilities."""
    logits = run.readout.capped(run.readout.logits(run.last[None]).to(run.dtype))[0]
    top = logits.softmax(-1).topk(min(count, len(logits)))
    most = int((top.values.cumsum(0) < probability).sum()) + 1
    return top.indices[:most], top.values[:most].to(run.embedding.device)


class _Table:
    """Rows as they are found: sparse, because a target has edges from what stands before it alone."""

    def __init__(self, sources: int, latents: int, probabilities: Tensor) -> None:
        self._sources, self._latents = sources, latents
        self._probabilities = probabilities.cpu().double().numpy()
        self.targets: list[np.ndarray] = []
        self._rows: list[sparse.csr_matrix] = []
        self._biases: list[np.ndarray] = []
        self._done = np.zeros(latents, dtype=bool)

    @property
    def known(self) -> int:
        """Latents with a row."""
        return int(self._done.sum())

    def add(self, targets: np.ndarray, rows: Rows) -> None:
        """Take the rows of some targets; logits are numbered behind all sources."""
        self.targets.append(targets)
        self._rows.append(sparse.csr_matrix(rows.edges.cpu().numpy()))
        self._biases.append(rows.bias.cpu().double().numpy())
        self._done[targets[targets < self._latents]] = True

    def whole(self) -> tuple[sparse.csr_matrix, np.ndarray]:
        """Return all edges ``(source and logit, source)`` and the biases, in order; rows that are not known are empty."""
        targets = np.concatenate(self.targets)
        size = self._sources + len(self._probabilities)
        rows, bias = sparse.vstack(self._rows, format="coo"), np.zeros(size)
        bias[targets] = np.concatenate(self._biases)
        return sparse.csr_matrix((rows.data, (targets[rows.row], rows.col)), shape=(size, self._sources)), bias

    def next(self, most: int) -> np.ndarray:
        """Return the latents without a row that matter most to the logits by the rows that are known, a share of what is still wanted at a time."""
        edges, _ = self.whole()
        size = edges.shape[0]
        weights = np.zeros(size)
        weights[self._sources :] = self._probabilities
        edges.resize(size, size)
        reached = influence(normalised(edges), weights)[: self._latents]
        open_ = np.flatnonzero(~self._done)
        order = open_[np.argsort(-reached[open_], kind="stable")]
        # in four rounds or more, each of which ranks anew
        return order[: min(most - self.known, max(_ROUND, most // 4))]


# latents of a round at least, where not all get a row
_ROUND = 256


def _assembled(
    replacement: Replacement, table: _Table, chosen: Tensor, probabilities: Tensor, values: np.ndarray, offsets: np.ndarray
) -> AttributionGraph:
    """Put nodes and edges in order; latents without a row leave, and what they bring is added up."""
    run, latents, tokens, logits = replacement.run, len(replacement), len(replacement.run.ids), len(chosen)
    edges, bias = table.whole()
    layers, sources = len(replacement.written), edges.shape[1]
    known = np.flatnonzero(table._done)
    errors = [layer * tokens + at for layer in range(layers) for at in range(replacement.first, tokens)]
    kept = np.concatenate([known, latents + np.array(errors, dtype=np.int64), np.arange(sources - tokens, sources)])
    left = np.setdiff1d(np.arange(latents), known)
    targets = np.concatenate([known, np.arange(sources, edges.shape[0])])
    rest = np.zeros(edges.shape[0])
    rest[targets] = np.asarray(edges[targets][:, left].sum(axis=1, dtype=np.float64)).ravel()
    own = np.concatenate([kept, np.arange(sources, edges.shape[0])])
    of_value, of_bias = np.full(len(own), np.nan), bias
    of_value[: len(known)], of_value[len(own) - logits :] = values[known], values[latents:]
    of_bias[known] += offsets[known]
    of_bias[sources:] += offsets[latents:]
    names, ids = replacement.names(), list(run.ids)
    layer, position, index = (part.cpu().numpy() for part in (replacement.layer, replacement.position, replacement.index))
    at, last = position[known], tokens - 1
    above = (f"m{each // tokens}" for each in errors)
    component = [*(names[each] for each in known), *above, *["embed"] * tokens, *["logits"] * logits]
    places = np.concatenate([at, np.array(errors, dtype=np.int64) % tokens, np.arange(tokens), np.full(logits, last)])
    nodes = pd.DataFrame(
        {
            "kind": np.repeat(KINDS, [len(known), len(errors), tokens, logits]),
            "component": component,
            "layer": np.concatenate(
                [layer[known], np.array(errors, dtype=np.int64) // tokens, np.full(tokens, -1), np.full(logits, layers)]
            ),
            "position": places,
            "index": np.concatenate([index[known], np.full(len(errors), -1), ids, chosen.cpu().numpy()]),
            "value": of_value,
            "probability": np.concatenate([np.full(len(own) - logits, np.nan), probabilities.cpu().double().numpy()]),
            "bias": of_bias[own],
            "rest": rest[own],
        }
    )
    nodes.insert(0, "node", [_name(row) for row in nodes.to_dict("records")])
    inner = edges[own][:, kept].tocoo()
    square = sparse.csr_matrix((inner.data, (inner.row, inner.col)), shape=(len(own), len(own)))
    weights = np.nan_to_num(nodes["probability"].to_numpy())
    rows = np.full(len(own), -1)
    rows[: len(known)] = known
    return AttributionGraph(nodes, square, weights, run.ids, layers, replacement.first, latents, replacement.without, rows, replacement)


def _name(row: Mapping[Any, Any]) -> str:
    behind = {"latent": "", "error": ".error", "token": "", "logit": f".t{row['index']}"}[row["kind"]]
    return f"{row['component']}{behind}@{row['position']}"


def sums(graph: AttributionGraph) -> Float[np.ndarray, " node"]:
    """Return Σ edges + bias + rest of every node: of latents and logits their value."""
    return np.asarray(graph.edges.sum(axis=1, dtype=np.float64)).ravel() + graph.nodes["bias"].to_numpy() + graph.nodes["rest"].to_numpy()
