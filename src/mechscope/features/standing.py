"""Autoencoders that stand at one place of a running model, so that each latent, and what is left over, is a component of it.

    x = Σ_j f_j(x) D_j + b + ε(x)        at every token

A component's value can be read and replaced, alone or with others: f_j by another number, ε by another vector; x then moves by exactly what the change adds.
Where the rule decides for each latent alone (all but TopK) only the latents that are asked for are computed. Errors are written `resid6.error`.

At tokens that a dictionary is not meant to read (`reads`), those that its training left out, what it says stands for nothing: they count in no mean, and
nothing is changed there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechscope.errors import SettingsError
from mechscope.features.attributions import Attributions
from mechscope.features.codes import Codes
from mechscope.features.dictionary import Dictionary
from mechscope.features.layout import autoencoder
from mechscope.features.places import Latent, Place
from mechscope.features.rows import left_out_in_training
from mechscope.instrument import Edit, Recording
from mechscope.settings.features import TokenSettings
from mechscope.shapes import by_shape
from mechscope.subject import Subject
from mechscope.subject.placement import sent

# in which order a layer's places come by
_ORDER = ("z", "attention_output", "mlp_output", "residual")
Stream = Float[Tensor, "batch token width"]


@dataclass(frozen=True, order=True)
class Node:
    """A latent of the autoencoder at a place, or (`latent` None) its error.

    Attributes:
        place: Where.
        latent: Which latent; None for the error.
    """

    place: Place
    latent: int | None = None

    @property
    def name(self) -> str:
        """Its text form: `resid6.f1024`, `resid6.error`."""
        return f"{self.place.name}.error" if self.latent is None else Latent(self.place, self.latent).name

    @classmethod
    def parse(cls, text: str) -> Node:
        """Read the text form; `SettingsError` where it is none."""
        if text.endswith(".error"):
            return cls(Place.parse(text.removesuffix(".error")))
        latent = Latent.parse(text)
        return cls(latent.place, latent.index)


@dataclass(frozen=True, eq=False)
class Standing:
    """An autoencoder at its place.

    Attributes:
        dictionary: The autoencoder, on the model's device.
        place: Where it stands.
    """

    dictionary: Dictionary
    place: Place
    _parts: dict[tuple[int, ...], Dictionary] = field(default_factory=dict, repr=False)
    _seen: list[tuple[Tensor, Codes]] = field(default_factory=list, repr=False)

    __repr__ = by_shape

    @classmethod
    def of(cls, dictionary: Dictionary, subject: Subject, *, other_model: bool = False) -> Standing:
        """Check that a dictionary is an autoencoder of one place of the model.

        Raises:
            SettingsError: It writes elsewhere than it reads, or at several places, or the model has no such place.
            ModelError: It was made for another model.
        """
        layout = dictionary.layout
        if layout.inputs != layout.outputs or len(layout.inputs) > 1 or layout.inputs[0].site not in _ORDER:
            raise SettingsError(
                f"a dictionary that reads {', '.join(map(str, layout.inputs))} and writes {', '.join(map(str, layout.outputs))} has no latents that are "
                "components of a run: take autoencoders of one place, such as resid6, a6, m6 or a6.z"
            )
        dictionary.check(subject, other_model=other_model)
        return cls(dictionary.to(subject.device), layout.inputs[0])

    @cached_property
    def first(self) -> int:
        """Tokens at the beginning of each text that its training left out; one where that is not known."""
        return (left_out_in_training(self.dictionary)[0] or TokenSettings()).first

    @cached_property
    def limit(self) -> float | None:
        """Norm above which its training left a token out; None where it left none out, or that is not known."""
        return left_out_in_training(self.dictionary)[1].get(self.place)

    def reads(self, real: Bool[Tensor, "batch token"], *streams: Stream) -> Bool[Tensor, "batch token"]:
        """Return which tokens it is meant to read: neither the first ones of a text nor those whose norm is above the limit.

        Args:
            real: Tokens that are no padding.
            streams: What stands at its place in each run in which the tokens are read, on any device; none to leave norms aside.
        """
        tokens = sent(real, self.decoders.device)
        tokens = tokens & (tokens.cumsum(1) > self.first)
        for x in streams:
            tokens = tokens & sent(self.ordinary(x), tokens.device)
        return tokens

    def ordinary(self, x: Stream) -> Bool[Tensor, "batch token"]:
        """Return at which tokens the norm is not above the limit."""
        norm = torch.linalg.vector_norm(x.float(), dim=-1)
        # of what is no number a comparison with <= says that it is not ordinary
        return torch.ones_like(norm, dtype=torch.bool) if self.limit is None else norm <= self.limit

    @cached_property
    def decoders(self) -> Float[Tensor, "latent width"]:
        """What each latent writes, in the model's units."""
        return self.dictionary.decoders()

    @cached_property
    def encoders(self) -> Float[Tensor, "latent width"]:
        """The gradient of each latent's value by x where it is active, in the model's units."""
        return self.dictionary.encoders()

    @cached_property
    def nothing(self) -> Float[Tensor, " width"]:
        """What it writes when no latent is active."""
        return self.dictionary.nothing()[0]

    def check(self, latents: Iterable[int]) -> None:
        """Refuse latents that it lacks; `SettingsError`."""
        for latent in latents:
            if not 0 <= latent < self.dictionary.latents:
                raise SettingsError(f"latent {self.place}.f{latent} does not exist: the dictionary has {self.dictionary.latents:,} there")

    def codes(self, x: Stream) -> Codes:
        """Return the active latents of all tokens, row after row."""
        return self.dictionary.encode([x.flatten(0, 1)])

    def rebuilt(self, codes: Codes, like: Stream) -> Stream:
        """Return what codes stand for, in the shape of a stream."""
        return (codes.decoded(self.decoders) + self.nothing).view(like.shape)

    def error(self, x: Stream, codes: Codes | None = None) -> Stream:
        """Return what the latents miss of x, in the type of the dictionary."""
        return x.to(self.decoders) - self.rebuilt(self.codes(x) if codes is None else codes, x)

    def values(self, x: Stream, latents: Sequence[int]) -> Float[Tensor, "batch token chosen"]:
        """Return some latents' values at all tokens."""
        if not latents:
            return x.new_zeros(*x.shape[:2], 0).to(self.decoders)
        if self.dictionary.layout.rule.name == "topk":
            codes = self._remembered(x)
            return codes.columns(torch.tensor(latents, device=codes.latents.device)).unflatten(0, x.shape[:2])
        return self._part(tuple(latents)).encode([x.flatten(0, 1)]).dense().unflatten(0, x.shape[:2])

    def _remembered(self, x: Stream) -> Codes:
        """Return the codes of what a sweep asks for again and again: the stream that it changes, and the one that it takes values from."""
        for seen, codes in self._seen:
            if seen is x:
                return codes
        del self._seen[:-1]
        self._seen.append((x, self.codes(x)))
        return self._seen[-1][1]

    def _part(self, latents: tuple[int, ...]) -> Dictionary:
        """Return some of the latents as an autoencoder of their own; of rules that decide for each latent alone."""
        if latents not in self._parts:
            whole = self.dictionary
            at = torch.tensor(latents, device=whole.device)
            rule = whole.layout.rule
            # k plays no part once the threshold is stored
            own = autoencoder(self.place, whole.layout.input_widths[0], len(latents), replace(rule, k=1) if rule.k else rule)
            tensors = {name: tensor if name == "decoder_bias" or not tensor.ndim else tensor[at] for name, tensor in whole.tensors.items()}
            self._parts[latents] = Dictionary(own, tensors, whole.input_maps, whole.output_maps)
        return self._parts[latents]

    def attributions(
        self, changes: Sequence[tuple[float, Codes]], gradient: Stream, weights: Float[Tensor, "set token"] | None = None
    ) -> Attributions:
        """Return what latents do along a gradient, text by text; see `Attributions.of`."""
        return Attributions.of(changes, gradient.to(self.decoders), self.decoders, weights)

    def read(self, recording: Recording) -> Stream:
        """Return what was recorded at the place, where the dictionary is and in its type."""
        return self.place.of(recording).to(self.decoders)

    def latents_edit(self, latents: Sequence[int], value: Tensor | float, positions: Bool[Tensor, "batch token"] | None = None) -> Edit:
        """Return the edit that sets some latents, with the rest of x kept, and tokens whose norm is above the limit left alone.

        Args:
            latents: Which.
            value: What they become: ``(batch, token, chosen)``, or what broadcasts to it.
            positions: ``(batch, token)``: the tokens where they are set; None for all.
        """
        rows = self.decoders[list(latents)]

        def change(x: Stream) -> Stream:
            old = self.values(x, latents)
            moved = x.to(rows) + (torch.as_tensor(value, dtype=old.dtype, device=old.device) - old) @ rows
            own = sent(x, moved.device)
            return torch.where(self.ordinary(own)[..., None], moved, own)

        return self.place.edit(change, positions)


def require(standing: Iterable[Standing], nodes: Iterable[Node]) -> None:
    """Refuse nodes that are none of the autoencoders'; `SettingsError`."""
    known = {each.place: each for each in standing}
    for node in nodes:
        if node.place not in known:
            raise SettingsError(f"node {node.name} belongs to no dictionary: they stand at {', '.join(map(str, known))}")
        known[node.place].check(() if node.latent is None else (node.latent,))


def in_order(standing: Iterable[Standing]) -> tuple[Standing, ...]:
    """Return autoencoders in the order in which a run comes by their places.

    Raises:
        SettingsError: Two stand at one place, or there is none.
    """
    ordered = tuple(sorted(standing, key=lambda each: (each.place.layer, _ORDER.index(each.place.site))))
    places = [each.place for each in ordered]
    if not places:
        raise SettingsError("there is no dictionary: name at least one")
    if twice := sorted({place.name for place in places if places.count(place) > 1}):
        raise SettingsError(f"two dictionaries stand at {', '.join(twice)}: take one of them")
    return ordered
