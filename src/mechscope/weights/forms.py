"""The OV and QK circuit of every head of a model, or how fine-tuning changed them, as bilinear forms.

The gain and centring of the norm a head reads through are part of its weights (and so is the gain of a norm behind attention). A pair of models gives
W_tuned − W_base, of rank at most 2 d_head (Elhage et al. 2021 for the circuits): which may be seen through the base's tokens, so that what is shown is
the change of the head and not that of the embeddings.
"""

from __future__ import annotations

import torch

from mechscope.instrument.wiring import Wiring
from mechscope.subject.load import Subject
from mechscope.subject.pair import Pair
from mechscope.weights.bilinear import Bilinear
from mechscope.weights.rotary import score_matrices

Model = Subject | Pair


class Forms:
    """One model's circuits.

    Attributes:
        subject: The model.
    """

    def __init__(self, subject: Subject) -> None:
        """Find out how the model's heads read and write; raises ModelError where that is not supported."""
        self.subject, self._wiring = subject, Wiring(subject)
        self._scores: dict[tuple[int, int], torch.Tensor] = {}

    def ov(self, layer: int, head: int) -> Bilinear:
        """Return W_OV: what is attended to → what is written. No constants: those are written wherever a head looks, as attention sums to one."""
        weight, _ = self._wiring.writer(layer)
        value = self._wiring.folded(layer, "value")[head // self._wiring.group]
        return Bilinear(value.double(), weight[head].double())

    def qk(self, layer: int, head: int, *, offset: int = 0) -> Bilinear:
        """Return W_QK at an offset: what a query reads, what a key reads → their score, scaling and constants included.

        Args:
            layer: Which block.
            head: Which head.
            offset: Query position less key position, in tokens; counts in rotary families only. At 0 nothing is turned: content alone.

        Raises:
            ModelError: Queries or keys have norms of their own.
            SettingsError: The offset does not fit the model.
        """
        if (layer, offset) not in self._scores:
            self._scores[layer, offset] = score_matrices(self.subject, layer, [offset])[0]
        return self.bare_qk(layer, head, self._scores[layer, offset])

    def bare_qk(self, layer: int, head: int, scores: torch.Tensor) -> Bilinear:
        """Return the form for a score matrix at hand, one of `score_matrices`."""
        shared = head // self._wiring.group
        query, key = self._wiring.folded(layer, "query")[head].double(), self._wiring.folded(layer, "key")[shared].double()
        constants = [
            None if (constant := self._wiring.constant(layer, part)) is None else constant[at].double()
            for part, at in (("query", head), ("key", shared))
        ]
        return Bilinear(query, scores @ key, constants[0], None if constants[1] is None else scores @ constants[1])


class ChangedForms:
    """The difference of two models' circuits, tuned less base; made of the same calls.

    Attributes:
        subject: The base model, through whose tokens the change is seen.
    """

    def __init__(self, pair: Pair) -> None:
        """Take both models apart."""
        self.subject = pair.base
        self._base, self._tuned = Forms(pair.base), Forms(pair.tuned)

    def ov(self, layer: int, head: int) -> Bilinear:
        """Return ΔW_OV."""
        return self._tuned.ov(layer, head).minus(self._base.ov(layer, head))

    def qk(self, layer: int, head: int, *, offset: int = 0) -> Bilinear:
        """Return ΔW_QK at an offset, the change of constants included."""
        return self._tuned.qk(layer, head, offset=offset).minus(self._base.qk(layer, head, offset=offset))


def forms_of(model: Model) -> Forms | ChangedForms:
    """Return a model's circuits, or how they changed for a pair."""
    return ChangedForms(model) if isinstance(model, Pair) else Forms(model)
