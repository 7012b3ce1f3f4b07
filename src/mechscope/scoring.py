"""Texts and the metric they are judged by: batches, one number per text, and runs of many units over them.

Every technique that changes a model and reads a metric goes through here; tables and intervals are made of these numbers elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechscope import ranks
from mechscope.data.memory import each
from mechscope.data.metrics import Loss, Metric, pair_metric, read_at
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.errors import DataError, ModelError, SettingsError
from mechscope.instrument import Prefix, Reading, unembed
from mechscope.instrument.rerun import TOKENS_PER_PASS, Unit
from mechscope.instrument.walk import next_token_losses
from mechscope.progress import Progress
from mechscope.subject import Subject
from mechscope.subject.placement import index_for, sent

# rows of logits held at once: 256 × 50,257 × 4 bytes are 49 MiB
_ROWS = 256

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


class Runs:
    """One batch's runs of a model: the base run, its metric, and reruns of it.

    Attributes:
        prefix: The run that is changed.
        metric: What is measured.
        reading: The rows it reads.
    """

    def __init__(self, prefix: Prefix, metric: Metric) -> None:
        """Bind a metric to a run."""
        self.prefix = prefix
        self.metric = metric
        self.reading = Reading.of(metric.where)

    @torch.no_grad()
    def unchanged(self) -> np.ndarray:
        """Return the metric of the base run, one number per text."""
        return _array(score(self.prefix.subject, self.prefix.read(self.reading)[None], self.metric)[0])

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
        found = []
        for indices, hidden in self.prefix.rerun(units, self.reading, tokens_per_pass=tokens_per_pass):
            found.append(score(self.prefix.subject, hidden, self.metric))
            order += indices
            if progress is not None:
                progress(len(indices))
        if not found:
            return torch.empty(0, self.prefix.batch)
        whole = torch.cat(found)
        return whole[index_for(np.argsort(order).tolist(), whole)]

    @torch.no_grad()
    def resumed(self, layer: int) -> Float[Tensor, " batch"]:
        """Return the metric when the model runs from a layer on as it is now: −1 for the embedding, the number of blocks for what follows them.

        For weights that were changed from that layer on. A device may still work on it.
        """
        return score(self.prefix.subject, self.prefix.resume(layer, self.reading)[None], self.metric)[0]


def fetched(values: Float[Tensor, "*shape"], *, of: str = "a changed run") -> Float[np.ndarray, "*shape"]:
    """Wait for the metric of runs; once for all that were launched, as every wait leaves the device without work.

    Args:
        values: What was launched.
        of: What gave them, for the error.

    Raises:
        ModelError: Values are not finite.
    """
    found = _array(values)
    if not np.isfinite(found).all():
        raise ModelError(f"{of} gave values that are NaN or infinite: the model's type is too narrow for it, try dtype float32")
    return found


@torch.no_grad()
def metric_of(name: str, batch: PairBatch, reference: Prefix | None) -> Metric:
    """Build a batch's metric; `kl` compares with a reference run.

    Args:
        name: One of `mechscope.data.metrics.METRICS`.
        batch: The pairs.
        reference: The run of the clean texts; only `kl` needs it.
    """
    if name != "kl" or reference is None:
        return pair_metric(name, batch)
    rows = reference.read(Reading.of(read_at(name, batch)))
    logits = torch.cat([unembed(reference.subject, part) for part in rows.split(_ROWS)])
    return pair_metric(name, batch, logits)


class Gathered:
    """Per-text results of batches, put back into the order of the pairs; several ranks share the batches that `run` works on."""

    def __init__(self, pairs: Pairs) -> None:
        """Remember the order."""
        self._pairs = pairs
        self._place = {id(pair): index for index, pair in enumerate(pairs)}
        self._values: dict[str, np.ndarray] = {}
        self._own: list[int] = []
        self._dealt = False
        self._whole: set[str] = set()
        self._step: Callable[[int], None]

    def run(self, work: Work, tokens_per_batch: int, *, label: str = "", progress: Progress | None = None, units: int = 1) -> None:
        """Work on this rank's share of the batches and put what is found; a batch that does not fit into memory is halved, see `each`.

        Args:
            work: Returns, by name, values whose last axis is a batch's texts. Where memory runs out it is begun again with half of the batch, so
                until it returns it may leave nothing behind.
            tokens_per_batch: Most tokens of a batch, padding included.
            label: What progress is called.
            progress: Called with the label, what is done and how much there is: units × texts, of all ranks about.
            units: How many things are done to each text; work may tell of them one by one (`step`).

        Raises:
            SettingsError: There are no pairs.
            RunError: Not even half of a batch, or a single text, fits into memory.
        """
        self._dealt = True
        done, told, total = 0, 0, units * len(self._pairs)

        def tell(at: int) -> None:
            nonlocal told
            at = min(at * ranks.size(), total)  # the others have done about as much
            # less than before where work was begun again
            if progress is not None and at > told:
                told = at
                progress(label, at, total)

        def attempt(batch: PairBatch) -> tuple[PairBatch, Mapping[str, np.ndarray]]:
            at = done

            def step(number: int) -> None:
                nonlocal at
                at += number * len(batch)
                tell(at)

            self._step = step
            return batch, work(batch)

        for part, found in each(attempt, ranks.own(batches(self._pairs, tokens_per_batch))):
            for name, values in found.items():
                self.put(name, part, values)
            self._own += [self._place[id(pair)] for pair in part.pairs]
            done += units * len(part)
            tell(done)
        tell(total)  # a rank's own share may be the smaller one

    def step(self, number: int) -> None:
        """Tell, from within work, that so many more of its units are done."""
        self._step(number)

    def put(self, name: str, batch: PairBatch, values: np.ndarray) -> None:
        """Keep values whose last axis is a batch's texts."""
        whole = self._values.setdefault(name, np.full((*values.shape[:-1], len(self._place)), np.nan))
        whole[..., [self._place[id(pair)] for pair in batch.pairs]] = values

    def __getitem__(self, name: str) -> np.ndarray:
        """Return what was put under a name, of all texts; all ranks ask for the same names in the same order."""
        if self._dealt and ranks.size() > 1 and name not in self._whole:
            self._whole.add(name)
            own = self._values.get(name)
            parts = ranks.exchange((self._own, None if own is None else own[..., self._own]))
            # a rank without batches has put nothing
            shape = next(part.shape[:-1] for _, part in parts if part is not None)
            whole = self._values[name] = np.full((*shape, len(self._place)), np.nan)
            for places, part in parts:
                if part is not None:
                    whole[..., places] = part
        return self._values[name]


def _array(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()
