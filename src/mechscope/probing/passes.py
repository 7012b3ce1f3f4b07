"""The two passes of a probe over its texts: one adds up what is learned from, fold by fold, the other judges each fold by probes that were fitted to the
others.

Probes in closed form keep nothing of a row: what is held does not grow with the tokens. Those that are learned step by step hold rows, up to a number. Probes
are solved between the passes, and whatever their number, a pass runs the model once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechscope import ranks
from mechscope.data.pairs import PairBatch
from mechscope.data.scoring import PerText
from mechscope.errors import ModelError
from mechscope.instrument import Execution
from mechscope.instrument.texts import over_texts
from mechscope.probing.activations import Activations, components_of
from mechscope.probing.held import HeldRows
from mechscope.probing.linear import LinearProbe, Spectrum, chosen_penalties, difference_in_means, lda, ridge
from mechscope.probing.logistic import logistic
from mechscope.probing.mlp import MlpProbe, mlp
from mechscope.probing.tasks import Task
from mechscope.shapes import by_shape
from mechscope.stats.co_moments import CoMoments
from mechscope.subject.placement import sent

Method = Literal["lda", "ridge", "means", "logistic", "mlp"]
LEARNED: tuple[Method, ...] = ("logistic", "mlp")
Probe = LinearProbe | MlpProbe
Labeling = Sequence[Int[np.ndarray, " row"]]
TOKENS_PER_BATCH = 2048
# rows that are added up at once: adding few costs as much as adding many, as all of a Gram matrix is read and written
_ROWS = 512


@dataclass(frozen=True)
class Folded:
    """A task with several labelings of its rows, and the fold of each text.

    Attributes:
        task: The task.
        labelings: The class of every row of every text, in each labeling.
        fold: ``(text,)``.
    """

    task: Task
    labelings: Sequence[Labeling]
    fold: Int[np.ndarray, " text"]

    __repr__ = by_shape

    @property
    def folds(self) -> int:
        """How many folds there are."""
        return int(self.fold.max()) + 1

    def labels(self, batch: PairBatch) -> Int[Tensor, "row labeling"]:
        """Return the classes of a batch's rows, text after text."""
        return torch.from_numpy(np.stack([np.concatenate([own[at] for at in batch.indices]) for own in self.labelings], axis=1))

    def text(self, batch: PairBatch) -> Int[Tensor, " row"]:
        """Return which of the batch's texts each row is of."""
        counts = [len(self.labelings[0][at]) for at in batch.indices]
        return torch.arange(len(batch)).repeat_interleave(torch.tensor(counts))

    def held(self, seed: int) -> HeldRows:
        """Return what will hold the rows."""
        sizes = [len(own) for own in self.labelings[0]]
        labels = np.stack([np.concatenate(labeling) for labeling in self.labelings], axis=1)
        return HeldRows(labels, np.repeat(np.arange(len(sizes)), sizes), seed=seed)

    def seen(self) -> Float[np.ndarray, "labeling text class"]:
        """Return how many rows of each class every text has."""
        classes = len(self.task.classes)
        return np.array([[np.bincount(own, minlength=classes) for own in labeling] for labeling in self.labelings], dtype=np.float64)


def co_moments(activations: Activations, folded: Folded, execution: Execution, held: HeldRows | None = None) -> list[CoMoments]:
    """Run over the texts once and return the statistics of each fold's rows; ranks share the batches and have the same.

    Args:
        activations: What is read.
        folded: The texts' rows.
        execution: Tokens of a batch, progress.
        held: What holds rows meanwhile.

    Raises:
        ModelError: Activations are not finite.
        RunError: Not even a single text fits into memory.
    """
    sites = len(components_of(activations.subject, activations.site))
    classes = (len(folded.task.classes),) * len(folded.labelings)
    moments = [CoMoments(sites, activations.width, classes) for _ in range(folded.folds)]
    waiting: list[list[tuple[Tensor, Tensor]]] = [[] for _ in moments]

    def add(fold: int) -> None:
        rows, labels = zip(*waiting[fold], strict=True)
        waiting[fold].clear()
        try:
            moments[fold].update(torch.cat(rows, dim=1), torch.cat(labels))
        except ValueError as error:
            raise ModelError(
                f"activations of {activations.subject.source!r} are NaN or infinite: its type is too narrow for it, try dtype float32"
            ) from error

    for batch, x in over_texts(folded.task.texts, activations.rows, execution, tokens=TOKENS_PER_BATCH, label="probe", dealt=True):
        labels, fold = folded.labels(batch), torch.from_numpy(folded.fold[list(batch.indices)])[folded.text(batch)]
        if held is not None:
            held.take(batch, x)
        for each in fold.unique().tolist():
            own = fold == each
            waiting[each].append((x[:, sent(own, x.device)], labels[own]))
            if sum(part.shape[1] for part, _ in waiting[each]) >= _ROWS:
                add(each)
    for each, parts in enumerate(waiting):
        if parts:
            add(each)
    if ranks.size() > 1:
        first, *others = ranks.exchange([each.to("cpu") for each in moments])
        for other in others:
            for one, more in zip(first, other, strict=True):
                one.merge(more)
        moments = [each.to(activations.subject.device) for each in first]
    if held is not None:
        held.gather()
    return moments


def together(moments: Sequence[CoMoments]) -> CoMoments:
    """Return the statistics of all folds."""
    first, *others = moments
    whole = CoMoments.from_state(first.state())
    for other in others:
        whole.merge(other)
    return whole


def fitted(moments: Sequence[CoMoments], method: Method, folded: Folded, held: HeldRows | None = None, seed: int = 0) -> list[list[Probe]]:
    """Return, for every fold, the probe of each labeling that was fitted to the other folds.

    How much covariances are shrunk, or weights are, is chosen for each site on the next fold, which the probe that chooses has not seen either: by ridge
    regression, for all probes. The penalty of logistic regression is λ t p (1 − p), p = 1 / classes, which curves its loss as much as ridge's.

    Args:
        moments: Of each fold; three at least.
        method: How.
        folded: The texts' rows.
        held: Rows, for probes that are learned step by step.
        seed: Of what those draw.
    """
    whole, probes = together(moments), list[list[Probe]]()
    classes, labelings = len(folded.task.classes), range(len(whole.classes))
    for number, judged in enumerate(moments):
        learned = whole.without(judged)
        if method == "means":
            probes.append([difference_in_means(learned, labeling) for labeling in labelings])
            continue
        chooses = moments[(number + 1) % len(moments)]
        penalties, spectrum = chosen_penalties(learned.without(chooses), chooses), Spectrum.of(learned)
        if method == "lda":
            probes.append([lda(learned, each, shrinkage=penalties[each], spectrum=spectrum) for each in labelings])
        elif method == "ridge":
            probes.append([ridge(learned, each, penalty=penalties[each], spectrum=spectrum) for each in labelings])
        elif held is not None:
            own = torch.from_numpy(folded.fold)[held.text] != number
            x, labels = held.x[:, sent(own, held.x.device)], held.labels[own]
            if method == "logistic":
                curved = penalties * spectrum.scale.cpu() * (classes - 1) / classes**2
                probes.append([*logistic(x, labels, classes, penalty=curved, spectrum=spectrum)])
            else:
                probes.append([*mlp(x, labels, classes, shrinkage=penalties[0], spectrum=spectrum, seed=seed)])
        else:
            raise ValueError(f"a {method} probe is learned from rows: hold them")
    return probes


def judged(
    activations: Activations, folded: Folded, probes: Mapping[str, Sequence[Sequence[Probe]]], execution: Execution
) -> dict[str, Float[np.ndarray, "component labeling class text"]]:
    """Run over the texts once more and return how many rows of each text and class every set of probes tells right.

    Args:
        activations: What is read.
        folded: The texts' rows.
        probes: By name, for every fold and labeling the probe that was fitted to the other folds.
        execution: Tokens of a batch, progress.

    Raises:
        RunError: Not even a single text fits into memory.
    """
    classes, labelings = len(folded.task.classes), len(folded.labelings)

    def work(batch: PairBatch) -> dict[str, np.ndarray]:
        x = activations.rows(batch).double()
        labels, text = sent(folded.labels(batch), x.device), folded.text(batch)
        fold = torch.from_numpy(folded.fold[list(batch.indices)])[text]
        cell = labels * len(batch) + sent(text, x.device)[:, None]
        right = {name: x.new_zeros(labelings, len(x), classes * len(batch)) for name in probes}
        for each in fold.unique().tolist():
            own = sent((fold == each).nonzero()[:, 0], x.device)
            for name, of_folds in probes.items():
                for labeling, probe in enumerate(of_folds[each]):
                    told = probe.says(x[:, own]) == labels[own, labeling]
                    right[name][labeling].index_add_(1, cell[own, labeling], told.double())
        return {name: hits.unflatten(2, (classes, len(batch))).transpose(0, 1).cpu().numpy() for name, hits in right.items()}

    per_text = PerText(folded.task.texts)
    per_text.run(work, execution, tokens=TOKENS_PER_BATCH, label="judge")
    return {name: per_text[name] for name in probes}
