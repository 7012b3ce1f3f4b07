"""Experts of a mixture, one by one: what each adds to the residual stream, recorded and changed.

An expert adds its output times its gate weight to the tokens that are sent to it, and nothing to others; m3 = Σ m3.e* + shared experts. No weights are read
for this: the experts' own module, called once more with every token and slot as a row of its own, gives each expert's part whatever it is made of (stacked
weights, adapters around them, any kernel). Where one is changed, the difference is added to what the module gives: routing, and the gate weights of the
other experts, stay as they were; they are not shared out anew.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechscope.errors import ModelError
from mechscope.instrument.edits import Edit, apply
from mechscope.instrument.outputs import tensor_of, with_tensor
from mechscope.instrument.routers import Dispatch
from mechscope.shapes import by_shape
from mechscope.subject.anatomy import Experts
from mechscope.subject.load import Subject
from mechscope.subject.placement import sent

# rows on which it is looked at how a block's parts add up
_PROBED = 8


@dataclass(frozen=True)
class ExpertOutputs:
    """What one layer's experts add to the residual stream. Kept by slot: a token has few experts of many.

    Attributes:
        slots: ``(batch, token, slot, d_model)``: gate-weighted, with the family's factors.
        chosen: ``(batch, token, slot)``: whose they are.
        number: How many experts there are.
        changed: By expert, ``(batch, token, d_model)``: what stands there instead.
    """

    slots: Float[Tensor, "batch token slot d_model"]
    chosen: Int[Tensor, "batch token slot"]
    number: int
    changed: Mapping[int, Float[Tensor, "batch token d_model"]] = field(default_factory=dict)

    __repr__ = by_shape

    def of(self, experts: Sequence[int] | None = None) -> Float[Tensor, "batch token expert d_model"]:
        """Return what some experts add, all of them for None; zero at tokens that are not sent to them."""
        return torch.stack([self._one(expert) for expert in (range(self.number) if experts is None else experts)], dim=2)

    def _one(self, expert: int) -> Float[Tensor, "batch token d_model"]:
        return self.changed[expert] if expert in self.changed else self._given(expert)

    def _given(self, expert: int) -> Float[Tensor, "batch token d_model"]:
        return (self.slots * (self.chosen == expert)[..., None]).sum(2)

    def at(self, texts: Int[Tensor, "batch token"], tokens: Int[Tensor, "batch token"]) -> ExpertOutputs:
        """Return what they add at other tokens of the batch."""
        where = sent(texts, self.slots.device), sent(tokens, self.slots.device)
        return ExpertOutputs(
            self.slots[where], self.chosen[where], self.number, {name: value[where] for name, value in self.changed.items()}
        )

    def total(self, where: Bool[Tensor, "batch token"]) -> Float[Tensor, "expert d_model"]:
        """Sum over some tokens, in float64."""
        marked = sent(where, self.slots.device)
        sums = self.slots.new_zeros(self.number, self.slots.shape[-1], dtype=torch.float64)
        return sums.index_add_(0, self.chosen[marked].flatten(), self.slots[marked].double().flatten(0, 1))

    @property
    def difference(self) -> Float[Tensor, "batch token d_model"]:
        """What changes add to their sum."""
        parts = [value - self._given(expert) for expert, value in self.changed.items()]
        return torch.stack(parts).sum(0) if parts else self.slots.new_zeros(self.slots.shape[:2] + self.slots.shape[3:])


def with_edits(edits: Sequence[Edit], outputs: ExpertOutputs) -> ExpertOutputs:
    """Return the outputs with edits made, one after another."""
    changed = dict(outputs.changed)
    for edit in edits:
        experts = range(outputs.number) if edit.experts is None else edit.experts
        part = apply([replace(edit, experts=None)], replace(outputs, changed=changed).of(experts))
        changed |= {expert: part[:, :, at] for at, expert in enumerate(experts)}
    return replace(outputs, changed=changed)


Tap = Callable[[ExpertOutputs], ExpertOutputs | None]
# the taps of every module that is taken apart now, in the order in which they were opened, and how a sublayer's experts add up where that is known
_taps: WeakKeyDictionary[nn.Module, list[Tap]] = WeakKeyDictionary()
_shares: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()


@contextlib.contextmanager
def taken_apart(subject: Subject, layer: int, tap: Tap) -> Iterator[None]:
    """Hand what the experts of a layer add to `tap`, in any forward pass inside the context; what it returns stands there instead.

    Contexts nest: an outer one acts first, and an inner one sees what was changed.

    Raises:
        ModelError: The experts cannot be taken apart.
    """
    share = _share(subject, layer)
    module = _experts(subject, layer).module
    with contextlib.ExitStack() as stack:
        if not (taps := _taps.setdefault(module, [])):
            _hook(subject, layer, share, taps, stack)
        taps.append(tap)
        try:
            yield
        finally:
            taps.remove(tap)


def _hook(subject: Subject, layer: int, share: float, taps: list[Tap], stack: contextlib.ExitStack) -> None:
    block, experts = subject.anatomy.blocks[layer], _experts(subject, layer)
    factor, shape = share * block.multiplier, torch.Size(())

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal shape
        shape = (args[0] if args else kwargs["hidden_states"]).shape[:2]

    def behind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call = Dispatch.of(args, kwargs)
        assert call is not None  # as it was when it was looked at how the parts add up
        slots = _slots(module, call).unflatten(0, shape)
        outputs = ExpertOutputs(slots if factor == 1.0 else slots * factor, call.chosen.unflatten(0, shape), experts.number)
        for tap in list(taps):
            outputs = tap(outputs) or outputs
        if not outputs.changed:
            return None
        added = outputs.difference.flatten(0, 1)
        return with_tensor(output, tensor_of(output) + (added if factor == 1.0 else added / factor))

    stack.callback(block.module.register_forward_pre_hook(begin, with_kwargs=True).remove)
    stack.callback(experts.module.register_forward_hook(behind, with_kwargs=True).remove)


def _slots(module: Any, call: Dispatch) -> Float[Tensor, "token slot d_model"]:
    """Call experts with every token and slot as a row of its own; past the module's hooks, one of which asks for this."""
    slots = call.chosen.shape[1]
    rows = module.forward(call.tokens.repeat_interleave(slots, 0), call.chosen.reshape(-1, 1), call.weights.reshape(-1, 1))
    return tensor_of(rows).unflatten(0, (-1, slots))


def _experts(subject: Subject, layer: int) -> Experts:
    experts = subject.anatomy.blocks[layer].experts
    if experts is None:
        raise ModelError(f"{subject.family}: the MLP of layer {layer} is dense: it has no experts")
    return experts


@torch.no_grad()
def _share(subject: Subject, layer: int) -> float:
    """Return the factor with which the experts' sum enters what the MLP adds: 1, or less where a family averages it with shared experts.

    Raises:
        ModelError: The MLP is no such sum.
    """
    block, experts = subject.anatomy.blocks[layer], _experts(subject, layer)
    if experts.module in _shares:
        return _shares[experts.module]
    where = f"{subject.family}: the experts of layer {layer} ({experts.name})"
    if block.mlp_behind is not None:
        raise ModelError(
            f"{where} are summed and then go through a norm before they are added: what one of them adds depends on the others"
        )
    calls: list[Dispatch | None] = []
    sums: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        calls.append(Dispatch.of(args, kwargs))
        sums.append(tensor_of(output))
        return None if len(calls) == 1 else with_tensor(output, torch.zeros_like(tensor_of(output)))

    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, _PROBED, subject.anatomy.d_model, generator=generator)
    weight = next(block.module.parameters())
    rows = rows.to(device=subject.device if weight.is_meta else weight.device, dtype=subject.dtype)
    with subject.active(layer), _without_hooks(block.mlp_write), contextlib.ExitStack() as stack:
        stack.callback(experts.module.register_forward_hook(note, with_kwargs=True).remove)
        whole, shared = (tensor_of(block.mlp_write(rows)).reshape(_PROBED, -1).double() for _ in range(2))
        if len(calls) != 2 or (call := calls[0]) is None:
            raise ModelError(f"{where} are not called with tokens, chosen experts and gate weights: they cannot be taken apart")
        apart = _slots(experts.module, call).double().sum(1)
    added, together = whole - shared, sums[0].double()
    size = together.square().sum()
    share = float((added * together).sum() / size) if size > 0 else 1.0
    allowed = 5e-2 if subject.dtype.itemsize == 2 else 1e-4
    share = 1.0 if abs(share - 1) < allowed else share
    off = max((added - share * together).abs().max(), (apart - together).abs().max()) / together.abs().max().clamp(min=1e-9)
    if not off <= allowed:
        raise ModelError(
            f"{where} do not add up to what the MLP adds beside shared experts (off by {float(off):.1e}): they cannot be taken apart"
        )
    _shares[experts.module] = share
    return share


@contextlib.contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Let a module and its parts run without hooks: those of an outer context are made for whole texts."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    before = [(part, {name: vars(part)[name] for name in names}) for part in module.modules()]
    for part, _ in before:
        vars(part).update({name: OrderedDict() for name in names})
    try:
        yield
    finally:
        for part, own in before:
            vars(part).update(own)
