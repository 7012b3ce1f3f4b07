"""What latents of a comparison carry of what fine-tuning did to the loss: put into the base, and taken out of the tuned model.

    1. both models read a text, and the dictionary reads both: f
    2. what a set S of latents says of the difference, at every place of the residual stream or of what is added to it
           c = Σ_{j∈S} f_j (D_tuned,j − D_base,j)            (of a dictionary of differences: Σ f_j D_j)
    3. the base runs with x_base + c in the place of x_base, and the tuned model with x_tuned − c: all that the dictionary misses stays as it is
    4. carried alone = loss(base) − loss(base + c);   lost without = loss(tuned − c) − loss(tuned);   both as shares of loss(base) − loss(tuned)

c is that of the undisturbed runs, and x at every place too, so that a latent that writes at several places is not counted again behind the first. Tokens that
the dictionary never reads (the first ones, outliers) are left alone. Beside a set stand as many other latents whose c is nearest in size, its own f
with random vectors as long as its own D_tuned − D_base, all latents together, the mean of x_tuned − x_base, which no latent has to say, and the whole of it:
the most that these places can carry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechscope.data.metrics import check_metric
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import PerText, Runs, metric_of
from mechscope.errors import ModelError, SettingsError
from mechscope.features.codes import Codes
from mechscope.features.dictionary import Dictionary
from mechscope.features.diffing.views import BASE, DIFFERENCE, TUNED, model_places
from mechscope.features.places import Place
from mechscope.features.rows import Reader, limits_at
from mechscope.instrument import CachedRun, Edit, Execution
from mechscope.settings.features import TokenSettings
from mechscope.shapes import by_shape
from mechscope.subject import Pair

# every set is a run more of the batch: as many tokens as runs hold that change nodes one by one
TOKENS_PER_BATCH = 1024


@dataclass(frozen=True)
class LatentSet:
    """Latents that are put in and taken out together.

    Attributes:
        latents: Which; None for all of the dictionary.
        instead: What is taken instead, whatever the dictionary's latents say: the `whole` of x_tuned − x_base, or its `mean` over the tokens of the
            training, everywhere the same.
        draw: Seed of random vectors in the place of the latents' own; None for their own.
    """

    latents: tuple[int, ...] | None = None
    instead: Literal["whole", "mean"] | None = None
    draw: int | None = None

    def __post_init__(self) -> None:
        if self.instead is not None and (self.latents is not None or self.draw is not None):
            raise SettingsError(f"a set that takes the {self.instead} difference instead of what latents say has no latents and no draw")


@dataclass(frozen=True)
class Carried:
    """Losses on the targets, in nats per token; one number per text.

    Attributes:
        base: ``(text)``: of the base.
        tuned: ``(text)``: of the tuned model.
        into_base: By set ``(text)``: of the base with the set put in.
        out_of_tuned: By set ``(text)``: of the tuned model with the set taken out.
        energy: By set: mean ‖c‖² per token.
    """

    base: Float[np.ndarray, " text"]
    tuned: Float[np.ndarray, " text"]
    into_base: Mapping[str, Float[np.ndarray, " text"]]
    out_of_tuned: Mapping[str, Float[np.ndarray, " text"]]
    energy: Mapping[str, float]

    __repr__ = by_shape


class Contribution:
    """What latents say of the difference of two models, in the models' units."""

    def __init__(self, dictionary: Dictionary) -> None:
        """Take a crosscoder of `base` and `tuned`, or an autoencoder of `difference`.

        Raises:
            ModelError: It is neither.
        """
        self.dictionary = dictionary
        models = {place.model for place in dictionary.layout.inputs}
        self.where = tuple(dict.fromkeys(replace(place, model="") for place in dictionary.layout.inputs))
        expected = [model_places(self.where, names) for names in ((BASE, TUNED), (DIFFERENCE,))]
        if dictionary.layout.inputs not in expected or dictionary.layout.outputs != dictionary.layout.inputs:
            raise ModelError(
                f"a dictionary that reads {', '.join(map(str, dictionary.layout.inputs))} is no comparison of base and tuned: give a crosscoder of "
                "base:PLACE,tuned:PLACE or an autoencoder of difference:PLACE"
            )
        if wrong := [place.name for place in self.where if place.site == "mlp_input"]:
            raise ModelError(f"{wrong[0]} is read by an MLP and written by no one: what latents carry is tested where models write")
        self._of_difference = models == {DIFFERENCE}

    def codes(self, streams: Mapping[Place, Float[Tensor, "token width"]]) -> Codes:
        """Return the latents of some tokens, of which both models' streams are given."""
        rows = {place: value.to(self.dictionary.device, self.dictionary.dtype) for place, value in streams.items()}
        if self._of_difference:
            rows = {replace(place, model=DIFFERENCE): _difference(rows, place) for place in self.where}
        return self.dictionary.encode([rows[place] for place in self.dictionary.layout.inputs])

    def directions(self, latents: Sequence[int], place: Place) -> Float[Tensor, "latent width"]:
        """Return what a value of one of some latents adds to the difference at a place."""
        return self._apart(place, lambda at: self.dictionary.directions(latents, at))

    def mean(self, place: Place) -> Float[Tensor, " width"]:
        """Return the mean difference at a place, over the tokens that the dictionary was trained on."""
        layout, maps = self.dictionary.layout, self.dictionary.output_maps
        return self._apart(place, lambda at: maps[layout.outputs.index(at)].centre.to(self.dictionary.device, self.dictionary.dtype))

    def _apart(self, place: Place, of: Callable[[Place], Tensor]) -> Tensor:
        """Return what is said of the difference, or of the tuned model less what is said of the base."""
        if self._of_difference:
            return of(replace(place, model=DIFFERENCE))
        return of(replace(place, model=TUNED)) - of(replace(place, model=BASE))


def _difference(streams: Mapping[Place, Tensor], place: Place) -> Tensor:
    return streams[replace(place, model=TUNED)] - streams[replace(place, model=BASE)]


def carried(
    pair: Pair,
    dictionary: Dictionary,
    texts: Pairs,
    sets: Mapping[str, LatentSet],
    *,
    tokens: TokenSettings | None = None,
    limits: Mapping[str, float] | None = None,
    execution: Execution = Execution(),
) -> Carried:
    """Put sets of latents into the base and take them out of the tuned model, and read the loss on the texts' targets.

    Args:
        pair: The two models.
        dictionary: A crosscoder of `base` and `tuned`, or an autoencoder of `difference`.
        texts: Texts with a target, such as a summary.
        sets: What is put in and taken out, by name.
        tokens: Which tokens are left alone.
        limits: Norms above which a token is left alone, by the names of the places, as training had them; None to find them here.
        execution: Tokens of a batch (1,024 by default), progress.

    Raises:
        MechscopeError: The dictionary or the texts do not fit, a latent does not exist, or an MLP's output is to be changed of a model in which it does
            not just add up to the residual stream.
    """
    contribution = Contribution(dictionary)
    if wrong := [latent for chosen in sets.values() for latent in chosen.latents or () if not 0 <= latent < dictionary.latents]:
        raise SettingsError(f"latent {wrong[0]} does not exist: the dictionary has {dictionary.latents:,}")
    models = {BASE: pair.base, TUNED: pair.tuned}
    reader = Reader(models, model_places(contribution.where, (BASE, TUNED)), tokens or TokenSettings())
    reader.check(texts)
    check_metric("loss", texts)
    if limits is None:
        reader.probe(texts, range(len(texts)), Execution(execution.tokens_per_batch))
    else:
        reader.limits = limits_at(reader.places, limits)
    gathered = PerText(texts)
    sites = {place.site for place in contribution.where}

    @torch.no_grad()
    def run(batch: PairBatch) -> dict[str, np.ndarray]:
        runs = {
            side: Runs(CachedRun(subject, batch.clean, batch.real, sites=sites), metric_of("loss", batch, None))
            for side, subject in models.items()
        }
        streams = {place: place.of(runs[place.model].base.recording) for place in reader.places}
        kept, _ = reader.kept(batch, streams)
        rows = {place: value[kept.to(value.device)] for place, value in streams.items()}
        codes = contribution.codes(rows)
        shifts = [{place: _shift(contribution, chosen, codes, rows, place) for place in contribution.where} for chosen in sets.values()]
        found = {"read": kept.sum(1).numpy(), "energy": np.array([_energy(shift, kept) for shift in shifts]).reshape(len(sets), len(kept))}
        for side, sign in ((BASE, 1), (TUNED, -1)):
            units = [
                [_edit(place, streams[replace(place, model=side)], sign * each, kept) for place, each in shift.items()] for shift in shifts
            ]
            found |= {side: runs[side].unchanged(), f"{side} changed": runs[side].of(units, progress=gathered.step)}
        return found

    gathered.run(run, execution, tokens=TOKENS_PER_BATCH, label="what latents carry", units=2 * len(sets))
    changed = {side: dict(zip(sets, gathered[f"{side} changed"], strict=True)) for side in models}
    energy = gathered["energy"].sum(1) / max(gathered["read"].sum(), 1)
    return Carried(gathered[BASE], gathered[TUNED], changed[BASE], changed[TUNED], dict(zip(sets, energy.tolist(), strict=True)))


def _shift(
    contribution: Contribution, chosen: LatentSet, codes: Codes, rows: Mapping[Place, Tensor], place: Place
) -> Float[Tensor, "token width"]:
    """Return c of the tokens that are read, at a place."""
    if chosen.instead == "whole":
        return _difference(rows, place)
    if chosen.instead == "mean":
        return contribution.mean(place).expand(codes.tokens, -1)
    latents = tuple(range(contribution.dictionary.latents)) if chosen.latents is None else chosen.latents
    directions = contribution.directions(latents, place)
    if chosen.draw is not None:
        seed = (chosen.draw * 1_000_003 + place.layer) * 1_000_003 + len(place.site)
        drawn = torch.randn(directions.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(directions)
        directions = drawn * (directions.norm(dim=1) / drawn.norm(dim=1))[:, None]
    if chosen.latents is None:
        return codes.decoded(directions.contiguous())
    return codes.columns(torch.tensor(latents, dtype=torch.int64, device=codes.latents.device)) @ directions


def _energy(shifts: Mapping[Place, Float[Tensor, "token width"]], kept: Bool[Tensor, "batch token"]) -> Float[np.ndarray, " batch"]:
    """Return the ‖c‖² of each text, over all its tokens that are read and all places."""
    squares = torch.zeros(kept.shape, dtype=torch.float64)
    squares[kept] = sum((shift.double().square().sum(1).cpu() for shift in shifts.values()), squares.new_zeros(int(kept.sum())))
    return squares.sum(1).numpy()


def _edit(
    place: Place, own: Float[Tensor, "batch token width"], shift: Float[Tensor, "token width"], kept: Bool[Tensor, "batch token"]
) -> Edit:
    def value(_: Tensor) -> Tensor:
        # not what arrives there: a place before it was changed too
        changed = own.clone()
        changed[kept.to(own.device)] += shift.to(own)
        return changed

    return place.edit(value, kept)


def contributed(dictionary: Dictionary, squares: Float[np.ndarray, " latent"]) -> Float[np.ndarray, " latent"]:
    """Return how large the c of each latent alone is: its mean f² times ‖D_tuned − D_base‖², over all places, in the models' units.

    Args:
        dictionary: A crosscoder of `base` and `tuned`, or an autoencoder of `difference`.
        squares: Mean f² per token.

    Raises:
        ModelError: It is neither.
    """
    contribution, latents = Contribution(dictionary), range(dictionary.latents)
    sizes = [contribution.directions(latents, place).double().square().sum(1).cpu().numpy() for place in contribution.where]
    energy: np.ndarray = squares * np.sum(sizes, axis=0)
    return energy


def alike(latents: Sequence[int], energy: Float[np.ndarray, " latent"], *, seed: int, among: int = 4) -> tuple[int, ...]:
    """Draw as many other latents that are as large: for each one of the nearest by the logarithm of its energy that are not taken yet.

    Args:
        latents: The latents.
        energy: Of every latent, such as that of its c (`contributed`); those of none are never drawn.
        seed: Of the draw.
        among: From how many of the nearest one is drawn.

    Returns:
        Other latents; fewer where there are no more.
    """
    random = np.random.default_rng(seed)
    free = np.setdiff1d(np.flatnonzero(energy > 0), np.asarray(latents, dtype=int))
    drawn = []
    for latent in random.permutation(np.asarray(latents, dtype=int)):
        if not len(free):
            break
        distance = np.abs(np.log(energy[free]) - np.log(max(float(energy[latent]), np.finfo(float).tiny)))
        one = random.choice(np.argsort(distance, kind="stable")[:among])
        drawn.append(int(free[one]))
        free = np.delete(free, one)
    return tuple(sorted(drawn))
