"""How the maps of a tuned lens are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from mechscope.settings import Number, Rate, Settings, setting


@dataclass(frozen=True, kw_only=True)
class TunedLensSettings(Settings):
    """How translators are trained: by Adam, with a learning rate that falls linearly to zero."""

    panel: ClassVar[str] = "Tuned lens"

    steps: Number = setting(250, "Training steps of the lens.")
    tokens_per_step: Number = setting(2048, "Most tokens of a training step's texts, padding included.")
    learning_rate: Rate = setting(1e-3, "Learning rate of the first training step; it falls linearly to zero.")
    weight_decay: Annotated[float, Ge(0)] = setting(1e-3, "Decoupled weight decay, towards the logit lens.")
