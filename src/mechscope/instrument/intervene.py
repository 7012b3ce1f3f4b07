"""Changing a forward pass: a context manager that restores the model in any case (idea 6 of the design).

Inside `intervene` every forward pass of the model, `generate` included, runs with the changes made. Contexts nest and compose: an outer one acts
first, and a recording opened inside sees what was changed. Where several edits meet at one site they act in the order given.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from mechscope.instrument.attention import AttentionCall, AttentionInputs, observed
from mechscope.instrument.edits import Change, Edit, apply, rewritten, validate, with_patterns
from mechscope.instrument.experts import taken_apart, with_edits
from mechscope.instrument.outputs import tensor_of, with_tensor
from mechscope.instrument.patterns import pattern
from mechscope.subject.load import Subject

_ATTENTION = frozenset({"query", "key", "value", "mask", "pattern", "z"})


@contextlib.contextmanager
def intervene(subject: Subject, *changes: Change) -> Iterator[None]:
    """Run the model with some of its values replaced, by `Edit`s and `Knockout`s.

    Raises:
        SettingsError: A change names something the model does not have; or, when the model runs, its value does not fit.
    """
    validate(changes, subject.anatomy)
    by_place: dict[tuple[int, str], list[Change]] = defaultdict(list)
    for change in changes:
        by_place[change.layer, change.site].append(change)
    with contextlib.ExitStack() as stack:
        if any(change.site in _ATTENTION for change in changes):
            stack.enter_context(_attention(subject, by_place))
        else:
            stack.enter_context(subject.active())
        for (layer, site), at in by_place.items():
            edits = [change for change in at if isinstance(change, Edit)]
            if site == "expert_output":
                stack.enter_context(taken_apart(subject, layer, partial(with_edits, edits)))
            elif site not in _ATTENTION:
                _hook(subject, layer, site, edits, stack)
        yield


@contextlib.contextmanager
def _attention(subject: Subject, by_place: dict[tuple[int, str], list[Change]]) -> Iterator[None]:
    def edits(layer: int, site: str) -> list[Edit]:
        return [change for change in by_place.get((layer, site), ()) if isinstance(change, Edit)]

    def rewrite(inputs: AttentionInputs) -> AttentionInputs:
        at = [change for site in ("query", "key", "value", "mask") for change in by_place.get((inputs.layer, site), ())]
        return rewritten(inputs, at)

    def tap(call: AttentionCall) -> Tensor | None:
        z = None
        if at := edits(call.layer, "pattern"):
            z = with_patterns(at, call.value, call.z, lambda: pattern(call, dtype=call.query.dtype))
        if at := edits(call.layer, "z"):
            z = apply(at, call.z if z is None else z)
        return z

    with observed(subject, tap, rewrite=rewrite):
        yield


def _hook(subject: Subject, layer: int, site: str, edits: list[Edit], stack: contextlib.ExitStack) -> None:
    """Hook the module whose input or output an edit changes; the hook leaves with the stack."""
    block = subject.anatomy.blocks[layer]
    shape: dict[str, Any] = {}

    # what is edited is what is added to the residual stream
    factor = block.multiplier if site in ("attention_output", "mixer_output", "mlp_output") else 1.0

    def changed(value: Tensor) -> Tensor:
        if factor != 1.0:
            return edited(value * factor) / factor
        return edited(value)

    def edited(value: Tensor) -> Tensor:
        if value.ndim == 2:  # OPT's MLP sees all tokens of the batch as rows of one matrix
            return apply(edits, value.unflatten(0, shape["tokens"])).flatten(0, 1)
        return apply(edits, value)

    def on_output(module: nn.Module) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return with_tensor(output, changed(tensor_of(output)))

        stack.callback(module.register_forward_hook(hook).remove)

    def on_input(module: nn.Module, *, only_look: bool = False) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if only_look:
                shape["tokens"] = hidden.shape[:2]
                return None
            return ((changed(hidden), *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed(hidden)})

        stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    if site in ("neuron", "mlp_output"):
        on_input(block.module, only_look=True)
    match site:
        case "embedding":
            on_input(block.module)
        case "neuron":
            on_input(block.mlp_down)
        case "attention_output" | "mixer_output":
            on_output(block.mixing.write)
        case "mlp_output":
            on_output(block.mlp_write)
        case "residual":
            on_output(block.module)
