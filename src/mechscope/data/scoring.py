"""Texts and the metric they are judged by: batches, one number per text, and runs of many units over them.

Every technique that changes a model and reads a metric goes through here; tables and intervals are made of these numbers elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mechscope import ranks
from mechscope.data.metrics import Loss, Metric, pair_metric, read_at
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.errors import DataError, ModelError, SettingsError
from mechscope.instrument import CachedRun, Reading, unembed
from mechscope.instrument.execution import Execution
from mechscope.instrument.rerun import TOKENS_PER_PASS, Unit
from mechscope.instrument.texts import Loop, over_texts
from mechscope.instrument.walk import next_token_losses
from mechscope.shapes import short
from mechscope.subject import Subject
from mechscope.subject.placement import index_for, sent

# rows of logits held at once: 256 × 50,257 × 4 bytes are 49 MiB
_ROWS = 256

T = TypeVar("T")
# what is done with a batch: by name, values whose last axis is its texts
Work = Callable[[PairBatch], Mapping[str, np.ndarray]]


def batches(pairs: Pairs, tokens_per_batch: int) -> Iterator[PairBatch]:
    """Yield batches padded on the right, which needs no mask under a causal pattern.

    Raises:
        SettingsError: There are no pairs.
    """
    if not len(pairs):
        raise SettingsError("there are no pairs to run: give at least one")
    yield from pairs.batches(tokens_per_batch=tokens_per_batch, padding="right")


def check_fits(subject: Subject, pairs: Pairs) -> None:
    """Refuse texts that the model cannot read.

    Raises:
        DataError: A text is longer than the model's positions, or holds a token outside its vocabulary.
    """
    for pair in pairs:
        if len(pair.clean) > subject.anatomy.max_positions:
            raise DataError(
                f"pair {pair.id!r} has {len(pair.clean):,} tokens, the model reads {subject.anatomy.max_positions:,}: shorten it"
            )
        highest = max((*pair.clean, *pair.corrupt, *pair.answers, *pair.wrong_answers))
        if highest >= subject.anatomy.vocab_size:
            raise DataError(
                f"pair {pair.id!r} holds token {highest}, the model's vocabulary has {subject.anatomy.vocab_size:,}: "
                "was it made with another tokenizer?"
            )


def score(subject: Subject, hidden: Float[Tensor, "units read d_model"], metric: Metric) -> Float[Tensor, "units batch"]:
    """Return a metric from rows of the last residual stream; logits are held a few rows at a time."""
    units, read, _ = hidden.shape
    if isinstance(metric, Loss) and not (torch.is_grad_enabled() and hidden.requires_grad):
        return metric.mean(next_token_losses(subject, hidden, sent(metric.target, hidden.device).expand(units, read)))
    per_row = hidden.new_empty(units, read)
    at_once = max(1, _ROWS // read)
    for first in range(0, units, at_once):
        for start in range(0, read, _ROWS):
            rows = slice(start, min(start + _ROWS, read))
            per_row[first : first + at_once, rows] = metric.score(unembed(subject, hidden[first : first + at_once, rows]), rows)
    return metric.mean(per_row)


def differentiable_score(subject: Subject, rows: Float[Tensor, "read d_model"], metric: Metric) -> Float[Tensor, " batch"]:
    """Return a metric per text from the rows it reads; logits of many rows are made again in the backward pass instead of being held until then."""
    if len(rows) <= _ROWS:
        return score(subject, rows[None], metric)[0]
    starts = range(0, len(rows), _ROWS)
    parts = [
        checkpoint(partial(_scored_rows, subject, metric, start), part, use_reentrant=False, preserve_rng_state=False)
        for start, part in zip(starts, rows.split(_ROWS), strict=True)
    ]
    return metric.mean(torch.cat(parts))


def _scored_rows(subject: Subject, metric: Metric, start: int, rows: Tensor) -> Tensor:
    return metric.score(unembed(subject, rows), slice(start, start + len(rows)))


class Runs:
    """One batch's runs of a model: a `base` run, the `metric` of the rows that it reads (`reading`), and reruns with changes."""

    def __init__(self, base: CachedRun, metric: Metric) -> None:
        """Bind a metric to a run."""
        self.base = base
        self.metric = metric
        self.reading = Reading.of(metric.where)

    @torch.no_grad()
    def unchanged(self) -> np.ndarray:
        """Return the metric of the base run, one number per text."""
        return _array(score(self.base.subject, self.base.read(self.reading)[None], self.metric)[0])

    @torch.no_grad()
    def of(
        self, units: Sequence[Unit], *, tokens_per_pass: int = TOKENS_PER_PASS, progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Return the metric of every unit's run, (units, batch)."""
        return fetched(self.launch(units, tokens_per_pass=tokens_per_pass, progress=progress))

    @torch.no_grad()
    def launch(
        self, units: Sequence[Unit], *, tokens_per_pass: int = TOKENS_PER_PASS, progress: Callable[[int], None] | None = None
    ) -> Float[Tensor, "units batch"]:
        """Return the metric of every unit's run while a device may still work on it, for `fetched`."""
        order: list[int] = []
        scores = []
        for indices, hidden in self.base.rerun(units, self.reading, tokens_per_pass=tokens_per_pass):
            scores.append(score(self.base.subject, hidden, self.metric))
            order += indices
            if progress is not None:
                progress(len(indices))
        if not scores:
            return torch.empty(0, self.base.batch)
        whole = torch.cat(scores)
        return whole[index_for(np.argsort(order).tolist(), whole)]

    @torch.no_grad()
    def resumed(self, layer: int) -> Float[Tensor, " batch"]:
        """Return the metric when the model runs from a layer on as it is now: −1 for the embedding, the number of blocks for what follows them.

        For weights that were changed from that layer on. A device may still work on it.
        """
        return score(self.base.subject, self.base.resume(layer, self.reading)[None], self.metric)[0]


def fetched(values: Float[Tensor, "*shape"], *, of: str = "a changed run") -> Float[np.ndarray, "*shape"]:
    """Wait for the metric of runs; once for all that were launched, as every wait leaves the device without work.

    Raises:
        ModelError: Values are not finite; the message names the runs by `of`.
    """
    array = _array(values)
    if not np.isfinite(array).all():
        raise ModelError(f"{of} gave values that are NaN or infinite: the model's type is too narrow for it, try dtype float32")
    return array


@torch.no_grad()
def metric_of(name: str, batch: PairBatch, reference: CachedRun | None) -> Metric:
    """Build a batch's metric, one of `mechscope.data.metrics.METRICS`; `kl` compares with a reference run, that of the clean texts."""
    if name != "kl" or reference is None:
        return pair_metric(name, batch)
    rows = reference.read(Reading.of(read_at(name, batch)))
    logits = torch.cat([unembed(reference.subject, part) for part in rows.split(_ROWS)])
    return pair_metric(name, batch, logits)


class PerText:
    """What work makes of each text, put back into the order of the pairs; several ranks share the batches.

    For numbers; tables and other values are brought together by `per_text`.
    """

    def __init__(self, pairs: Pairs) -> None:
        """Remember the texts."""
        self._pairs = pairs
        self._values: dict[str, np.ndarray] = {}
        self._own: list[int] = []
        self._dealt = False
        self._whole: set[str] = set()
        self._loop: Loop[PairBatch]

    def __repr__(self) -> str:
        held = ", ".join(f"{name} {short(values)}" for name, values in self._values.items())
        texts = f"{len(self._pairs)} text{'s' * (len(self._pairs) != 1)}"
        return f"PerText({texts}: {held})" if held else f"PerText({texts})"

    def run(self, work: Work, execution: Execution, *, tokens: int, label: str = "", units: int = 1) -> None:
        """Work on this rank's share of the batches and keep the values; a batch that does not fit into memory is halved, see `over_texts`.

        Args:
            work: Returns, by name, values whose last axis is a batch's texts; begun again with half of the batch where memory runs out, so it may
                leave nothing behind until it returns.
            execution: Tokens of a batch, progress (units × texts, of all ranks about).
            tokens: Tokens of a batch where `execution` says nothing.
            label: What progress is called.
            units: How many things are done to each text; work may report them one by one (`step`).

        Raises:
            SettingsError: There are no pairs.
            RunError: Not even half of a batch, or a single text, fits into memory.
        """
        self._dealt = True
        self._loop = Loop(self._pairs, execution, tokens=tokens, label=label, units=units, dealt=True)
        for batch, results in self._loop.run(work):
            for name, values in results.items():
                self.put(name, batch, values)
            self._own += batch.indices

    def step(self, number: int) -> None:
        """Report, from within work, that so many more of its units are done."""
        self._loop.step(number)

    def put(self, name: str, batch: PairBatch, values: np.ndarray) -> None:
        """Keep values whose last axis is a batch's texts."""
        whole = self._values.setdefault(name, np.full((*values.shape[:-1], len(self._pairs)), np.nan))
        whole[..., list(batch.indices)] = values

    def __getitem__(self, name: str) -> np.ndarray:
        """Return what was put under a name, of all texts; all ranks ask for the same names in the same order."""
        if self._dealt and ranks.size() > 1 and name not in self._whole:
            self._whole.add(name)
            own = self._values.get(name)
            parts = ranks.exchange((self._own, None if own is None else own[..., self._own]))
            # a rank without batches has put nothing
            shape = next(part.shape[:-1] for _, part in parts if part is not None)
            whole = self._values[name] = np.full((*shape, len(self._pairs)), np.nan)
            for places, part in parts:
                if part is not None:
                    whole[..., places] = part
        return self._values[name]


def per_text(pairs: Pairs, work: Callable[[PairBatch], Sequence[T]], execution: Execution, *, tokens: int, label: str = "") -> list[T]:
    """Return one thing for each text (a table, a reading), in the order of the pairs; several ranks share the batches.

    Args:
        pairs: The texts.
        work: Returns one thing for each row of a batch; begun again with half of it where memory runs out, so it may leave nothing behind.
        execution: Tokens of a batch, progress.
        tokens: Tokens of a batch where `execution` says nothing.
        label: What progress is called.

    Raises:
        SettingsError: There are no pairs.
        RunError: Not even half of a batch, or a single text, fits into memory.
    """
    own: dict[int, T] = {}
    for batch, results in over_texts(pairs, work, execution, tokens=tokens, label=label, dealt=True):
        own |= zip(batch.indices, results, strict=True)
    whole = {index: result for part in ranks.exchange(own) for index, result in part.items()}
    return [whole[index] for index in range(len(pairs))]


def _array(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()
