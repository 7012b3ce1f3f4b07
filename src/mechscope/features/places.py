"""Where a dictionary reads and writes: a site of a layer, and of which model where there are two.

In text `resid6` is the residual stream behind block 6, `a6` and `m6` what its attention and its MLP add, `m6.in` what that MLP reads, `a6.z` the heads'
outputs side by side before their projection. With two models `base:resid6` says whose. A latent of a dictionary that writes there is `resid6.f1024`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from jaxtyping import Bool, Float
from torch import Tensor

from mechscope.errors import SettingsError
from mechscope.instrument import Edit, Recording
from mechscope.instrument.edits import EditSite
from mechscope.subject import Subject

FeatureSite = Literal["residual", "attention_output", "mlp_output", "mlp_input", "z"]
_FORMS: dict[FeatureSite, str] = {
    "residual": "resid{}",
    "attention_output": "a{}",
    "mlp_output": "m{}",
    "mlp_input": "m{}.in",
    "z": "a{}.z",
}
_PLACE = re.compile(r"(?:(?P<model>[a-z]\w*):)?(?P<kind>resid|a|m)(?P<layer>\d+)(?P<part>\.in|\.z)?")
_LATENT = re.compile(r"(?P<place>.+)\.f(?P<latent>\d+)")
_SITES: dict[str, FeatureSite] = {form.replace("{}", ""): site for site, form in _FORMS.items()}


@dataclass(frozen=True, order=True)
class Place:
    """A site of a layer.

    Attributes:
        site: What stands there.
        layer: The block.
        model: Which of several models; empty for the only one.
    """

    site: FeatureSite
    layer: int
    model: str = ""

    def __post_init__(self) -> None:
        if self.site not in get_args(FeatureSite):
            raise SettingsError(f"dictionaries have no site {self.site!r}: the sites are {', '.join(get_args(FeatureSite))}")

    @property
    def name(self) -> str:
        """Its text form."""
        return (f"{self.model}:" if self.model else "") + _FORMS[self.site].format(self.layer)

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, text: str) -> Place:
        """Read the text form; the inverse of `name`.

        Raises:
            SettingsError: It is none.
        """
        match = _PLACE.fullmatch(text.strip())
        site = match and _SITES.get(match["kind"] + (match["part"] or ""))
        if not match or not site:
            raise SettingsError(f"place {text!r} is not understood: write resid6, a6, m6, m6.in or a6.z, with two models base:resid6")
        return cls(site, int(match["layer"]), match["model"] or "")

    def width(self, subject: Subject) -> int:
        """Return how many numbers stand there for each token."""
        return subject.anatomy.n_heads * subject.anatomy.d_head if self.site == "z" else subject.anatomy.d_model

    def check(self, subject: Subject) -> Place:
        """Return itself if the model has the layer; `SettingsError` otherwise."""
        if not 0 <= self.layer < subject.anatomy.n_layers:
            raise SettingsError(f"{self.name} does not exist: {subject.source!r} has layers 0-{subject.anatomy.n_layers - 1}")
        return self

    def of(self, recording: Recording) -> Float[Tensor, "batch token width"]:
        """Return what was recorded there."""
        return self.flat(recording[self.site, self.layer])

    def flat(self, value: Float[Tensor, "batch token ..."]) -> Float[Tensor, "batch token width"]:
        """Return what stands there with heads side by side, as dictionaries read it; a run gives those of z apart."""
        return value.flatten(2) if self.site == "z" else value

    def edit(self, change: Callable[[Tensor], Tensor], positions: Bool[Tensor, "batch token"] | None = None) -> Edit:
        """Return the edit that puts something else there, given as a function of what stood there, heads side by side.

        Args:
            change: From ``(batch, token, width)`` to the same.
            positions: ``(batch, token)``: the tokens where it is changed; None for all.
        """

        def value(current: Tensor) -> Tensor:
            return change(self.flat(current)).to(current).view_as(current)

        return Edit(cast(EditSite, self.site), self.layer, value, positions=positions)


def places(given: Place | str | Sequence[Place | str]) -> tuple[Place, ...]:
    """Read one place or several, given as places or in their text form (joined by commas)."""
    if isinstance(given, Place):
        return (given,)
    several = given.split(",") if isinstance(given, str) else given
    return tuple(each if isinstance(each, Place) else Place.parse(each) for each in several)


def subject_of(subjects: Subject | Mapping[str, Subject], place: Place) -> Subject:
    """Return the model of a place; `SettingsError` where it is not among those given."""
    if isinstance(subjects, Subject):
        subjects = {"": subjects}
    if place.model not in subjects:
        raise SettingsError(f"place {place} is of a model {place.model!r}, given are {', '.join(map(repr, subjects))}: name the models")
    return subjects[place.model]


@dataclass(frozen=True)
class Latent:
    """One latent of the dictionary that writes at a place: `resid6.f1024`."""

    place: Place
    index: int

    @property
    def name(self) -> str:
        """Its text form."""
        return f"{self.place.name}.f{self.index}"

    @classmethod
    def parse(cls, text: str) -> Latent:
        """Read the text form; `SettingsError` where it is none."""
        match = _LATENT.fullmatch(text.strip())
        if not match:
            raise SettingsError(f"latent {text!r} is not understood: write the place and the latent, such as resid6.f1024")
        return cls(Place.parse(match["place"]), int(match["latent"]))
