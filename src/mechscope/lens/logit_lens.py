"""The logit lens: what the model would say if what stands at some place went to the unembedding at once.

Places are the residual stream after every block (nostalgebraist 2020, "interpreting GPT: the logit lens"), and what attention, each head or the MLP adds
to it (Geva et al. 2022; Dar et al. 2023). The final norm stands between, in one of two ways, and which one is part of the result:

    applied   the norm of the vector itself, as if it were the whole residual stream: gain, shift and bias included
    frozen    the scale (and centring) that the norm has at the end of the model at that position. For the residual stream with shift and bias; for parts
              without them and without a soft cap: these are the part's summands of the final logits, so for parts this is the honest one.

The residual stream after the last block reads as the model's own logits. With translators it is the tuned lens (`translators`), or at heads the
attention lens (`attention_lens`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechscope.choices import LensNorm
from mechscope.data.pairs import PairBatch, Pairs, PromptPair
from mechscope.data.scoring import check_fits, per_text
from mechscope.errors import SettingsError
from mechscope.instrument.execution import Execution
from mechscope.lens.places import LensPlace, SiteValues, places_of, real_rows
from mechscope.lens.projection import Projection
from mechscope.lens.reading import LensReading, TextReading
from mechscope.lens.token_stats import TokenStats
from mechscope.lens.translators import Translators
from mechscope.subject import Subject


def logit_lens(
    subject: Subject,
    texts: Pairs,
    *,
    sites: Sequence[str] = ("residual",),
    layers: Collection[int] | None = None,
    k: int = 5,
    norm: LensNorm = "applied",
    translators: Translators | None = None,
    statistics: bool = True,
    execution: Execution = Execution(),
) -> LensReading:
    """Read the clean text of each pair through the lens.

    What is held at once: a batch's residual streams of all layers, and a block of logits.

    Args:
        subject: The model.
        texts: The texts; the target at a position is the token after it, and after the last one the pair's first right answer.
        sites: Of `residual` (with the embedding as layer −1), `attention_output`, `mlp_output`, `head_output` (each head).
        layers: Which layers; None for all.
        k: How many of the likeliest tokens to keep.
        norm: The final norm `applied` to what is read, or `frozen`; see the module's text.
        translators: Trained maps from the places to the end of the residual stream; the norm is then applied.
        statistics: Also take the target's rank, entropy and KL(final ‖ lens); without them only the likeliest tokens and the target's probability.
        execution: Tokens of a batch (2,048 by default), progress.

    Raises:
        MechscopeError: A setting is not known, the texts do not fit the model, or the translators are another model's.
    """
    places = places_of(subject, sites, layers)
    if norm not in get_args(LensNorm):
        raise SettingsError(f"norm {norm!r} is not known: use {' or '.join(get_args(LensNorm))}")
    if translators is not None:
        if norm != "applied":
            raise SettingsError("translators lead to the end of the residual stream, where the norm is applied: leave norm='applied'")
        translators.check(subject, places)
    check_fits(subject, texts)
    lens = _Lens(subject, places, k=k, norm=norm, translators=translators, statistics=statistics)
    readings = per_text(texts, lens.of, execution, tokens=2048, label="lens")
    return LensReading(lens.places, tuple(readings), norm, subject.spelling)


class _Lens:
    """A model, what is read of it, and how."""

    def __init__(
        self, subject: Subject, places: tuple[LensPlace, ...], *, k: int, norm: LensNorm, translators: Translators | None, statistics: bool
    ) -> None:
        self.subject, self.places, self.k, self.norm = subject, places, k, norm
        self.translators, self.statistics = translators, statistics
        self.projection, self._site_values = Projection(subject), SiteValues(subject, places)

    @torch.no_grad()
    def of(self, batch: PairBatch) -> list[TextReading]:
        """Read a batch, padded anywhere."""
        targets = torch.cat([_targets(pair) for pair in batch.pairs])
        walk, streams = self._site_values.run(batch)
        last = real_rows(streams[-1], batch.real)
        scale = self.projection.scale(last) if self.norm == "frozen" else None
        final = self.projection.final(self.projection.applied(last)) if self.statistics else None
        stats: dict[LensPlace, TokenStats] = {}
        for place, values in self._site_values.values(walk, streams, batch.real):
            rows, part = self._rows(place, values, scale), scale is not None and place.site != "residual"
            stats[place] = self.projection.read(
                rows, targets, k=self.k, ranks=self.statistics, entropy=self.statistics, final=final, part=part
            )
        own = stats.get(LensPlace("residual", self.subject.anatomy.n_layers - 1))
        if final is not None and own is None:
            own = self.projection.read(final.rows, k=1)
        return _split(batch, targets, [stats[place] for place in self.places], None if final is None else own)

    def _rows(self, place: LensPlace, values: Float[Tensor, "rows d_model"], scale: Tensor | None) -> Float[Tensor, "rows d_model"]:
        """Return what the unembedding reads of a place."""
        if scale is not None:
            return self.projection.frozen(values, scale, part=place.site != "residual")
        return self.projection.applied(values if self.translators is None else self.translators.translated(place, values))


def _targets(pair: PromptPair) -> Int[Tensor, " token"]:
    return torch.tensor([*pair.clean[1:], pair.answers[0] if pair.answers else -1])


def _in_target(pair: PromptPair) -> Bool[np.ndarray, " token"]:
    """Mark the rows that predict the target span, or the answer where there is no span."""
    marked = np.zeros(len(pair.clean), dtype=bool)
    if pair.target is not None:
        marked[pair.target[0] - 1 : pair.target[1] - 1] = True
    elif pair.answers:
        marked[-1] = True
    return marked


def _split(batch: PairBatch, targets: Int[Tensor, " rows"], stats: Sequence[TokenStats], own: TokenStats | None) -> list[TextReading]:
    """Split the statistics of a batch's rows by text."""
    missing = torch.full(targets.shape, torch.nan)
    columns: dict[str, np.ndarray] = {
        "log_probability": _stacked([one.target_log_probability for one in stats], missing),
        "rank": _stacked([None if one.rank is None else one.rank.double().masked_fill(one.rank == 0, torch.nan) for one in stats], missing),
        "entropy": _stacked([one.entropy for one in stats], missing),
        "kl": _stacked([one.kl for one in stats], missing),
        "top": _stacked([one.top.int() for one in stats], missing),
        "top_log_probability": _stacked([one.top_log_probability for one in stats], missing),
    }
    likeliest = np.full(len(targets), -1) if own is None else own.top[:, 0].cpu().numpy()
    texts, start = [], 0
    for pair in batch.pairs:
        where = slice(start, start + len(pair.clean))
        start = where.stop
        own_columns = {name: values[:, where] for name, values in columns.items()}
        tokens = np.array(pair.clean)
        texts.append(TextReading(pair.id, tokens, targets[where].numpy(), _in_target(pair), likeliest[where], **own_columns))
    return texts


def _stacked(values: Sequence[Tensor | None], missing: Tensor) -> np.ndarray:
    return np.stack([(missing if value is None else value).cpu().numpy() for value in values])
