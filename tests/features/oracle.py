"""Dictionaries written down densely, as the papers have them: every latent of every token, and one product for each map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mechscope.features.affine import Affine
from mechscope.features.dictionary import Dictionary
from mechscope.features.layout import Layout, autoencoder, cross_layer, crosscoder, transcoder
from mechscope.features.places import Place
from mechscope.features.rules import RULE_TENSORS, Rule

D, LATENTS, TOKENS = 12, 40, 30
RULES = (
    Rule("relu"),
    Rule("gated"),
    Rule("topk", 5),
    Rule("topk", 5, by_norm=True),
    Rule("batchtopk", 5),
    Rule("batchtopk", 5, by_norm=True),
    Rule("jumprelu"),
)


def layouts(rule: Rule) -> dict[str, Layout]:
    """Return one layout of each kind."""
    return {
        "autoencoder": autoencoder("resid1", D, LATENTS, rule),
        "transcoder": transcoder(1, D, LATENTS, rule, skip=True),
        "crosscoder": crosscoder("base:resid1,tuned:resid1", (D, D), LATENTS, rule),
        "cross-layer": cross_layer((0, 1, 2), D, LATENTS // 2, rule),
    }


def maps(widths: Sequence[int], *, scale: float | None = None, seed: int = 0) -> tuple[Affine, ...]:
    """Return random affine maps, of different scales or all of one."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(Affine(scale or 0.5 + at, torch.randn(width, generator=generator, dtype=torch.float64)) for at, width in enumerate(widths))


def dictionary(layout: Layout, *, scale: float | None = None, seed: int = 1) -> Dictionary:
    """Return a random dictionary in float64, with decoders of different norms and no bias zero."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5 for name, shape in layout.shapes().items()}
    if "threshold" in made:
        made["threshold"] = made["threshold"].abs() + 0.3
    return Dictionary(layout, made, maps(layout.input_widths, scale=scale), maps(layout.output_widths, scale=scale, seed=2))


def inputs(layout: Layout, seed: int = 3) -> list[Tensor]:
    """Return random inputs in float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(TOKENS, width, generator=generator, dtype=torch.float64) * 2 for width in layout.input_widths]


def encoder(layout: Layout, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return all encoders as one matrix (latent, read), zero where a latent does not read."""
    return _whole(tensors, "encoder", layout.input_widths, [group.reads for group in layout.groups])


def decoder(layout: Layout, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return all decoders as one matrix (latent, written), zero where a latent does not write."""
    return _whole(tensors, "decoder", layout.output_widths, [group.writes for group in layout.groups])


def _whole(tensors: Mapping[str, Tensor], name: str, widths: Sequence[int], places: Sequence[Sequence[int]]) -> Tensor:
    parts = []
    for number, own in enumerate(places):
        part = tensors[f"{name}.{number}"]
        before = sum(widths[: own[0]])
        parts.append(torch.nn.functional.pad(part, (before, sum(widths) - before - part.shape[1])))
    return torch.cat(parts)


def sizes(layout: Layout, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return each latent's norm, added up over the places it writes to."""
    return sum(part.norm(dim=1) for part in decoder(layout, tensors).split(layout.output_widths, dim=1))


def encode(given: Dictionary, values: Sequence[Tensor]) -> Tensor:
    """Return f, (token, latent)."""
    layout, tensors, rule = given.layout, given.tensors, given.layout.rule
    u = torch.cat([(value - each.centre) * each.scale for value, each in zip(values, given.input_maps, strict=True)], dim=1)
    pre = u @ encoder(layout, tensors).T + tensors["encoder_bias"]
    scores = pre * sizes(layout, tensors) if rule.by_norm else pre
    if rule.name == "relu":
        return pre.clamp(min=0)
    if rule.name == "gated":
        plain = pre - tensors["encoder_bias"]
        return (pre > 0) * (tensors["magnitude_log"].exp() * plain + tensors["magnitude_bias"]).clamp(min=0)
    if rule.name == "topk":
        kept = torch.zeros_like(pre)
        for token in range(len(pre)):
            best = sorted(range(layout.latents), key=lambda latent: -scores[token, latent].item())[: rule.k]
            kept[token, best] = pre[token, best]
        return kept.clamp(min=0)
    return pre * (scores > tensors["threshold"]) * (pre > 0)


def reconstruct(given: Dictionary, values: Sequence[Tensor]) -> list[Tensor]:
    """Return x̂ at every output place."""
    layout, tensors = given.layout, given.tensors
    out = encode(given, values) @ decoder(layout, tensors) + tensors["decoder_bias"]
    if layout.skip:
        u = torch.cat([(value - each.centre) * each.scale for value, each in zip(values, given.input_maps, strict=True)], dim=1)
        out = out + u @ tensors["skip"].T
    return [part / each.scale + each.centre for part, each in zip(out.split(layout.output_widths, dim=1), given.output_maps, strict=True)]


__all__ = ["LATENTS", "RULES", "RULE_TENSORS", "TOKENS", "D", "Place", "dictionary", "inputs", "layouts"]
