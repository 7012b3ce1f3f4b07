"""Where a sweep changes the model: one place at a time, named as the circuit literature names it.

embed      embedding            resid3  residual stream behind block 3      a3      attention output of layer 3
a3.h5      head (its z)         a3.h5<q>, <k>, <v>   its query, key, value   a3.h5<p>   its attention pattern
mixer3     what layer 3, which does not attend, mixes tokens by
m3         MLP output           m3.n17  neuron 17 of its MLP                   m3.e5   expert 5 of its MLP
resid3.f17 latent 17 of the dictionary that stands there
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from mechscope.causal.sources import Bound
from mechscope.errors import SettingsError
from mechscope.features import Standing
from mechscope.instrument.edits import EDIT_SITES, HEAD_SITES, Edit, EditSite, Value
from mechscope.subject import Components
from mechscope.subject.anatomy import Anatomy
from mechscope.subject.placement import sent

# what a person may call a site
ALIASES = {
    "head": "z",
    "q": "query",
    "k": "key",
    "v": "value",
    "attention": "attention_output",
    "mixer": "mixer_output",
    "mlp": "mlp_output",
    "expert": "expert_output",
    "embed": "embedding",
}
# what a table calls the site of a latent, and a person the site of all of them
LATENT = "latent"
_MARKS = {"query": "<q>", "key": "<k>", "value": "<v>", "pattern": "<p>", "z": ""}


@dataclass(frozen=True)
class Place:
    """One component's value at one site.

    Attributes:
        site: Where in the block.
        layer: Which block.
        head: Which query head, of sites with heads.
        feature: Which neuron, of site `neuron`; which expert, of `expert_output`.
    """

    site: EditSite
    layer: int
    head: int | None = None
    feature: int | None = None

    def __str__(self) -> str:
        if self.site in HEAD_SITES:
            return f"a{self.layer}.h{self.head}{_MARKS[self.site]}"
        if self.site == "neuron":
            return f"m{self.layer}" if self.feature is None else f"m{self.layer}.n{self.feature}"
        if self.site == "expert_output":
            return f"m{self.layer}.e{self.feature}"
        prefix = {"attention_output": "a", "mixer_output": "mixer", "mlp_output": "m", "residual": "resid"}.get(self.site)
        return f"{prefix}{self.layer}" if prefix else "embed"

    @property
    def kind(self) -> str:
        """What a table calls its site."""
        return self.site

    def edit(self, value: Value, positions: Tensor | None = None) -> Edit:
        """Return the edit that puts a value here."""
        heads = None if self.head is None else (self.head,)
        chosen = None if self.feature is None else (self.feature,)
        own = {"experts" if self.site == "expert_output" else "features": chosen}
        return Edit(self.site, self.layer, value, heads=heads, positions=positions, **own)


@dataclass(frozen=True, kw_only=True)
class LatentPlace(Place):
    """A latent of a dictionary that stands at a site; `feature` is which.

    Attributes:
        standing: The dictionary.
    """

    standing: Standing

    def __str__(self) -> str:
        return f"{self.standing.place.name}.f{self.latent}"

    @property
    def kind(self) -> str:
        """What a table calls its site."""
        return LATENT

    @property
    def latent(self) -> int:
        """Which latent."""
        return self.feature or 0


def latent_places(standing: Sequence[Standing], components: Components | str | None = None) -> tuple[LatentPlace, ...]:
    """List latents of dictionaries, dictionary by dictionary.

    Args:
        standing: The dictionaries.
        components: Only these latents; None for all.

    Raises:
        SettingsError: There is no dictionary at a latent's place, it lacks the latent, or none of the components is a latent.
    """
    components = Components.parse(components) if isinstance(components, str) else components
    by_place = {each.place.name: each for each in standing}
    if components is None:
        chosen = [(name, latent) for name, each in by_place.items() for latent in range(each.dictionary.latents)]
    else:
        chosen = list(components.latents)
    if not chosen:
        named = f"components {str(components)!r} name no latent" if by_place else "there is no dictionary"
        raise SettingsError(f"{named}: latents are written resid6.f1024, and their dictionaries given with them (--dictionary)")
    found = []
    for name, latent in chosen:
        if name not in by_place:
            known = f"dictionaries stand at {', '.join(by_place)}" if by_place else "there is no dictionary"
            raise SettingsError(
                f"component {name}.f{latent} is a latent of a dictionary at {name}, and {known}: give its file (--dictionary)"
            )
        each = by_place[name]
        each.check([latent])
        found.append(LatentPlace(cast(EditSite, each.place.site), each.place.layer, feature=latent, standing=each))
    return tuple(found)


def chosen_places(anatomy: Anatomy, site: str, components: Components | str | None, standing: Sequence[Standing]) -> tuple[Place, ...]:
    """List the places of a site as `places` does, or latents of dictionaries for the site `latent`; latents and experts are for sites of their own.

    Raises:
        SettingsError: As of these two.
    """
    components = Components.parse(components) if isinstance(components, str) else components
    if site == LATENT:
        return latent_places(standing, components)
    if components is None or not len(components):
        return places(anatomy, site, components)
    own = components.without_latents if site_named(site) == "expert_output" else components.without_latents.without_experts
    if not len(own):
        raise SettingsError(
            f"components {str(components)!r} name nothing that has site {site!r}: single experts have site expert, latents site latent"
        )
    return places(anatomy, site, own)


def site_named(name: str) -> EditSite:
    """Return the site a person means.

    Raises:
        SettingsError: There is none of that name.
    """
    site = ALIASES.get(name, name)
    if site not in EDIT_SITES:
        raise SettingsError(f"site {name!r} is not known: use one of {', '.join(sorted({*ALIASES, *EDIT_SITES, LATENT}))}")
    return cast(EditSite, site)


def places(anatomy: Anatomy, site: str, components: Components | str | None = None) -> tuple[Place, ...]:
    """List a site's places, layer by layer.

    Args:
        anatomy: The model's parts.
        site: A site or its short name (`head`, `mlp`, …).
        components: Only these: heads and whole layers for sites with heads, MLPs and whole layers for `mlp_output` and `neuron`, these and single experts
            for `expert_output`, mixers and whole layers for `mixer_output`, whole layers for the others; None for all. Layers that do not attend have no
            site of attention.

    Raises:
        SettingsError: The site is not known, a component does not exist, or none of the components has such a site.
    """
    site = site_named(site)
    if isinstance(components, str):
        components = Components.parse(components)
    chosen = None if components is None else components.validate(anatomy, experts=site == "expert_output")
    if site == "expert_output" and all(block.experts is None for block in anatomy.blocks):
        raise SettingsError("the model has no experts: all its MLPs are dense; whole MLPs have site mlp")
    if site == "mixer_output" and not anatomy.mixing:
        raise SettingsError("all layers of the model attend: no mixers to change; what attention adds has site attention")
    listed = tuple(_places(anatomy, site, chosen))
    if not listed:
        raise SettingsError(
            f"components {str(chosen)!r} name nothing that has site {site!r}: heads are written a3.h5, MLPs m3, mixers mixer3, experts m3.e5, layers layers:2,3"
        )
    return listed


def _places(anatomy: Anatomy, site: EditSite, chosen: Components | None) -> Iterator[Place]:
    if site == "embedding":
        yield Place(site, 0)
        return
    whole = set(range(anatomy.n_layers)) if chosen is None else set(chosen.layers)
    if site in HEAD_SITES:
        heads = set() if chosen is None else set(chosen.heads)
        for layer, head in anatomy.heads():
            if layer in whole or (layer, head) in heads:
                yield Place(site, layer, head=head)
        return
    if chosen is not None and site in ("mlp_output", "neuron", "expert_output"):
        whole |= set(chosen.mlps)
    if site == "mixer_output":
        whole = (whole | (set() if chosen is None else set(chosen.mixers))) & set(anatomy.mixing)
    if site == "attention_output":
        whole &= set(anatomy.attending)
    if site == "expert_output":
        named = set() if chosen is None else set(chosen.experts)
        every = {(layer, index) for layer in whole if (own := anatomy.blocks[layer].experts) is not None for index in range(own.number)}
        yield from (Place(site, layer, feature=index) for layer, index in sorted(named | every))
        return
    for layer in sorted(whole):
        if site == "neuron":
            yield from (Place(site, layer, feature=index) for index in range(anatomy.blocks[layer].d_mlp))
        else:
            yield Place(site, layer)


def places_of(components: Components, anatomy: Anatomy, *, experts: bool = False) -> tuple[Place, ...]:
    """Return the places that stand for components: z of heads, what mixers, MLPs and (where these are of use) experts add.

    A whole layer is its heads, or its mixer, and its MLP.
    """
    each = components.validate(anatomy, experts=experts).expand(anatomy.n_heads, anatomy.mixing)
    return (
        *(Place("z", layer, head=head) for layer, head in each.heads),
        *(Place("mixer_output", layer) for layer in each.mixers),
        *(Place("expert_output", layer, feature=expert) for layer, expert in each.experts),
        *(Place("mlp_output", layer) for layer in each.mlps),
    )


def edits_of(changed: Iterable[Place], value: Callable[[str, int], Value] | Bound, positions: Tensor | None = None) -> list[Edit]:
    """Return the edits that change places together: one per site and layer, or dictionary, so that hundreds of heads or latents stay cheap.

    Latents change at the tokens that their dictionary is meant to read.
    """
    together: dict[tuple[EditSite, int], list[Place]] = {}
    latents: dict[Standing, list[int]] = {}
    for place in changed:
        if isinstance(place, LatentPlace):
            latents.setdefault(place.standing, []).append(place.latent)
        else:
            together.setdefault((place.site, place.layer), []).append(place)
    edits = []
    for (site, layer), members in together.items():
        heads = None if members[0].head is None else tuple(place.head for place in members if place.head is not None)
        features = None if members[0].feature is None else tuple(place.feature for place in members if place.feature is not None)
        if site == "expert_output" and features is not None:
            if not isinstance(value, Bound):
                raise SettingsError("experts take their values from a source: a text, zero, a mean")
            edits.append(Edit(site, layer, value.experts(layer, features), experts=features, positions=positions))
            continue
        edits.append(Edit(site, layer, value(site, layer), heads=heads, features=features, positions=positions))
    for standing, chosen in latents.items():
        if not isinstance(value, Bound):
            raise SettingsError("latents take their values from a source: a text, zero, a mean")
        read = value.reads(standing)
        where = read if positions is None else read & sent(positions, read.device)
        edits.append(standing.latents_edit(chosen, value.latents(standing, chosen), where))
    return edits
