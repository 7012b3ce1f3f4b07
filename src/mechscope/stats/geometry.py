"""Similarity of two models' representations of the same documents: debiased linear CKA and RSA, and the sample they are computed from.

Linear CKA (Kornblith et al. 2019, arXiv 1905.00414) compares the Gram matrices of two sets of vectors; with the biased estimator it tends
to 1 whenever there are more dimensions than documents, so the unbiased HSIC of Song et al. (2012, JMLR 13, eq. 5) is used, whose
expectation is 0 for independent representations. RSA (Kriegeskorte et al. 2008) is the Spearman correlation of the pairwise distances.
Both need vectors of several documents at once, so `BottomK` keeps a fixed-size sample: the documents whose hashed ids are smallest,
whatever the order of arrival.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy.spatial.distance import pdist
from scipy.stats import rankdata

from mechscope.stats.chance import stable_hash

# the unbiased HSIC divides by n (n - 3); RSA of three documents has three distances, hence only six possible rank orders
MIN_DOCUMENTS = 4


def cka(x: Float[np.ndarray, "n d1"], y: Float[np.ndarray, "n d2"]) -> float:
    """Return the debiased linear CKA of two sets of vectors: 1 for the same up to rotation and scale, 0 on average for independent ones.

    Debiased, so it may be slightly negative. Works through the (n, n) Gram matrices or the (d, d) feature products, whichever is smaller.

    Args:
        x: One vector per document from one model.
        y: The same documents from the other model; a document with a value that is not finite in either is left out.

    Returns:
        NaN with fewer than four documents (the unbiased HSIC does not exist) or where all vectors of one side are equal.

    Raises:
        ValueError: The two do not have one vector per document.
    """
    x, y = _finite_pairs(x, y)
    if len(x) < MIN_DOCUMENTS:
        return float("nan")
    # HSIC ignores shifts and CKA scales; taking both out first keeps the differences below free of cancellation and overflow
    x, y = _standard(x), _standard(y)
    hsic = _hsic_by_gram if len(x) <= max(x.shape[1], y.shape[1]) else _hsic_by_features
    own = hsic(x, x) * hsic(y, y)
    return float(hsic(x, y) / np.sqrt(own)) if own > 0 else float("nan")


def rsa(
    x: Float[np.ndarray, "n d1"], y: Float[np.ndarray, "n d2"], *, distance: Literal["correlation", "euclidean"] = "correlation"
) -> float:
    """Return the Spearman correlation of the two sets' pairwise distances between documents.

    The default distance, 1 − Pearson correlation, is the one RSA was defined with; it ignores each vector's offset and length, and how much
    longer a tuned model's vectors have become is measured on its own (activation norm). `"euclidean"` counts length too.

    Args:
        x: One vector per document from one model.
        y: The same documents from the other model; a document with a value that is not finite in either is left out.
        distance: How far apart two vectors are.

    Returns:
        NaN with fewer than four documents (too few distances to rank) or where the distances of one side are all equal or undefined.

    Raises:
        ValueError: The two do not have one vector per document.
    """
    x, y = _finite_pairs(x, y)
    if len(x) < MIN_DOCUMENTS:
        return float("nan")
    with np.errstate(invalid="ignore", divide="ignore"):
        first, second = pdist(x, distance), pdist(y, distance)
    if np.isnan(first).any() or np.isnan(second).any():
        return float("nan")
    a, b = (ranks - ranks.mean() for ranks in (rankdata(first), rankdata(second)))
    own = (a @ a) * (b @ b)
    return float(a @ b / np.sqrt(own)) if own > 0 else float("nan")


class BottomK:
    """A sample of at most k documents' arrays: those whose hashed ids are smallest.

    The sample is a function of the seed and the set of documents, not of their order, grouping or repetition, so it can be merged and
    resumed like a moment. Hashes are uniform, so for documents not chosen with the seed in mind it is a uniform sample without
    replacement.
    """

    def __init__(self, k: int, seed: int = 0) -> None:
        """Start with no documents, to keep at most k of them, chosen by a hash with this seed; `ValueError` where k is below 1."""
        if k < 1:
            raise ValueError(f"a sample of {k} documents: keep at least 1")
        self.k = k
        self.seed = seed
        self._heap: list[int] = []  # negated, so that the largest hash kept is on top
        self._arrays: dict[int, np.ndarray] = {}

    @staticmethod
    def chosen(names: Iterable[str], k: int, seed: int = 0) -> set[str]:
        """Return the documents of these whose arrays a sample of all would end up with, so that no others need be made."""
        return set(heapq.nsmallest(k, set(names), key=lambda name: stable_hash(seed, name)))

    def __len__(self) -> int:
        return len(self._arrays)

    def update(self, name: str, array: Float[np.ndarray, "*shape"]) -> None:
        """Offer one document's array under the document's id; its dtype is kept.

        Raises:
            ValueError: The array is of another shape than those before.
        """
        self._offer(stable_hash(self.seed, name), array)

    def merge(self, other: BottomK) -> None:
        """Offer all documents of another sample.

        Raises:
            ValueError: The other sample has another k or seed.
        """
        if (self.k, self.seed) != (other.k, other.seed):
            raise ValueError(
                f"a sample with k={other.k}, seed={other.seed} cannot be merged into one with k={self.k}, seed={self.seed}: "
                "use the same for both"
            )
        for key, array in other._arrays.items():
            self._offer(key, array)

    def _offer(self, key: int, array: np.ndarray) -> None:
        if key in self._arrays or (len(self) == self.k and key > -self._heap[0]):
            return
        if self._arrays and (shape := next(iter(self._arrays.values())).shape) != array.shape:
            raise ValueError(f"a sample of arrays of shape {shape} cannot take one of shape {array.shape}")
        self._arrays[key] = np.array(array)
        if len(self._heap) < self.k:
            heapq.heappush(self._heap, -key)
        else:
            del self._arrays[-heapq.heapreplace(self._heap, -key)]

    def arrays(self, at: tuple[int, ...] = ()) -> Float[np.ndarray, "n ..."]:
        """Return the sampled arrays, or what lies at some place of each, stacked in the order of their hashes; of shape (0,) where there are none."""
        return np.stack([self._arrays[key][at] for key in sorted(self._arrays)]) if self._arrays else np.zeros(0)

    def state(self) -> dict[str, np.ndarray]:
        """Return the arrays that `from_state` needs to continue to the last bit."""
        hashes = np.array(sorted(self._arrays), dtype=np.int64)
        return {"k": np.array(self.k), "seed": np.array(self.seed), "hashes": hashes, "arrays": self.arrays()}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> BottomK:
        """Restore a sample from what `state` returned."""
        sample = cls(int(state["k"]), int(state["seed"]))
        for key, array in zip(state["hashes"], state["arrays"], strict=True):
            sample._offer(int(key), array)
        return sample


def _finite_pairs(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"vectors of shapes {x.shape} and {y.shape}: give (documents, dimensions) for the same documents")
    finite = np.isfinite(x).all(axis=1) & np.isfinite(y).all(axis=1)
    return x[finite], y[finite]


def _standard(x: np.ndarray) -> np.ndarray:
    """Take out the mean vector and the overall scale; all zeros where the spread is no more than rounding."""
    largest = np.abs(x).max(initial=0.0)
    centred = x - x.mean(axis=0)
    spread = np.abs(centred).max(initial=0.0)
    # a mean of n equal numbers is off by up to n units in the last place
    return centred / spread if spread > len(x) * np.finfo(np.float64).eps * largest else np.zeros_like(x)


def _hsic_by_gram(x: np.ndarray, y: np.ndarray) -> float:
    """Return n (n − 3) times the unbiased HSIC, from the Gram matrices with zero diagonals."""
    gram_x, gram_y = x @ x.T, y @ y.T  # K and L in the paper
    np.fill_diagonal(gram_x, 0.0)
    np.fill_diagonal(gram_y, 0.0)
    return _unbiased(float(np.vdot(gram_x, gram_y)), gram_x.sum(axis=0), gram_y.sum(axis=0))


def _hsic_by_features(x: np.ndarray, y: np.ndarray) -> float:
    """Return the same from feature products: tr(K L) = ‖XᵀY‖², K 1 = X (Xᵀ 1), both less what the diagonals hold."""
    k_diagonal, l_diagonal = (x * x).sum(axis=1), (y * y).sum(axis=1)
    product = x.T @ y
    k_rows, l_rows = x @ x.sum(axis=0) - k_diagonal, y @ y.sum(axis=0) - l_diagonal
    return _unbiased(float(np.vdot(product, product) - k_diagonal @ l_diagonal), k_rows, l_rows)


def _unbiased(trace: float, k_rows: np.ndarray, l_rows: np.ndarray) -> float:
    """Combine tr(K̃ L̃), K̃ 1 and L̃ 1 (K̃, L̃: Gram matrices with zero diagonals) as in Song et al. (2012), eq. 5."""
    n = len(k_rows)
    return float(trace + k_rows.sum() * l_rows.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k_rows @ l_rows))
