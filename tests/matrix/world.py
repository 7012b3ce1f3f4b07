"""A model as mechscope loads it beside plain copies as Hugging Face gives them, and how far two tensors are apart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mechscope.subject.load import Subject
from tests import families
from tests.matrix.configs import VOCABULARY

# two lengths: one within, one beyond the sliding windows of the tiny configurations
LENGTHS = (12, 4)


class NotSaid(Exception):
    """Plain Hugging Face does not give what would be compared."""


@dataclass
class World:
    """A model beside plain copies of it.

    Attributes:
        subject: The model, loaded by mechscope.
        plain: A copy as Hugging Face gives it, with the attention whose maps it hands out.
        other: A second plain model of the same family, for divergences.
    """

    subject: Subject
    plain: Any
    other: Any
    second: Subject

    @cached_property
    def texts(self) -> list[Tensor]:
        """Two random texts."""
        return families.documents(VOCABULARY, seed=1, lengths=LENGTHS)

    def alone(self, model: Any, text: Tensor, **wanted: bool) -> Any:
        """Run the plain model on one text."""
        with torch.no_grad():
            return model(input_ids=text[None], use_cache=False, **wanted)


def off(found: Tensor, expected: Tensor) -> float:
    """Return the largest deviation relative to the largest value."""
    if found.shape != expected.shape:
        return float("inf")
    scale = expected.double().abs().max().clamp(min=1e-9)
    return float(((found.double() - expected.double()).abs().max() / scale).nan_to_num(torch.inf))
