"""Automatic circuit discovery: close one edge after the other and leave it closed where nothing much happens (ACDC; Conmy et al. 2023, 2304.14997).

Receivers are visited from the logits back to the first layer, and a receiver's edges from the latest sender to the earliest, as in the authors' code:
the MLP before the heads of its layer; of the heads all queries, then keys, then values; the last head first. With C the edges that are still in,

    m(C − edge) − m(C) < τ   the edge leaves C        m: mean over all texts of KL(p_model ‖ p_C), which is 0 for the whole model

and |m(C − edge) − m(C)| for any other metric. A node that no remaining edge leads from to the logits loses its incoming edges untested.

The threshold sweep is one search: thresholds whose circuits are still equal share their trials, those that have parted run side by side. A greedy
search promises little: a higher threshold need not give a subset of a lower one's circuit, nor fewer edges, and another order gives another circuit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechscope import ranks
from mechscope.circuits.forward import CircuitRuns
from mechscope.circuits.graph import Circuit, Graph
from mechscope.circuits.scores import Cost, EdgeScores
from mechscope.circuits.sender_outputs import Source, require_source, source_name
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import batches, check_fits
from mechscope.errors import SettingsError
from mechscope.instrument.execution import Execution
from mechscope.instrument.memory import each
from mechscope.shapes import by_shape
from mechscope.subject import Subject

# the mean metric over all texts of some edge sets
_Measure = Callable[[Bool[np.ndarray, "units edge"]], Float[np.ndarray, " units"]]


@dataclass(frozen=True)
class AcdcResult:
    """The circuits of a sweep.

    Attributes:
        thresholds: In rising order, in the metric's unit.
        circuits: One per threshold. Edges that were not candidates are in all of them.
        values: Mean metric of each circuit, each edge outside it carrying the source's value.
        clean: Mean metric of the whole model.
        scores: For every edge the largest threshold whose circuit has it, 0 if none has; NaN for edges that were no candidates. Unsigned: large means
            important. There are no scores per text, because a decision needs all texts.
    """

    thresholds: tuple[float, ...]
    circuits: tuple[Circuit, ...]
    values: Float[np.ndarray, " threshold"]
    clean: float
    scores: EdgeScores

    __repr__ = by_shape

    def __getitem__(self, threshold: float) -> Circuit:
        """Return the circuit of one of the thresholds."""
        return self.circuits[self.thresholds.index(threshold)]

    def table(self) -> pd.DataFrame:
        """Return one row per threshold: `threshold`, `edges`, `share` of all edges, `metric` and its `change` from the whole model."""
        sizes = np.array([len(circuit) for circuit in self.circuits])
        columns = {"threshold": self.thresholds, "edges": sizes, "share": sizes / len(self.scores.graph)}
        return pd.DataFrame({**columns, "metric": self.values, "change": self.values - self.clean})


def acdc(
    subject: Subject,
    pairs: Pairs,
    *,
    thresholds: Sequence[float],
    metric: str = "kl",
    source: Source = "corrupt",
    edges: Sequence[str] | Circuit | None = None,
    execution: Execution = Execution(),
) -> AcdcResult:
    """Find the circuits of several thresholds.

    Every candidate edge costs one pass over all texts for each different circuit that the thresholds have come to, at most edges × thresholds; the layers
    before the receiver are whole and are not run. Threshold 0 keeps every edge and infinity removes every candidate, neither by a trial. An edge
    that changes nothing at all leaves at every threshold above 0; rounding lets it change about 1e-16 in float64 and 1e-7 in float32, so choose
    thresholds well above that.

    What every head and MLP writes is held for all texts throughout (senders × tokens × d_model numbers), since every decision needs all texts: memory
    grows with them. Several ranks share them, batch by batch, so each holds its share only. Reruns go batch by batch, and a batch that does not fit is
    run in halves from then on.

    Args:
        subject: The model.
        pairs: Clean and corrupt prompts.
        thresholds: Each at least 0, in the metric's unit (nats for `kl` and `loss`).
        metric: `kl` counts only rises; for `logit-diff`, `probability` and `loss` a change in either direction counts.
        source: What an edge outside the circuit carries: the `corrupt` run's value, `zero`, means (`SenderOutputs.mean_over`), or another model's value.
        edges: Candidates, by name or as a circuit; None for all. Others stay in.
        execution: Tokens of a batch (512 by default), progress.

    Raises:
        SettingsError: There are no thresholds, one is negative or not a number, or the candidates are not this model's edges.
        MechscopeError: Pairs, metric or source do not fit the model or each other.
    """
    levels = _levels(thresholds)
    graph = Graph.of(subject)
    candidates = _candidates(graph, edges)
    check_fits(subject, pairs)
    require_source(pairs, source)
    texts = _Texts(pairs, lambda batch: CircuitRuns(subject, batch, metric, source=source), execution.tokens(512))

    def measure(sets: Bool[np.ndarray, "units edge"]) -> Float[np.ndarray, " units"]:
        wanted = torch.from_numpy(sets)
        return texts.mean(lambda runs: runs.run(wanted), units=len(sets))

    clean = float(texts.mean(lambda runs: runs.clean[None], units=1)[0])
    search = _Search(graph, candidates, levels, clean, rises_only=metric == "kl")
    inside = search.run(measure, execution)
    survived = np.where(inside, levels[:, None], 0.0).max(0)
    notes = {"metric": metric, "source": source_name(source), "thresholds": levels.tolist(), "trials": search.trials}
    notes["score"] = "largest threshold that the edge survives; unsigned"
    # the clean and the source's run, then the layers that trials ran
    cost = Cost(forward=2 + search.passes, backward=0)
    scores = EdgeScores(graph, np.where(candidates, survived, np.nan), None, "acdc", cost, notes)
    return AcdcResult(tuple(levels.tolist()), tuple(Circuit(graph, one) for one in inside), search.values, clean, scores)


class _Ready:
    """A batch and its runs, which are prepared when they are first needed: so what does not fit into memory can still be halved."""

    def __init__(self, batch: PairBatch, prepare: Callable[[PairBatch], CircuitRuns]) -> None:
        self._batch, self._prepare = batch, prepare

    def __len__(self) -> int:
        return len(self._batch)

    @cached_property
    def runs(self) -> CircuitRuns:
        return self._prepare(self._batch)

    def halves(self) -> tuple[_Ready, _Ready]:
        # the whole makes room for its halves
        self.__dict__.pop("runs", None)
        first, second = self._batch.halves()
        return _Ready(first, self._prepare), _Ready(second, self._prepare)


class _Texts:
    """All texts: this rank's batches stay ready, and its measurements are joined with those of the others."""

    def __init__(self, pairs: Pairs, prepare: Callable[[PairBatch], CircuitRuns], tokens_per_batch: int) -> None:
        every = list(batches(pairs, tokens_per_batch))
        places = np.split(np.arange(len(pairs)), np.cumsum([len(batch) for batch in every])[:-1])
        self._ready = [_Ready(batch, prepare) for batch in ranks.own(every)]
        # places of the ranks' texts, one rank after the other: halves stand where their batch stood
        self._order: Int[np.ndarray, " text"] = np.concatenate([place for own in ranks.exchange([*ranks.own(places)]) for place in own])

    def mean(self, of: Callable[[CircuitRuns], Float[Tensor, "units batch"]], *, units: int) -> Float[np.ndarray, " units"]:
        """Return the mean over all texts, the same on every rank and, to the last bit, for every number of ranks."""
        results = list(each(lambda ready: (ready, of(ready.runs).double().cpu().numpy()), self._ready))
        self._ready = [ready for ready, _ in results]
        # a rank may have no batch
        own = np.concatenate([np.empty((units, 0)), *(values for _, values in results)], axis=1)
        whole = np.empty((units, len(self._order)))
        whole[:, self._order] = np.concatenate(ranks.exchange(own), axis=1)
        return whole.mean(1)


def _candidates(graph: Graph, edges: Sequence[str] | Circuit | None) -> Bool[np.ndarray, " edge"]:
    if edges is None:
        return np.ones(len(graph), dtype=bool)
    chosen = edges if isinstance(edges, Circuit) else Circuit.of(graph, edges)
    if chosen.graph != graph:
        raise SettingsError(
            f"the candidates are of a model with {len(chosen.graph):,} edges, this one has {len(graph):,}: name this model's edges"
        )
    return chosen.edges


def _levels(thresholds: Sequence[float]) -> Float[np.ndarray, " threshold"]:
    if not len(thresholds):
        raise SettingsError("there are no thresholds: give at least one, such as 0.01")
    for threshold in thresholds:
        if math.isnan(threshold) or threshold < 0:
            raise SettingsError(f"threshold {threshold} cannot be used: give the largest change that may be ignored, 0 or more")
    return np.unique(np.asarray(thresholds, dtype=np.float64))


def _visits(graph: Graph) -> Iterator[int]:
    """Yield the receivers in the order of the search: an order in which none reads what a later one belongs to."""
    yield len(graph.receivers) - 1
    for layer in reversed(range(graph.n_layers)):
        yield graph.mlp_reader(layer)
        readers = graph.readers_of(layer)
        for start in range(readers.start, readers.stop, graph.n_heads):
            yield from reversed(range(start, start + graph.n_heads))


class _Search:
    """One circuit per threshold, growing smaller.

    Attributes:
        inside: The circuits.
        values: Their mean metric.
        trials: Circuits that were run.
        passes: The same in whole forward passes: the layers before the receiver are not run.
    """

    def __init__(
        self,
        graph: Graph,
        candidates: Bool[np.ndarray, " edge"],
        levels: Float[np.ndarray, " threshold"],
        clean: float,
        *,
        rises_only: bool,
    ) -> None:
        """Begin with the whole model at every threshold."""
        self.graph, self.candidates, self.levels, self.rises_only = graph, candidates, levels, rises_only
        self.depth = graph.layer_of(graph.receivers)
        self.inside = np.ones((len(levels), len(graph)), dtype=bool)
        self.values = np.full(len(levels), clean)
        self.trials, self.passes = 0, 0.0

    def run(self, measure: _Measure, execution: Execution) -> Bool[np.ndarray, "threshold edge"]:
        """Visit every candidate edge and return the circuits."""
        free = np.isinf(self.levels)
        self.inside[np.ix_(free, self.candidates)] = False
        undecided = np.flatnonzero((self.levels > 0) & ~free)
        # (sender, receiver) matrix of the edges' places in the order
        places = self.graph.matrix(np.arange(len(self.graph)), fill=-1)
        done, total = 0, int(self.candidates.sum())
        for receiver in _visits(self.graph):
            column = places[:, receiver][::-1]
            incoming = column[column >= 0]
            incoming = incoming[self.candidates[incoming]]
            connected = np.array([at for at in undecided if self._reaches_logits(int(at), receiver)], dtype=np.int64)
            self.inside[np.ix_(np.setdiff1d(undecided, connected), incoming)] = False
            for place in incoming if len(connected) else ():
                self._try_without(int(place), connected, measure)
            done += len(incoming)
            if len(incoming):
                execution.told("closing edges", done, total)
        if free.any():
            self.values[free] = measure(self.inside[free][:1])
            self.trials, self.passes = self.trials + 1, self.passes + 1
        return self.inside

    def _try_without(self, place: int, thresholds: np.ndarray, measure: _Measure) -> None:
        trials = self.inside[thresholds]
        trials[:, place] = False
        first: dict[bytes, int] = {}
        which = np.array([first.setdefault(trial.tobytes(), len(first)) for trial in trials])
        distinct = trials[[int(np.argmax(which == unit)) for unit in range(len(first))]]
        self.trials += len(distinct)
        self.passes += len(distinct) * (1 - self.depth[self.graph.edges[place, 1]] / self.graph.n_layers)
        value = measure(distinct)[which]
        change = value - self.values[thresholds]
        leaves = (change if self.rises_only else np.abs(change)) < self.levels[thresholds]
        self.inside[thresholds[leaves], place] = False
        self.values[thresholds[leaves]] = value[leaves]

    def _reaches_logits(self, at: int, receiver: int) -> bool:
        """Tell whether what a receiver reads can still change the logits."""
        owner = self.graph.owner[receiver]
        if owner == len(self.graph.senders):
            return True
        matrix = self.graph.matrix(self.inside[at])
        used = np.zeros(len(self.graph.senders) + 1, dtype=bool)
        used[-1] = True
        for sender in reversed(range(owner, len(self.graph.senders))):
            used[sender] = bool((matrix[sender] & used[self.graph.owner]).any())
        return bool(used[owner])
