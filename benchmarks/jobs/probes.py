"""Probes: logistic regression of all sites and labelings at once beside a loop of scikit-learn's.

Rows are random: Gaussian classes of unlike frequency in as many dimensions as the model is wide, at three sites, with variances from 100 to a
hundredth as in residual streams; three labelings, of which two are shuffled. Both minimise the same loss.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from benchmarks.harness import Beside, Job
from benchmarks.settings import Settings
from benchmarks.shapes import Size
from mechscope.probing.linear import LinearProbe, Spectrum
from mechscope.probing.logistic import logistic
from mechscope.stats.co_moments import CoMoments

_SHARES = (0.5, 0.2, 0.1, 0.1, 0.05, 0.05)
_LABELINGS, _SITES = 3, 3
# of the mean variance
_PENALTY = 1e-3


@dataclass(frozen=True, eq=False)
class ProbesCase:
    """Rows at every site and their classes.

    Attributes:
        x: The rows.
        labels: Their classes in every labeling.
    """

    x: Float[Tensor, "site row width"]
    labels: Int[Tensor, "row labeling"]
    texts: int = 0
    tokens: int = 0
    each: int | None = None

    def small(self) -> ProbesCase:
        """Return a tenth of the rows."""
        rows = self.x.shape[1] // 10
        return replace(self, x=self.x[:, :rows], labels=self.labels[:rows])


def build(settings: Settings, _: Size) -> ProbesCase:
    """Draw rows as wide as the model's."""
    random, width = np.random.default_rng(0), settings.shape.width
    rows, classes = 4 * width, len(_SHARES)
    labels = random.choice(classes, p=_SHARES, size=rows)
    turn, scale = np.linalg.qr(random.normal(size=(width, width)))[0], np.geomspace(10, 0.1, width)
    sites = [
        ((random.normal(size=(rows, width)) + 0.3 * random.normal(size=(classes, width))[labels]) * scale) @ turn for _ in range(_SITES)
    ]
    every = np.stack([labels, *(random.permutation(labels) for _ in range(_LABELINGS - 1))], axis=1)
    return ProbesCase(torch.from_numpy(np.stack(sites)).float(), torch.from_numpy(every))


def fit(case: ProbesCase) -> list[LinearProbe]:
    """Fit all at once."""
    spectrum = Spectrum.of(CoMoments.of(case.x))
    return logistic(
        case.x, case.labels, len(_SHARES), penalty=_PENALTY * spectrum.scale.expand(_LABELINGS, -1), balanced=False, spectrum=spectrum
    )


def loop(case: ProbesCase) -> list[LogisticRegression]:
    """Fit one after the other, with the same penalty."""
    scale, found = Spectrum.of(CoMoments.of(case.x)).scale, []
    with warnings.catch_warnings():
        # of the rows that are too few to be told apart
        warnings.simplefilter("ignore")
        for site, x in enumerate(case.x.numpy()):
            for own in case.labels.T.numpy():
                found.append(LogisticRegression(C=1 / (_PENALTY * float(scale[site]) * len(x)), max_iter=300).fit(x, own))
    return found


JOBS = (
    Job(
        name="probes_logistic",
        what="logistic probes of 3 sites and 3 labelings",
        build=build,
        run=fit,
        beside=Beside("loops of scikit-learn's", loop),
        ratio=0.5,
        rounds=1,
        slow=True,
        seconds=120,
    ),
)
