"""How a fine-tuning is run, as a value.

The defaults are those of paper 1's poster (AdamW, learning rate 3e-5, weight decay .01, batches of 32, up to 10 epochs with patience 6); it
does not say LoRA's learning rate, so LoRA has the usual ten times larger one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mechscope import ranks
from mechscope.adapt.loss import LossOn
from mechscope.errors import SettingsError

Method = Literal["full", "lora"]
Schedule = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of one fine-tuning.

    Attributes:
        learning_rate_full: Peak learning rate of full fine-tuning.
        learning_rate_lora: Peak learning rate of LoRA.
        weight_decay: AdamW's decoupled decay.
        epochs: Passes over the training examples at most.
        max_steps: Optimizer steps at most; None leaves it to `epochs`.
        batch_size: Examples per forward pass.
        gradient_accumulation: Forward passes per optimizer step.
        warmup: Share of the steps, from 0 to 1, in which the learning rate rises.
        schedule: What the learning rate does after that.
        max_grad_norm: Clipping of the gradient's norm.
        patience: Evaluations without a new best validation loss after which training stops; None never stops early.
        eval_every: Optimizer steps between evaluations (and checkpoints); None means once per epoch.
        loss_on: Which tokens are learned and scored: `"summary"` or `"all"`.
        bf16: Compute in bfloat16 (the weights that learn stay float32).
        seed: Seed of the order of examples, of dropout and of the adapter's start.
    """

    learning_rate_full: float = 3e-5
    learning_rate_lora: float = 3e-4
    weight_decay: float = 0.01
    epochs: int = 10
    max_steps: int | None = None
    batch_size: int = 32
    gradient_accumulation: int = 1
    warmup: float = 0.0
    schedule: Schedule = "linear"
    max_grad_norm: float = 1.0
    patience: int | None = 6
    eval_every: int | None = None
    loss_on: LossOn = "summary"
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        whole = ("epochs", "max_steps", "batch_size", "gradient_accumulation", "patience", "eval_every")
        for name in (*whole, "learning_rate_full", "learning_rate_lora", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise SettingsError(f"training setting {name} is {value}: it must be positive")
        if not 0 <= self.warmup < 1:
            raise SettingsError(f"training setting warmup is {self.warmup}: it is a share of the steps, from 0 up to but not including 1")
        if self.weight_decay < 0:
            raise SettingsError(f"training setting weight_decay is {self.weight_decay}: it must not be negative")
        if self.schedule not in ("linear", "cosine", "constant"):
            raise SettingsError(f"training setting schedule is {self.schedule!r}: use 'linear', 'cosine' or 'constant'")
        if self.loss_on not in ("summary", "all"):
            raise SettingsError(f"training setting loss_on is {self.loss_on!r}: use 'summary' or 'all'")

    def learning_rate(self, method: Method) -> float:
        """Return the peak learning rate of a method."""
        return self.learning_rate_full if method == "full" else self.learning_rate_lora

    def steps_per_epoch(self, n_examples: int) -> int:
        """Return the optimizer steps of one pass; the last, smaller batch is a step of its own."""
        micro_batches = -(-n_examples // self.batch_size)
        return -(-micro_batches // self.gradient_accumulation)


def check_batch_size(batch_size: int) -> None:
    """Refuse batches that the ranks cannot share evenly.

    Raises:
        SettingsError: The number of ranks does not divide the batch size.
    """
    if batch_size % ranks.size():
        raise SettingsError(
            f"batches of {batch_size} cannot be divided among {ranks.size()} ranks: choose a multiple of {ranks.size()} for batch_size, or, to go on "
            f"with a run that was begun, start a number of ranks that divides {batch_size}"
        )
