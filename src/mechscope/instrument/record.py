"""Recording what flows through a model: residual stream, attention, heads, MLPs, logits.

`record` is a context manager: inside it any forward pass of the model (its own call, a `Walk`, `generate`) fills the recording with the
chosen sites and nothing else. Values are those of the last pass. What is written to the residual stream is recorded as it is added, so
h_L = embedding + Σ attention_output + Σ mlp_output for families that add plainly (checked at load); of layers that mix tokens in another way than by
attention `mixer_output` stands in its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechscope.errors import ModelError, SettingsError
from mechscope.instrument.attention import AttentionCall, observed
from mechscope.instrument.experts import ExpertOutputs, taken_apart
from mechscope.instrument.outputs import tensor_of
from mechscope.instrument.patterns import pattern
from mechscope.instrument.routers import mixtures
from mechscope.shapes import short
from mechscope.subject.anatomy import Anatomy
from mechscope.subject.load import Subject
from mechscope.subject.placement import require_in_memory

Site = Literal[
    "embedding",
    "residual",
    "query",
    "key",
    "value",
    "pattern",
    "z",
    "head_output",
    "attention_output",
    "mixer_output",
    "mlp_input",
    "neuron",
    "expert_output",
    "mlp_output",
    "logits",
]
SITES: tuple[Site, ...] = get_args(Site)
# kept under layer 0
_WITHOUT_LAYER = {"embedding", "logits"}
_ATTENTION_SITES = {"query", "key", "value", "pattern", "z", "head_output"}


@dataclass
class Recording:
    """What was recorded, by site and layer.

    Shapes: `embedding`, `residual` (after the block), `attention_output`, `mixer_output` (of layers that do not attend), `mlp_input` (what the MLP
    reads: behind its norm), `mlp_output` ``(batch, token, d_model)``; `query` and `z`
    ``(batch, token, head, d_head)``; `key` and `value` ``(batch, token, kv_head, d_head)`` (query and key after rotary embedding);
    `head_output` (z W_O, times the family's factor, without the projection's bias) ``(batch, token, head, d_model)``; `pattern`
    ``(batch, head, query, key)``, whole;
    `neuron` (what the MLP's last map reads) ``(batch, token, d_mlp)``; `expert_output` (what each expert adds: its gate-weighted output, zero where a
    token is not sent to it) ``(batch, token, expert, d_model)``, made when asked for of what `experts` keeps by slot; `logits`
    ``(batch, token, vocab)``. `embedding` and `logits` have no layer and are kept under layer 0.
    """

    values: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    experts: dict[int, ExpertOutputs] = field(default_factory=dict)

    def __repr__(self) -> str:
        held: dict[tuple[str, str], list[int]] = {}
        for (site, layer), value in self.values.items():
            held.setdefault((site, short(value)), []).append(layer)
        for layer, outputs in self.experts.items():
            held.setdefault(("expert_output", f"{short(outputs.slots)} by slot"), []).append(layer)
        sites = [f"{site} {shape}{_layers(site, layers)}" for (site, shape), layers in held.items()]
        return f"Recording({', '.join(sites) or 'empty: no forward pass was run'})"

    def __getitem__(self, key: str | tuple[str, int]) -> Tensor:
        """Return one value by `(site, layer)`, or a site without layers by its name."""
        site, layer = (key, 0) if isinstance(key, str) else key
        if site == "expert_output" and layer in self.experts:
            return self.experts[layer].of()
        try:
            return self.values[site, layer]
        except KeyError:
            held = (
                ", ".join(sorted({name for name, _ in self.values} | {"expert_output" for _ in self.experts}))
                or "nothing (no forward pass was run)"
            )
            raise KeyError(f"site {site!r} at layer {layer} was not recorded; the recording holds {held}") from None

    def mixed(self, layer: int) -> Float[Tensor, "batch token d_model"]:
        """Return what a layer's attention, or what mixes tokens there instead, added to the residual stream: whichever was recorded."""
        site = "mixer_output" if ("mixer_output", layer) in self.values else "attention_output"
        return self[site, layer]

    def stack(self, site: Site) -> Float[Tensor, "layer ..."]:
        """Return a site's values of all recorded layers, stacked in order of the layers."""
        if site == "expert_output":
            return torch.stack([self.experts[layer].of() for layer in sorted(self.experts)])
        return torch.stack([value for (name, _), value in sorted(self.values.items()) if name == site])


def _layers(site: str, layers: list[int]) -> str:
    return "" if site in _WITHOUT_LAYER else f" of layer{'s' if len(layers) > 1 else ''} {','.join(map(str, sorted(layers)))}"


@contextlib.contextmanager
def record(subject: Subject, *sites: Site, layers: Collection[int] | None = None, detach: bool = True) -> Iterator[Recording]:
    """Record sites during the forward passes inside the context; hooks are removed in any case.

    Args:
        subject: The model.
        sites: What to record, for example `"residual", "z"`.
        layers: Which layers; None for all. In a hybrid stack sites of attention are those of the layers that attend, `mixer_output` is the others'.
        detach: Cut the values from the autograd graph.

    Raises:
        SettingsError: A site or a layer does not exist, or a named layer does not have any of the sites.
        ModelError: Experts are recorded, and the model has none, or they cannot be taken apart.
    """
    anatomy = subject.anatomy
    for site in sites:
        if site not in SITES:
            raise SettingsError(f"site {site!r} cannot be recorded: the sites are {', '.join(SITES)}")
    chosen = range(anatomy.n_layers) if layers is None else sorted(layers)
    for layer in chosen:
        if not 0 <= layer < anatomy.n_layers:
            raise SettingsError(f"layer {layer} does not exist: the model has layers 0-{anatomy.n_layers - 1}")
    _require_sites(anatomy, sites, chosen if layers is not None else ())
    recording = Recording()

    def keep(site: str, layer: int, value: Tensor) -> None:
        recording.values[site, layer] = value.detach() if detach else value

    with contextlib.ExitStack() as stack:
        _hook_modules(subject, sites, chosen, keep, stack)
        if "expert_output" in sites:
            for layer in mixtures(subject).keys() & set(chosen):
                stack.enter_context(taken_apart(subject, layer, partial(_keep_experts, recording, layer, detach)))
        heads = _ATTENTION_SITES.intersection(sites)
        wanted = set(chosen)

        def tap(call: AttentionCall) -> None:
            if call.layer not in wanted:
                return
            for site in heads:
                keep(site, call.layer, _seen(subject, call, site))

        stack.enter_context(observed(subject, tap if heads else None))
        yield recording


def _require_sites(anatomy: Anatomy, sites: Collection[str], layers: Collection[int]) -> None:
    """Refuse layers of which nothing would be recorded, and mixers in a model that attends everywhere; raises SettingsError."""
    if "mixer_output" in sites and set(sites) == {"mixer_output"} and not anatomy.mixing:
        raise SettingsError("the model has no mixers besides attention: all its layers attend; what attention adds is attention_output")
    for layer in layers:
        absent = {"mixer_output"} if layer in anatomy.attending else _ATTENTION_SITES | {"attention_output"}
        if sites and absent.issuperset(sites):
            raise SettingsError(f"layer {layer} has no {', '.join(sites)}: {anatomy.instead(layer)}")


def _keep_experts(recording: Recording, layer: int, detach: bool, outputs: ExpertOutputs) -> None:
    if detach:
        changed = {expert: value.detach() for expert, value in outputs.changed.items()}
        outputs = replace(outputs, slots=outputs.slots.detach(), changed=changed)
    recording.experts[layer] = outputs


def _seen(subject: Subject, call: AttentionCall, site: str) -> Tensor:
    if site == "head_output":
        return head_outputs(subject, call)
    if site == "pattern":
        return pattern(call, dtype=call.query.dtype)
    return call.z if site == "z" else getattr(call, site).transpose(1, 2)


def head_outputs(subject: Subject, call: AttentionCall) -> Float[Tensor, "batch token head d_model"]:
    """Return what each head writes: its z times its slice of W_O, without the projection's bias."""
    output = subject.anatomy.blocks[call.layer].output
    if not subject.heads_write:
        raise ModelError(
            f"{subject.family}: something (a gate, a norm) stands between its heads and their output projection, so what single heads write cannot be "
            "recorded; z and attention_output can"
        )
    require_in_memory(subject.source, output.module, "recording head outputs")
    whole, _ = subject.linear(output.module)
    weight = torch.stack([output.take(whole, head) for head in range(subject.anatomy.n_heads)])  # (head, d_model, d_head)
    written = torch.einsum("bthd,hmd->bthm", call.z, weight)
    factor = subject.anatomy.blocks[call.layer].multiplier
    return written if factor == 1.0 else written * factor


def _hook_modules(
    subject: Subject, sites: tuple[str, ...], layers: Collection[int], keep: Callable[[str, int, Tensor], None], stack: contextlib.ExitStack
) -> None:
    """Hook the modules whose inputs or outputs are wanted; the hooks leave with the stack."""
    anatomy = subject.anatomy

    def on_output(module: nn.Module, site: str, layer: int, factor: float = 1.0) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            value = by_token(tensor_of(getattr(output, "logits", output)))
            keep(site, layer, value if factor == 1.0 else value * factor)

        handle = module.register_forward_hook(hook)
        stack.callback(handle.remove)

    def on_input(module: nn.Module, hook: Callable[[Tensor], None]) -> None:
        def pre_hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hook(args[0] if args else kwargs["hidden_states"])

        handle = module.register_forward_pre_hook(pre_hook, with_kwargs=True)
        stack.callback(handle.remove)

    tokens: dict[str, torch.Size] = {}

    def by_token(value: Tensor) -> Tensor:
        # OPT's MLP sees all tokens of the batch as rows of one matrix
        return value.unflatten(0, tokens["shape"]) if value.ndim == 2 else value

    def keep_input(site: str, layer: int, hidden: Tensor) -> None:
        keep(site, layer, by_token(hidden))

    if "embedding" in sites:
        on_input(anatomy.blocks[0].module, lambda hidden: keep("embedding", 0, hidden))
    if "logits" in sites:
        on_output(subject.plain, "logits", 0)
    for layer in layers:
        block = anatomy.blocks[layer]
        if "residual" in sites:
            on_output(block.module, "residual", layer)
        if block.mixing_site in sites:
            on_output(block.mixing.write, block.mixing_site, layer, block.multiplier)
        if {"mlp_input", "mlp_output", "neuron"}.intersection(sites):
            on_input(block.module, lambda hidden: tokens.update(shape=hidden.shape[:2]))
        if "mlp_output" in sites:
            on_output(block.mlp_write, "mlp_output", layer, block.multiplier)
        if "mlp_input" in sites:
            on_input(block.mlp_read, partial(keep_input, "mlp_input", layer))
        if "neuron" in sites:
            on_input(block.mlp_down, partial(keep_input, "neuron", layer))
