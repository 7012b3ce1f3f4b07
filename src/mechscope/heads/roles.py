"""Roles of heads and their scores, text by text, beside what chance gives on the same text.

A role is a number per head and text ("attention to the previous token") with its null: the number that a head without the role gets on that text. What is
above it is the excess. A head has a role if its mean excess is worth the name and more than the same heads reach when turned at random
(`mechscope.heads.turned`): of the heads that are given a role, 5 % are expected to be false. For a base and a tuned model the same texts are read by
both, so changes are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from mechscope.errors import DataError
from mechscope.heads.turned import false_share, reached
from mechscope.shapes import by_shape
from mechscope.stats.inference import Estimate, benjamini_hochberg, estimate, paired_difference
from mechscope.stats.skewness import ThirdMoments

# the share of false heads among those given a role
_FALSE_DISCOVERIES = 0.05
ALL_HEADS = "all"


@dataclass(frozen=True)
class Role:
    """A job that a head may have.

    Attributes:
        name: For example `previous-token`.
        definition: What is measured, on what, in one sentence.
        source: The paper it comes from.
        null: What a head without the role scores and how that is computed, in one sentence.
        least: The smallest mean excess over the null that is worth the name; None for a role that is measured and never ascribed.
        low: Least score there can be; None for one without a bound.
        high: Largest score there can be; None for one without a bound.
    """

    name: str
    definition: str
    source: str
    null: str
    least: float | None
    low: float | None = 0.0
    high: float | None = 1.0


@dataclass(frozen=True)
class RoleScores:
    """Every head's scores for one role.

    Attributes:
        role: The role.
        texts: Names of the probes: texts, or tokens where weights are looked at.
        score: ``(text, layer, head)``; NaN where a text says nothing.
        null: What chance gives on the same text, in the same shape.
        turned: ``(draw, layer, head)``: the mean excess of the same heads under each random turn; without, no head is given the role.
        layers: Which layers these are: those that attend; None for all, counted from zero.
    """

    role: Role
    texts: tuple[str, ...]
    score: Float[np.ndarray, "text layer head"]
    null: Float[np.ndarray, "text layer head"]
    turned: Float[np.ndarray, "draw layer head"] | None = None
    layers: tuple[int, ...] | None = None

    __repr__ = by_shape

    def __post_init__(self) -> None:
        if not self.score.shape == self.null.shape == (len(self.texts), *self.score.shape[1:]) or self.score.ndim != 3:
            raise DataError(
                f"role {self.role.name!r}: scores {self.score.shape} and nulls {self.null.shape} for {len(self.texts)} texts: "
                "give both as (text, layer, head)"
            )
        if self.layers is not None and len(self.layers) != self.score.shape[1]:
            raise DataError(f"role {self.role.name!r}: scores of {self.score.shape[1]} layers for layers {self.layers}: name each of them")
        if self.turned is not None and self.turned.shape[1:] != self.score.shape[1:]:
            raise DataError(
                f"role {self.role.name!r}: scores {self.score.shape} and turned heads {self.turned.shape}: give those as (draw, layer, head)"
            )

    @property
    def excess(self) -> Float[np.ndarray, "text layer head"]:
        """The score less its null."""
        return self.score - self.null


def roles_table(found: Sequence[RoleScores], *, model: str = "model") -> pd.DataFrame:
    """Tell which head has which role, with what confidence.

    Args:
        found: Scores, a role each.
        model: What to call the model.

    Returns:
        One row per role and head: `model`, `role`, `layer`, `head`, `component`, `n` (texts that say something), `score` with `low` and `high` (95 %
        interval over texts), `null`, `excess` (score − null) with `excess_low` and `excess_high`, `threshold` (the excess that heads of this model must
        exceed for the role: what turned heads reach, or the least that is worth the name), `q` (expected share of false ones among the model's
        heads with at least this excess, by heads turned at random) and `has_role` (q of .05 at most, an excess worth the name, its interval above
        zero). Threshold and q are NaN for roles that are never ascribed.
    """
    if not found:
        return pd.DataFrame(columns=["model", "role", *_HEAD, "n", *_SCORE, *_EXCESS, "threshold", "q", "has_role"])
    return pd.concat([_table(scores, model) for scores in found], ignore_index=True)


_HEAD = ("layer", "head", "component")
_SCORE = ("score", "low", "high", "null")
_EXCESS = ("excess", "excess_low", "excess_high")


def _table(scores: RoleScores, model: str) -> pd.DataFrame:
    excess = scores.excess
    silent = np.isnan(excess)  # of what is silent on either side, neither is averaged
    score, null, above = (_estimated(np.where(silent, np.nan, part)) for part in (scores.score, scores.null, excess))
    q, threshold = _chance(scores, above.mean)
    measured = (score.mean, score.low, score.high, null.mean, above.mean, above.low, above.high)
    columns = dict(zip((*_SCORE, *_EXCESS), measured, strict=True))
    # without an interval (one text) nothing is surely above zero
    columns |= {
        "threshold": np.full(q.shape, threshold),
        "q": q,
        "has_role": (above.mean >= threshold) & (q <= _FALSE_DISCOVERIES) & (above.low > 0),
    }
    return _rows({"model": model, "role": scores.role.name}, above.n, columns, scores.layers)


def _chance(scores: RoleScores, excess: Float[np.ndarray, "layer head"]) -> tuple[Float[np.ndarray, "layer head"], float]:
    """Return every head's q, and the excess above which heads have the role: NaN for a role that is never ascribed."""
    if scores.role.least is None or scores.turned is None:
        return np.full(excess.shape, np.nan), float("nan")
    q = false_share(excess, scores.turned)
    return q, max(scores.role.least, reached(scores.turned, int((q <= _FALSE_DISCOVERIES).sum()), _FALSE_DISCOVERIES))


def _rows(names: Mapping[str, str], n: np.ndarray, columns: Mapping[str, np.ndarray], layers: tuple[int, ...] | None) -> pd.DataFrame:
    layer, head = (index.ravel() for index in np.indices(n.shape))
    layer = layer if layers is None else np.array(layers)[layer]
    component = [f"a{one}.h{two}" for one, two in zip(layer, head, strict=True)]
    values = {name: value.ravel() for name, value in columns.items()}
    return pd.DataFrame({**names, "layer": layer, "head": head, "component": component, "n": n.ravel(), **values})


def _estimated(values: Float[np.ndarray, "text ..."]) -> Estimate:
    moments = ThirdMoments(values.shape[1:])
    moments.update_many(values)
    return estimate(moments)


def role_changes(base: Sequence[RoleScores], tuned: Sequence[RoleScores]) -> pd.DataFrame:
    """Tell how fine-tuning changed the heads' roles, paired over the same texts.

    Args:
        base: The base model's scores.
        tuned: The tuned model's, of the same roles on the same texts.

    Returns:
        One row per role and head: `role`, `layer`, `head`, `component`, `n`, `base` and `tuned` (mean scores), `change` (tuned − base) with `low` and
        `high` (95 % interval over texts), `p` (the change is zero), `q` (Benjamini–Hochberg over all heads of the role), `gained` and `lost`
        (whether only the tuned, or only the base model's head has the role, and its score surely rose, or fell: q < .05). After them one row per
        role with the component `all`, layer and head −1:
        each text's mean over heads, its q over the roles.

    Raises:
        DataError: The two have other roles, texts, or heads.
    """
    tables, wholes = [], []
    for one, two in _paired(base, tuned):
        changes = two.score - one.score
        silent = np.isnan(changes)
        before, after = (_estimated(np.where(silent, np.nan, scores.score)).mean for scores in (one, two))
        has_before, has_after = (_table(scores, "")["has_role"].to_numpy().reshape(before.shape) for scores in (one, two))
        columns = _change(before, after, paired_difference(two.score, one.score))
        q = benjamini_hochberg(columns["p"])
        # a head that stands at the threshold crosses it by next to nothing
        surely = np.where(q < _FALSE_DISCOVERIES, np.sign(columns["change"]), 0)
        columns |= {"q": q, "gained": has_after & ~has_before & (surely > 0), "lost": has_before & ~has_after & (surely < 0)}
        tables.append(_rows({"role": one.role.name}, (~silent).sum(0), columns, one.layers))
        wholes.append(_of_all_heads(one.role, *(_text_means(scores.score, silent) for scores in (one, two))))
    order = ["role", *_HEAD, "n", *_CHANGE, "q", "gained", "lost"]
    if not tables:
        return pd.DataFrame(columns=order)
    all_heads = pd.concat(wholes, ignore_index=True)
    all_heads["q"] = benjamini_hochberg(all_heads["p"])
    return pd.concat([*tables, all_heads], ignore_index=True)[order]


_CHANGE = ("base", "tuned", "change", "low", "high", "p")


def _change(before: np.ndarray, after: np.ndarray, change: Estimate) -> dict[str, np.ndarray]:
    return dict(zip(_CHANGE, (before, after, change.mean, change.low, change.high, change.p), strict=True))


def _paired(base: Sequence[RoleScores], tuned: Sequence[RoleScores]) -> list[tuple[RoleScores, RoleScores]]:
    names = [[scores.role.name for scores in side] for side in (base, tuned)]
    if names[0] != names[1]:
        raise DataError(f"base is scored for the roles {names[0]}, tuned for {names[1]}: score both for the same")
    for one, two in zip(base, tuned, strict=True):
        if one.texts != two.texts or one.score.shape != two.score.shape or one.layers != two.layers:
            raise DataError(
                f"role {one.role.name!r}: base has {one.score.shape} scores (text, layer, head), tuned {two.score.shape}, or of other texts: "
                "score both on the same texts"
            )
    return list(zip(base, tuned, strict=True))


def _text_means(score: np.ndarray, silent: np.ndarray) -> Float[np.ndarray, " text"]:
    """Average each text over the heads that it says something about; NaN where there is none."""
    counted = (~silent).sum((1, 2))
    return np.where(counted > 0, np.where(silent, 0.0, score).sum((1, 2)) / np.maximum(counted, 1), np.nan)


def _of_all_heads(role: Role, before: Float[np.ndarray, " text"], after: Float[np.ndarray, " text"]) -> pd.DataFrame:
    change = paired_difference(after, before)
    columns = _change(_estimated(before).mean, _estimated(after).mean, change)
    values = {name: float(value) for name, value in columns.items()}
    head = dict(zip(_HEAD, (-1, -1, ALL_HEADS), strict=True))
    return pd.DataFrame([{"role": role.name, **head, "n": int(change.n), **values, "gained": False, "lost": False}])
