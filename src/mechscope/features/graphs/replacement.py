"""What stands for the MLPs in one prompt: active latents of transcoders, what they miss (errors), and what is there whatever is read (constants).

    m_l[t] = Σ_s f_s D_s,l + c_l + W_skip x_l[t] + ε_l[t]          s: latents active at t that write at layer l; ε makes it exact

Latents are read in the model's own run, so errors restore it to the digit (the local replacement model of Ameisen et al. 2025, §3). At the first tokens,
which dictionaries are not trained on, the MLPs' outputs are constants as they stand. A layer without a dictionary has errors alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from mechscope.errors import SettingsError
from mechscope.features.codes import Codes
from mechscope.features.dictionary import Dictionary
from mechscope.features.graphs.frozen import FrozenRun
from mechscope.features.places import Place
from mechscope.subject import Subject


@dataclass(frozen=True)
class Written:
    """What is written at one layer's MLP, position by position, side by side.

    Attributes:
        vectors: ``(token, slot, d_model)``: what each latent that is active there adds, and behind them the error; zero in slots that are empty.
        latents: ``(token, slot)``: which latent, −1 for the error's and for empty ones.
        constant: ``(token, d_model)``: what is written whatever is read.
        skip: ``(d_model, d_model)``: the skip map (out, in), or None.
    """

    vectors: Float[Tensor, "token slot d_model"]
    latents: Int[Tensor, "token slot"]
    constant: Float[Tensor, "token d_model"]
    skip: Float[Tensor, "d_model d_model"] | None


class _Part:
    """Latents of one dictionary that read one layer."""

    def __init__(self, dictionary: Dictionary, number: int) -> None:
        layout = dictionary.layout
        group, (start, stop) = layout.groups[number], layout.spans[number]
        self.dictionary, self.number, self.span = dictionary, number, (start, stop)
        self.reads = layout.inputs[group.reads[0]].layer
        self.place = layout.outputs[group.writes[0]]
        self.writes = [layout.outputs[at].layer for at in range(*group.writes)]
        self._input = dictionary.input_maps[group.reads[0]]
        gated = layout.rule.name == "gated"
        self._bias = dictionary.tensors["magnitude_bias" if gated else "encoder_bias"][start:stop]

    def encoder(self, latents: Tensor) -> Float[Tensor, "latent d_model"]:
        """Return what some latents read, in the model's units: their value is ⟨row, x⟩ + `constant`."""
        return self.dictionary.encoders(self.number, latents)

    def constant(self, latents: Tensor) -> Float[Tensor, " latent"]:
        """Return the value of some latents where x is zero."""
        return self._bias[latents] - self.encoder(latents) @ self._input.centre.to(self._bias)

    def decoder(self, latents: Tensor, layer: int) -> Float[Tensor, "latent d_model"]:
        """Return what a value of one of some latents adds at a layer."""
        whole = (latents + self.span[0]).tolist()
        return self.dictionary.directions(whole, next(place for place in self.dictionary.layout.outputs if place.layer == layer))


class Replacement:
    """The local replacement of the MLPs in one prompt.

    Attributes:
        run: The prompt's run.
        first: Tokens at the beginning whose MLP outputs are constants.
        places: The first place that each latent writes, for its name, by number of `part`.
        part: ``(latent)``: which group of which dictionary it belongs to.
        layer: ``(latent)``: the layer that it reads.
        position: ``(latent)``: its token.
        index: ``(latent)``: its number in its group.
        value: ``(latent)``: f.
        constants: ``(latent)``: its value where what it reads is zero, the shift of the MLP's norm included.
        errors: ``(layer, token, d_model)``.
        written: What is written at each layer.
        without: Layers that no dictionary writes.
    """

    @torch.no_grad()
    def __init__(self, run: FrozenRun, dictionaries: Mapping[str, Dictionary], *, first: int, other_model: bool = False) -> None:
        """Read the latents that are active in a prompt.

        Raises:
            SettingsError: A dictionary is no transcoder, or two write at one layer.
            ModelError: A dictionary is another model's.
        """
        self.run, self.first = run, first
        fitting = {name: checked(each, name, run.subject, other_model=other_model) for name, each in dictionaries.items()}
        require_apart(fitting)
        moved = {name: each.to(run.embedding.device, run.dtype) for name, each in fitting.items()}
        self._parts: list[_Part] = []
        found, decoded = list[tuple[Tensor, Tensor]](), torch.zeros_like(run.mlp_outputs)
        constants, skips = torch.zeros_like(run.mlp_outputs), dict[int, Tensor]()
        for dictionary in moved.values():
            layout = dictionary.layout
            inputs = [run.mlp_inputs[place.layer] for place in layout.inputs]
            codes = dictionary.encode(inputs)
            parts = [_Part(dictionary, number) for number in range(len(layout.groups))]
            values = codes.values.clone()
            for part in parts:
                own, at = codes.between(*part.span)
                values[at] = self._values(part, own)
                rows = torch.stack([torch.full_like(own.rows, len(self._parts)), own.rows, own.latents])
                found.append((rows[:, own.rows >= first], values[at][own.rows >= first]))
                self._parts.append(part)
            for place, out in zip(layout.outputs, dictionary.decode(codes.with_values(values), inputs), strict=True):
                decoded[place.layer] = out
            self._add_constants(dictionary, constants, skips)
        order = torch.cat([rows for rows, _ in found], dim=1) if found else torch.zeros(3, 0, dtype=torch.int64, device=decoded.device)
        self.part, self.position, self.index = order
        self.value = torch.cat([values for _, values in found]) if found else decoded.new_zeros(0)
        self.places: tuple[Place, ...] = tuple(part.place for part in self._parts)
        reads = torch.tensor([part.reads for part in self._parts], dtype=torch.int64, device=decoded.device)
        self.layer = reads[self.part]
        self._sort()
        self.without = tuple(
            layer
            for layer in range(len(decoded))
            if not any(layer == place.layer for each in fitting.values() for place in each.layout.outputs)
        )
        self.errors = run.mlp_outputs - decoded
        self.errors[:, :first] = 0.0
        constants[:, :first] = run.mlp_outputs[:, :first]
        self.constants = self._latent_constants()
        self.written = [self._written(layer, constants[layer], skips.get(layer)) for layer in range(len(decoded))]

    def __len__(self) -> int:
        return len(self.value)

    def __repr__(self) -> str:
        return f"Replacement({len(self)} active latents of {len(self._parts)} groups, {len(self.run.ids)} tokens)"

    def _values(self, part: _Part, codes: Codes) -> Float[Tensor, " entry"]:
        """Return the values of active latents in the type that is computed in: what they read plus what is constant."""
        inputs = self.run.mlp_inputs[part.reads]
        rows = torch.empty_like(codes.values)
        for piece in torch.arange(len(codes), device=rows.device).split(_PIECE):
            latents = codes.latents[piece]
            rows[piece] = (inputs[codes.rows[piece]] * part.encoder(latents)).sum(-1) + part.constant(latents)
        return rows

    def _sort(self) -> None:
        """Put latents in the order of layer, position and index."""
        width = int(self.index.max()) + 1 if len(self) else 1
        order = (
            (self.layer * len(self.run.ids) + self.position) * len(self._parts or [0]) * width + self.part * width + self.index
        ).argsort()
        for name in ("part", "layer", "position", "index", "value"):
            setattr(self, name, getattr(self, name)[order])

    def _latent_constants(self) -> Float[Tensor, " latent"]:
        total = torch.zeros_like(self.value)
        for number, part in enumerate(self._parts):
            for piece in (self.part == number).nonzero()[:, 0].split(_PIECE):
                own = part.encoder(self.index[piece]) @ self.run.shift(part.reads)
                total[piece] = part.constant(self.index[piece]) + own
        return total

    @staticmethod
    def _add_constants(dictionary: Dictionary, constants: Tensor, skips: dict[int, Tensor]) -> None:
        """Add the bias of a dictionary's decoder at every layer that it writes, and the constant part of its skip map."""
        layout = dictionary.layout
        for place, written in zip(layout.outputs, dictionary.nothing(), strict=True):
            constants[place.layer] += written
        if layout.skip:
            # one place is read and one written: `checked` sees to it
            inside, outside = dictionary.input_maps[0], dictionary.output_maps[0]
            skips[layout.outputs[0].layer] = skip = dictionary.tensors["skip"] * (inside.scale / outside.scale)
            constants[layout.outputs[0].layer] -= skip @ inside.centre.to(skip)

    def _written(self, layer: int, constant: Tensor, skip: Tensor | None) -> Written:
        tokens = len(self.run.ids)
        writing = torch.tensor([layer in part.writes for part in self._parts], dtype=torch.bool, device=constant.device)
        latents = writing[self.part].nonzero()[:, 0]
        order = self.position[latents].argsort(stable=True)
        latents = latents[order]
        counts = torch.bincount(self.position[latents], minlength=tokens)
        starts = counts.cumsum(0) - counts
        slots = torch.arange(len(latents), device=latents.device) - starts[self.position[latents]]
        width = int(counts.max()) if len(latents) else 0
        vectors = constant.new_zeros(tokens, width + 1, constant.shape[-1])
        which = torch.full((tokens, width + 1), -1, dtype=torch.int64, device=latents.device)
        which[self.position[latents], slots] = latents
        vectors[self.position[latents], slots] = self.decoders(latents, layer)
        vectors[:, -1] = self.errors[layer]
        if skip is not None:
            constant[self.first :] += linear(self.run.shift(layer), skip)
        return Written(vectors, which, constant, skip)

    def encoders(self, latents: Int[Tensor, " chosen"]) -> Float[Tensor, "chosen d_model"]:
        """Return what some latents read at their MLP's input."""
        rows = self.run.embedding.new_empty(len(latents), self.run.embedding.shape[1])
        for number in self.part[latents].unique().tolist():
            own = self.part[latents] == number
            rows[own] = self._parts[number].encoder(self.index[latents[own]])
        return rows

    def decoders(self, latents: Int[Tensor, " chosen"], layer: int) -> Float[Tensor, "chosen d_model"]:
        """Return what some latents add at a layer, f D; zero where they do not write."""
        rows = self.run.embedding.new_zeros(len(latents), self.run.embedding.shape[1])
        for number in self.part[latents].unique().tolist():
            own = self.part[latents] == number
            if layer in self._parts[number].writes:
                rows[own] = self._parts[number].decoder(self.index[latents[own]], layer)
        return rows * self.value[latents, None]

    def names(self) -> list[str]:
        """Return the latents' text forms: `m3.f1024`, named after the first place that they write."""
        return [f"{self.places[part].name}.f{index}" for part, index in zip(self.part.tolist(), self.index.tolist(), strict=True)]


# rows of encoders gathered at once
_PIECE = 8192


def checked(dictionary: Dictionary, name: str, subject: Subject, *, other_model: bool = False) -> Dictionary:
    """Return a dictionary if it can stand for MLPs of a model.

    Raises:
        SettingsError: It reads or writes something else, reads several places at once, or a later one than it writes.
        ModelError: It is another model's.
    """
    layout = dictionary.layout
    if {place.site for place in layout.inputs} != {"mlp_input"} or {place.site for place in layout.outputs} != {"mlp_output"}:
        raise SettingsError(
            f"dictionary {name!r} reads {', '.join(map(str, layout.inputs))} and writes {', '.join(map(str, layout.outputs))}: a graph is made of transcoders, "
            "which read m3.in and write m3, or of a cross-layer transcoder"
        )
    for group in layout.groups:
        if group.reads[1] - group.reads[0] != 1 or layout.inputs[group.reads[0]].layer > layout.outputs[group.writes[0]].layer:
            raise SettingsError(
                f"latents of dictionary {name!r} read several layers, or one behind that which they write: no graph can be made of them"
            )
    if layout.skip and len(layout.groups) > 1:
        raise SettingsError(f"dictionary {name!r} has a skip map across layers: that is not supported")
    return dictionary.check(subject, other_model=other_model)


def require_apart(dictionaries: Mapping[str, Dictionary]) -> None:
    """Refuse two dictionaries for one MLP; `SettingsError`."""
    owner: dict[Place, str] = {}
    for name, dictionary in dictionaries.items():
        for place in dictionary.layout.outputs:
            if place in owner:
                raise SettingsError(f"dictionaries {owner[place]!r} and {name!r} both write {place}: give one of them")
            owner[place] = name


def shuffled(dictionary: Dictionary, *, seed: int = 0) -> Dictionary:
    """Return a control: the same latents with the same values, each of which writes what another one should (decoder rows in another order)."""
    generator = torch.Generator().manual_seed(seed)
    made = dict(dictionary.tensors)
    for number, group in enumerate(dictionary.layout.groups):
        made[f"decoder.{number}"] = made[f"decoder.{number}"][torch.randperm(group.latents, generator=generator).to(dictionary.device)]
    return replace(dictionary, tensors=made, about={**dictionary.about, "control": "shuffled decoders"})
