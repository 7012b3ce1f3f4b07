"""Logit spectroscopy: how much of what a model keeps in its residual stream its unembedding can see.

The right singular vectors of the unembedding are an orthonormal basis of the residual stream, ordered by how strongly logits answer to each; cut into
bands, they split any vector into a bright part that moves logits and a dark one that does not and still carries what later blocks read, attention
sinks above all (Cancedda 2024, "Spectral Filters, Dark Signals, and Attention Sinks", §3). The final norm's gain and centring are part of the map.
The basis comes from the eigenvectors of the d_model × d_model Gram matrix in float64; no decomposition of the whole unembedding is made. Singular
values below about 1e-8 of the largest are rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import PerText, check_fits
from mechscope.errors import SettingsError
from mechscope.instrument import observed
from mechscope.instrument.execution import Execution
from mechscope.instrument.kernels import statistics_dtype
from mechscope.instrument.readout import Readout
from mechscope.instrument.walk import next_token_losses
from mechscope.lens.places import LensPlace, SiteValues, places_of, places_table
from mechscope.lens.reading import Rows
from mechscope.shapes import by_shape
from mechscope.stats.inference import benjamini_hochberg, estimate, paired_difference
from mechscope.stats.skewness import ThirdMoments
from mechscope.subject import Subject

# words whose directions are held at once
_WORDS = 4096


@dataclass(frozen=True)
class Bands:
    """The residual stream's directions by how much the unembedding amplifies them, cut into bands; band 0 is the brightest.

    Attributes:
        vectors: ``(d_model, d_model)``: right singular vectors as columns, float64.
        singular_values: ``(d_model)``: falling.
        edges: Band b holds the vectors from ``edges[b]`` up to ``edges[b + 1]``.
    """

    vectors: Float[Tensor, "d_model d_model"]
    singular_values: Float[Tensor, " d_model"]
    edges: tuple[int, ...]

    __repr__ = by_shape

    @property
    def n(self) -> int:
        """Number of bands."""
        return len(self.edges) - 1

    def shares(self, values: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows band"]:
        """Return each band's share of the squared norm, which sum to 1; NaN for a zero vector."""
        squares = (values.to(self.vectors) @ self.vectors).square()
        parts = torch.stack([squares[..., start:end].sum(-1) for start, end in pairwise(self.edges)], dim=-1)
        return parts / parts.sum(-1, keepdim=True)

    def filtered(self, values: Float[Tensor, "*rows d_model"], suppressed: Collection[int]) -> Float[Tensor, "*rows d_model"]:
        """Return vectors without their parts in some bands.

        Raises:
            SettingsError: A band does not exist.
        """
        for band in suppressed:
            if not 0 <= band < self.n:
                raise SettingsError(f"band {band} does not exist: there are bands 0-{self.n - 1}, the brightest first")
        columns = [at for band in sorted(set(suppressed)) for at in range(self.edges[band], self.edges[band + 1])]
        taken = self.vectors[:, columns].to(values.device, statistics_dtype(values.dtype))
        wide = values.to(taken.dtype)
        return (wide - (wide @ taken) @ taken.T).to(values.dtype)


@torch.no_grad()
def bands(subject: Subject, *, n: int = 20) -> Bands:
    """Cut the residual stream into bands of equal width by the unembedding's singular values.

    Args:
        subject: The model.
        n: How many; where they do not divide d_model, widths differ by one.

    Raises:
        SettingsError: There are fewer directions than bands.
        ModelError: The readout is none that is known here.
    """
    width = subject.anatomy.d_model
    if not 1 <= n <= width:
        raise SettingsError(f"n={n} bands of {width} directions: ask for 1 to {width}")
    readout = Readout.of(subject)
    gram = torch.zeros(width, width, dtype=torch.float64, device=readout.weight.device)
    for words in torch.arange(len(readout.weight)).split(_WORDS):
        directions = readout.directions(words).double()
        gram += directions.T @ directions
    values, vectors = torch.linalg.eigh(gram)
    edges = tuple(round(at * width / n) for at in range(n + 1))
    return Bands(vectors.flip(-1), values.flip(-1).clamp(min=0).sqrt(), edges)


@torch.no_grad()
def logit_spectrum(
    subject: Subject,
    texts: Pairs,
    *,
    using: Bands | None = None,
    sites: Sequence[str] = ("residual",),
    layers: Collection[int] | None = None,
    execution: Execution = Execution(),
) -> pd.DataFrame:
    """Measure how what stands at places spreads over the bands.

    Args:
        subject: The model.
        texts: The texts; their clean versions are read.
        using: The bands, for example the base model's; by default 20 of the model itself.
        sites: Of `residual` (with the embedding as layer −1), `attention_output`, `mlp_output`, `head_output` (each head).
        layers: Which layers; None for all.
        execution: Tokens of a batch (2,048 by default), progress.

    Returns:
        One row per place and band: `site`, `layer`, `head`, `component`, `band` (0 is the brightest), `singular_high` and `singular_low` (its largest
        and smallest singular value), `share_of_directions` (what a vector in a random direction would have), `n` (texts) and `share_of_norm` (of the
        squared norm; mean over texts of means over tokens) with `_se`, `_low`, `_high` (95 %).

    Raises:
        MechscopeError: A setting is not known, or the texts do not fit the model.
    """
    places = places_of(subject, sites, layers)
    check_fits(subject, texts)
    using = _fitting(subject, using)
    site_values, gathered = SiteValues(subject, places), PerText(texts)

    def shares(batch: PairBatch) -> dict[str, np.ndarray]:
        walk, streams = site_values.run(batch)
        by_place = {}
        for place, values in site_values.values(walk, streams, batch.real):
            of_texts = using.shares(values).split([len(pair.clean) for pair in batch.pairs])
            by_place[place.component] = torch.stack([rows.nanmean(0) for rows in of_texts], dim=-1).cpu().numpy()
        return by_place

    gathered.run(shares, execution, tokens=2048, label="spectroscopy")
    return pd.concat([_spectrum_table(place, gathered[place.component].T, using) for place in places], ignore_index=True)


@torch.no_grad()
def suppress_bands(
    subject: Subject,
    texts: Pairs,
    suppressed: Collection[int],
    *,
    using: Bands | None = None,
    layers: Collection[int] | None = None,
    rows: Rows = "all",
    execution: Execution = Execution(),
) -> pd.DataFrame:
    """Measure what the model loses when bands are taken out of its residual stream, at one layer at a time and at every token.

    Args:
        subject: The model.
        texts: The texts; their clean versions are run.
        suppressed: The bands, taken out together.
        using: What the bands are; by default 20 of the model itself.
        layers: After which blocks, −1 for the embedding; None for all, each by itself.
        rows: Loss of `all` next tokens, or of those in the pairs' `target` spans.
        execution: Tokens of a batch (2,048 by default), progress.

    Returns:
        One row per layer: `site`, `layer`, `head`, `component`, `rows`, `n` (texts), `loss` and `loss_suppressed` (nats per token, means over texts), and
        `loss_change` with `_se`, `_low`, `_high` (95 %), `_p` and `_q` (Benjamini–Hochberg over layers).

    Raises:
        MechscopeError: A band or layer does not exist, or the texts do not fit the model.
    """
    places = places_of(subject, ("residual",), layers)
    check_fits(subject, texts)
    using = _fitting(subject, using)
    site_values, gathered = SiteValues(subject, places), PerText(texts)

    def losses(batch: PairBatch) -> dict[str, np.ndarray]:
        marked = _predicting(batch, rows)
        walk, streams = site_values.run(batch)
        by_place = {"loss": _losses(subject, streams[-1], batch, marked)}
        for place in places:
            with subject.active(), observed(subject):
                hidden = walk.run(using.filtered(streams[place.layer + 1], suppressed), start=place.layer + 1)
            by_place[place.component] = _losses(subject, hidden, batch, marked)
        return by_place

    gathered.run(losses, execution, tokens=2048, label="spectroscopy")
    return _suppression_table(places, gathered, rows)


def _fitting(subject: Subject, using: Bands | None) -> Bands:
    if using is None:
        return bands(subject)
    if len(using.vectors) != subject.anatomy.d_model:
        raise SettingsError(
            f"the bands are of {len(using.vectors)} directions, {subject.source!r} has {subject.anatomy.d_model}: use bands of this model"
        )
    return using


def _spectrum_table(place: LensPlace, shares: Float[np.ndarray, "text band"], using: Bands) -> pd.DataFrame:
    moments = ThirdMoments((using.n,))
    moments.update_many(shares)
    estimates, edges, values = estimate(moments), np.array(using.edges), using.singular_values.cpu().numpy()
    columns = {"band": range(using.n), "singular_high": values[edges[:-1]], "singular_low": values[edges[1:] - 1]}
    columns |= {"share_of_directions": np.diff(edges) / edges[-1], "n": estimates.n}
    columns |= {"share_of_norm": estimates.mean, "share_of_norm_se": estimates.standard_error}
    columns |= {"share_of_norm_low": estimates.low, "share_of_norm_high": estimates.high}
    where = pd.concat([places_table([place])] * using.n, ignore_index=True)
    return pd.concat([where, pd.DataFrame(columns)], axis=1)


def _predicting(batch: PairBatch, rows: Rows) -> Tensor:
    """Mark the positions whose next token's loss counts."""
    if rows not in get_args(Rows):
        raise SettingsError(f"rows {rows!r} are not known: use {' or '.join(get_args(Rows))}")
    wanted = batch.positions(rows)
    marked = torch.zeros_like(wanted)
    marked[:, :-1] = wanted[:, 1:] & batch.real[:, :-1]  # a text's first token is predicted by nothing
    return marked


def _losses(subject: Subject, hidden: Tensor, batch: PairBatch, marked: Tensor) -> np.ndarray:
    """Return each text's mean loss over the marked positions, NaN where there are none."""
    losses = next_token_losses(subject, hidden[marked.to(hidden.device)], batch.clean.roll(-1, 1)[marked])
    return np.array([float(one.double().mean()) for one in losses.split(marked.sum(1).tolist())])


def _suppression_table(places: Sequence[LensPlace], gathered: PerText, rows: Rows) -> pd.DataFrame:
    plain, changed = gathered["loss"], np.stack([gathered[place.component] for place in places], axis=1)
    change = paired_difference(changed, np.broadcast_to(plain[:, None], changed.shape))
    columns = {"rows": rows, "n": change.n, "loss": np.nanmean(plain), "loss_suppressed": np.nanmean(changed, axis=0)}
    columns |= {"loss_change": change.mean, "loss_change_se": change.standard_error, "loss_change_low": change.low}
    columns |= {"loss_change_high": change.high, "loss_change_p": change.p, "loss_change_q": benjamini_hochberg(change.p)}
    return pd.concat([places_table(places), pd.DataFrame(columns)], axis=1)
