"""Learning subspaces for an alignment: one of a given width, or the narrowest that does as well as any.

The narrowest is found by what it does. A boundless search (a soft boundary, Wu et al. 2023) gives a wide subspace, since its boundary stops where training
does. Then subspaces of 1, 2, 4, … dimensions are learned until one does as well as the best on pairs set aside, and the widths below it are halved
down to the smallest that does. As well means: an exact test over the pairs that only one of the two is right on (McNemar 1947) does not tell them apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from scipy.stats import binomtest

from mechscope.causal.alignment import Alignment
from mechscope.causal.interchange import Position, interchanges
from mechscope.causal.places import Place
from mechscope.causal.steering import features_at
from mechscope.causal.subspace import Subspace
from mechscope.data.pairs import Pairs
from mechscope.errors import DataError
from mechscope.instrument import observed
from mechscope.instrument.execution import Execution
from mechscope.subject import Subject

# share of the pairs that widths are chosen on, and the fewest pairs in all
_ASIDE, FEWEST = 3, 6
_LEVEL = 0.05


@dataclass(frozen=True)
class AlignmentSearch:
    """Where a subspace is sought, and how it is learned; see `train_das`."""

    subject: Subject
    place: Place
    position: Position
    epochs: int
    learning_rate: float
    size_penalty: float
    execution: Execution

    def learned(self, pairs: Pairs, dimensions: int | None) -> Alignment:
        """Learn a subspace of some width, or boundless."""
        subject, place, seed = self.subject, self.place, self.execution.seed
        order = np.random.default_rng(seed)
        shuffled = Pairs(tuple(pairs.pairs[at] for at in order.permutation(len(pairs))), pairs.source)
        with observed(subject):
            texts = list(interchanges(subject, shuffled, place, self.position, self.execution.tokens(512)))
            space = Subspace(features_at(subject, place.site, place.layer), dimensions, seed, subject)
            parameters = [*space.turn.parameters(), *([space.boundary] if dimensions is None else [])]
            optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)
            steps = self.epochs * len(texts)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
            rows: list[dict[str, float]] = []
            for epoch in range(self.epochs):
                total = correct = 0.0
                for number, at in enumerate(order.permutation(len(texts))):
                    space.anneal((epoch * len(texts) + number) / max(1, steps - 1))
                    with torch.enable_grad():
                        logits = texts[at].logits(subject, texts[at].edit(space.exchange()))
                        loss = texts[at].loss(logits)
                        gradients = torch.autograd.grad(loss + self.size_penalty * space.share(), parameters)
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        parameter.grad = gradient
                    optimizer.step()
                    schedule.step()
                    space.clamp()
                    total += loss.item() * texts[at].size
                    correct += texts[at].correct(logits)
                means = {"loss": total / len(pairs), "accuracy": correct / len(pairs)}
                rows.append({"epoch": epoch, **means, "dimensions": space.dimensions, "temperature": space.temperature})
                self.execution.told(f"aligning {place}", epoch + 1, self.epochs)
        curve = pd.DataFrame(rows)
        return Alignment(space.rotation(), place.site, place.layer, self.position, place.head, curve, subject.fingerprint)

    def narrowest(self, pairs: Pairs) -> Alignment:
        """Learn the narrowest subspace that does as well as the best, on pairs set aside.

        Raises:
            DataError: There are too few pairs to set some aside.
        """
        if len(pairs) < FEWEST:
            raise DataError(
                f"{len(pairs)} pairs are too few to find how many dimensions a variable needs: give at least {FEWEST}, or the number"
            )
        order = np.random.default_rng(self.execution.seed).permutation(len(pairs)).tolist()
        aside = len(pairs) // _ASIDE
        judged, learned = (Pairs(tuple(pairs.pairs[at] for at in sorted(part)), pairs.source) for part in (order[:aside], order[aside:]))
        tried = _Tried(self, learned, judged)
        widest = tried.take(self.learned(learned, None))
        failed, width = 0, 1
        while width < widest and not tried.as_good(width):
            failed, width = width, 2 * width
        good = min(width, widest)
        while good - failed > 1:
            middle = (good + failed) // 2
            failed, good = (failed, middle) if tried.as_good(middle) else (middle, good)
        # a narrower one may have been the best, beside which an earlier one is not good any more
        chosen = next(width for width in sorted(tried.by_width) if width >= good and tried.as_good(width))
        return replace(tried.by_width[chosen], widths=tried.table(chosen))


@dataclass(frozen=True)
class _Tried:
    """Subspaces that were learned, by width, and which of the pairs set aside each is right on."""

    search: AlignmentSearch
    learned: Pairs
    judged: Pairs
    by_width: dict[int, Alignment] = field(default_factory=dict)
    right: dict[int, Bool[np.ndarray, " pair"]] = field(default_factory=dict)

    def take(self, alignment: Alignment) -> int:
        """Judge a subspace, and return its width."""
        width = alignment.dimensions
        self.by_width[width] = alignment
        self.right[width] = alignment.right(self.search.subject, self.judged, execution=replace(self.search.execution, progress=None))
        return width

    def as_good(self, width: int) -> bool:
        """Tell whether a subspace of some width, learned if it has not been, does as well as the best."""
        if width not in self.by_width:
            self.take(self.search.learned(self.learned, width))
        return self.p(width) >= _LEVEL

    def p(self, width: int) -> float:
        """Return the one-sided p that a width is right on as many pairs as the best one."""
        best = max(self.right.values(), key=lambda right: int(right.sum()))
        lost, won = int((best & ~self.right[width]).sum()), int((self.right[width] & ~best).sum())
        return 1.0 if lost == 0 else float(binomtest(lost, lost + won, alternative="greater").pvalue)

    def table(self, chosen: int) -> pd.DataFrame:
        """Return what `Alignment.widths` holds."""
        rows = [
            {
                "dimensions": width,
                "n": len(self.judged),
                "correct": int(self.right[width].sum()),
                "behind_best_p": self.p(width),
                "chosen": width == chosen,
                **alignment.convergence.columns,
            }
            for width, alignment in sorted(self.by_width.items())
        ]
        return pd.DataFrame(rows)
