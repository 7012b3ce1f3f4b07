"""One dictionary in training: its weights, Adam's moments, and how long each latent has been silent.

Weights are float32 whatever the activations are stored in: a threshold in bfloat16 stops learning. A step is: gradients, the decoder's part along its own rows
taken out (where norms are one), clipping of the whole gradient, Adam, rows brought back to norm one, thresholds kept at zero or above. `batchtopk`'s
threshold follows the batches' smallest kept score: a running mean at first, later an exponential one, so that it owes nothing to where it started.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.errors import ModelError
from mechscope.features.layout import Layout
from mechscope.features.objective import checked
from mechscope.features.pre_activations import BLOCK
from mechscope.features.shared_batch import Batch
from mechscope.features.step import Ahead, Step, step
from mechscope.settings.features import FeatureTraining, Objective

# share of one batch in the threshold, once more batches than its inverse were seen
_THRESHOLD_RATE = 0.01
# measured: 58 (relu), 70 (gated), 75 (jumprelu): values, latents and rows of the codes, and the same latent after latent
_BYTES_PER_ENTRY = 80


class DivergedError(ModelError):
    """A training whose loss is no longer a number."""


class Learner:
    """A dictionary in training.

    Attributes:
        layout: What it reads and writes.
        objective: What it is trained for.
        tensors: Its tensors, changed by every step.
        silent: ``(latent)``: tokens since each latent was last active.
        seen: Steps taken.
    """

    def __init__(self, layout: Layout, objective: Objective, training: FeatureTraining, tensors: Mapping[str, Tensor]) -> None:
        """Begin with some tensors, which are taken over and changed."""
        self.layout, self.objective, self._training = layout, checked(objective, layout), training
        self.tensors = dict(tensors)
        self._learned = {name: tensor for name, tensor in self.tensors.items() if name != "threshold" or layout.rule.name == "jumprelu"}
        self._adam = torch.optim.Adam(self._learned.values(), lr=1.0, betas=(training.momentum, 0.999), fused=True)
        device = self.tensors["encoder_bias"].device
        self.silent = torch.zeros(layout.latents, dtype=torch.int64, device=device)
        self.seen = 0
        self._cut = 0.0

    @property
    def dead(self) -> Tensor:
        """``(latent)``: which were silent for too long."""
        return self.silent >= self.objective.patience(self._training)

    @torch.no_grad()
    def advance(
        self, u: Float[Tensor, "token read"], v: Float[Tensor, "token written"], *, tokens: int | None = None, ahead: Ahead | None = None
    ) -> Step:
        """Take one step on a batch, in the units of the tensors.

        Args:
            u: What is read.
            v: What is to be written.
            tokens: Rows of the whole batch, where ranks hold some each and take the step together; None where these are all.
            ahead: What the reconstruction leads to further on (`mechscope.features.step`).

        Raises:
            DivergedError: The loss is not finite; the weights are as they were before.
        """
        dead = self.dead if self.objective.aux_weight else None
        done = step(self.layout, self.tensors, u, v, self.objective, dead=dead, cut=self._cut, tokens=tokens, ahead=ahead)
        gradients = done.gradients
        if self.objective.norms == "unit":
            for number in range(len(self.layout.groups)):
                decoder, gradient = self.tensors[f"decoder.{number}"], gradients[f"decoder.{number}"]
                gradient.addcmul_(decoder, torch.einsum("ld,ld->l", gradient, decoder)[:, None], value=-1)
        norm = torch.nn.utils.get_total_norm(list(gradients.values()))
        # inputs too: a pre-activation that is no number is never chosen, and the loss would not show it
        read = Batch.of(len(u), tokens).summed(u.sum())
        if not (math.isfinite(done.loss) and bool((norm + read).isfinite())):
            raise DivergedError(
                f"loss {done.loss:.3g}, gradient {norm:.3g}, inputs {'finite' if read.isfinite() else 'not finite'} at step {self.seen + 1}"
            )
        for name, tensor in self._learned.items():
            tensor.grad = gradients[name]
        # a gradient that is short enough would be multiplied by one: a pass over all of it for nothing
        if float(norm) + 1e-6 > self._training.clip:
            torch.nn.utils.clip_grads_with_norm_(list(self._learned.values()), self._training.clip, norm)
        for group in self._adam.param_groups:
            group["lr"] = self._training.rate(self.layout.latents) * self._training.pace(self.seen)
        self._adam.step()
        # gradients are made anew by every step: two of them would never fit where one does
        self._adam.zero_grad(set_to_none=True)
        gradients.clear()
        self._settle(done)
        self.silent += len(u) if tokens is None else tokens
        self.silent[done.active > 0] = 0
        self.seen += 1
        return done

    def _settle(self, done: Step) -> None:
        """Bring norms and thresholds back to where they have to be."""
        if self.objective.norms == "unit":
            for number in range(len(self.layout.groups)):
                decoder = self.tensors[f"decoder.{number}"]
                decoder.div_(torch.linalg.vector_norm(decoder, dim=1, keepdim=True))
        if self.layout.rule.name == "jumprelu":
            self.tensors["threshold"].clamp_(min=0)
        if done.cut is not None:
            self._cut = done.cut
            self.tensors["threshold"].lerp_(torch.tensor(done.cut).to(self.tensors["threshold"]), max(1 / (self.seen + 1), _THRESHOLD_RATE))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and numbers from which `restore` goes on to the last bit."""
        moments = {
            f"{name}:{part}": self._adam.state[tensor][part]
            for name, tensor in self._learned.items()
            for part in ("exp_avg", "exp_avg_sq")
            if tensor in self._adam.state
        }
        return {**self.tensors, **moments, "silent": self.silent}, {"seen": self.seen, "cut": self._cut}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.seen, self._cut = numbers["seen"], numbers["cut"]
        self.silent.copy_(tensors["silent"])
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
        for name, tensor in self._learned.items():
            if self.seen:
                parts = {part: tensors[f"{name}:{part}"].to(tensor.device).clone() for part in ("exp_avg", "exp_avg_sq")}
                self._adam.state[tensor] = {"step": torch.tensor(float(self.seen)), **parts}


@dataclass(frozen=True)
class Memory:
    """Bytes that a training needs: of weights, gradients and moments (`held`), and for a batch's work."""

    held: int
    work: int

    @property
    def total(self) -> int:
        """Both."""
        return self.held + self.work


def memory_of(layouts: list[Layout], batch: int, *, bytes_each: int = 4) -> Memory:
    """Return what training some dictionaries together needs; gradients are held by one at a time."""
    sizes = [sum(math.prod(shape) for shape in layout.shapes().values()) for layout in layouts]
    work = max(_work(layout, batch, bytes_each) for layout in layouts)
    return Memory(bytes_each * (3 * sum(sizes) + max(sizes)), work)


def _work(layout: Layout, batch: int, bytes_each: int) -> int:
    """Return the bytes of one step's work: a block of pre-activations, the entries of the codes, and what is read and written."""
    rule, block = layout.rule, min(BLOCK, batch * layout.latents)
    # a rule without k has half of its latents active until its penalty has acted
    entries = batch * (rule.k or layout.latents // 2)
    rows = batch * sum((*layout.input_widths, *layout.output_widths))
    # across tokens a block is sorted with its indices; topk compares what is there, unless by norm; others have a mask or what is compared beside it
    copies = 8 if rule.name == "batchtopk" else 1 if rule.name == "topk" and not rule.by_norm else 2
    return copies * bytes_each * block + entries * _BYTES_PER_ENTRY + 4 * bytes_each * rows
