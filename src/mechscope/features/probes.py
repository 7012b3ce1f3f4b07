"""What latents say of whole texts: probes on a few latents, and probes on activations before and after latents are taken out.

Everything is of means over a text's tokens. Taking latents out puts their mean over the texts that are learned from in their place and keeps the error, which
changes a text's mean by x̄ − Σ_j (f̄_j − mean) D_j, exactly, so no further run of the model is needed. With zero in their place, as in SAEBench, every text moves
to one side of a probe's threshold, and a probe that lost its hint would be called useless.

sparse probing   balanced accuracy of a logistic probe that reads the k latents whose class means differ most (Gurnee et al. 2023; SAEBench)
SCR              spurious correlation removal: a probe of one attribute, trained where another goes with it, is judged where they do not go together;
                 (accuracy with the latents of the other taken out − biased accuracy) / (unbiased accuracy − biased accuracy) (Karvonen et al. 2024)
TPP              targeted probe perturbation: what taking out a class's latents costs its own probe, less what it costs those of the other classes

Latents are ranked for SCR and TPP by (difference of class means) · ⟨D_j, probe⟩. The unit is the held-out text; accuracies weigh both classes alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.sparse import csr_matrix

from mechscope.features.dictionary import Dictionary
from mechscope.shapes import by_shape
from mechscope.stats.inference import MIN_TEXTS, balanced_accuracy, too_few
from mechscope.stats.shares import Share, share_of


@dataclass(frozen=True)
class Writes:
    """What a dictionary's latents write at its output places, side by side, in the model's units."""

    dictionary: Dictionary

    def along(self, direction: Float[np.ndarray, " width"]) -> tuple[Float[np.ndarray, " latent"], Float[np.ndarray, " latent"]]:
        """Return ⟨D_j, direction⟩ of every latent, and the cosine."""
        layout, inner, cosines = self.dictionary.layout, [], []
        for number, group in enumerate(layout.groups):
            rows = self.dictionary.decoders(number, torch.float64).cpu().numpy()
            own = rows @ direction[layout.written_columns(group)]
            inner.append(own)
            cosines.append(own / np.maximum(np.linalg.norm(rows, axis=1) * np.linalg.norm(direction), 1e-12))
        return np.concatenate(inner), np.concatenate(cosines)

    @property
    def bias(self) -> Float[np.ndarray, " width"]:
        """What stands there where no latent is active."""
        return np.asarray(torch.cat(self.dictionary.nothing(torch.float64)).cpu().numpy())

    def of(self, latents: Sequence[int]) -> Float[np.ndarray, "chosen width"]:
        """Return what some latents write."""
        layout, dictionary = self.dictionary.layout, self.dictionary
        parts = [dictionary.directions([int(each) for each in latents], place) for place in layout.outputs]
        return np.asarray(torch.cat(parts, dim=1).double().cpu().numpy())


@dataclass(frozen=True)
class Pooled:
    """Means over the tokens of each text: of what stands at a dictionary's output places, and of its codes."""

    x: Float[np.ndarray, "text width"]
    codes: csr_matrix
    writes: Writes

    __repr__ = by_shape

    def rows(self, at: np.ndarray) -> Pooled:
        """Return some of the texts."""
        return Pooled(self.x[at], self.codes[at], self.writes)

    def without(self, latents: np.ndarray, usual: Pooled) -> Float[np.ndarray, "text width"]:
        """Return x with latents at their mean in the usual texts, and errors kept."""
        own, mean = (part.codes[:, latents].toarray() for part in (self, usual))
        return self.x - (own - mean.mean(0)) @ self.writes.of(latents.tolist())


class Probe:
    """A logistic probe; classes weigh alike."""

    def __init__(self, x: Float[np.ndarray, "row column"], y: np.ndarray, *, each: bool = False) -> None:
        """Fit.

        Args:
            x: What is read.
            y: Whether a row is of the class.
            each: Bring every column to one scale (latents), instead of all together (activations, whose directions count).
        """
        from sklearn.linear_model import LogisticRegression

        self._mean = x.mean(0)
        spread = x.std(0)
        self._scale = np.where(spread > 0, spread, 1.0) if each else max(float(np.sqrt((spread**2).mean())), 1e-12)
        self._fit: Any = LogisticRegression(class_weight="balanced", max_iter=2000).fit((x - self._mean) / self._scale, y)

    @property
    def direction(self) -> Float[np.ndarray, " column"]:
        """What the probe adds up, in the units of what it reads."""
        return np.asarray(self._fit.coef_[0] / self._scale)

    def says(self, x: Float[np.ndarray, "row column"]) -> np.ndarray:
        """Return which rows it takes for the class."""
        return np.asarray(self._fit.predict((x - self._mean) / self._scale), dtype=bool)


class Probes:
    """Probes of activations, each fitted once, however many dictionaries are judged by it."""

    def __init__(self) -> None:
        self._known: dict[bytes, Probe] = {}

    def fit(self, x: Float[np.ndarray, "row column"], y: np.ndarray) -> Probe:
        """Return the probe of these rows, fitted where none of the same rows is known."""
        key = blake2b(repr((x.shape, x.dtype)).encode())
        for array in (x, y):
            key.update(np.ascontiguousarray(array).data)
        if (digest := key.digest()) not in self._known:
            self._known[digest] = Probe(x, y)
        return self._known[digest]


Fit = Callable[[Float[np.ndarray, "row column"], np.ndarray], Probe]
"""Makes a probe of activations: `Probe` itself, or `Probes.fit`, which makes none twice."""


def balanced(right: np.ndarray, y: np.ndarray) -> Float[np.ndarray, " row"]:
    """Return values whose mean is the balanced accuracy, each class counting a half, and whose spread is that of its linear part: deviations within classes."""
    own = {kind: right[y == kind].mean() for kind in (True, False)}
    share = np.where(y, y.mean(), 1 - y.mean())
    return sum(own.values()) / 2 + (right - np.where(y, own[True], own[False])) / (2 * share)


def balanced_of(right: np.ndarray, y: np.ndarray) -> Share:
    """Return the balanced accuracy of one probe, with the interval of `balanced_accuracy`."""
    if len(y) < MIN_TEXTS:
        return Share(np.nan, np.nan, np.nan, len(y), too_few(len(y)))
    return Share(*balanced_accuracy(right, y), len(y), "")


def most_different(codes: csr_matrix, y: np.ndarray, k: int, *, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the k latents whose class means differ most; with weights, those where difference × weight is largest."""
    difference = np.asarray(codes[y].mean(0)).ravel() - np.asarray(codes[~y].mean(0)).ravel()
    ranked = np.abs(difference) if weights is None else difference * weights
    return np.argsort(-ranked, kind="stable")[:k]


def sparse_probing(train: Pooled, test: Pooled, y: np.ndarray, y_test: np.ndarray, k: int) -> Bool[np.ndarray, " text"]:
    """Return which texts a probe that reads k latents tells right."""
    chosen = most_different(train.codes, y, k)
    probe = Probe(train.codes[:, chosen].toarray(), y, each=True)
    return np.asarray(probe.says(test.codes[:, chosen].toarray()) == y_test)


def dense_probing(train: Pooled, test: Pooled, y: np.ndarray, y_test: np.ndarray, *, fit: Fit = Probe) -> Bool[np.ndarray, " text"]:
    """Return which texts a probe that reads all of the activations tells right: what there is to be found."""
    return np.asarray(fit(train.x, y).says(test.x) == y_test)


def spurious_correlation_removal(
    train: Pooled,
    test: Pooled,
    wanted: np.ndarray,
    other: np.ndarray,
    wanted_test: np.ndarray,
    other_test: np.ndarray,
    counts: Sequence[int],
    *,
    fit: Fit = Probe,
) -> dict[int, Share]:
    """Return SCR by number of latents taken out.

    Args:
        train: Texts to learn from.
        test: Held-out texts.
        wanted: Whether a text has the attribute that is to be told.
        other: Whether it has the one that goes with it in the biased texts.
        wanted_test: The same of held-out texts.
        other_test: The same.
        counts: How many latents are taken out.
        fit: Makes the probes of the activations.
    """
    cells = [np.flatnonzero((wanted == one) & (other == two)) for one in (True, False) for two in (True, False)]
    fewest = min(map(len, cells))
    even, biased = np.concatenate([cell[:fewest] for cell in cells]), np.concatenate([cells[0], cells[3]])
    unbiased_probe, biased_probe = fit(train.x[even], wanted[even]), fit(train.x[biased], wanted[biased])
    spurious = fit(train.x[even], other[even])
    inner, _ = train.writes.along(spurious.direction)
    ranked = most_different(train.codes[even], other[even], max(counts), weights=inner)
    # the four cells weigh alike
    weights = np.zeros(len(test.x))
    for one in (True, False):
        for two in (True, False):
            cell = (wanted_test == one) & (other_test == two)
            weights[cell] = len(test.x) / (4 * max(cell.sum(), 1))

    def accuracy(probe: Probe, x: np.ndarray) -> np.ndarray:
        return weights * (probe.says(x) == wanted_test)

    before = accuracy(biased_probe, test.x)
    whole = accuracy(unbiased_probe, test.x) - before
    absent = "the biased probe is as good as the unbiased one"
    usual = train.rows(even)
    after = {count: accuracy(biased_probe, test.without(ranked[:count], usual)) for count in counts}
    return {count: share_of(own - before, whole, absent=absent, positive=True) for count, own in after.items()}


def targeted_probe_perturbation(
    train: Pooled, test: Pooled, y: np.ndarray, y_test: np.ndarray, counts: Sequence[int], *, fit: Fit = Probe
) -> dict[int, Share]:
    """Return TPP by number of latents taken out.

    Args:
        train: Texts to learn from.
        test: Held-out texts.
        y: ``(text, class)``.
        y_test: The same of held-out texts.
        counts: How many latents are taken out for each class.
        fit: Makes the probes of the activations.
    """
    probes = [fit(train.x, own) for own in y.T]
    before = [balanced(probe.says(test.x) == own, own) for probe, own in zip(probes, y_test.T, strict=True)]
    found: dict[int, list[np.ndarray]] = {count: [] for count in counts}
    for at, probe in enumerate(probes):
        inner, _ = train.writes.along(probe.direction)
        ranked = most_different(train.codes, y[:, at], max(counts), weights=inner)
        for count in counts:
            x = test.without(ranked[:count], train)
            drops = [was - balanced(each.says(x) == own, own) for each, was, own in zip(probes, before, y_test.T, strict=True)]
            others = [drop for number, drop in enumerate(drops) if number != at]
            found[count].append(drops[at] - np.mean(others, axis=0))
    return {count: mean_of(np.mean(values, axis=0)) for count, values in found.items()}


def mean_of(values: Float[np.ndarray, " text"]) -> Share:
    """Return a mean over texts with its interval."""
    return share_of(values, np.where(np.isnan(values), np.nan, 1.0))
