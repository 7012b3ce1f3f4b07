"""What an intervention is judged by: one number per text, from the logits of a few rows.

Every metric says which tokens' next-token logits it reads, scores each such row, and averages a text's rows. All are differentiable, and none
needs logits anywhere else. Signs:

    logit-diff    mean logit of the right answers − mean logit of the wrong ones     higher: the right answer is favoured
    probability   summed probability of the right answers − that of the wrong ones    higher: the right answer is favoured
    loss          −log p of the text's target tokens (the summary), nats per token    lower: better
    kl            KL(p_reference ‖ p) to the reference run's next-token distribution   0: as in the reference run
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import kl_div

from mechscope.choices import MetricName
from mechscope.data.pairs import PairBatch, Pairs, collate_pairs
from mechscope.errors import DataError
from mechscope.subject.placement import sent

METRICS: tuple[str, ...] = get_args(MetricName)


class Metric(ABC):
    """A metric of one batch.

    Attributes:
        name: One of `METRICS`.
        where: ``(batch, token)``: the tokens whose next-token logits are read.
    """

    name: ClassVar[str]

    def __init__(self, where: Bool[Tensor, "batch token"]) -> None:
        self.where = where
        self.example = where.nonzero()[:, 0]
        if (empty := (~where.any(1)).nonzero().flatten()).numel():
            raise DataError(f"metric {self.name!r} reads no token of text {int(empty[0])} of the batch: every text needs one")

    @abstractmethod
    def score(self, logits: Float[Tensor, "*units some vocab"], rows: slice) -> Float[Tensor, "*units some"]:
        """Score some of the rows that are read, from their logits; `rows` says which of those that `where` marks, counted text by text."""

    def mean(self, scores: Float[Tensor, "*units read"]) -> Float[Tensor, "*units batch"]:
        """Average the rows of each text."""
        batch = len(self.where)
        total = scores.new_zeros(*scores.shape[:-1], batch).index_add(-1, sent(self.example, scores.device), scores)
        return total / sent(self.where.sum(1), total.device).to(total.dtype)

    def __call__(self, logits: Float[Tensor, "*units batch token vocab"]) -> Float[Tensor, "*units batch"]:
        """Compute the metric from whole logits."""
        rows = logits[..., self.where.to(logits.device), :]
        return self.mean(self.score(rows, slice(0, rows.shape[-2])))


class _Answers(Metric):
    """A metric of the right and wrong answers that may follow each text's last token."""

    def __init__(self, where: Bool[Tensor, "batch token"], answers: Sequence[Sequence[int]], wrong: Sequence[Sequence[int]]) -> None:
        super().__init__(where)
        self.answers, self.wrong = _table(answers), _table(wrong)

    def _pooled(self, values: Tensor, answers: tuple[Tensor, Tensor], rows: slice, *, mean: bool) -> Tensor:
        ids, weight = (sent(x[self.example[rows]], values.device) for x in answers)
        taken = values.gather(-1, ids.expand(*values.shape[:-1], -1)) * weight.to(values.dtype)
        return taken.sum(-1) / weight.sum(-1).clamp(min=1) if mean else taken.sum(-1)


class LogitDifference(_Answers):
    """Mean logit of the right answers minus mean logit of the wrong ones."""

    name = "logit-diff"

    def score(self, logits: Tensor, rows: slice) -> Tensor:
        """Subtract the means."""
        return self._pooled(logits, self.answers, rows, mean=True) - self._pooled(logits, self.wrong, rows, mean=True)


class Probability(_Answers):
    """Probability of the right answers minus that of the wrong ones."""

    name = "probability"

    def score(self, logits: Tensor, rows: slice) -> Tensor:
        """Subtract the sums."""
        p = logits.softmax(-1)
        return self._pooled(p, self.answers, rows, mean=False) - self._pooled(p, self.wrong, rows, mean=False)


class Loss(Metric):
    """Negative log probability of each text's target tokens, in nats per token."""

    name = "loss"

    def __init__(self, where: Bool[Tensor, "batch token"], input_ids: Int[Tensor, "batch token"]) -> None:
        """Score the prediction of the token after each marked one; the last column has none and is never marked."""
        super().__init__(where)
        self.target = input_ids[:, 1:][where[:, :-1].to(input_ids.device)]

    def score(self, logits: Tensor, rows: slice) -> Tensor:
        """Take logsumexp − the target's logit."""
        target = sent(self.target[rows], logits.device)
        return logits.logsumexp(-1) - logits.gather(-1, target[:, None].expand(*logits.shape[:-1], 1))[..., 0]


class Divergence(Metric):
    """KL(p_reference ‖ p) of next-token distributions, in nats."""

    name = "kl"

    def __init__(self, where: Bool[Tensor, "batch token"], reference: Float[Tensor, "read vocab"]) -> None:
        """Compare with the reference run's logits at the rows that are read."""
        super().__init__(where)
        self.reference = reference.detach().log_softmax(-1)

    def score(self, logits: Tensor, rows: slice) -> Tensor:
        """Sum p_reference · (log p_reference − log p)."""
        reference = self.reference[rows].to(logits.device)
        return kl_div(logits.log_softmax(-1), reference.expand_as(logits), reduction="none", log_target=True).sum(-1)


def read_at(name: str, batch: PairBatch) -> Bool[Tensor, "batch token"]:
    """Return the tokens whose next-token logits a metric of prompt pairs reads: those before the targets for `loss`, else the last.

    Raises:
        DataError: The metric is not known, or the pairs lack what it needs.
    """
    if name not in METRICS:
        raise DataError(f"metric {name!r} is not known: use one of {', '.join(METRICS)}")
    with_target = [pair.target is not None for pair in batch.pairs]
    if name == "loss" or (name == "kl" and all(with_target)):
        if not all(with_target):
            pair = batch.pairs[with_target.index(False)]
            raise DataError(f"pair {pair.id!r} has no target span, which metric 'loss' scores: use logit-diff or probability")
        where = batch.positions("target")
        # the row before a token predicts it
        return torch.cat([where[:, 1:], torch.zeros_like(where[:, :1])], dim=1)
    return batch.positions("last")


def pair_metric(name: str, batch: PairBatch, reference: Float[Tensor, "read vocab"] | None = None) -> Metric:
    """Build a metric for a batch of prompt pairs.

    Args:
        name: One of `METRICS`.
        batch: The pairs.
        reference: For `kl`: the reference run's logits at the rows of `read_at`.

    Raises:
        DataError: The metric is not known, or the pairs lack what it needs.
    """
    where = read_at(name, batch)
    if name == "loss":
        return Loss(where, batch.clean)
    if name == "kl":
        if reference is None:
            raise DataError("metric 'kl' compares with a reference run: give its logits")
        return Divergence(where, reference)
    _require_answers(name, batch)
    kind = LogitDifference if name == "logit-diff" else Probability
    return kind(where, [pair.answers for pair in batch.pairs], [pair.wrong_answers for pair in batch.pairs])


def check_metric(name: str, pairs: Pairs) -> None:
    """Refuse texts that lack what a metric needs, without a run of a model.

    Raises:
        DataError: The metric is not known, or a pair has no target span or no answers for it.
    """
    for pair in pairs:
        batch = collate_pairs([pair])
        read_at(name, batch)
        if name in ("logit-diff", "probability"):
            _require_answers(name, batch)


def _require_answers(name: str, batch: PairBatch) -> None:
    for pair in batch.pairs:
        if not pair.answers:
            raise DataError(f"pair {pair.id!r} names no right answer, which metric {name!r} needs")
        if name == "logit-diff" and not pair.wrong_answers:
            raise DataError(f"pair {pair.id!r} names no wrong answer, which metric 'logit-diff' needs: use probability or loss")


def _table(ids: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "batch most"], Float[Tensor, "batch most"]]:
    """Lay sets of token ids side by side, with weight 0 where a set is shorter."""
    most = max(1, *(len(row) for row in ids)) if ids else 1
    table, weight = torch.zeros(len(ids), most, dtype=torch.int64), torch.zeros(len(ids), most)
    for row, entries in enumerate(ids):
        table[row, : len(entries)] = torch.tensor(entries, dtype=torch.int64)
        weight[row, : len(entries)] = 1
    return table, weight
