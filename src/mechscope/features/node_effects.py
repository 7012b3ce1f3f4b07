"""What every latent and every error would do to a metric if it took another value: estimated from gradients, or by exact patching (Marks et al. 2024, §3.1).

    attribution            Σ_t ∂m/∂f_t · (f'_t − f_t)                       the gradient of the run as it is
    integrated gradients   the same with the gradient's mean on the way     from x to x', one place at a time, everything behind it run again

f' is the value in the corrupt run, or zero for single texts. Of an error the product runs over its coordinates, so it is one number. The sum over the nodes of
a place is by integrated gradients the effect of replacing the place as a whole. Means are taken at the points of a quadrature, Gauss and Legendre's or the
middles of equal steps: a left Riemann sum misses the whole by O(1/points).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy import sparse
from torch import Tensor

from mechscope.choices import NodeMethod, NodeSource, Quadrature
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import Runs, check_fits, metric_of, per_text
from mechscope.errors import SettingsError
from mechscope.features.codes import Codes
from mechscope.features.cut import Cuttable, counted
from mechscope.features.places import Place
from mechscope.features.standing import Node, Standing, Stream
from mechscope.instrument import CachedRun, Execution
from mechscope.shapes import by_shape
from mechscope.stats.inference import benjamini_hochberg, estimate
from mechscope.stats.skewness import ThirdMoments
from mechscope.subject import Subject

TOKENS_PER_BATCH = 1024
# columns of texts × latents that are dense at once
_AT_ONCE = 4096


@dataclass(frozen=True)
class Moved:
    """What stands at a place in the run as it is, and what nodes become.

    Attributes:
        x: ``(batch, token, width)`` as it is.
        other: The same with every node that counts replaced; equal to x at other tokens.
        codes: Active latents of x, and those of what they become, at tokens that count.
        error: ε' − ε ``(batch, token, width)``; zero at other tokens.
    """

    x: Stream
    other: Stream
    codes: tuple[Codes, Codes]
    error: Stream

    __repr__ = by_shape

    def change(self, latents: Sequence[int]) -> Float[Tensor, "batch token chosen"]:
        """Return f' − f of some latents."""
        at = torch.tensor(latents, dtype=torch.int64, device=self.x.device)
        before, after = (codes.columns(at) for codes in self.codes)
        return (after - before).unflatten(0, self.x.shape[:2])


@dataclass(frozen=True)
class NodeEffects:
    """Effects of nodes on a metric, text by text.

    Attributes:
        latents: By place: texts × latents, sparse; no entry where a latent is active neither as it is nor in what it becomes.
        errors: By place: ``(text)``.
        unchanged: ``(text)``: the metric of the run as it is.
        metric: Its name.
    """

    latents: Mapping[Place, sparse.csr_array]
    errors: Mapping[Place, Float[np.ndarray, " text"]]
    unchanged: Float[np.ndarray, " text"]
    metric: str

    __repr__ = by_shape

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per node that is active on any text.

        Columns: `component`, `place`, `latent` (−1 for an error), `metric`, `n` (texts), `effect` (mean over texts), `se`, `low`, `high` (95 %), `p`, `q`
        (Benjamini–Hochberg over the table).
        """
        parts = []
        for place, matrix in self.latents.items():
            active = np.unique(matrix.indices)
            for start in range(0, len(active), _AT_ONCE):
                own = active[start : start + _AT_ONCE]
                parts.append(_rows(place, own, matrix[:, own].toarray()))
            parts.append(_rows(place, np.array([-1]), self.errors[place][:, None]))
        table = pd.concat(parts, ignore_index=True)
        table["q"] = benjamini_hochberg(table["p"].to_numpy())
        table.insert(3, "metric", self.metric)
        return table

    def largest(self, threshold: float, most: int) -> list[Node]:
        """Return the nodes whose mean effect is as large as a threshold, largest first; so many at most."""
        size = self.table["effect"].abs().to_numpy()
        order = np.argsort(-size, kind="stable")[:most]
        return [
            Node(Place.parse(self.table["place"].iloc[at]), int(latent) if (latent := self.table["latent"].iloc[at]) >= 0 else None)
            for at in order
            if size[at] >= threshold and size[at] > 0
        ]


def _rows(place: Place, latents: np.ndarray, values: Float[np.ndarray, "text latent"]) -> pd.DataFrame:
    moments = ThirdMoments(values.shape[1:])
    moments.update_many(values)
    found = estimate(moments)
    names = [Node(place, int(latent) if latent >= 0 else None).name for latent in latents]
    about = {"component": names, "place": place.name, "latent": latents.astype(int), "n": found.n.astype(int)}
    return pd.DataFrame({**about, "effect": found.mean, "se": found.standard_error, "low": found.low, "high": found.high, "p": found.p})


def node_effects(
    subject: Subject,
    standing: Sequence[Standing],
    pairs: Pairs,
    *,
    method: NodeMethod = "integrated-gradients",
    points: int = 10,
    quadrature: Quadrature = "gauss",
    source: NodeSource = "corrupt",
    metric: str = "logit-diff",
    execution: Execution = Execution(),
) -> NodeEffects:
    """Estimate what each latent and each error would do to the clean run's metric if it took another value.

    Args:
        subject: The model.
        standing: The autoencoders, in the order of the run (`in_order`).
        pairs: The texts; clean ones are run, corrupt ones where they are the source.
        method: `attribution` or `integrated-gradients`.
        points: Points of integrated gradients.
        quadrature: Where they lie: `gauss` or `midpoint`.
        source: What a node becomes: its value on the `corrupt` text, or `zero`.
        metric: `logit-diff`, `probability` or `loss`; `kl` has no gradient in the clean run.
        execution: Tokens of a batch (1,024 by default), progress.

    Raises:
        MechscopeError: Texts or metric do not fit the model or each other.
    """
    check_options(method, points, source, metric)
    check_fits(subject, pairs)
    weights = quadrature_of(quadrature, points)

    def effects(batch: PairBatch) -> list[tuple[dict[Place, tuple[np.ndarray, np.ndarray, float]], float]]:
        prepared, moved, real = prepare(subject, standing, batch, source=source, metric=metric)
        gradients = gradients_of(prepared, standing, moved, method, weights)
        unchanged = Runs(prepared.run, prepared.metric).unchanged()
        by_place = {each.place: _by_text(each, moved[each.place], gradients[each.place], real) for each in standing}
        return [({place: rows[text] for place, rows in by_place.items()}, float(unchanged[text])) for text in range(len(batch))]

    found = per_text(pairs, effects, execution, tokens=TOKENS_PER_BATCH, label="effects of latents")
    latents, errors = {}, {}
    for each in standing:
        rows = [by_place[each.place] for by_place, _ in found]
        ends = np.concatenate([[0], np.cumsum([len(own) for own, _, _ in rows])])
        entries = np.concatenate([values for _, values, _ in rows]), np.concatenate([own for own, _, _ in rows]), ends
        latents[each.place] = sparse.csr_array(entries, shape=(len(rows), each.dictionary.latents))
        errors[each.place] = np.array([error for _, _, error in rows])
    return NodeEffects(latents, errors, np.array([unchanged for _, unchanged in found]), metric)


def check_options(method: str, points: int, source: str, metric: str) -> None:
    """Refuse options that do not fit; `SettingsError`."""
    if method not in get_args(NodeMethod) or source not in get_args(NodeSource):
        raise SettingsError(
            f"method {method!r} with source {source!r} is not known: methods are {', '.join(get_args(NodeMethod))}, sources {', '.join(get_args(NodeSource))}"
        )
    if points < 1:
        raise SettingsError(f"integrated gradients at {points} points: at least one is needed")
    if metric == "kl":
        raise SettingsError("metric 'kl' has no gradient in the clean run, where it is smallest: use logit-diff, probability or loss")


def quadrature_of(name: Quadrature, points: int) -> list[tuple[float, float]]:
    """Return places between 0 and 1 with their weights, which add up to 1."""
    if name == "midpoint":
        return [((at + 0.5) / points, 1 / points) for at in range(points)]
    if name != "gauss":
        raise SettingsError(f"quadrature {name!r} is not known: use gauss or midpoint")
    places, weights = np.polynomial.legendre.leggauss(points)
    return [((1 + float(at)) / 2, float(weight) / 2) for at, weight in zip(places, weights, strict=True)]


@torch.no_grad()
def prepare(
    subject: Subject, standing: Sequence[Standing], batch: PairBatch, *, source: str, metric: str
) -> tuple[Cuttable, dict[Place, Moved], Bool[Tensor, "batch token"]]:
    """Run a batch as it is and see what its nodes become; returned are the run, both values by place, and the tokens that count."""
    sites = {each.place.site for each in standing}
    run = CachedRun(subject, batch.clean, batch.real, sites=sites)
    prepared = Cuttable(run, metric_of(metric, batch, run))
    corrupt = CachedRun(subject, batch.corrupt, batch.real, sites=sites) if source == "corrupt" else None
    x, other = ({each.place: each.read(given.recording) for each in standing} if given is not None else {} for given in (run, corrupt))
    real = counted(batch.real, standing, *((x, other) if other else (x,)))
    return prepared, {each.place: _moved(each, x[each.place], other.get(each.place), real) for each in standing}, real


def _moved(each: Standing, x: Stream, corrupt: Stream | None, real: Tensor) -> Moved:
    here = real[..., None]
    # padding may hold anything
    x_real = torch.where(here, x, 0.0)
    codes = each.codes(x_real).at(real.flatten())
    if corrupt is None:
        other, empty = each.nothing.expand_as(x), codes.latents[:0]
        then = Codes(empty, codes.values[:0], torch.zeros_like(codes.offsets), codes.width)
        error = -each.error(x_real, codes)
    else:
        other = torch.where(here, corrupt, 0.0)
        then = each.codes(other).at(real.flatten())
        error = each.error(other, then) - each.error(x_real, codes)
    return Moved(x, torch.where(here, other, x), (codes, then), torch.where(here, error, 0.0))


def gradients_of(
    prepared: Cuttable, standing: Sequence[Standing], moved: Mapping[Place, Moved], method: str, weights: Sequence[tuple[float, float]]
) -> dict[Place, Stream]:
    """Return the derivative of the metric by what stands at each place: as it is, or its mean on the way to what it becomes."""
    if method == "attribution":
        return {place: gradient.to(moved[place].x) for place, gradient in prepared.cut(standing).total().items()}
    found = {}
    for each in standing:
        own, total = moved[each.place], torch.zeros_like(moved[each.place].x)
        for at, weight in weights:
            cut = prepared.cut((each,), {each.place: own.x + at * (own.other - own.x)})
            total += weight * cut.back(None, None, (each.place,))[each.place].to(total)
        found[each.place] = total
    return found


def _by_text(each: Standing, moved: Moved, gradient: Stream, real: Tensor) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Return for every text: latents, their effects, and the error's."""
    gradient = torch.where(real[..., None], gradient, 0.0).to(each.decoders)
    errors = (gradient.double() * moved.error.double()).sum((1, 2)).tolist()
    before, after = moved.codes
    effects = each.attributions([(-1.0, before), (1.0, after)], gradient).by_text()
    return [(*own, error) for own, error in zip(effects, errors, strict=True)]
