"""Heads that two models share: whether heads can be matched so that what a head does tells what its partner does.

A head's profile is how far it stands above chance in each role that is about where heads look in random text (`mechscope.heads.pattern_roles`), so
it needs no common vocabulary. Heads of layers at the same relative depth are matched on half of the texts by the assignment with the smallest distances
(Kuhn 1955), as the order of heads means nothing, and judged on the other half: how well profiles of partners correlate over heads, role by role. Partners are
chosen to be alike, so they are in any two models: chance is the same, matching included, where the other model's heads are dealt to its layers at random.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from mechscope.errors import DataError
from mechscope.heads.roles import RoleScores
from mechscope.stats.inference import benjamini_hochberg, rank_p


def same_heads(
    first: Sequence[RoleScores], second: Sequence[RoleScores], *, draws: int = 200, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Match the heads of two models by what they do.

    Args:
        first: A model's scores, role by role.
        second: The other model's, of the same roles.
        draws: How often the other model's heads are dealt at random, for chance.
        seed: Of the halves of the texts and of these.

    Returns:
        One row per role: `role`, `heads` (matched), `n` (texts judged on), `agreement` (correlation over heads), `chance` (its mean where the other model's
        heads are dealt to layers at random), `chance_high` (97.5 % quantile), `p` (share of these, this one counted, that agree at least as well) and `q`
        (Benjamini–Hochberg over roles); NaN where no head of a model differs from another. And one row per matched head: `component`, `layer`,
        `partner`, `partner_layer`, `role` (in which it stands highest above chance), `excess` and `partner_excess` (there, on the texts judged on).

    Raises:
        DataError: Roles differ, or there are fewer than two texts.
    """
    if [one.role.name for one in first] != [one.role.name for one in second]:
        raise DataError("the two models' heads were not scored for the same roles")
    number = min(len(one.texts) for one in (*first, *second))
    if number < 2:
        raise DataError(f"heads are matched on half of the texts and judged on the other half: {number} is too few, give at least 2")
    rng = np.random.default_rng(seed)
    halves = np.array_split(rng.permutation(number), 2)
    fit = [_profiles(scores, halves[0]) for scores in (first, second)]
    told = [_profiles(scores, halves[1]) for scores in (first, second)]
    scale = np.maximum(np.concatenate(fit).std(0), 1e-9)
    shapes = [scores[0].score.shape[1:] for scores in (first, second)]
    blocks = _blocks(*shapes)

    def matched(order: Int[np.ndarray, " head"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Match with the other model's heads in some order: whose partner is whose, and how well they agree."""
        mine, partners = _matched(fit[0] / scale, fit[1][order] / scale, blocks)
        return mine, order[partners], _agreement(told[0][mine], told[1][order[partners]])

    mine, partners, agreement = matched(np.arange(len(fit[1])))
    chance = np.stack([matched(rng.permutation(len(fit[1])))[2] for _ in range(draws)])
    roles = [one.role.name for one in first]
    summary = []
    for at, role in enumerate(roles):
        drawn = chance[:, at]
        known = not np.isnan(drawn).any() and not np.isnan(agreement[at])
        summary.append(
            {
                "role": role,
                "heads": len(mine),
                "n": len(halves[1]),
                "agreement": agreement[at],
                "chance": drawn.mean() if known else np.nan,
                "chance_high": np.quantile(drawn, 0.975) if known else np.nan,
                "p": rank_p(agreement[at], drawn)[0] if known else np.nan,
            }
        )
    best = fit[0][mine].argmax(1)
    names = [_names(scores[0], shape) for scores, shape in zip((first, second), shapes, strict=True)]
    matches = pd.DataFrame(
        {
            "component": [names[0][head][0] for head in mine],
            "layer": [names[0][head][1] for head in mine],
            "partner": [names[1][head][0] for head in partners],
            "partner_layer": [names[1][head][1] for head in partners],
            "role": [roles[role] for role in best],
            "excess": told[0][mine, best],
            "partner_excess": told[1][partners, best],
        }
    )
    table = pd.DataFrame(summary)
    table["q"] = benjamini_hochberg(table["p"])
    return table, matches


def _profiles(scores: Sequence[RoleScores], texts: Int[np.ndarray, " text"]) -> Float[np.ndarray, "head role"]:
    """Return how far every head stands above chance in each role, mean over some texts; heads layer by layer."""
    return np.stack([np.nanmean(one.excess[texts], axis=0).ravel() for one in scores], axis=1)


def _names(scores: RoleScores, shape: tuple[int, ...]) -> list[tuple[str, int]]:
    layers = scores.layers or tuple(range(shape[0]))
    return [(f"a{layer}.h{head}", layer) for layer in layers for head in range(shape[1])]


def _blocks(first: tuple[int, ...], second: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the sets of heads that may be partners: those of each layer, and of the other model's layer at the same relative depth."""
    mine, others = (np.arange(shape[0] * shape[1]).reshape(shape) for shape in (first, second))
    return [(heads, others[round(layer * (len(others) - 1) / max(1, len(mine) - 1))]) for layer, heads in enumerate(mine)]


def _matched(
    first: Float[np.ndarray, "head role"], second: Float[np.ndarray, "other role"], blocks: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return heads and their partners: of each layer as many as the smaller one has."""
    mine, partners = [], []
    for own, others in blocks:
        distance = np.linalg.norm(first[own][:, None] - second[others][None], axis=-1)
        rows, columns = linear_sum_assignment(distance)
        mine.append(own[rows])
        partners.append(others[columns])
    return np.concatenate(mine), np.concatenate(partners)


def _agreement(first: Float[np.ndarray, "head role"], second: Float[np.ndarray, "head role"]) -> Float[np.ndarray, " role"]:
    """Return the correlation over heads, role by role; NaN where either side does not vary."""
    x, y = first - first.mean(0), second - second.mean(0)
    own = np.sqrt((x**2).sum(0) * (y**2).sum(0))
    return np.divide((x * y).sum(0), own, out=np.full(len(own), np.nan), where=own > 0)
