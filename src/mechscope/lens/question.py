"""A metric as weights on logits: which rows of the last residual stream are read, and in which direction.

    logit-diff      mean logit of the right answers after the last token − mean logit of the wrong ones
    target-logit    logit of a text's target tokens less the mean logit over the vocabulary, averaged over the target span; of a text without a
                    span, mean logit of its right answers after the last token less that mean

Without the mean taken off, a lone logit would say little: adding one number to all logits changes no probability. Both metrics are linear in the
logits, before any soft cap, so they have a direction in the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechscope.choices import LogitMetric
from mechscope.data.pairs import PairBatch, PromptPair
from mechscope.errors import DataError, SettingsError
from mechscope.instrument import Reading
from mechscope.instrument.readout import Readout

METRICS: tuple[str, ...] = get_args(LogitMetric)
# rows of logits, and of directions, held at once: 256 × 50,257 × 4 bytes are 49 MiB
ROWS = 256


@dataclass(frozen=True)
class Question:
    """A batch's metric as weights on logits: which rows of the last residual stream are read, and what is read from them.

    Attributes:
        reading: The rows, text by text.
        tokens: ``(read, most)``: whose logits are weighed.
        weights: ``(read, most)``: 0 where a row has fewer.
        centred: Whether the mean logit over the vocabulary is taken off.
        texts: How many there are; a text's metric is the mean of its rows.
    """

    reading: Reading
    tokens: Int[Tensor, "read most"]
    weights: Float[Tensor, "read most"]
    centred: bool
    texts: int

    @classmethod
    def of(cls, metric: str, batch: PairBatch) -> Question:
        """Weigh the logits of a batch's clean texts by a metric.

        Raises:
            MechscopeError: The metric is not known, or a pair lacks what it needs.
        """
        if metric not in METRICS:
            raise SettingsError(f"metric {metric!r} is no weighing of logits: direct logit attribution takes {' or '.join(METRICS)}")
        weighed_tokens = _logit_difference if metric == "logit-diff" else _target_logit
        rows = [(row, batch.shift(row) + at, weighed) for row, pair in enumerate(batch.pairs) for at, weighed in weighed_tokens(pair)]
        most = max(len(weighed) for *_, weighed in rows)
        tokens, weights = torch.zeros(len(rows), most, dtype=torch.int64), torch.zeros(len(rows), most, dtype=torch.float64)
        for index, (*_, weighed) in enumerate(rows):
            tokens[index, : len(weighed)] = torch.tensor([token for token, _ in weighed])
            weights[index, : len(weighed)] = torch.tensor([weight for _, weight in weighed], dtype=torch.float64)
        example, position = (torch.tensor([row[axis] for row in rows]) for axis in (0, 1))
        return cls(Reading(example, position), tokens, weights, metric == "target-logit", len(batch.pairs))

    def directions(self, readout: Readout, dtype: torch.dtype) -> tuple[Float[Tensor, "read d_model"], Float[Tensor, " read"]]:
        """Return what each row's metric reads from the residual stream, and its part that nothing wrote."""
        directions, constants = [], []
        weights = self.weights.to(readout.weight.device, dtype)
        for tokens, weight in zip(self.tokens.split(ROWS), weights.split(ROWS), strict=True):
            directions.append(torch.einsum("rm,rmd->rd", weight, readout.directions(tokens).to(dtype)))
            constants.append((weight * readout.constant(tokens).to(dtype)).sum(-1))
        direction, constant = torch.cat(directions), torch.cat(constants)
        if self.centred:
            mean, mean_constant = _mean_direction(readout, dtype)
            direction, constant = direction - mean, constant - mean_constant
        return direction, constant

    def score(self, logits: Float[Tensor, "some vocab"], rows: slice) -> Float[Tensor, " some"]:
        """Weigh some rows' logits."""
        tokens, weights = self.tokens[rows].to(logits.device), self.weights[rows].to(logits)
        scored = (logits.gather(-1, tokens) * weights).sum(-1)
        return scored - logits.mean(-1) if self.centred else scored

    def per_text(self, values: Float[Tensor, "read ..."]) -> Float[Tensor, "text ..."]:
        """Average the rows of each text."""
        example = self.reading.example.to(values.device)
        total = values.new_zeros(self.texts, *values.shape[1:]).index_add(0, example, values)
        return total / example.bincount(minlength=self.texts).view(-1, *[1] * (values.ndim - 1))


Weighed = list[tuple[int, float]]


def _logit_difference(pair: PromptPair) -> list[tuple[int, Weighed]]:
    for name, ids in (("right", pair.answers), ("wrong", pair.wrong_answers)):
        if not ids:
            raise DataError(f"pair {pair.id!r} names no {name} answer, which metric 'logit-diff' needs: add it, or use target-logit")
    right = [(token, 1 / len(pair.answers)) for token in pair.answers]
    return [(len(pair.clean) - 1, right + [(token, -1 / len(pair.wrong_answers)) for token in pair.wrong_answers])]


def _target_logit(pair: PromptPair) -> list[tuple[int, Weighed]]:
    if pair.target is not None:  # the row before a token predicts it
        return [(at - 1, [(pair.clean[at], 1.0)]) for at in range(*pair.target)]
    if not pair.answers:
        raise DataError(f"pair {pair.id!r} has neither a target span nor answers, whose logits metric 'target-logit' takes")
    return [(len(pair.clean) - 1, [(token, 1 / len(pair.answers)) for token in pair.answers])]


def _mean_direction(readout: Readout, dtype: torch.dtype) -> tuple[Float[Tensor, " d_model"], Float[Tensor, ""]]:
    """Return what the mean logit over the vocabulary reads, a few tokens at a time."""
    vocabulary = torch.arange(len(readout.weight))
    pieces = vocabulary.split(16 * ROWS)
    direction = torch.stack([readout.directions(tokens).to(dtype).sum(0) for tokens in pieces]).sum(0)
    constant = torch.stack([readout.constant(tokens).to(dtype).sum() for tokens in pieces]).sum()
    return direction / len(vocabulary), constant / len(vocabulary)
