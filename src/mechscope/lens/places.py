"""Where a lens looks: the residual stream after a block, or what attention, a head or an MLP adds to it; and what stands there in a text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechscope.choices import LensSite
from mechscope.data.pairs import PairBatch
from mechscope.errors import SettingsError
from mechscope.instrument import Walk, observed, record
from mechscope.instrument.wiring import Wiring
from mechscope.subject import Subject

SITES: tuple[str, ...] = get_args(LensSite)


@dataclass(frozen=True)
class LensPlace:
    """What is read.

    Attributes:
        site: `residual`, `attention_output`, `mixer_output` (of layers that do not attend), `mlp_output` or `head_output`.
        layer: The block; −1 for the embedding.
        head: −1 where there is none.
    """

    site: str
    layer: int
    head: int = -1

    @property
    def component(self) -> str:
        """Its name: `embed`, `resid3` (after block 3), `a3`, `a3.h5`, `mixer3`, `m3`."""
        if self.site == "residual":
            return "embed" if self.layer < 0 else f"resid{self.layer}"
        if self.site == "head_output":
            return f"a{self.layer}.h{self.head}"
        return f"{ {'attention_output': 'a', 'mixer_output': 'mixer'}.get(self.site, 'm') }{self.layer}"


def places_of(subject: Subject, sites: Sequence[str], layers: Collection[int] | None = None) -> tuple[LensPlace, ...]:
    """Return the places that sites have in a model, site by site.

    Args:
        subject: The model.
        sites: Some of `SITES`.
        layers: Which layers, −1 for the embedding; None for all.

    Raises:
        SettingsError: A site or layer does not exist, or nothing is left to read.
    """
    n_layers, n_heads = subject.anatomy.n_layers, subject.anatomy.n_heads
    for site in sites:
        if site not in SITES:
            raise SettingsError(f"the lens reads no site {site!r}: the sites are {', '.join(SITES)}")
    chosen = range(-1, n_layers) if layers is None else sorted(set(layers))
    for layer in chosen:
        if not -1 <= layer < n_layers:
            raise SettingsError(f"layer {layer} does not exist: the model has layers 0-{n_layers - 1}, and −1 is its embedding")
    places = []
    for site in sorted(set(sites), key=SITES.index):
        for layer in chosen:
            if layer in subject.anatomy.mixing and site in ("head_output", "attention_output"):
                continue  # it does not attend
            if site == "mixer_output" and layer not in subject.anatomy.mixing:
                continue
            if site == "head_output" and layer >= 0:
                places += [LensPlace(site, layer, head) for head in range(n_heads)]
            elif site == "residual" or layer >= 0:
                places.append(LensPlace(site, layer))
    if not places:
        raise SettingsError("the lens has nothing to read: give at least one site, and at least one layer that has it")
    return tuple(places)


def places_table(places: Sequence[LensPlace]) -> pd.DataFrame:
    """Return the columns `site`, `layer`, `head`, `component`."""
    return pd.DataFrame({name: [getattr(place, name) for place in places] for name in ("site", "layer", "head", "component")})


class SiteValues:
    """What stands at places while a batch runs: real tokens only, as rows.

    Residual streams of all layers are held for the batch, so that what is known at the end of the model (its final distribution, the scale of its
    final norm) can be put beside each of them; a layer is run again only for what it adds.

    Attributes:
        subject: The model.
        places: What is read.
    """

    def __init__(self, subject: Subject, places: Sequence[LensPlace]) -> None:
        """Find out how heads write, where heads are read.

        Raises:
            ModelError: Heads are read, and they write in a way that is not supported.
        """
        self.subject, self.places = subject, tuple(places)
        self._wiring = Wiring(subject) if any(place.site == "head_output" for place in places) else None

    @torch.no_grad()
    def run(self, batch: PairBatch) -> tuple[Walk, list[Float[Tensor, "batch token d_model"]]]:
        """Run the clean texts of a batch: the embedding, and the residual stream after each block."""
        with self.subject.active(), observed(self.subject):
            walk = Walk(self.subject, batch.clean, None if bool(batch.real.all()) else batch.real)
            streams = [walk.hidden]
            for layer in range(self.subject.anatomy.n_layers):
                streams.append(walk.step(layer, streams[-1]))
        return walk, streams

    @torch.no_grad()
    def values(
        self, walk: Walk, streams: Sequence[Tensor], real: Bool[Tensor, "batch token"]
    ) -> Iterator[tuple[LensPlace, Float[Tensor, "rows d_model"]]]:
        """Yield what stands at each place, layer by layer."""
        for layer in sorted({place.layer for place in self.places}):
            places = [place for place in self.places if place.layer == layer]
            sites: list[Any] = ["z" if place.site == "head_output" else place.site for place in places if place.site != "residual"]
            if sites:
                with self.subject.active(), record(self.subject, *dict.fromkeys(sites), layers=[layer]) as written:
                    walk.step(layer, streams[layer])
            for place in places:
                if place.site == "residual":
                    yield place, real_rows(streams[layer + 1], real)
                elif place.site == "head_output" and self._wiring is not None:
                    yield place, _head(self._wiring, place, real_rows(written["z", layer], real))
                else:
                    yield place, real_rows(written[place.site, layer], real)


def real_rows(values: Float[Tensor, "batch token ..."], real: Bool[Tensor, "batch token"]) -> Float[Tensor, "rows ..."]:
    """Return the values of real tokens, text after text."""
    return values[real.to(values.device)]


def _head(wiring: Wiring, place: LensPlace, z: Float[Tensor, "rows head d_head"]) -> Float[Tensor, "rows d_model"]:
    """Return what a head adds to the residual stream, without the projection's bias, which is no head's."""
    weight, scale = wiring.writer(place.layer)[0], wiring.written_scale(place.layer, z)
    values = z[:, place.head] if scale is None else z[:, place.head] * scale[:, 0]
    return values @ weight[place.head]
