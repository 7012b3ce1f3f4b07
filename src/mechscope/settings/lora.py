"""What a LoRA adapter is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mechscope.choices import LoraModules
from mechscope.settings import Number, Rate, Settings, ShareBelowOne, setting


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Settings):
    """Rank, size and modules of LoRA."""

    panel: ClassVar[str] = "LoRA"

    rank: Number = setting(8, "Rank of standard LoRA, and of every strategy at equal rank.")
    lora_scaling: Rate = setting(2.0, "Alpha divided by rank.")
    lora_dropout: ShareBelowOne = setting(0.0, "Dropout in front of the adapter.")
    lora_modules: LoraModules = setting("attention", "Linear maps of a layer that are adapted.")
