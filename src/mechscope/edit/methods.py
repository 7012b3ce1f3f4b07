"""Making edits: ROME, MEMIT, AlphaEdit, and constrained fine-tuning as the baseline; each returns a `Delta` and leaves the model as it was.

What is looked for (the shift δ of a value) is found by the model's own gradients in the model's type; what is solved is solved in float64 and rounded once, to
the weight's type, when the edit is applied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mechscope.data.pairs import Pairs
from mechscope.edit import solve
from mechscope.edit.delta import Change, Delta, LowRank, applied
from mechscope.edit.keys import RIDGE, KeyMoments
from mechscope.edit.maps import DownMap, down_map, require_layers
from mechscope.edit.requests import Request, Spelled
from mechscope.edit.value import Contexts, Search, at_subject, beginnings, contexts, key_of, losses_of, shift_of
from mechscope.errors import DataError, ModelError, SettingsError
from mechscope.instrument import Execution
from mechscope.subject import Subject

# λ of MEMIT in units of the map's inputs. The authors' 20,000 tokens for GPT-2 XL are 3 of its 6,400; on a newsroom model taught 60 facts that made a third of
# single edits take, and 0.1 all of them, with as many neighbours kept
MEMIT_WEIGHT = 0.1
# AlphaEdit: directions below this share of the mean are free (at 0.02 a newsroom model has none); its ridge is a share of the keys' mean square
FREE, ALPHA_RIDGE = 0.1, 1e-4


@dataclass(frozen=True)
class Setting:
    """What edits of one model share.

    Attributes:
        moments: C of the layers that may be edited.
        before: Beginnings that stand before prompts; none for the prompt alone.
        search: How values are looked for.
        subjects: By the fact's id, another subject at whose key it is written, as a control.
    """

    moments: KeyMoments
    before: Sequence[Sequence[int]] = ()
    search: Search = field(default_factory=Search)
    subjects: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, subject: Subject, moments: KeyMoments, texts: Pairs, *, number: int = 20, seed: int = 0, search: Search | None = None
    ) -> Setting:
        """Take beginnings from texts; `DataError` where none is long enough."""
        start = len(_spelled(subject).pieces.start_ids)
        return cls(moments, beginnings(texts, number, start=start, seed=seed), search or Search())

    def contexts(self, subject: Subject, request: Request) -> Contexts:
        """Return a fact's contexts."""
        return contexts(_spelled(subject), request, self.before, subject=self.subjects.get(request.id))


def rome(subject: Subject, request: Request, setting: Setting, *, layer: int, execution: Execution = Execution()) -> Delta:
    """Edit one fact in one layer by a change of rank one (Meng et al. 2022).

    Args:
        subject: The model.
        request: The fact.
        setting: C, beginnings, how the value is looked for.
        layer: Where.
        execution: Progress.

    Raises:
        MechscopeError: The layer cannot be edited, its keys were not read, or the tokenizer splits the subject.
    """
    here, given = down_map(subject, layer), setting.contexts(subject, request)
    key = key_of(subject, here, given)
    shift, losses = shift_of(subject, here, given, here.written(key[:, None])[:, 0], setting.search)
    execution.told("edits", 1, 1)
    left, right = solve.rome(shift, key, setting.moments.mean(layer, ridge=RIDGE))
    return Delta.of(subject, {here.parameter: _change(here, left, right)}, _about("rome", [layer], [request], losses[-1]))


def memit(
    subject: Subject,
    requests: Sequence[Request],
    setting: Setting,
    *,
    layers: Sequence[int],
    weight: float | None = None,
    execution: Execution = Execution(),
) -> Delta:
    """Edit facts together, spread over several layers (Meng et al. 2023).

    What the last layer's residual stream lacks at each subject is shared out: every layer, in order, writes its share of what is still lacking.

    Args:
        subject: The model.
        requests: The facts.
        setting: C, beginnings, how values are looked for.
        layers: Where; the value is looked for in the last.
        weight: λ, in tokens of C; by default a tenth of the map's inputs.
        execution: Progress.

    Raises:
        MechscopeError: As of `rome`; or a norm stands between a layer's MLP and the residual stream.
    """

    def solved(here: DownMap, residuals: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        own = MEMIT_WEIGHT * len(keys) if weight is None else weight
        return solve.memit(residuals, keys, setting.moments.mean(here.layer, ridge=RIDGE), weight=own)

    return _spread(subject, requests, setting, layers, solved, "memit", execution)


def alphaedit(
    subject: Subject,
    requests: Sequence[Request],
    setting: Setting,
    *,
    layers: Sequence[int],
    free: float = FREE,
    ridge: float = ALPHA_RIDGE,
    earlier: Sequence[Request] = (),
    execution: Execution = Execution(),
) -> Delta:
    """Edit facts within the directions that other keys hardly use (Fang et al. 2025), spread over layers as in `memit`.

    Args:
        subject: The model.
        requests: The facts.
        setting: C, beginnings, how values are looked for.
        layers: Where.
        free: Directions with a mean square below this share of the mean are free.
        ridge: μ, as a share of the keys' mean square (the trace of C).
        earlier: Facts that were edited before, in this model: what is written for their keys stays.
        execution: Progress.

    Raises:
        MechscopeError: As of `memit`; or no direction is free.
    """
    before = [setting.contexts(subject, request) for request in earlier]

    def solved(here: DownMap, residuals: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        moment = setting.moments.mean(here.layer)
        kept = torch.stack([key_of(subject, here, given) for given in before], dim=1) if before else None
        basis = solve.free_directions(moment, share=free)
        return solve.alphaedit(residuals, keys, basis, earlier=kept, ridge=ridge * float(moment.trace()))

    return _spread(subject, requests, setting, layers, solved, "alphaedit", execution)


def finetune(
    subject: Subject,
    request: Request,
    setting: Setting,
    *,
    layer: int,
    steps: int = 25,
    rate: float = 5e-4,
    bound: float = 5e-4,
    execution: Execution = Execution(),
) -> Delta:
    """Edit one fact by Adam on one layer's map, no weight moved by more than a bound (FT-L of Zhu et al. 2020): the baseline.

    Args:
        subject: The model.
        request: The fact; its prompt alone is learned from.
        setting: Where C and beginnings are kept, which this does not need.
        layer: Where.
        steps: Steps at most.
        rate: Learning rate.
        bound: Most that a weight moves.
        execution: Progress.

    Raises:
        MechscopeError: The layer cannot be edited, or the tokenizer splits the subject.
    """
    if not bound > 0 or steps < 1:
        raise SettingsError(f"bound {bound:g} and steps {steps}: both must be above zero")
    here = down_map(subject, layer)
    batch = contexts(_spelled(subject), request, subject=setting.subjects.get(request.id)).batch
    kind = torch.float64 if subject.dtype == torch.float64 else torch.float32
    change = torch.zeros(here.weight.shape, dtype=kind, device=here.weight.device, requires_grad=True)
    optimizer, losses = torch.optim.Adam([change], lr=rate), [0.0]
    with _added(here.module, change):
        for _ in range(steps):
            loss = losses_of(subject, batch).mean()
            losses.append(float(loss.detach()))
            if losses[-1] < setting.search.enough:
                break
            (change.grad,) = torch.autograd.grad(loss, change)
            optimizer.step()
            with torch.no_grad():
                change.clamp_(-bound, bound)
    execution.told("edits", 1, 1)
    return Delta.of(subject, {here.parameter: here.stored(change.detach())}, _about("finetune", [layer], [request], losses[-1]))


def _spread(
    subject: Subject,
    requests: Sequence[Request],
    setting: Setting,
    layers: Sequence[int],
    solved: Callable[[DownMap, Tensor, Tensor], tuple[Tensor, Tensor]],
    method: str,
    execution: Execution,
) -> Delta:
    if not requests:
        raise DataError("there is no fact to edit: give at least one")
    maps = require_layers(subject, layers)
    for here in maps:
        if subject.anatomy.blocks[here.layer].mlp_behind is not None:
            raise ModelError(
                f"a norm stands between the MLP of layer {here.layer} and the residual stream, so that layers cannot share out what is lacking: use rome"
            )
    last = maps[-1]
    given = [setting.contexts(subject, request) for request in requests]
    wanted, losses = [], []
    for done, own in enumerate(given, start=1):
        value = last.written(key_of(subject, last, own)[:, None])[:, 0]
        shift, curve = shift_of(subject, last, own, value, setting.search)
        factor = subject.anatomy.blocks[last.layer].multiplier
        wanted.append(at_subject(subject, own.batch, [last.layer], "residual")[last.layer] + factor * shift)
        losses.append(curve[-1])
        execution.told("edits", done, len(given))
    changes: dict[str, Change] = {}
    fits: dict[str, str] = {}
    gives: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for place, here in enumerate(maps):
            lacking = [
                target - at_subject(subject, own.batch, [last.layer], "residual")[last.layer]
                for target, own in zip(wanted, given, strict=True)
            ]
            # the share of this layer, in the map's own output
            residuals = torch.stack(lacking, dim=1) / (len(maps) - place) / subject.anatomy.blocks[here.layer].multiplier
            keys = torch.stack([key_of(subject, here, own) for own in given], dim=1)
            left, right = solved(here, residuals, keys)
            part = Delta.of(subject, {here.parameter: _change(here, left, right)})
            changes |= part.changes
            fits |= part.fits
            gives |= part.gives
            stack.enter_context(applied(subject, part))
    return Delta(changes, fits, gives, _about(method, [here.layer for here in maps], requests, sum(losses) / len(losses)))


@contextlib.contextmanager
def _added(module: nn.Module, change: Tensor) -> Iterator[None]:
    """Add a change to a map's weight for the duration, as a second map beside it, through which gradients flow."""

    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + nn.functional.linear(args[0].to(change.dtype), change).to(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _change(here: DownMap, left: Tensor, right: Tensor) -> LowRank:
    """Return left @ rightᵀ as the weight is stored."""
    return LowRank(right, left) if here.transposed else LowRank(left, right)


def _about(method: str, layers: Sequence[int], requests: Sequence[Request], loss: float) -> dict[str, Any]:
    facts = [{"id": own.id, "subject": own.subject, "prompt": own.prompt, "target_new": own.new} for own in requests]
    return {"method": method, "layers": list(layers), "facts": facts, "loss": loss}


def _spelled(subject: Subject) -> Spelled:
    if subject.tokenizer is None:
        raise DataError(f"model {subject.source!r} has no tokenizer, which prompts need: load it with one")
    return Spelled(subject.tokenizer)
