"""One optimizer step of fine-tuning: LoRA everywhere, LoRA in the slices of some heads, all weights.

A step is what the trainer does with one batch: forward, backward, clipping, AdamW. The last quarter of every text is its summary, whose tokens
alone have a loss. The learning rate is zero: the same work, and every round has the same loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import Job
from benchmarks.models import make_model, make_texts
from benchmarks.settings import Settings
from benchmarks.shapes import Shape, Size
from mechscope.adapt import attach
from mechscope.adapt.loss import Collator, summed_loss
from mechscope.data.prompt import Example
from mechscope.subject import Components
from mechscope.subject.load import load

RANK = 8
_SIZES = {"small": Size(4, 128), "long": Size(1, 2048)}


@dataclass(frozen=True, eq=False)
class StepCase:
    """A model that learns, its optimizer and a batch.

    Attributes:
        model: What learns.
        plain: The model of the forward pass it is compared with.
        optimizer: Of all that requires a gradient.
        inputs: The batch, with labels.
    """

    model: nn.Module
    plain: nn.Module
    optimizer: torch.optim.Optimizer
    inputs: dict[str, Tensor]

    @property
    def texts(self) -> int:
        """How many texts."""
        return len(self.inputs["input_ids"])

    @property
    def tokens(self) -> int:
        """Of all texts together."""
        return self.inputs["input_ids"].numel()

    @property
    def each(self) -> int:
        """Of each text."""
        return self.inputs["input_ids"].shape[1]

    def small(self) -> StepCase:
        """Return half the texts: as long, so that each still has a summary."""
        half = {name: tensor[: max(1, self.texts // 2)] for name, tensor in self.inputs.items()}
        return StepCase(self.model, self.plain, self.optimizer, half)


def every_layer(shape: Shape) -> str:
    """Name all layers."""
    return f"layers:0-{shape.layers - 1}"


def some_heads(shape: Shape) -> str:
    """Name a quarter of each layer's heads."""
    return ",".join(f"a{layer}.h{head}" for layer in range(shape.layers) for head in range(max(1, shape.heads // 4)))


def build(settings: Settings, size: Size, *, where: Callable[[Shape], str] | None) -> StepCase:
    """Make the model, put LoRA where it is to learn (None: everything learns), and encode the batch."""
    subject = load(make_model(settings.shape, device=settings.device))
    if where is None:
        model: Any = make_model(settings.shape, device=settings.device)
    else:
        model = attach(subject, Components.parse(where(settings.shape)), rank=RANK, modules="attention", share_weights=True)
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
    texts = make_texts(settings.shape, size)[0]
    begin = 3 * texts.shape[1] // 4
    examples = [Example(str(at), tuple(row), (0, begin), (begin, len(row)), False) for at, row in enumerate(texts.tolist())]
    inputs = {name: tensor.to(settings.device) for name, tensor in Collator(0)(examples).items()}
    return StepCase(model.train(), subject.plain, torch.optim.AdamW(learns, lr=0.0), inputs)


def step(case: StepCase) -> float:
    """Take an optimizer step; return the loss before it."""
    loss, tokens = summed_loss(case.model, case.inputs)
    loss = loss / tokens
    loss.backward()
    learns = case.optimizer.param_groups[0]["params"]
    torch.nn.utils.clip_grad_norm_(learns, 1.0)
    case.optimizer.step()
    case.optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def forward(case: StepCase) -> None:
    """Run the plain forward pass, logits of all tokens included."""
    case.plain(case.inputs["input_ids"], use_cache=False)


def _loss(found: float) -> np.ndarray:
    return np.array([found])


def _job(name: str, what: str, where: Callable[[Shape], str] | None, *, comparable: bool = False) -> Job:
    return Job(
        name=name,
        what=what,
        build=partial(build, where=where),
        run=step,
        sizes=_SIZES,
        forward=forward,
        numbers=_loss if comparable else None,
        seconds=40,
    )


JOBS = (
    _job("lora_step", f"optimizer step, LoRA of rank {RANK} on all attention", every_layer, comparable=True),
    _job("lora_heads_step", f"optimizer step, LoRA of rank {RANK} in a quarter of each layer's heads", some_heads),
    _job("full_step", "optimizer step, all weights", None),
)
