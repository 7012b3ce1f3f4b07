"""What Hugging Face's own libraries do without any other: attention maps, hooks, hidden states, and LoRA by peft."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Beside, Job
from benchmarks.models import logit_difference, make_model, make_texts
from benchmarks.peers.cases import PeerCase, builder, first_text, forward, mean_entropies, stacked, top_log_probabilities
from benchmarks.settings import Settings
from benchmarks.shapes import HEAD_WIDTH, Size

BY, PEFT = "Hugging Face", "peft"


@torch.no_grad()
def backbone(case: PeerCase) -> None:
    """Run the plain forward pass up to the last residual stream."""
    case.model.transformer(case.ids, use_cache=False)


@torch.no_grad()
def _eager(case: PeerCase, model: Any) -> list[Tensor]:
    case.model.set_attn_implementation("eager")
    try:
        return [mean_entropies(maps) for maps in model(case.ids, use_cache=False, output_attentions=True).attentions]
    finally:
        case.model.set_attn_implementation("sdpa")


def entropy(case: PeerCase) -> list[Tensor]:
    """Take every head's mean entropy from eager attention's maps."""
    return _eager(case, case.model)


def entropy_backbone(case: PeerCase) -> list[Tensor]:
    """Take every head's mean entropy from eager attention's maps, without logits."""
    return _eager(case, case.model.transformer)


@torch.no_grad()
def patch_heads(case: PeerCase) -> list[Tensor]:
    """Patch every head, clean into corrupt, by a loop over hooks: one forward pass each."""
    clean: dict[int, Tensor] = {}
    projections = [block.attn.c_proj for block in case.model.transformer.h]
    handles = [
        projection.register_forward_pre_hook(lambda _, args, layer=layer: clean.update({layer: args[0]}))
        for layer, projection in enumerate(projections)
    ]
    case.model(case.ids, use_cache=False)
    for handle in handles:
        handle.remove()
    found = []
    for layer in case.layers:
        for head in case.heads:
            where = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)

            def put(_: Any, args: Any, layer: int = layer, where: slice = where) -> Any:
                z = args[0].clone()
                z[..., where] = clean[layer][..., where]
                return (z, *args[1:])

            handle = projections[layer].register_forward_pre_hook(put)
            found.append(logit_difference(case.model(case.corrupt, use_cache=False).logits))
            handle.remove()
    return found


@torch.no_grad()
def lens(case: PeerCase) -> list[Tensor]:
    """Read the five likeliest tokens behind every block from `output_hidden_states`."""
    after = case.model.transformer(case.ids, use_cache=False, output_hidden_states=True).hidden_states[1:]
    norm = case.model.transformer.ln_f
    # the last one comes with the final norm applied
    return [top_log_probabilities(case.model.lm_head(hidden if hidden is after[-1] else norm(hidden))) for hidden in after]


def _by_layer(found: list[Tensor]) -> np.ndarray:
    return first_text(found)


@dataclass(frozen=True, eq=False)
class StepCase(PeerCase):
    """A model with an adapter, its optimizer, and labels of the last quarter of every text.

    Attributes:
        optimizer: Of the adapter.
        labels: The tokens whose loss counts; −100 elsewhere.
    """

    optimizer: Any = None
    labels: Any = None

    def small(self) -> StepCase:
        """Return half the texts: as long, so that each still has labels."""
        half = slice(max(1, self.texts // 2))
        return replace(self, ids=self.ids[half], corrupt=self.corrupt[half], labels=self.labels[half])


def build_step(settings: Settings, size: Size) -> StepCase:
    """Put peft's LoRA on all attention maps."""
    peft = importlib.import_module("peft")
    ids, corrupt = (texts.to(settings.device) for texts in make_texts(settings.shape, size))
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["attn.c_attn", "attn.c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model(settings.shape, device=settings.device), config)
    labels = ids.clone()
    labels[:, : 3 * ids.shape[1] // 4] = -100
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plain = make_model(settings.shape, device=settings.device)
    return StepCase(plain, model.train(), ids, corrupt, torch.optim.AdamW(learns, lr=0.0), labels)


def step(case: StepCase) -> list[Tensor]:
    """Take an optimizer step; return the loss before it."""
    loss = case.wrapped(case.ids, labels=case.labels, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(case.optimizer.param_groups[0]["params"], 1.0)
    case.optimizer.step()
    case.optimizer.zero_grad()
    return [loss]


_MAPS = {"small": Size(1, 1024), "long": Size(1, 4096)}
JOBS = (
    Job(
        name="entropy",
        what="the same from eager attention's maps",
        build=builder(maps=True),
        run=entropy,
        sizes=_MAPS,
        forward=forward,
        numbers=stacked,
        by=BY,
        package="transformers",
        rounds=3,
        seconds=45,
    ),
    Job(
        name="entropy_backbone",
        what="the same from eager attention's maps",
        build=builder(maps=True),
        run=entropy_backbone,
        sizes=_MAPS,
        forward=forward,
        beside=Beside("passes without logits", backbone),
        numbers=stacked,
        by=BY,
        package="transformers",
        rounds=3,
        seconds=45,
    ),
    Job(
        name="patch_heads",
        what="the same by a loop over hooks",
        build=builder(),
        run=patch_heads,
        sizes={"small": Size(8, 16), "long": Size(1, 1024)},
        forward=forward,
        numbers=stacked,
        by=BY,
        package="transformers",
        rounds=1,
        slow=True,
        seconds=55,
    ),
    Job(
        name="lens",
        what="the same from hidden states",
        build=builder(),
        run=lens,
        sizes={"small": Size(8, 128), "long": Size(1, 4096)},
        forward=forward,
        numbers=_by_layer,
        by=BY,
        package="transformers",
        rounds=2,
        seconds=60,
    ),
    Job(
        name="lora_step",
        what="the same by peft and the model's own loss",
        build=build_step,
        run=step,
        sizes={"small": Size(4, 128), "long": Size(1, 2048)},
        forward=forward,
        numbers=stacked,
        by=PEFT,
        package="peft",
        seconds=50,
    ),
)
