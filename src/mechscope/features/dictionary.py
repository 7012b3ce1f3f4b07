"""A dictionary: what a model holds at some places, written as a few of many directions.

    u = affine(x)            one map for every place read, one for every place written
    f = rule(u Eᵀ + b)       sparse codes: (latent, value) for every token
    x̂ = affine⁻¹(f D + c + u Sᵀ)

Autoencoders, transcoders, crosscoders and cross-layer transcoders are layouts of this one type (`mechscope.features.layout`). Pre-activations are computed
for a block of tokens at a time and only what the rule keeps of them is held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from mechscope.errors import ModelError, RunError, SettingsError
from mechscope.features.affine import Affine
from mechscope.features.codes import Codes
from mechscope.features.layout import Layout
from mechscope.features.places import Place, subject_of
from mechscope.features.pre_activations import pre_activations
from mechscope.features.vocabulary import is_other
from mechscope.shapes import by_shape
from mechscope.store.tables import read_tensors, write_tensors
from mechscope.subject import Subject

_KIND, _VERSION = "mechscope dictionary", 1


@dataclass(frozen=True)
class Dictionary:
    """A dictionary.

    Attributes:
        layout: What it reads and writes.
        tensors: By name (`Layout.shapes`): `encoder.g` ``(latent, read)`` and `decoder.g` ``(latent, written)`` of every group g, `encoder_bias`,
            `decoder_bias`, `skip`, and the rule's own.
        input_maps: From the model's units to those the tensors are in, for every input place.
        output_maps: The same for the output places; what is decoded goes back through them.
        fingerprint: Of the model it was made for; empty where that is not known.
        about: How it was made: settings, data, source.
    """

    layout: Layout
    tensors: Mapping[str, Tensor]
    input_maps: tuple[Affine, ...]
    output_maps: tuple[Affine, ...]
    fingerprint: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)

    __repr__ = by_shape

    def __post_init__(self) -> None:
        expected = self.layout.shapes()
        found = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        if found != expected:
            wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            told = "; ".join(f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'none')}" for name in wrong)
            raise ModelError(f"a dictionary's tensors do not fit its layout: {told}")

    @classmethod
    def plain(cls, layout: Layout, tensors: Mapping[str, Tensor], **options: Any) -> Dictionary:
        """Return a dictionary that works in the model's own units."""
        inside, outside = (tuple(map(Affine.identity, widths)) for widths in (layout.input_widths, layout.output_widths))
        return cls(layout, tensors, inside, outside, **options)

    @property
    def latents(self) -> int:
        """Number of latents."""
        return self.layout.latents

    @property
    def dtype(self) -> torch.dtype:
        """Type of its tensors."""
        return self.tensors["encoder_bias"].dtype

    @property
    def device(self) -> torch.device:
        """Where its tensors lie."""
        return self.tensors["encoder_bias"].device

    def to(self, *args: Any) -> Dictionary:
        """Return it in another type or on another device."""
        return replace(self, tensors={name: tensor.to(*args) for name, tensor in self.tensors.items()})

    def read(self, inputs: Sequence[Float[Tensor, "token width"]]) -> Float[Tensor, "token read"]:
        """Return the inputs side by side, in the units of the tensors."""
        return _mapped(inputs, self.input_maps, self.layout.inputs, self.tensors["encoder_bias"])

    def aim(self, outputs: Sequence[Float[Tensor, "token width"]]) -> Float[Tensor, "token written"]:
        """Return what stands at the output places side by side, in the units of the tensors: what `decoded` is to be."""
        return _mapped(outputs, self.output_maps, self.layout.outputs, self.tensors["encoder_bias"])

    @torch.no_grad()
    def encode(self, inputs: Sequence[Float[Tensor, "token width"]]) -> Codes:
        """Return the active latents of tokens.

        Args:
            inputs: What stands at each input place, in the model's units.

        Raises:
            ModelError: The inputs do not fit the places.
        """
        u = self.read(inputs)
        sizes = decoder_sizes(self.layout, self.tensors) if self.layout.rule.by_norm else None
        return Codes.joined([self.layout.rule.codes(pre, self.tensors, sizes) for pre in pre_activations(self.layout, self.tensors, u)])

    @torch.no_grad()
    def decode(self, codes: Codes, inputs: Sequence[Tensor] = ()) -> tuple[Float[Tensor, "token width"], ...]:
        """Return what codes stand for at each output place, in the model's units.

        Args:
            codes: Active latents.
            inputs: What was encoded; needed where there is a skip map.
        """
        out = decoded(self.layout, self.tensors, codes)
        if self.layout.skip:
            out += linear(self.read(inputs), self.tensors["skip"])
        parts = out.split(self.layout.output_widths, dim=1)
        return tuple(each.back(part) for each, part in zip(self.output_maps, parts, strict=True))

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Float[Tensor, "token width"], ...]:
        """Return the reconstruction of the output places."""
        return self.decode(self.encode(inputs), inputs)

    def directions(self, latents: Sequence[int], place: Place) -> Float[Tensor, "chosen width"]:
        """Return what a value of one of some latents adds at an output place, in the model's units; zero where they do not write."""
        at = self.layout.outputs.index(place)
        rows = torch.zeros(len(latents), self.layout.output_widths[at], dtype=self.dtype, device=self.device)
        for number, (group, (start, stop)) in enumerate(zip(self.layout.groups, self.layout.spans, strict=True)):
            first, last = group.writes
            own = [place for place, latent in enumerate(latents) if start <= latent < stop]
            if own and first <= at < last:
                before = sum(self.layout.output_widths[first:at])
                part = self.tensors[f"decoder.{number}"][[latents[each] - start for each in own]]
                rows[own] = part[:, before : before + self.layout.output_widths[at]]
        return rows / self.output_maps[at].scale

    def encoders(self, number: int = 0, latents: Tensor | slice = slice(None)) -> Float[Tensor, "chosen read"]:
        """Return the gradient of a group's latents, all or some, by what they read where they are active, in the model's units."""
        layout = self.layout
        reads = slice(*layout.groups[number].reads)
        parts = self.tensors[f"encoder.{number}"][latents].split(layout.input_widths[reads], dim=1)
        rows = torch.cat([part * each.scale for part, each in zip(parts, self.input_maps[reads], strict=True)], dim=1)
        if layout.rule.name == "gated":
            rows = rows * self.tensors["magnitude_log"][slice(*layout.spans[number])][latents].exp()[:, None]
        return rows

    def decoders(self, number: int = 0, dtype: torch.dtype | None = None) -> Float[Tensor, "latent written"]:
        """Return what a value of one of a group's latents adds at the places that it writes, side by side, in the model's units."""
        writes = slice(*self.layout.groups[number].writes)
        parts = self.tensors[f"decoder.{number}"].to(dtype or self.dtype).split(self.layout.output_widths[writes], dim=1)
        return torch.cat([part / each.scale for part, each in zip(parts, self.output_maps[writes], strict=True)], dim=1)

    def nothing(self, dtype: torch.dtype | None = None) -> tuple[Float[Tensor, " width"], ...]:
        """Return what it writes at each output place where no latent is active, a skip map left aside, in the model's units."""
        parts = self.tensors["decoder_bias"].to(dtype or self.dtype).split(self.layout.output_widths)
        return tuple(each.back(part) for each, part in zip(self.output_maps, parts, strict=True))

    def folded(self) -> Dictionary:
        """Return the same dictionary in the model's units: scale and centre taken into its weights and biases; codes and outputs stay equal.

        Raises:
            SettingsError: Latents are compared by the norm of their decoders, and the output places have different scales: folding would change which are
                chosen.
        """
        scales = {each.scale for each in self.output_maps}
        if self.layout.rule.by_norm and len(scales) > 1:
            raise SettingsError(
                f"rule {self.layout.rule.name} compares latents by their decoders' norm over {len(self.output_maps)} places of different scales: folding the "
                "scales would change which are chosen. Fold the norms first (normed), or keep the maps"
            )
        made = dict(self.tensors)
        into, out = (
            torch.cat(
                [torch.full((width,), each.scale, dtype=self.dtype, device=self.device) for width, each in zip(widths, maps, strict=True)]
            )
            for widths, maps in ((self.layout.input_widths, self.input_maps), (self.layout.output_widths, self.output_maps))
        )
        centre, target = (torch.cat([each.centre for each in maps]).to(into) for maps in (self.input_maps, self.output_maps))
        shifts = []
        for number, group in enumerate(self.layout.groups):
            read, written = self.layout.read_columns(group), self.layout.written_columns(group)
            made[f"encoder.{number}"] = self.tensors[f"encoder.{number}"] * into[read]
            made[f"decoder.{number}"] = self.tensors[f"decoder.{number}"] / out[written]
            shifts.append(made[f"encoder.{number}"] @ centre[read])
        shift = torch.cat(shifts)
        made["encoder_bias"] = self.tensors["encoder_bias"] - shift
        made["decoder_bias"] = self.tensors["decoder_bias"] / out + target
        if self.layout.skip:
            made["skip"] = self.tensors["skip"] * into / out[:, None]
            made["decoder_bias"] = made["decoder_bias"] - made["skip"] @ centre
        if self.layout.rule.name == "gated":
            # the gate's bias is taken off again before the magnitude's map, and with it the shift
            made["magnitude_bias"] = self.tensors["magnitude_bias"] - self.tensors["magnitude_log"].exp() * shift
        if self.layout.rule.by_norm and self.layout.rule.name == "batchtopk":
            made["threshold"] = self.tensors["threshold"] / scales.pop()
        return Dictionary.plain(self.layout, made, fingerprint=self.fingerprint, about=self.about)

    def normed(self) -> Dictionary:
        """Return the same dictionary with decoders of norm one, the norms taken into the encoders: outputs stay equal, codes are multiplied by the norms.

        Raises:
            SettingsError: Latents are compared without their norms (`topk`, `batchtopk` without `by_norm`), so that folding them would change which are chosen;
                or a latent writes nothing.
        """
        rule = self.layout.rule
        sizes = decoder_sizes(self.layout, self.tensors)
        if rule.name in ("topk", "batchtopk") and not rule.by_norm and not torch.allclose(sizes, sizes[:1].expand_as(sizes), rtol=1e-5):
            raise SettingsError(
                f"rule {rule.name} was trained to compare latents without their decoders' norms, which differ ({sizes.min():.3g} to {sizes.max():.3g}): "
                "folding the norms would change which are chosen"
            )
        if not bool((sizes > 0).all()):
            raise SettingsError(f"{int((sizes == 0).sum())} latents write nothing: a decoder of norm zero cannot be given norm one")
        made = dict(self.tensors)
        for number, (start, stop) in enumerate(self.layout.spans):
            made[f"encoder.{number}"] = self.tensors[f"encoder.{number}"] * sizes[start:stop, None]
            made[f"decoder.{number}"] = self.tensors[f"decoder.{number}"] / sizes[start:stop, None]
        made["encoder_bias"] = self.tensors["encoder_bias"] * sizes
        if rule.name == "gated":
            made["magnitude_bias"] = self.tensors["magnitude_bias"] * sizes
        if rule.name == "jumprelu" or (rule.name == "batchtopk" and not rule.by_norm):
            made["threshold"] = self.tensors["threshold"] * (sizes if rule.name == "jumprelu" else sizes[0])
        return replace(self, layout=replace(self.layout, rule=replace(rule, by_norm=False)), tensors=made)

    def check(self, subjects: Subject | Mapping[str, Subject], *, other_model: bool = False) -> Dictionary:
        """Return itself if it belongs to the model.

        Raises:
            ModelError: A place has another width; the model has another vocabulary than the one it was made for, or other weights and `other_model` is not
                set.
            SettingsError: A place does not exist.
        """
        widths = (*self.layout.input_widths, *self.layout.output_widths)
        for place, width in zip((*self.layout.inputs, *self.layout.outputs), widths, strict=True):
            subject = subject_of(subjects, place)
            if place.check(subject).width(subject) != width:
                raise ModelError(
                    f"the dictionary has width {width} at {place}, model {subject.source!r} has {place.width(subject)}: it was made for another model"
                )
        first = subject_of(subjects, self.layout.outputs[-1])
        source = self.about.get("source", {})
        known = source.get("vocabularies", {}).get(self.layout.outputs[-1].model, {}) if isinstance(source, Mapping) else {}
        if is_other(first, known):
            raise ModelError(
                f"the dictionary was made for a model with another tokenizer ({known['tokens']:,} tokens) than that of {first.source!r} "
                f"({len(first.tokenizer.get_vocab()):,}): the same text would be other tokens"
            )
        if self.fingerprint and not other_model and self.fingerprint != first.fingerprint:
            raise ModelError(
                f"the dictionary was made for a model with other weights (fingerprint {self.fingerprint[:12]}, {first.source!r} has "
                f"{first.fingerprint[:12]}): pass other_model=True to use it nevertheless"
            )
        return self

    def save(self, path: str | Path) -> None:
        """Write it to one safetensors file; `RunError` where that is refused."""
        meta = {
            "kind": _KIND,
            "version": _VERSION,
            "layout": self.layout.to_json(),
            "scales": [[each.scale for each in maps] for maps in (self.input_maps, self.output_maps)],
            "fingerprint": self.fingerprint,
            "about": dict(self.about),
        }
        centres = {
            f"{name}_centre.{at}": each.centre
            for name, maps in (("input", self.input_maps), ("output", self.output_maps))
            for at, each in enumerate(maps)
        }
        write_tensors({**self.tensors, **centres}, Path(path), meta=meta)

    @classmethod
    def load(cls, path: str | Path) -> Dictionary:
        """Read what `save` wrote.

        Raises:
            RunError: The file is missing, damaged, something else, or of a later version.
        """
        if not Path(path).is_file():
            raise RunError(
                f"{path}: no such file; give a dictionary that mechscope wrote, or read other formats by mechscope.features.formats"
            )
        try:
            tensors, meta = read_tensors(Path(path))
        except RunError as error:
            raise RunError(f"{path} cannot be read as a dictionary, it is damaged or something else: {error.__cause__}") from error
        if not isinstance(meta, dict) or meta.get("kind") != _KIND:
            raise RunError(f"{path} holds no dictionary of mechscope: read other formats by mechscope.features.formats")
        if meta["version"] > _VERSION:
            raise RunError(
                f"{path} was written by a later mechscope (format {meta['version']}, this one reads {_VERSION}): update mechscope"
            )
        inside, outside = (
            tuple(Affine(scale, tensors.pop(f"{name}_centre.{at}")) for at, scale in enumerate(scales))
            for name, scales in zip(("input", "output"), meta["scales"], strict=True)
        )
        return cls(Layout.from_json(meta["layout"]), tensors, inside, outside, meta["fingerprint"], meta["about"])


def decoded(layout: Layout, tensors: Mapping[str, Tensor], codes: Codes) -> Float[Tensor, "token written"]:
    """Return f D + c, the output places side by side, in the units of the tensors."""
    if len(layout.groups) == 1:
        return codes.decoded(tensors["decoder.0"]) + tensors["decoder_bias"]
    out = tensors["decoder_bias"].expand(codes.tokens, -1).clone()
    for number, (group, span) in enumerate(zip(layout.groups, layout.spans, strict=True)):
        out[:, layout.written_columns(group)] += codes.between(*span)[0].decoded(tensors[f"decoder.{number}"])
    return out


def decoder_sizes(layout: Layout, tensors: Mapping[str, Tensor]) -> Float[Tensor, " latent"]:
    """Return each latent's norm: of its decoder at every place it writes to, added up."""
    found = []
    for number, group in enumerate(layout.groups):
        parts = tensors[f"decoder.{number}"].split(layout.output_widths[slice(*group.writes)], dim=1)
        found.append(sum((torch.linalg.vector_norm(part, dim=1) for part in parts), torch.zeros((), device=parts[0].device)))
    return torch.cat(found)


def _mapped(values: Sequence[Tensor], maps: Sequence[Affine], where: Sequence[Place], like: Tensor) -> Tensor:
    if len(values) != len(where):
        raise ModelError(f"{len(values)} inputs for {len(where)} places ({', '.join(map(str, where))}): give one for each")
    for value, place, each in zip(values, where, maps, strict=True):
        expected = len(each.centre)
        if value.ndim != 2 or value.shape[1] != expected:
            raise ModelError(f"an input of shape {tuple(value.shape)} at {place}, where the dictionary reads (tokens, {expected})")
    mapped = [each(value.to(like)) for each, value in zip(maps, values, strict=True)]
    return mapped[0] if len(mapped) == 1 else torch.cat(mapped, dim=1)
