"""Which tuned edges, put into the base model, carry the gain of fine-tuning.

The base model runs the clean texts; some edges carry what the tuned model writes there, the others what the base model writes:

    share(E) = (m(base with tuned E) − m(base)) / (m(tuned) − m(base))

0 is none of the gain, 1 all of it; a part that hinders is above 1 without or below 0 alone. Edges are ranked by attribution (`attribute_edges` with the tuned
model as the source): to first order what the metric gains by each, and, since the gain has a sign, those that raise it come first. On the texts that
ranked them the first edges carry more than on others, so they are best ranked on texts of their own (`scored_on`). Random sets of as many edges in
the same layers stand beside. Readers keep the base's weights: this is about what is written, path by path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from mechscope.choices import GradientMethod
from mechscope.circuits.attribution import attribute_edges
from mechscope.circuits.evaluation import evaluate
from mechscope.circuits.graph import Circuit
from mechscope.circuits.overlap import random_like
from mechscope.circuits.scores import Cost, EdgeScores
from mechscope.data.pairs import Pairs
from mechscope.data.scoring import check_fits
from mechscope.errors import SettingsError
from mechscope.instrument.execution import Execution
from mechscope.shapes import by_shape
from mechscope.stats.inference import rank_p
from mechscope.stats.shares import shares_of
from mechscope.subject import Pair


@dataclass(frozen=True)
class Gain:
    """What tuned edges carry.

    Attributes:
        table: One row per size and `kind` (`tuned`: chosen by attribution, `random`: mean of random sets): `fraction`, `edges`, `n` (texts), `random_sets`,
            `value` (mean metric of the base model with these tuned edges), `share` of the gain with `low`, `high` (over texts; for `random` the band over
            sets), `withheld` (why these are NaN), and of the tuned edges `p_random` and `p_less`: the share of sets, the chosen one counted, that carry at
            least as much, and at most as much.
        scores: What each tuned edge would change, to first order.
        base: Mean metric of the base model.
        tuned: Mean metric of the tuned model.
        cost: Passes that were made for the table.
        note: Why shares are NaN, or None.
    """

    table: pd.DataFrame
    scores: EdgeScores
    base: float
    tuned: float
    cost: Cost
    note: str | None

    __repr__ = by_shape


def tuned_edges(
    pair: Pair,
    texts: Pairs,
    *,
    fractions: Sequence[float],
    scored_on: Pairs | None = None,
    random: int = 40,
    metric: str = "logit-diff",
    method: GradientMethod = "eap",
    steps: int = 5,
    execution: Execution = Execution(),
) -> Gain:
    """Put tuned edges into the base model.

    Args:
        pair: The two models.
        texts: What both read (the clean texts); shares are measured on them.
        fractions: How many edges are tuned, as fractions of all.
        scored_on: Texts on which edges are ranked and which tell whether the metric should rise or fall. None: the same texts, and then shares of
            small sets are too large, by far where texts are few: edges come first that happen to fit these texts.
        random: Random sets per size; with fewer than 40 no rank among them can be below .025.
        metric: What fine-tuning changed: `logit-diff`, `probability` or `loss`.
        method: How edges are ranked: `eap` or `eap-ig-activations`.
        steps: Points of `eap-ig-activations`.
        execution: Tokens of a batch (512 by default), seed (of random sets), progress.

    Raises:
        MechscopeError: Texts, metric or method do not fit the models.
    """
    if metric == "kl":
        raise SettingsError("metric 'kl' compares with one model's own clean run, so it has no gain: use logit-diff, probability or loss")
    if not all(0 < fraction <= 1 for fraction in fractions):
        raise SettingsError(f"fractions {tuple(fractions)} of tuned edges: give shares above 0 and up to 1")
    ranked_on = texts if scored_on is None else scored_on
    for read in (texts, ranked_on):
        check_fits(pair.tuned, read)
    options: dict[str, Any] = {"metric": metric, "execution": replace(execution, tokens_per_batch=execution.tokens(512))}
    scores = attribute_edges(pair.base, ranked_on, method=method, steps=steps, source=pair.tuned, **options)
    whole = Circuit.full(scores.graph)

    def unchanged(read: Pairs) -> list[np.ndarray]:
        return [evaluate(subject, read, [whole], source="zero", **options).clean for subject in (pair.base, pair.tuned)]

    own, tuned = unchanged(texts)
    before, after = (own, tuned) if ranked_on is texts else unchanged(ranked_on)
    rises = bool(after.mean() >= before.mean())
    # a score is what the metric gains when the edge carries the tuned value: those that take it to the tuned model's come first
    towards = np.where(np.isnan(scores.mean), -np.inf, scores.mean if rises else -scores.mean)
    ranked = np.argsort(-towards, kind="stable")
    sets = []
    for fraction in fractions:
        edges = np.zeros(len(scores.graph), dtype=bool)
        edges[ranked[: max(1, round(fraction * len(edges)))]] = True
        sets.append(Circuit(scores.graph, edges))
    drawn = [random_like(chosen, number=random, seed=execution.seed + place) for place, chosen in enumerate(sets)]
    everything = [*sets, *(one for of_size in drawn for one in of_size)]
    evaluated = evaluate(pair.base, texts, [whole - one for one in everything], source=pair.tuned, **options)
    # an improvement is a lower loss, or more of what the other metrics count
    better = -1 if metric == "loss" else 1
    absent = f"fine-tuning did not {'lower' if better < 0 else 'raise'} the {metric} on these texts"
    share = shares_of(better * (evaluated.values - own), better * (tuned - own), absent=absent, positive=True)
    rows = []
    for place, (fraction, chosen) in enumerate(zip(fractions, sets, strict=True)):
        row = {"fraction": fraction, "edges": len(chosen), "n": len(texts), "random_sets": random}
        ends = {"share": share.value[place], "low": share.low[place], "high": share.high[place], "withheld": share.withheld[place]}
        these = slice(len(sets) + place * random, len(sets) + (place + 1) * random)
        more, less = rank_p(share.value[place], share.value[these])
        ranked_as = {"p_random": more, "p_less": less}
        rows.append({**row, "kind": "tuned", "value": evaluated.values[place].mean(), **ends, **ranked_as})
        if random:
            low, high = np.quantile(share.value[these], [0.025, 0.975])
            by_chance = {"value": evaluated.values[these].mean(), "share": share.value[these].mean(), "low": low, "high": high}
            rows.append({**row, "kind": "random", **by_chance, "withheld": share.withheld[place], "p_random": np.nan, "p_less": np.nan})
    return Gain(pd.DataFrame(rows), scores, float(own.mean()), float(tuned.mean()), evaluated.cost, share.note)
