"""Streaming co-moments: mean, covariance and class means of vectors in one pass, mergeable, in memory that does not grow with the rows.

Everything that a linear probe in closed form needs: how many rows there are, their sum, their Gram matrix, and their sum within each class. The Gram matrix
knows nothing of labels, so one pass serves any number of labelings (the labels, control labels, shuffles) at the cost of a class sum each; and sums can be
taken away again, so the statistics of all folds but one are those of all less those of one.

Rows are shifted by the mean of the first batch and added up in float64: activations whose mean is thousands of times their spread, as residual streams have
in some dimensions, would otherwise lose the spread to rounding. What is asked of the object is of the rows themselves, not of the shifted ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


class CoMoments:
    """Sums, Gram matrices and class sums of rows at several sites at once, such as the layers of a model.

    Attributes:
        sites: How many sites.
        width: Numbers in a row.
        classes: How many classes each labeling has.
        n: How many rows there were.
    """

    def __init__(self, sites: int, width: int, classes: Sequence[int] = ()) -> None:
        """Start with no rows.

        Args:
            sites: Each row is seen at so many sites.
            width: Numbers in a row.
            classes: The number of classes of each labeling.
        """
        self.sites, self.width, self.classes = sites, width, tuple(classes)
        self.n = 0
        self._counts = torch.zeros(sum(self.classes), dtype=torch.float64)
        # of shifted rows; the shift is that of the first rows
        self._shift = torch.zeros(sites, width, dtype=torch.float64)
        self._sum = torch.zeros(sites, width, dtype=torch.float64)
        self._gram = torch.zeros(sites, width, width, dtype=torch.float64)
        self._sums = torch.zeros(sites, sum(self.classes), width, dtype=torch.float64)

    @classmethod
    def of(
        cls, x: Float[Tensor, "site row width"], labels: Int[Tensor, "row labeling"] | None = None, classes: Sequence[int] = ()
    ) -> CoMoments:
        """Return the statistics of rows that are all at hand; arguments as those of `update`, and the number of classes of each labeling."""
        moments = cls(x.shape[0], x.shape[2], classes)
        moments.update(x, labels)
        return moments

    def __repr__(self) -> str:
        labelings = f", {len(self.classes)} labelings" if self.classes else ""
        return f"CoMoments({self.n:,} rows of width {self.width} at {self.sites} sites{labelings})"

    def update(self, x: Float[Tensor, "site row width"], labels: Int[Tensor, "row labeling"] | None = None) -> None:
        """Add rows; sums are kept where the first rows lie.

        Args:
            x: The rows at every site, of any floating-point type.
            labels: The class of every row in every labeling, from 0; may be left out where there is no labeling.

        Raises:
            ValueError: The rows have another shape, a label is missing or is no class, or a value is not finite.
        """
        if x.ndim != 3 or (x.shape[0], x.shape[2]) != (self.sites, self.width):
            raise ValueError(f"statistics of {self.sites} sites of width {self.width} cannot take rows of shape {tuple(x.shape)}")
        member = self._member(labels, x)
        if not x.shape[1]:
            return
        x = x.double()
        shift = self._shift if self.n else x.mean(1)
        shifted = x - shift[:, None]
        total = shifted.sum(1)
        if not torch.isfinite(total).all():
            raise ValueError("rows hold values that are NaN or infinite")
        if not self.n:
            self.to(x.device)._shift = shift
        self._sum += total
        self._gram.baddbmm_(shifted.transpose(1, 2), shifted)
        self._sums += member.T @ shifted
        self._counts += member.sum(0)
        self.n += x.shape[1]

    def _member(self, labels: Int[Tensor, "row labeling"] | None, x: Float[Tensor, "site row width"]) -> Float[Tensor, "row class"]:
        """Return which rows belong to which class, the classes of all labelings side by side."""
        shape = (x.shape[1], len(self.classes))
        if labels is None and not self.classes:
            labels = torch.zeros(shape, dtype=torch.int64)
        if labels is None or tuple(labels.shape) != shape:
            given = "none" if labels is None else tuple(labels.shape)
            raise ValueError(f"labels of shape {given} for {shape[0]} rows in {shape[1]} labelings: give one for each row and labeling")
        sizes = torch.tensor(self.classes, device=labels.device)
        if ((labels < 0) | (labels >= sizes)).any():
            raise ValueError(
                f"labels lie in {int(labels.min())} to {int(labels.max())}, labelings have {', '.join(map(str, self.classes))} classes"
            )
        member = x.new_zeros(shape[0], sum(self.classes), dtype=torch.float64)
        return member.scatter_(1, (labels + sizes.cumsum(0) - sizes).to(x.device), 1.0)

    def to(self, device: torch.device | str) -> CoMoments:
        """Move all sums to a device; returns itself."""
        for name in ("_counts", "_shift", "_sum", "_gram", "_sums"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def merge(self, other: CoMoments) -> None:
        """Add all rows of another object to this one.

        Raises:
            ValueError: The other object has other sites, width or classes.
        """
        self._check(other)
        if not other.n:
            return
        if not self.n:
            self.to(other._gram.device)
            self._shift = other._shift.clone()
        self._add(other, 1)

    def without(self, other: CoMoments) -> CoMoments:
        """Return the statistics of these rows less those of some of them, such as a fold.

        Raises:
            ValueError: The other object has other sites, width or classes, or more rows.
        """
        self._check(other)
        if bool((other._counts.to(self._counts.device) > self._counts).any()) or other.n > self.n:
            raise ValueError(f"{other.n} rows are taken from {self.n}: only rows that were added can be taken away")
        left = self.from_state(self.state())
        if other.n:
            left._add(other, -1)
        return left

    def at(self, site: int) -> CoMoments:
        """Return the statistics of the same rows at one site, from 0."""
        one = {name: value if name in ("n", "classes", "counts") else value[site : site + 1] for name, value in self.state().items()}
        return self.from_state(one)

    def _check(self, other: CoMoments) -> None:
        own, others = ((each.sites, each.width, each.classes) for each in (self, other))
        if own != others:
            raise ValueError(f"statistics of sites, width and classes {own} cannot be combined with those of {others}")

    def _add(self, other: CoMoments, sign: int) -> None:
        counts, shift, total, gram, sums = (
            value.to(self._gram.device) for value in (other._counts, other._shift, other._sum, other._gram, other._sums)
        )
        # the other's rows, shifted by what shifts these
        by = shift - self._shift
        cross = total[:, :, None] * by[:, None]
        self._gram += sign * (gram + cross + cross.transpose(1, 2) + other.n * by[:, :, None] * by[:, None])
        self._sum += sign * (total + other.n * by)
        self._sums += sign * (sums + counts[:, None] * by[:, None])
        self._counts += sign * counts
        self.n += sign * other.n

    @property
    def mean(self) -> Float[Tensor, "site width"]:
        """Mean over rows; NaN without any."""
        return self._shift + self._sum / (self.n or float("nan"))

    @property
    def covariance(self) -> Float[Tensor, "site width width"]:
        """Covariance of rows (divided by n); NaN without any."""
        mean = self._sum / (self.n or float("nan"))
        return self._gram / (self.n or float("nan")) - mean[:, :, None] * mean[:, None]

    def counts(self, labeling: int | None = 0) -> Float[Tensor, " class"]:
        """How many rows each class of a labeling has; with None of all labelings side by side."""
        return self._counts if labeling is None else self._counts[self._columns(labeling)]

    def class_means(self, labeling: int = 0) -> Float[Tensor, "site class width"]:
        """Mean over the rows of each class of a labeling; NaN where it has none."""
        counts = self.counts(labeling)
        means = self._sums[:, self._columns(labeling)] / torch.where(counts > 0, counts, torch.nan)[:, None]
        return self._shift[:, None] + means

    def within(self, labeling: int = 0) -> Float[Tensor, "site width width"]:
        """Covariance within the classes of a labeling, pooled: of rows less their class's mean (divided by n)."""
        means = self.class_deviations(labeling)
        return self.covariance - torch.einsum("k,lki,lkj->lij", self.counts(labeling) / self.n, means, means)

    def cross_covariance(self, labeling: int | None = 0) -> Float[Tensor, "site width class"]:
        """Covariance of rows with the indicators of a labeling's classes (divided by n); with None of all labelings side by side."""
        share = self.counts(labeling) / self.n
        return (self.class_deviations(labeling) * share[:, None]).transpose(1, 2)

    def class_deviations(self, labeling: int | None = 0) -> Float[Tensor, "site class width"]:
        """Class means less the mean over all rows, 0 where a class has no rows; with None of all labelings side by side."""
        columns = slice(None) if labeling is None else self._columns(labeling)
        counts = self.counts(labeling)
        means = self._sums[:, columns] / counts.clamp(min=1)[:, None]
        return (means - (self._sum / self.n)[:, None]) * (counts > 0)[:, None]

    def _columns(self, labeling: int) -> slice:
        if not 0 <= labeling < len(self.classes):
            raise ValueError(f"labeling {labeling} does not exist: there are {len(self.classes)}")
        start = sum(self.classes[:labeling])
        return slice(start, start + self.classes[labeling])

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that `from_state` needs to continue to the last bit."""
        kept = {name: getattr(self, f"_{name}").clone() for name in ("counts", "shift", "sum", "gram", "sums")}
        return {"n": torch.tensor(self.n), "classes": torch.tensor(self.classes, dtype=torch.int64), **kept}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> CoMoments:
        """Restore an object from what `state` returned."""
        sites, width = state["sum"].shape
        moments = cls(sites, width, state["classes"].tolist())
        moments.n = int(state["n"])
        for name in ("counts", "shift", "sum", "gram", "sums"):
            setattr(moments, f"_{name}", state[name].clone())
        return moments
