"""What a lens read: for every place, text and position the likeliest tokens, the next token's rank, entropy and KL, as arrays and as tables.

A number of a place is the mean over a text's rows first and over texts then, with an interval over texts. Two models' readings of the same texts are
compared text by text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from mechscope.errors import DataError, SettingsError
from mechscope.lens.places import LensPlace, places_table
from mechscope.shapes import by_shape
from mechscope.stats.inference import benjamini_hochberg, estimate, paired_difference
from mechscope.stats.skewness import ThirdMoments
from mechscope.subject.spelling import Spelling

Rows = Literal["all", "target"]
MEASURES = ("log_probability", "reciprocal_rank", "agreement", "entropy", "kl")
# what two models' readings are compared by
CHANGES = ("log_probability", "entropy", "kl")


@dataclass(frozen=True)
class TextReading:
    """One text under the lens; NaN where a number was not requested, or a row has no target.

    Attributes:
        id: The text's.
        tokens: ``(token)`` ids.
        targets: ``(token)``: the token after each; after the last one the first right answer where the pair names one, else −1.
        in_target: ``(token)``: rows that predict the pair's target span, or its answer where it has no span.
        final_top: ``(token)``: the model's own likeliest next token; −1 where it was not taken.
        log_probability: ``(place, token)``: of the target, nats.
        rank: ``(place, token)``: of the target, 1 for the likeliest token.
        entropy: ``(place, token)``, nats.
        kl: ``(place, token)``: KL(final ‖ lens), nats.
        top: ``(place, token, k)``: the likeliest tokens.
        top_log_probability: ``(place, token, k)``, nats.
    """

    id: str
    tokens: Int[np.ndarray, " token"]
    targets: Int[np.ndarray, " token"]
    in_target: Bool[np.ndarray, " token"]
    final_top: Int[np.ndarray, " token"]
    log_probability: Float[np.ndarray, "place token"]
    rank: Float[np.ndarray, "place token"]
    entropy: Float[np.ndarray, "place token"]
    kl: Float[np.ndarray, "place token"]
    top: Int[np.ndarray, "place token k"]
    top_log_probability: Float[np.ndarray, "place token k"]

    __repr__ = by_shape

    def means(self, rows: Rows) -> Float[np.ndarray, "place measure"]:
        """Return the means over rows of `MEASURES`; NaN where no row has a value.

        Raises:
            DataError: The text has no rows of that kind.
        """
        marked = np.ones(len(self.tokens), dtype=bool) if rows == "all" else self.in_target
        if not marked.any():
            raise DataError(f"text {self.id!r} has neither a target span nor answers: summarise rows='all', or give it one")
        agreement = np.where(self.final_top >= 0, self.top[:, :, 0] == self.final_top, np.nan)
        values = np.stack([self.log_probability, 1 / self.rank, agreement, self.entropy, self.kl], axis=-1)[:, marked]
        known = ~np.isnan(values)
        total = np.where(known, values, 0.0).sum(axis=1, dtype=np.float64)
        count = known.sum(axis=1)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)


@dataclass(frozen=True)
class LensReading:
    """What a lens read in a set of texts.

    Attributes:
        places: What was read, in the order of the arrays.
        texts: The texts, in the order they were given.
        norm: `applied` or `frozen`.
        spelling: The tokens as text.
    """

    places: tuple[LensPlace, ...]
    texts: tuple[TextReading, ...]
    norm: str
    spelling: Spelling

    __repr__ = by_shape

    def table(self) -> pd.DataFrame:
        """Return one row per text, place and position.

        Columns: `text`, `site`, `layer` (−1: embedding), `head` (−1: none), `component`, `position`, `token`, `target` (the next token; None at an end
        without answers), `rank`, `probability` (of the target), `entropy` and `kl` (nats), and the likeliest tokens `top_1` … with their
        probabilities `p_1` ….
        """
        return pd.concat([self._text_table(text) for text in self.texts], ignore_index=True)

    def _text_table(self, text: TextReading) -> pd.DataFrame:
        places, length = len(self.places), len(text.tokens)
        columns: dict[str, Any] = {"text": text.id}
        for name in ("site", "layer", "head", "component"):
            columns[name] = np.repeat([getattr(place, name) for place in self.places], length)
        columns["position"] = np.tile(np.arange(length), places)
        columns["token"] = np.tile(self._named(text.tokens), places)
        columns["target"] = np.tile(self._named(text.targets), places)
        columns |= {"rank": text.rank.ravel(), "probability": np.exp(text.log_probability).ravel()}
        columns |= {"entropy": text.entropy.ravel(), "kl": text.kl.ravel()}
        k = text.top.shape[2]
        columns |= {f"top_{at + 1}": self._named(text.top[:, :, at].ravel()) for at in range(k)}
        columns |= {f"p_{at + 1}": np.exp(text.top_log_probability[:, :, at]).ravel() for at in range(k)}
        return pd.DataFrame(columns)

    def _named(self, ids: Int[np.ndarray, " n"]) -> np.ndarray:
        """Return tokens' names; None for −1."""
        unique, places = np.unique(ids, return_inverse=True)
        names = [None if token < 0 else self.spelling.token(token) for token in unique.tolist()]
        return np.array(names, dtype=object)[places]

    def summary(self, *, rows: Rows = "all") -> pd.DataFrame:
        """Return one row per place: means over texts with 95 % intervals over texts.

        Columns: `site`, `layer`, `head`, `component`, `rows`, `n` (texts), and each of `log_probability` (of the target, nats), `reciprocal_rank` (of the
        target), `agreement` (share of positions whose likeliest token is the model's own), `entropy` and `kl` (nats), with `_se`, `_low`, `_high`.

        Args:
            rows: `all` positions, or those that predict the `target` span (without a span: the answer after the last token).

        Raises:
            SettingsError: There are no such rows.
            DataError: A text has no target.
        """
        moments = ThirdMoments((len(self.places), len(MEASURES)))
        moments.update_many(self._means(rows))
        stats = estimate(moments)
        columns: dict[str, Any] = {"rows": rows, "n": len(self.texts)}
        for at, name in enumerate(MEASURES):
            columns[name] = stats.mean[:, at]
            columns |= {f"{name}_se": stats.standard_error[:, at], f"{name}_low": stats.low[:, at], f"{name}_high": stats.high[:, at]}
        return pd.concat([places_table(self.places), pd.DataFrame(columns, index=range(len(self.places)))], axis=1)

    def _means(self, rows: Rows) -> Float[np.ndarray, "text place measure"]:
        if rows not in get_args(Rows):
            raise SettingsError(f"rows {rows!r} are not known: use {' or '.join(get_args(Rows))}")
        return np.stack([text.means(rows) for text in self.texts])


def compare_lenses(base: LensReading, tuned: LensReading, *, rows: Rows = "all") -> pd.DataFrame:
    """Compare two models' readings of the same texts, text by text.

    Args:
        base: The reading before fine-tuning.
        tuned: The reading after it, of the same texts and places.
        rows: `all` positions, or those that predict the `target` span (without a span: the answer after the last token).

    Returns:
        One row per place: `site`, `layer`, `head`, `component`, `rows`, `n` (texts), and for each of `log_probability`, `entropy` and `kl` (nats) the
        means `_base` and `_tuned`, their difference `_change` with `_change_se`, `_change_low`, `_change_high` (95 %), `_change_p` and
        `_change_q` (Benjamini–Hochberg over all places).

    Raises:
        DataError: The readings are not of the same texts.
        SettingsError: They are not of the same places or kind.
    """
    if base.places != tuned.places or base.norm != tuned.norm:
        raise SettingsError("the two readings are of different sites, layers or norms: read both with the same settings")
    before, after = ([(text.id, text.tokens.tolist()) for text in reading.texts] for reading in (base, tuned))
    if before != after:
        odd = next(
            (one[0] for one, other in zip(before, after, strict=False) if one != other), f"number {min(len(before), len(after)) + 1}"
        )
        raise DataError(f"the two readings differ in their texts (text {odd}): read the same texts, in the same order, with both models")
    one, two = base._means(rows), tuned._means(rows)
    change = paired_difference(two, one)
    columns: dict[str, Any] = {"rows": rows, "n": len(base.texts)}
    for name in CHANGES:
        at = MEASURES.index(name)
        columns |= {f"{name}_base": one[..., at].mean(0), f"{name}_tuned": two[..., at].mean(0), f"{name}_change": change.mean[:, at]}
        columns |= {f"{name}_change_se": change.standard_error[:, at], f"{name}_change_low": change.low[:, at]}
        columns |= {f"{name}_change_high": change.high[:, at], f"{name}_change_p": change.p[:, at]}
        columns[f"{name}_change_q"] = benjamini_hochberg(change.p[:, at])
    return pd.concat([places_table(base.places), pd.DataFrame(columns, index=range(len(base.places)))], axis=1)
