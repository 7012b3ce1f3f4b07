"""A subspace of one site that is held to carry a variable: exchanged between two runs, judged, saved and read back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechscope.causal.interchange import Interchange, Position, exchange_edit, judged_by, judgements
from mechscope.causal.places import Place
from mechscope.causal.steering import features_at
from mechscope.causal.subspace import exchanged
from mechscope.choices import Among
from mechscope.data.pairs import Pairs
from mechscope.errors import ModelError, RunError
from mechscope.instrument import Edit, observed
from mechscope.instrument.edits import EditSite, validate
from mechscope.instrument.execution import Execution
from mechscope.shapes import by_shape
from mechscope.stats.convergence import Convergence, convergence
from mechscope.store.tables import read_tensors, write_tensors
from mechscope.subject import Subject

_KIND = "mechscope alignment"


@dataclass(frozen=True)
class Alignment:
    """A subspace of one site that is held to carry a variable.

    Attributes:
        rotation: ``(features, k)``: orthonormal columns that span it.
        site: Where in the block.
        layer: Which block.
        position: Tokens that are exchanged, as `PairBatch.positions` takes them.
        head: Which head, of site `z`.
        curve: How it was learned: one row per epoch with `epoch`, `loss` (nats), `accuracy` (share of training pairs), `dimensions`, `temperature`.
        fingerprint: Of the model it belongs to.
        widths: Of a boundless search one row per width that was learned: `dimensions`, `n` (pairs set aside), `correct` (those right after its
            interchange), `behind_best_p` (exact p, one-sided, that it is right on as many pairs as the best), `chosen` (whether it is this one), and
            `converged`, `late_share` of its training.
    """

    rotation: Float[Tensor, "features k"]
    site: EditSite
    layer: int
    position: Position
    head: int | None = None
    curve: pd.DataFrame = field(default_factory=pd.DataFrame)
    fingerprint: str = ""
    widths: pd.DataFrame = field(default_factory=pd.DataFrame)

    __repr__ = by_shape

    @property
    def convergence(self) -> Convergence:
        """Whether its training arrived, by the loss of each epoch; a random subspace was not trained, and has nothing to arrive at."""
        if self.curve.empty:
            return Convergence(True, float("nan"), "")
        # the learning rate falls linearly to zero
        return convergence(self.curve["loss"], pace=1 - (self.curve["epoch"] + 0.5) / len(self.curve))

    @property
    def width(self) -> float:
        """How many dimensions the variable needs, as a boundless search found; NaN where none was made or a training it rests on has not converged."""
        return float(self.dimensions) if len(self.widths) and self.widths["converged"].all() else float("nan")

    @property
    def dimensions(self) -> int:
        """Number of dimensions of the subspace."""
        return self.rotation.shape[1]

    def edit(self, source_values: Float[Tensor, "batch token *head features"], mask: Bool[Tensor, "batch token"]) -> Edit:
        """Return the edit that gives the subspace a source's values.

        Args:
            source_values: The site's values in the source's run, as `record` gives them.
            mask: Tokens that are changed.
        """
        return exchange_edit(self.site, self.layer, self.head, source_values, mask, lambda value: exchanged(value, self.rotation))

    def accuracy(self, subject: Subject, pairs: Pairs, *, among: Among = "vocabulary", execution: Execution = Execution()) -> float:
        """Return the interchange accuracy: the share of pairs after whose interchange the likeliest token is an answer.

        Args:
            subject: The model.
            pairs: Base and source texts with the counterfactual answers; not those it was learned from.
            among: The likeliest of the whole `vocabulary`, or of the right and wrong `answers` (for a model that would rather say something else).
            execution: Tokens of a batch (2,048 by default).

        Raises:
            MechscopeError: Model or pairs do not fit.
        """
        return float(self.right(subject, pairs, among=among, execution=execution).mean())

    def right(
        self, subject: Subject, pairs: Pairs, *, among: Among = "vocabulary", execution: Execution = Execution()
    ) -> Bool[np.ndarray, " pair"]:
        """Tell of each pair, in the order of the batches, whether the likeliest token after its interchange is an answer; see `accuracy`."""
        self._check(subject)
        with observed(subject):
            place, judged = Place(self.site, self.layer, self.head), judged_by(pairs, among)
            parts = judgements(
                lambda text: rights(subject, text, self, among), subject, judged, place, self.position, execution, tokens=2048
            )
            return np.concatenate(list(parts))

    def save(self, path: Path | str) -> None:
        """Write it to a safetensors file."""
        position = self.position if isinstance(self.position, str | int) else list(self.position)
        place = {"site": self.site, "layer": self.layer, "head": self.head, "position": position}
        meta = {"kind": _KIND, **place, "fingerprint": self.fingerprint, "curve": self.curve.to_dict(orient="list")}
        meta["widths"] = self.widths.to_dict(orient="list")
        write_tensors({"rotation": self.rotation}, Path(path), meta=meta)

    @classmethod
    def load(cls, path: Path | str, subject: Subject) -> Alignment:
        """Read what `save` wrote, for the model it was learned on.

        Raises:
            RunError: The file is missing, damaged or something else.
            ModelError: It belongs to another model.
        """
        tensors, meta = read_tensors(Path(path))
        if not isinstance(meta, dict) or meta.get("kind") != _KIND or "rotation" not in tensors:
            raise RunError(f"{path} holds no alignment: give a file that Alignment.save wrote")
        place = {name: meta[name] for name in ("site", "layer", "head", "position", "fingerprint")}
        alignment = cls(
            tensors["rotation"].to(subject.device), **place, curve=pd.DataFrame(meta["curve"]), widths=pd.DataFrame(meta["widths"])
        )
        alignment._check(subject)
        return alignment

    def _check(self, subject: Subject) -> None:
        if self.fingerprint and self.fingerprint != subject.fingerprint:
            raise ModelError(
                f"the alignment was learned on a model with fingerprint {self.fingerprint[:12]}, {subject.source!r} has "
                f"{subject.fingerprint[:12]}: load that model, or learn an alignment for this one"
            )
        validate([Place(self.site, self.layer, self.head).edit(0.0)], subject.anatomy)
        if self.rotation.shape[0] != (width := features_at(subject, self.site, self.layer)):
            raise ModelError(
                f"the alignment is of {self.rotation.shape[0]} features, {self.site} of layer {self.layer} of {subject.source!r} has {width}"
            )


@torch.no_grad()
def rights(subject: Subject, text: Interchange, alignment: Alignment, among: Among) -> Bool[np.ndarray, " pair"]:
    """Tell of each pair of a batch whether it is right after its interchange."""
    return text.right(text.logits(subject, alignment.edit(text.source, text.mask)), among).cpu().numpy()
