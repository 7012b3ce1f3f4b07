"""What an edit writes, and where: the key of a subject, and the value that makes a model say the new target (Meng et al. 2022, section 3.1).

key     k*: what the MLP's last map reads at the subject's last token, the mean over several beginnings of the text. This one key is used everywhere: in the
        direction of the change, in its length and in what is left to change. (With the mean key in one place and the prompt's own in the others, edits after
        one another grow and the model breaks.)
value   v* = W k* + b + δ, where δ is found by Adam: added to the map's output at the subject's last token, it makes the whole target likely after every
        beginning, while what it says right behind the subject alone stays (KL) and δ stays short.

Beginnings are the starts of texts that the model reads anyway (in the paper, texts that it generates).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.data.pairs import PairBatch, Pairs, PromptPair, collate_pairs
from mechscope.edit.maps import DownMap, shifted
from mechscope.edit.requests import Request, Spelled
from mechscope.errors import DataError
from mechscope.instrument import record
from mechscope.instrument.walk import run_backbone, unembed
from mechscope.shapes import by_shape
from mechscope.subject import Subject
from mechscope.subject.placement import sent

# the authors' "{} is a" is read at the subject's last token, which sees nothing of what follows
_ESSENCE = "{}"
# lengths of beginnings, as in the paper
_LENGTHS = (5, 10)


@dataclass(frozen=True)
class Search:
    """How a value is looked for; defaults are those of the authors' code for GPT-2.

    Attributes:
        steps: Steps of Adam at most.
        rate: Its learning rate.
        kl: Weight of the KL divergence of what the model says of the subject.
        decay: Weight of ‖δ‖ / ‖v‖².
        longest: Most that δ may be long, in lengths of v.
        enough: The search stops at this loss.
    """

    steps: int = 25
    rate: float = 0.5
    kl: float = 0.0625
    decay: float = 0.5
    longest: float = 4.0
    enough: float = 0.05


@dataclass(frozen=True)
class Contexts:
    """A fact's prompt behind several beginnings: with its target, and with the subject's last token marked.

    Attributes:
        batch: Texts; the target is what is to be predicted, the segment "subject" one token.
        essence: The subject alone.
    """

    batch: PairBatch
    essence: PairBatch

    __repr__ = by_shape


def beginnings(texts: Pairs, number: int, *, start: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Return the first tokens of some texts, half of them 5 and half 10 long.

    Args:
        texts: Texts with their start tokens.
        number: How many.
        start: How many start tokens each text has, which are left out.
        seed: Of which texts.
    """
    random = np.random.default_rng(seed)
    longest = _LENGTHS[-1] + start
    usable = [pair.clean for pair in texts if len(pair.clean) >= longest]
    if number and not usable:
        raise DataError(
            f"no text of {texts.source} has {longest} tokens, from which beginnings are taken: give longer texts, or no beginnings"
        )
    drawn = random.permutation(len(usable))
    return [usable[drawn[at % len(usable)]][start : start + _LENGTHS[at % len(_LENGTHS)]] for at in range(number)]


def contexts(spelled: Spelled, request: Request, before: Sequence[Sequence[int]] = (), *, subject: str | None = None) -> Contexts:
    """Return a fact's contexts: the prompt alone, and behind each beginning.

    Args:
        spelled: The tokenizer.
        request: The fact.
        before: Beginnings.
        subject: Another subject, as a control.
    """
    name, target = subject or request.subject, spelled.target(request.new)
    pairs = []
    for lead in ((), *before):
        prompt, last = spelled.with_subject(request.prompt, name, before=lead)
        ids = (*prompt, *target)
        pairs.append(PromptPair(request.id, ids, ids, target=(len(prompt), len(ids)), segments={"subject": ((last, last + 1),)}))
    ids, last = spelled.with_subject(_ESSENCE, name)
    essence = PromptPair(request.id, ids, ids, segments={"subject": ((last, last + 1),)})
    return Contexts(collate_pairs(pairs), collate_pairs([essence]))


@torch.no_grad()
def at_subject(subject: Subject, batch: PairBatch, layers: Sequence[int], site: str) -> dict[int, Float[Tensor, " width"]]:
    """Return what stands at the subject's last token at a site of some layers, the mean over contexts, in float64."""
    with subject.active(), record(subject, site, layers=layers) as recording:  # type: ignore[arg-type]
        run_backbone(subject, batch.clean, _mask(batch))
    where = batch.positions("subject")
    return {layer: recording[site, layer][sent(where, recording[site, layer].device)].double().mean(0).cpu() for layer in layers}


def key_of(subject: Subject, here: DownMap, given: Contexts) -> Float[Tensor, " d_mlp"]:
    """Return k*, in float64 on the CPU."""
    return at_subject(subject, given.batch, [here.layer], "neuron")[here.layer]


def shift_of(
    subject: Subject, here: DownMap, given: Contexts, value: Float[Tensor, " d_model"], search: Search = Search()
) -> tuple[Float[Tensor, " d_model"], list[float]]:
    """Look for δ: what is to be added to a map's output at the subject's last token.

    Args:
        subject: The model.
        here: The map.
        given: The fact's contexts.
        value: W k* + b, whose length is the measure of δ's.
        search: How.

    Returns:
        δ in float64 on the CPU, and the loss at every step (nats).
    """
    scale = float(value.norm())
    kind = torch.float64 if subject.dtype == torch.float64 else torch.float32
    shift = torch.zeros(len(value), dtype=kind, device=here.weight.device, requires_grad=True)
    optimizer = torch.optim.Adam([shift], lr=search.rate)
    with torch.no_grad():
        before = _essence(subject, here, given, torch.zeros_like(shift))
    losses: list[float] = []
    for step in range(search.steps):
        nll = target_losses(subject, here, given.batch, shift).mean()
        after = _essence(subject, here, given, shift)
        kl = (before.exp() * (before - after)).sum(-1).mean()
        loss = nll + search.kl * kl + search.decay * sent(shift.norm(), nll.device) / scale**2
        losses.append(float(loss.detach()))
        if losses[-1] < search.enough or step == search.steps - 1:
            break
        (shift.grad,) = torch.autograd.grad(loss, shift)
        optimizer.step()
        with torch.no_grad():
            if (length := float(shift.detach().norm())) > search.longest * scale:
                shift *= search.longest * scale / length
    return shift.detach().double().cpu(), losses


def target_losses(subject: Subject, here: DownMap, batch: PairBatch, shift: Float[Tensor, " d_model"]) -> Float[Tensor, " context"]:
    """Return −log p of the target after each context with a vector added at the subject's last token: nats, the mean over its tokens."""
    with shifted(here.module, batch.positions("subject"), shift):
        return losses_of(subject, batch)


def losses_of(subject: Subject, batch: PairBatch) -> Float[Tensor, " text"]:
    """Return −log p of each text's target, the mean over its tokens (nats, float32 at least); gradients flow."""
    last = subject.anatomy.n_layers - 1
    with record(subject, "residual", layers=[last], detach=False) as recording:
        run_backbone(subject, batch.clean, _mask(batch))
    hidden, wanted = recording["residual", last], batch.positions("target")
    rows, tokens = wanted[:, 1:].nonzero(as_tuple=True)
    logits = unembed(subject, hidden[sent(rows, hidden.device), sent(tokens, hidden.device)])
    own = sent(batch.clean[rows, tokens + 1], logits.device)
    each = -precise(logits).log_softmax(-1).gather(1, own[:, None])[:, 0]
    counts = sent(wanted.sum(1), each.device)
    return torch.zeros(len(batch), dtype=each.dtype, device=each.device).index_add(0, sent(rows, each.device), each) / counts


def _essence(subject: Subject, here: DownMap, given: Contexts, shift: Tensor) -> Float[Tensor, "row vocab"]:
    """Return the log probabilities of what follows the subject."""
    batch, last = given.essence, subject.anatomy.n_layers - 1
    where = batch.positions("subject")
    with shifted(here.module, where, shift), record(subject, "residual", layers=[last], detach=False) as recording:
        run_backbone(subject, batch.clean, _mask(batch))
    hidden = recording["residual", last]
    return precise(unembed(subject, hidden[sent(where, hidden.device)])).log_softmax(-1)


def precise(logits: Tensor) -> Tensor:
    """Return logits in float32 at least: a softmax in bfloat16 has two digits."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _mask(batch: PairBatch) -> Tensor | None:
    return None if bool(batch.real.all()) else batch.real
