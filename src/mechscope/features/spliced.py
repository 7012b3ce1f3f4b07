"""Dictionaries in the model: what runs is written as latents and an error, and any of these can be recorded and changed.

    x = x̂(f) + error            at every place that a dictionary writes

With `errors` kept a change of latents moves x by exactly what it adds, Δf D, and where nothing is changed nothing moves; without them x becomes x̂. All of
this is edits of `mechscope.instrument`, so it nests with others, and holds in any forward pass and in `generate` (Marks et al. 2024, §3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import linear

from mechscope.errors import SettingsError
from mechscope.features.codes import Codes
from mechscope.features.dictionary import Dictionary
from mechscope.features.layout import Group, Layout
from mechscope.features.places import Latent, Place, places
from mechscope.instrument import Edit, Recording, intervene, record
from mechscope.shapes import by_shape
from mechscope.subject import Subject

# in which order a layer's places come by
_ORDER = ("z", "attention_output", "mlp_input", "mlp_output", "residual")
Values = Float[Tensor, "batch token chosen"]


@dataclass(frozen=True)
class LatentEdit:
    """A change of latents.

    Attributes:
        latents: Such as `resid6.f10`; of one dictionary or several.
        value: What they become: a number, a tensor that broadcasts to ``(batch, token, latents)``, or a function of what they were.
        positions: ``(batch, token)``, True where they are changed; None for everywhere.
    """

    latents: tuple[Latent, ...]
    value: float | Tensor | Callable[[Values], Values]
    positions: Bool[Tensor, "batch token"] | None = None

    __repr__ = by_shape

    def changed(self, old: Values) -> Values:
        """Return what values become."""
        value = self.value(old) if callable(self.value) else torch.as_tensor(self.value, dtype=old.dtype, device=old.device).expand_as(old)
        return value if self.positions is None else torch.where(self.positions.to(old.device)[..., None], value, old)


def latents(given: str | Latent | Sequence[str | Latent]) -> tuple[Latent, ...]:
    """Read latents: `"resid6.f10,m3.f7"`, or several of either form."""
    several: Sequence[str | Latent] = given.split(",") if isinstance(given, str) else (given,) if isinstance(given, Latent) else given
    return tuple(each if isinstance(each, Latent) else Latent.parse(each) for each in several)


def ablated(given: str | Sequence[str | Latent], positions: Tensor | None = None) -> LatentEdit:
    """Return the edit that silences latents."""
    return LatentEdit(latents(given), 0.0, positions)


def scaled(given: str | Sequence[str | Latent], factor: float, positions: Tensor | None = None) -> LatentEdit:
    """Return the edit that multiplies latents."""
    return LatentEdit(latents(given), lambda old: old * factor, positions)


def steered(given: str | Sequence[str | Latent], amount: float, positions: Tensor | None = None) -> LatentEdit:
    """Return the edit that adds to latents, active or not."""
    return LatentEdit(latents(given), lambda old: old + amount, positions)


class _Part:
    """Latents of a dictionary that read and write together, as a dictionary of their own; its codes are those of the pass that runs."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary = dictionary
        self.inputs, self.outputs = dictionary.layout.inputs, dictionary.layout.outputs
        self._read: tuple[Tensor, ...] = ()
        self._codes: Codes | None = None

    def codes(self, inputs: Sequence[Float[Tensor, "batch token width"]]) -> Codes:
        """Return the codes of what stands at the inputs, token after token; encoded once however many outputs ask."""
        if self._codes is None or any(one is not two for one, two in zip(inputs, self._read, strict=True)):
            self._read = tuple(inputs)
            self._codes = self.dictionary.encode([value.flatten(0, 1) for value in inputs])
        return self._codes

    @property
    def last(self) -> Codes:
        """The codes of the last pass."""
        if self._codes is None:
            raise KeyError("nothing was encoded: no forward pass was run inside the splice")
        return self._codes


class Spliced:
    """Dictionaries inside a running model: their latents and errors in the last pass."""

    def __init__(self, subject: Subject, dictionaries: Sequence[Dictionary], edits: Sequence[LatentEdit]) -> None:
        """Check that they fit; done by `splice`."""
        self._subject = subject
        self._whole = {place: dictionary for dictionary in dictionaries for place in dictionary.layout.outputs}
        self._parts = [part for dictionary in dictionaries for part in _parts(dictionary)]
        self._edits = [(edit, self._owner(latent), latent) for edit in edits for latent in edit.latents]
        self._given = list(edits)
        self.recording = Recording()
        self._before: dict[Place, Tensor] = {}
        self.shape = (0, 0)

    def _owner(self, latent: Latent) -> _Part:
        for part in self._parts:
            if latent.place == part.outputs[0]:
                if latent.index >= part.dictionary.latents:
                    raise SettingsError(f"latent {latent.name} does not exist: the dictionary has {part.dictionary.latents:,} there")
                return part
        known = ", ".join(part.outputs[0].name for part in self._parts)
        raise SettingsError(f"latent {latent.name} belongs to no spliced dictionary: they write {known}")

    def __getitem__(self, place: Place | str) -> Codes:
        """Return the codes of the latents that write first at a place, all tokens of the last pass row after row, as they were before edits."""
        (where,) = places(place)
        return next(part for part in self._parts if part.outputs[0] == where).last

    def values(self, given: str | Sequence[str | Latent]) -> Values:
        """Return some latents in the last pass, before edits."""
        chosen = latents(given)
        columns = [self._owner(latent).last.columns(torch.tensor([latent.index]))[:, 0] for latent in chosen]
        return torch.stack(columns, dim=1).unflatten(0, self.shape)

    def error(self, place: Place | str) -> Float[Tensor, "batch token width"]:
        """Return x − x̂ at a place in the last pass, before edits."""
        (where,) = places(place)
        return self._before[where].to(self._whole[where].tensors["decoder_bias"]) - self._reconstruction(where)

    def _inputs(self, part_inputs: Sequence[Place], place: Place, current: Tensor) -> list[Tensor]:
        return [current if where == place else where.of(self.recording) for where in part_inputs]

    def _reconstruction(self, place: Place) -> Float[Tensor, "batch token width"]:
        """Return x̂ at a place."""
        whole = self._whole[place]
        at = whole.layout.outputs.index(place)
        columns = slice(sum(whole.layout.output_widths[:at]), sum(whole.layout.output_widths[: at + 1]))
        out = whole.tensors["decoder_bias"][columns].expand(self.shape[0] * self.shape[1], -1)
        for part in self._parts:
            if place in part.outputs and self._whole[part.outputs[0]] is whole:
                own = part.outputs.index(place)
                start = sum(part.dictionary.layout.output_widths[:own])
                rows = part.dictionary.tensors["decoder.0"][:, start : start + whole.layout.output_widths[at]]
                out = out + part.last.decoded(rows.contiguous())
        if whole.layout.skip:
            inputs = self._inputs(whole.layout.inputs, place, self._before[place])
            out = out + linear(whole.read([value.flatten(0, 1) for value in inputs]), whole.tensors["skip"][columns])
        return whole.output_maps[at].back(out).unflatten(0, self.shape)

    def changed(self, place: Place, current: Float[Tensor, "batch token width"], errors: bool | Tensor) -> Tensor:
        """Return what stands at a place instead; called while the model runs."""
        whole = self._whole[place]
        self.shape, self._before[place] = (current.shape[0], current.shape[1]), current
        own = [part for part in self._parts if place in part.outputs and self._whole[part.outputs[0]] is whole]
        for part in own:
            part.codes(self._inputs(part.inputs, place, current))
        shifts = [shift for part in own if (shift := self._shift(part, place)) is not None]
        if errors is True:
            new = current if not shifts else current.to(whole.tensors["decoder_bias"])
        else:
            new = self._reconstruction(place)
            if isinstance(errors, Tensor):
                new = new + errors.to(new)
        for shift in shifts:
            new = new + shift
        return new.to(current)

    def _shift(self, part: _Part, place: Place) -> Tensor | None:
        """Return what the edits of a part's latents add at a place."""
        chosen = list(dict.fromkeys(latent.index for _, owner, latent in self._edits if owner is part))
        if not chosen:
            return None
        old = part.last.columns(torch.tensor(chosen, device=part.dictionary.device)).unflatten(0, self.shape)
        new = old.clone()
        for edit in self._given:
            at = [chosen.index(latent.index) for latent in edit.latents if self._owner(latent) is part]
            if at:
                whole_edit = replace(edit, value=_columns(edit, self, part))
                new[..., at] = whole_edit.changed(new[..., at])
        return (new - old) @ part.dictionary.directions(chosen, place)


def _columns(edit: LatentEdit, spliced: Spliced, part: _Part) -> float | Tensor | Callable[[Values], Values]:
    """Return an edit's value for the latents of one part: a tensor for several dictionaries' latents is cut."""
    if not isinstance(edit.value, Tensor) or edit.value.ndim == 0 or edit.value.shape[-1] != len(edit.latents):
        return edit.value
    return edit.value[..., [at for at, latent in enumerate(edit.latents) if spliced._owner(latent) is part]]


@contextlib.contextmanager
def splice(
    subject: Subject,
    dictionaries: Mapping[Place, Dictionary] | Mapping[str, Dictionary],
    *edits: LatentEdit,
    errors: bool | Mapping[Place, Tensor] | Mapping[str, Tensor] = True,
    positions: Bool[Tensor, "batch token"] | None = None,
    other_model: bool = False,
) -> Iterator[Spliced]:
    """Run a model through dictionaries, with latents changed if wanted.

    Args:
        subject: The model.
        dictionaries: By the (first) place that each writes.
        edits: Changes of latents, in the order given; see `ablated`, `scaled`, `steered`.
        errors: Whether what the dictionaries miss is kept; or what stands for it at each place ``(batch, token, width)``, such as another run's.
        positions: ``(batch, token)``: the tokens that go through the dictionaries; None for all. Not in `generate`.
        other_model: Allow dictionaries of a model with other weights.

    Yields:
        The latents and errors of the last pass.

    Raises:
        SettingsError: A place, a latent, or the order of what a dictionary reads and writes does not fit.
        ModelError: A dictionary is another model's.
    """
    for key, dictionary in dictionaries.items():
        (place,) = places(key)
        if dictionary.layout.outputs[0] != place:
            raise SettingsError(f"the dictionary given for {place} writes at {dictionary.layout.outputs[0]}: name that place")
        dictionary.check(subject, other_model=other_model)
    moved = [dictionary.to(subject.device) for dictionary in dictionaries.values()]
    written = [place for dictionary in moved for place in dictionary.layout.outputs]
    if twice := sorted({place.name for place in written if written.count(place) > 1}):
        raise SettingsError(f"two dictionaries write at {', '.join(twice)}: splice one of them")
    spliced = Spliced(subject, moved, edits)
    given = {places(place)[0]: value for place, value in errors.items()} if isinstance(errors, Mapping) else {}
    if isinstance(errors, Mapping) and set(given) != set(written):
        raise SettingsError(
            f"errors are given for {', '.join(map(str, given)) or 'no place'}, dictionaries write {', '.join(map(str, written))}"
        )
    changes = [_edit(spliced, place, given.get(place, bool(errors)), positions) for place in written]
    read = {place for dictionary in moved for place in dictionary.layout.inputs if place not in dictionary.layout.outputs}
    read |= {place for dictionary in moved if len(dictionary.layout.inputs) > 1 for place in dictionary.layout.inputs}
    with contextlib.ExitStack() as stack:
        if read:
            recording = record(subject, *dict.fromkeys(place.site for place in read), layers={place.layer for place in read})
            spliced.recording = stack.enter_context(recording)
        stack.enter_context(intervene(subject, *changes))
        yield spliced


def _edit(spliced: Spliced, place: Place, errors: bool | Tensor, positions: Tensor | None) -> Edit:
    if place.site == "mlp_input":
        raise SettingsError(
            f"{place} is read by the MLP and written by no one: splice a dictionary of what is written, such as m{place.layer}"
        )

    return place.edit(lambda current: spliced.changed(place, current, errors), positions)


def _parts(dictionary: Dictionary) -> list[_Part]:
    """Take a dictionary apart into its groups, which must be able to run one after the other."""
    layout = dictionary.layout
    if len(layout.groups) > 1 and layout.rule.name == "topk":
        raise SettingsError(
            "rule topk chooses among the latents of all layers, and later ones are not known when earlier ones are needed: splice another rule"
        )
    parts = []
    for number, (group, (start, stop)) in enumerate(zip(layout.groups, layout.spans, strict=True)):
        reads, writes = (slice(*part) for part in (group.reads, group.writes))
        inputs, outputs = layout.inputs[reads], layout.outputs[writes]
        if max(map(_when, inputs)) > min(map(_when, outputs)):
            raise SettingsError(
                f"a dictionary that reads {', '.join(map(str, inputs))} cannot write at {outputs[0]}, which comes first: it cannot stand in a run"
            )
        own = Layout(
            inputs,
            outputs,
            layout.input_widths[reads],
            layout.output_widths[writes],
            (Group(group.latents, (0, len(inputs)), (0, len(outputs))),),
            layout.rule,
        )
        tensors = {name: tensor for name, tensor in dictionary.tensors.items() if name in own.shapes()}
        tensors |= {name: dictionary.tensors[f"{name.split('.')[0]}.{number}"] for name in ("encoder.0", "decoder.0")}
        tensors["decoder_bias"] = torch.zeros(own.shapes()["decoder_bias"], dtype=dictionary.dtype, device=dictionary.device)
        for name in ("encoder_bias", "magnitude_log", "magnitude_bias", "threshold"):
            if name in tensors and tensors[name].ndim:
                tensors[name] = tensors[name][start:stop]
        parts.append(_Part(Dictionary(own, tensors, dictionary.input_maps[reads], dictionary.output_maps[writes])))
    return parts


def _when(place: Place) -> tuple[int, int]:
    return place.layer, _ORDER.index(place.site)
