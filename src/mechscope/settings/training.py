"""How a fine-tuning is run.

The defaults are those of paper 1's poster (AdamW, learning rate 3e-5, weight decay .01, batches of 32, up to 10 epochs with patience 6); it
does not say LoRA's learning rate, so LoRA has the usual ten times larger one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from mechscope import ranks
from mechscope.choices import LossOn, Schedule, TuningMethod
from mechscope.errors import SettingsError
from mechscope.settings import Number, Rate, Settings, ShareBelowOne, setting


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Settings):
    """Settings of one fine-tuning; its seed is that of the `Execution`."""

    panel: ClassVar[str] = "Training"

    learning_rate_full: Rate = setting(3e-5, "Peak learning rate of full fine-tuning.")
    learning_rate_lora: Rate = setting(3e-4, "Peak learning rate of LoRA.")
    weight_decay: Annotated[float, Ge(0)] = setting(0.01, "AdamW's decoupled weight decay.")
    epochs: Number = setting(10, "Passes over the training documents at most.")
    max_steps: Number | None = setting(None, "Optimizer steps at most; by default what the epochs give.")
    batch_size: Number = setting(32, "Documents per forward pass.")
    gradient_accumulation: Number = setting(1, "Forward passes per optimizer step.")
    warmup: ShareBelowOne = setting(0.0, "Share of the steps in which the learning rate rises, 0 to below 1.")
    schedule: Schedule = setting("linear", "What the learning rate does after the warm-up.")
    max_grad_norm: Rate = setting(1.0, "Norm at which gradients are clipped.")
    patience: Number | None = setting(6, "Evaluations without a better validation loss after which training stops.")
    eval_every: Number | None = setting(None, "Optimizer steps between evaluations (and checkpoints); by default once per epoch.")
    loss_on: LossOn = setting("summary", "Tokens that are learned and scored.")
    bf16: bool = setting(False, "Compute in bfloat16 while the learned weights stay float32.")

    def learning_rate(self, method: TuningMethod) -> float:
        """Return the peak learning rate of a method."""
        return self.learning_rate_full if method == "full" else self.learning_rate_lora

    def steps_per_epoch(self, n_examples: int) -> int:
        """Return the optimizer steps of one pass; the last, smaller batch is a step of its own."""
        micro_batches = -(-n_examples // self.batch_size)
        return -(-micro_batches // self.gradient_accumulation)

    def steps(self, n_examples: int) -> int:
        """Return the optimizer steps of a whole training that nothing stops early."""
        steps = self.epochs * self.steps_per_epoch(n_examples)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def check_ranks(self) -> None:
        """Refuse batches that the ranks cannot share evenly.

        Raises:
            SettingsError: The number of ranks does not divide the batch size.
        """
        if self.batch_size % ranks.size():
            raise SettingsError(
                f"batches of {self.batch_size} cannot be divided among {ranks.size()} ranks: choose a multiple of {ranks.size()} for batch_size, or, "
                f"to go on with a run that was begun, start a number of ranks that divides {self.batch_size}"
            )
