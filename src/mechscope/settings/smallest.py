"""Smallest effects of interest, by which quantities are called changed or negligible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mechscope.settings import Number, Rate, Settings, setting


@dataclass(frozen=True, kw_only=True)
class SmallestSettings(Settings):
    """What is too small to be a finding; by default twice what the base model differs by in another precision (bfloat16), at its worst place."""

    panel: ClassVar[str] = "Smallest effects"

    entropy_change: Rate | None = setting(
        None, "Of a head's attention entropy, nats; by default from the precision floor, as all of these."
    )
    attention_kl: Rate | None = setting(None, "Of attention KL, of a head and of a layer's mean, nats.")
    write_change: Rate | None = setting(
        None, "Of what a head or an MLP writes into the residual stream, as a part of what the base's writes."
    )
    residual_cosine: Rate | None = setting(None, "Of the residual stream behind a layer, 1 − cosine.")
    output_kl: Rate | None = setting(None, "Of next-token distributions, nats per token.")
    loss_change: Rate | None = setting(None, "Of the loss, nats per token.")
    documents: Number = setting(8, "Documents on which the precision floor is measured.")
