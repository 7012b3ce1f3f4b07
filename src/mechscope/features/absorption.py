"""Feature absorption: a latent that stands for a concept is silent where the concept is there, because a more particular latent has taken its part over.

Of a concept's tokens (a first letter, a fact's role) there are a probe on the activations and the main latents, those that a probe on a few latents needs.
Of every held-out token that has the concept and that the probe takes for it, with p = ⟨x − bias, probe⟩ of a probe of norm one and c_j = f_j ⟨D_j, probe⟩:

full       no main latent is active, the latent of the largest c_j has a cosine of at least 0.025 with the probe, and c_j ≥ 0.4 p
fraction   0 where the main latents give p or more, or the (at most three) others of largest c_j with a cosine of at least 0.1 give less than 0.4 p; 1 where the
           main latents give nothing; else a / (a + main) with a the smaller of what these others give and of what is missing

Thresholds and definitions are those of Chanin et al. (2024) as SAEBench computes them, but that projections are taken from the decoder's
bias, from where latents add up to x, and that tokens are those of running text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.sparse import csr_matrix
from sklearn.metrics import f1_score

from mechscope.features.probes import Fit, Probe, Writes, most_different
from mechscope.shapes import by_shape

# a further main latent must raise the F1 of the probe on latents by more than this
_RISE = 0.03
_MOST_MAIN, _MOST_ABSORBING = 10, 3
_FULL_COSINE, _FRACTION_COSINE, _PART = 0.025, 0.1, 0.4


@dataclass(frozen=True)
class Tokens:
    """Some tokens: activations, codes, and the place of each token's text."""

    x: Float[np.ndarray, "token width"]
    codes: csr_matrix
    text: np.ndarray

    __repr__ = by_shape

    def rows(self, at: np.ndarray) -> Tokens:
        """Return some of them."""
        return Tokens(self.x[at], self.codes[at], self.text[at])


@dataclass(frozen=True)
class Absorbed:
    """What was found of a concept.

    Attributes:
        main: The main latents.
        text: ``(token)``: the text of each held-out token that has the concept and that the probe takes for it.
        full: ``(token)``: whether it is absorbed fully.
        fraction: ``(token)``: which part is.
    """

    main: tuple[int, ...]
    text: np.ndarray
    full: np.ndarray
    fraction: Float[np.ndarray, " token"]

    __repr__ = by_shape


def absorption(train: Tokens, test: Tokens, y: np.ndarray, y_test: np.ndarray, writes: Writes, *, fit: Fit = Probe) -> Absorbed:
    """Measure absorption of one concept.

    Args:
        train: Tokens to learn from.
        test: Held-out tokens.
        y: Whether each has the concept.
        y_test: The same of held-out tokens.
        writes: What the latents write.
        fit: Makes the probe of the activations.
    """
    probe = fit(train.x, y)
    main = main_latents(train.codes, y)
    direction = probe.direction / np.linalg.norm(probe.direction)
    own = y_test & probe.says(test.x)
    p = (test.x[own] - writes.bias) @ direction
    codes = test.codes[own]
    inner, cosines = writes.along(direction)
    full, fraction = np.zeros(len(p), dtype=bool), np.zeros(len(p))
    for at, whole in enumerate(p):
        row = codes[at]
        latents, given = row.indices, row.data * inner[row.indices]
        is_main = np.isin(latents, main)
        full[at] = _fully(latents, given, is_main, cosines, whole)
        fraction[at] = _fraction(given, is_main, cosines[latents] >= _FRACTION_COSINE, whole)
    return Absorbed(tuple(int(each) for each in main), test.text[own], full, fraction)


def main_latents(codes: csr_matrix, y: np.ndarray) -> np.ndarray:
    """Return the latents that a probe on a few of them needs, the first by the difference of class means, more while its F1 rises by more than 0.03."""
    ranked = most_different(codes, y, _MOST_MAIN, weights=np.ones(codes.shape[1]))
    kept, best = 1, _f1(codes[:, ranked[:1]], y)
    while kept < len(ranked):
        score = _f1(codes[:, ranked[: kept + 1]], y)
        if score - best <= _RISE:
            break
        kept, best = kept + 1, score
    return ranked[:kept]


def _f1(codes: csr_matrix, y: np.ndarray) -> float:
    values = codes.toarray()
    return float(f1_score(y, Probe(values, y, each=True).says(values)))


def _fully(latents: np.ndarray, given: np.ndarray, is_main: np.ndarray, cosines: np.ndarray, whole: float) -> bool:
    if is_main.any() or whole <= 0 or not len(given):
        return False
    top = int(np.argmax(given))
    return bool(cosines[latents[top]] >= _FULL_COSINE and given[top] >= _PART * whole)


def _fraction(given: np.ndarray, is_main: np.ndarray, aligned: np.ndarray, whole: float) -> float:
    main = float(given[is_main].sum())
    others = float(np.sort(given[~is_main & aligned & (given > 0)])[::-1][:_MOST_ABSORBING].sum())
    if whole <= 0 or main >= whole or others < _PART * whole:
        return 0.0
    if main <= 0:
        return 1.0
    absorbed = min(others, whole - main)
    return absorbed / (absorbed + main)
