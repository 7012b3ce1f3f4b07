"""Routers of mixtures of experts: which experts a token is sent to, with which gate weights, and what the router thought of all of them.

transformers calls the experts of every family alike: with the tokens, and for each token the experts that were chosen and their gate weights. The router
is the module that gave these two; its logits stand beside them. What makes probabilities of the logits is found by what the gate weights are, and not by
the family's name: on some tokens they are, up to a factor for each token, those of

    softmax    exp(logit) over the sum of all experts. Families that take the softmax of the chosen logits only (gpt-oss, Granite) give the same weights as
               those that take it of all and divide by the sum of the chosen ones (Mixtral, Qwen3-MoE): the softmax over all experts is meant in both
    sigmoid    1 / (1 + exp(−logit)) of each expert by itself (DeepSeek-V3), here divided by its sum over all experts

What is added to choose experts only (DeepSeek-V3's correction bias, limits to groups of experts) is not in the probabilities. A router whose gate weights
are neither is refused by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechscope.errors import ModelError
from mechscope.instrument.attention import observed
from mechscope.instrument.walk import Walk
from mechscope.shapes import by_shape
from mechscope.subject.anatomy import Experts
from mechscope.subject.load import Subject

Kind = Literal["softmax", "sigmoid"]
# tokens on which routers are looked at
_PROBED = 16


@dataclass(frozen=True)
class Dispatch:
    """What experts are called with.

    Attributes:
        tokens: ``(token, d_model)``.
        chosen: ``(token, slot)``: the experts of every token.
        weights: ``(token, slot)``: their gate weights.
    """

    tokens: Float[Tensor, "token d_model"]
    chosen: Int[Tensor, "token slot"]
    weights: Float[Tensor, "token slot"]

    __repr__ = by_shape

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Dispatch | None:
        """Read the arguments of a call; None where they are not of this kind."""
        given = [*args, *kwargs.values()]
        if len(given) != 3 or not all(isinstance(each, Tensor) and each.ndim == 2 for each in given):
            return None
        tokens, chosen, weights = given
        if chosen.is_floating_point() or not weights.is_floating_point() or chosen.shape != weights.shape or len(tokens) != len(chosen):
            return None
        return cls(tokens, chosen, weights)


@dataclass(frozen=True)
class Router:
    """The router of one layer.

    Attributes:
        module: Gives a tuple in which the logits stand.
        place: Where they stand in it.
        kind: What makes probabilities of them.
        name: Path of the module in the plain Hugging Face model.
        experts: Those it chooses among.
        slots: How many of them it chooses for a token.
    """

    module: nn.Module
    place: int
    kind: Kind
    name: str
    experts: Experts
    slots: int

    __repr__ = by_shape


@dataclass
class Routed:
    """How one layer routed the tokens of the last pass; tokens of padding hold no meaning.

    Attributes:
        log_probability: ``(batch, token, expert)``, float64: the router's, in nats.
        chosen: ``(batch, token, slot)``: the experts.
        weights: ``(batch, token, slot)``: their gate weights.
    """

    log_probability: Float[Tensor, "batch token expert"]
    chosen: Int[Tensor, "batch token slot"]
    weights: Float[Tensor, "batch token slot"]

    __repr__ = by_shape


class Routers:
    """A model's routers.

    Attributes:
        subject: The model.
        layers: The router of every layer whose MLP is a mixture of experts.
    """

    def __init__(self, subject: Subject) -> None:
        """Find the routers, and what makes probabilities of their logits.

        Raises:
            ModelError: No MLP of the model is a mixture of experts, or a router cannot be read.
        """
        mixtures(subject)
        self.subject = subject
        self.layers = _discovered(subject)

    @contextlib.contextmanager
    def watched(self) -> Iterator[dict[int, Routed]]:
        """Keep, by layer, how tokens are routed in forward passes inside the context."""
        routed: dict[int, Routed] = {}
        with contextlib.ExitStack() as stack:
            for layer, router in self.layers.items():
                _watch(self.subject, layer, router, routed, stack)
            yield routed


def mixtures(subject: Subject) -> dict[int, Experts]:
    """Return the experts of every layer whose MLP is a mixture of them.

    Raises:
        ModelError: There is no such layer.
    """
    layers = {layer: block.experts for layer, block in enumerate(subject.anatomy.blocks) if block.experts is not None}
    if not layers:
        raise ModelError(
            f"model {subject.source!r} ({subject.family}) has no experts: all its MLPs are dense; mixtures of experts are Mixtral, Qwen-MoE, "
            "OLMoE, gpt-oss, DeepSeek, Granite-MoE, …"
        )
    return layers


def _watch(subject: Subject, layer: int, router: Router, routed: dict[int, Routed], stack: contextlib.ExitStack) -> None:
    shape, logits = torch.Size(()), torch.empty(0)

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal shape
        shape = (args[0] if args else kwargs["hidden_states"]).shape[:2]

    def decided(_: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        nonlocal logits
        logits = output[router.place].detach()

    def sent(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Dispatch.of(args, kwargs)
        assert call is not None  # as it was when the router was found
        routed[layer] = Routed(
            log_probabilities(logits, router.kind).unflatten(0, shape),
            call.chosen.unflatten(0, shape),
            call.weights.detach().unflatten(0, shape),
        )

    block = subject.anatomy.blocks[layer].module
    stack.callback(block.register_forward_pre_hook(begin, with_kwargs=True).remove)
    stack.callback(router.module.register_forward_hook(decided).remove)
    stack.callback(router.experts.module.register_forward_pre_hook(sent, with_kwargs=True).remove)


def log_probabilities(logits: Float[Tensor, "token expert"], kind: Kind) -> Float[Tensor, "token expert"]:
    """Return a router's log probabilities of all experts, in float64."""
    logits = logits.double()
    return (logits if kind == "softmax" else nn.functional.logsigmoid(logits)).log_softmax(-1)


@torch.no_grad()
def _discovered(subject: Subject) -> dict[int, Router]:
    anatomy = subject.anatomy
    calls: dict[int, Dispatch | None] = {}
    outputs: dict[int, list[tuple[nn.Module, tuple[Any, ...]]]] = {}
    length = min(_PROBED, anatomy.max_positions)
    probe = torch.linspace(0, anatomy.vocab_size - 1, length).long()[None].to(subject.device)
    with contextlib.ExitStack() as stack:
        for layer, experts in mixtures(subject).items():
            _probe(layer, anatomy.blocks[layer].module, experts.module, calls, outputs, stack)
        stack.enter_context(observed(subject))
        Walk(subject, probe).run()
    names = {module: name for name, module in subject.plain.named_modules()}
    routers = {}
    for layer, experts in mixtures(subject).items():
        where, call = f"{subject.family}: the experts of layer {layer} ({experts.name})", calls.get(layer)
        if call is None:
            raise ModelError(f"{where} are not called with tokens, chosen experts and gate weights: their routing cannot be read")
        found = [(module, place) for module, given in outputs.get(layer, []) if (place := _logits_in(given, call, experts)) is not None]
        if not found:
            raise ModelError(
                f"{where}: no module gives their gate weights with the logits of all {experts.number}: their routing cannot be read"
            )
        module, place = found[0]
        output = next(given for other, given in outputs[layer] if other is module)
        kind = _kind(output[place], call, subject.dtype)
        if kind is None:
            raise ModelError(
                f"{where}: the gate weights of {names[module]} are neither a softmax nor a sigmoid of its logits, so its probabilities cannot be read"
            )
        routers[layer] = Router(module, place, kind, names[module].replace(".base_layer", ""), experts, call.chosen.shape[1])
    return routers


def _probe(
    layer: int,
    block: nn.Module,
    experts: nn.Module,
    calls: dict[int, Dispatch | None],
    outputs: dict[int, list[tuple[nn.Module, tuple[Any, ...]]]],
    stack: contextlib.ExitStack,
) -> None:
    """Note what a layer's experts are called with, and which modules of the block give several things at once."""
    inside = set(experts.modules())

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[layer] = Dispatch.of(args, kwargs)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, tuple):
            outputs.setdefault(layer, []).append((module, output))

    stack.callback(experts.register_forward_pre_hook(before, with_kwargs=True).remove)
    for module in block.modules():
        if module not in inside:
            stack.callback(module.register_forward_hook(after).remove)


def _logits_in(output: tuple[Any, ...], call: Dispatch, experts: Experts) -> int | None:
    """Return where the logits of all experts stand in a module's output that also holds the chosen experts of a call; None where it is no router's."""
    tensors = {place: each for place, each in enumerate(output) if isinstance(each, Tensor)}
    if not any(each.shape == call.chosen.shape and torch.equal(each.to(call.chosen.dtype), call.chosen) for each in tensors.values()):
        return None
    shape = (len(call.tokens), experts.number)
    return next((place for place, each in tensors.items() if each.shape == shape and each.is_floating_point()), None)


def _kind(logits: Tensor, call: Dispatch, dtype: torch.dtype) -> Kind | None:
    """Return what makes probabilities of logits such that gate weights are those of the chosen experts, up to a factor for each token.

    Of one expert per token that would say nothing: there the factor is one for all.
    """
    weights, deviations = call.weights.double(), dict[Kind, float]()
    over = 1 if weights.shape[1] > 1 else (0, 1)
    for kind in get_args(Kind):
        scores = _scores(logits, kind).gather(1, call.chosen)
        factor = weights.sum(over, keepdim=True) / scores.sum(over, keepdim=True)
        deviations[kind] = float(((weights - factor * scores).abs().amax(1) / weights.amax(1)).max().nan_to_num(torch.inf))
    best = min(deviations, key=lambda kind: deviations[kind])
    # families take a softmax in float32 whatever the model's type
    return best if deviations[best] <= (2e-2 if dtype.itemsize == 2 else 1e-4) else None


def _scores(logits: Tensor, kind: Kind) -> Tensor:
    return logits.double().softmax(-1) if kind == "softmax" else logits.double().sigmoid()
