"""Do the layers and heads that changed most matter? A study's interventions, and how their answers compare with the differences.

1. Cross-model patching: which layers and heads carry the gain of fine-tuning alone, and without which is it lost? (tables `cross_model`)
2. Ablation of the selected heads in the tuned model, beside random head sets with the same layer profile (table `ablation`).
3. Rank correlation of "how much it changed" with "how much it carries" (table `importance`).
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations, pairwise, product
from math import comb

import numpy as np
import pandas as pd

from mechscope.causal import Effects, ablate_together, cross_patch, mean_of, random_like
from mechscope.causal.places import places_of
from mechscope.choices import AblationSource
from mechscope.data.pairs import Pairs
from mechscope.errors import SettingsError
from mechscope.instrument import Execution
from mechscope.stats.inference import paired_difference, rank_correlation, rank_p
from mechscope.stats.shares import share_of, shares_of
from mechscope.studies.selection import Chosen
from mechscope.subject import Components, Pair, Subject

log = logging.getLogger(__name__)

# sets like the selected one, to compare with: all of them where there are no more
_LAYER_SETS = 40
_NO_GAIN = "fine-tuning did not lower the loss on these summaries"
# tokens of a batch where no number is given
_TOKENS = 4096


def measure_importance(
    pair: Pair,
    texts: Pairs,
    chosen: Chosen,
    changed: Mapping[str, pd.DataFrame],
    *,
    rows: str,
    source: AblationSource,
    random_sets: int,
    execution: Execution,
) -> dict[str, pd.DataFrame]:
    """Ask by interventions whether the most changed layers and heads carry what fine-tuning brought.

    Args:
        pair: The models.
        texts: Held-out documents; the metric is the loss on the summary.
        chosen: The most changed layers and heads.
        changed: The tables `layers` and `heads` of the difference.
        rows: Which of their query rows are correlated with the gain.
        source: What ablated heads are replaced by.
        random_sets: Random head sets that the ablation is compared with.
        execution: Tokens of a batch (4,096 by default), seed of random sets, progress.

    Returns:
        The tables `cross_model`, `layer_sets`, `ablation` and `importance`.
    """
    execution = replace(execution, tokens_per_batch=execution.tokens(_TOKENS))
    sets = layer_sets(chosen.layers, pair.base.anatomy.n_layers, seed=execution.seed)
    mixing = ("attention", "mixer") if pair.base.anatomy.mixing else ("attention",)
    by_activations = cross_patch(pair, texts, levels=("layer", *mixing, "mlp", "head"), sets=sets, execution=execution)
    by_weights = cross_patch(pair, texts, levels=("layer", *mixing, "mlp", "embedding", "unembedding"), by="weights", execution=execution)
    base, tuned = by_activations["into_base"], by_activations["into_tuned"].unchanged
    gain = base.unchanged - tuned
    no_gain = share_of(gain, gain, absent=_NO_GAIN, positive=True).withheld
    singles = {into: _without_sets(effects) for into, effects in by_activations.items()}
    cross = pd.concat(
        [effects.table.assign(by="activations", into=into) for into, effects in singles.items()]
        + [effects.table.assign(by="weights", into=into) for into, effects in by_weights.items()],
        ignore_index=True,
    )
    return {
        "cross_model": cross,
        "layer_sets": layer_sets_table(base, tuned),
        "ablation": ablation_table(
            pair.tuned, texts, chosen.heads, source=source, random_sets=random_sets, withheld=no_gain, execution=execution
        ),
        "importance": importance_table(changed["heads"], changed["layers"], cross, rows=rows),
    }


def _without_sets(effects: Effects) -> Effects:
    return replace(effects, table=effects.table[effects.table["site"] != "set"])


def layer_sets(layers: Components, n_layers: int, *, seed: int) -> list[Components]:
    """Return the selected layers, then other sets of as many with as many neighbours among them: all there are, or forty drawn at random.

    Neighbouring layers may carry more together than apart, and selections are often neighbours, whatever they carry: among sets of any shape they would
    stand out without being the right layers.
    """
    chosen = tuple(sorted(layers.layers))
    size = len(chosen)
    if not size or size == n_layers:
        return [layers]
    runs = size - sum(two - one == 1 for one, two in pairwise(chosen))
    # a set is where its runs end within the selected layers, and before which of the others they stand
    ends, places = range(1, size), range(n_layers - size + 1)
    if comb(len(ends), runs - 1) * comb(len(places), runs) - 1 <= _LAYER_SETS:
        alike = [_layers_of(size, *one) for one in product(combinations(ends, runs - 1), combinations(places, runs))]
        others = sorted(set(alike) - {chosen})
    else:
        random, seen = np.random.default_rng(seed), {chosen}
        while len(seen) <= _LAYER_SETS:
            drawn = (sorted(random.choice(within, number, replace=False).tolist()) for within, number in ((ends, runs - 1), (places, runs)))
            seen.add(_layers_of(size, *drawn))
        others = sorted(seen - {chosen})
    return [Components.of_layers(other) for other in (chosen, *others)]


def _layers_of(size: int, ends: Sequence[int], places: Sequence[int]) -> tuple[int, ...]:
    """Return the layers whose runs end after so many of them, each run with so many other layers below it."""
    return tuple(at + places[bisect_right(ends, at)] for at in range(size))


def layer_sets_table(effects: Effects, tuned: np.ndarray) -> pd.DataFrame:
    """Compare what the selected layers carry together with what other sets of as many layers carry.

    Args:
        effects: Cross-model patching into the base; its rows of site `set` are the layer sets, the selected one first.
        tuned: The tuned model's loss per text.

    Returns:
        One row per set (`component`, `selected`, `gain` in nats per token, `share` of the gain, `n`, `withheld`: why shares are NaN), and on the selected one
        how much more it carries than the mean of the others: `more`, `more_low`, `more_high` as shares of the gain (95 % interval over texts), and
        `p_random` and `p_less`: the share of sets, itself counted, that carry at least, and at most, as much.
    """
    rows = (effects.table["site"] == "set").to_numpy()
    gains = effects.unchanged - effects.values[rows]  # loss that is gained, per text
    shares = shares_of(gains, effects.unchanged - tuned, absent=_NO_GAIN, positive=True)
    table = pd.DataFrame(
        {
            "component": effects.table.loc[rows, "component"].to_numpy(),
            "selected": np.arange(len(gains)) == 0,
            "gain": gains.mean(1),
            "share": shares.value,
            "n": shares.n,
            "withheld": shares.withheld,
        }
    )
    table[["more", "more_low", "more_high", "p_random", "p_less"]] = np.nan
    if len(gains) > 1:
        more = share_of(gains[0] - gains[1:].mean(0), effects.unchanged - tuned, absent=_NO_GAIN, positive=True)
        ends = [more.value, more.low, more.high]
        table.loc[0, ["more", "more_low", "more_high", "p_random", "p_less"]] = [*ends, *rank_p(shares.value[0], shares.value[1:])]
    return table


def ablation_table(
    subject: Subject,
    texts: Pairs,
    selected: Components,
    *,
    source: AblationSource,
    random_sets: int,
    metric: str = "loss",
    withheld: str = "",
    execution: Execution,
) -> pd.DataFrame:
    """Ablate selected heads together, and random sets with as many heads in each layer.

    Args:
        subject: The model; in a study the tuned one.
        texts: The texts; in a study held-out documents.
        selected: The selected heads. MLPs and whole mixers among them are ablated too, and then nothing is like them: no random set is drawn.
        source: What ablated components are replaced by.
        random_sets: How many random sets.
        metric: What is read.
        withheld: Why nothing is to be said of what these heads matter for: there is no gain. Empty where there is one.
        execution: Tokens of a batch, seed of the random sets, progress.

    Returns:
        One row per set, the selected one first: `kind` (`selected` or `random`), the columns of `ablate_together`; on the selected one `p_random` and
        `p_less`: the share of sets, itself counted, whose effect is at least, and at most, as large; `more`, `more_low`, `more_high`: its effect minus the
        random sets' mean effect with a 95 % interval over texts; and `withheld`.
    """
    anatomy = subject.anatomy
    places = places_of(selected, anatomy, experts=True)
    try:
        if any(place.site != "z" for place in places):
            raise SettingsError(f"components {str(selected)!r} are not heads alone")
        controls = random_like(selected, anatomy, random_sets, seed=execution.seed)
    except SettingsError as error:
        log.warning(
            "no random head sets to compare the selected heads with: %s",
            error,
            extra={"weakens": "ablation", "withheld": "whether the selected heads cost more than others"},
        )
        controls = []
    replacement = mean_of(subject, texts, sorted({place.site for place in places})) if source == "mean" else source
    effects = ablate_together(subject, texts, [selected, *controls], source=replacement, metric=metric, execution=execution)
    table, costs = effects.table, effects.table["effect"].to_numpy()
    table["kind"] = ["selected", *["random"] * len(controls)]
    table[["p_random", "p_less", "more", "more_low", "more_high"]] = np.nan
    if controls:
        more = paired_difference(effects.values[0], effects.values[1:].mean(0))
        ends = [float(more.mean), float(more.low), float(more.high)]
        table.loc[0, ["p_random", "p_less", "more", "more_low", "more_high"]] = [*rank_p(costs[0], costs[1:]), *ends]
    table["withheld"] = [withheld, *[""] * len(controls)]
    return table


def importance_table(heads: pd.DataFrame, layers: pd.DataFrame, cross: pd.DataFrame, *, rows: str) -> pd.DataFrame:
    """Correlate how much parts changed with how much of the gain they carry, by ranks (Spearman).

    Returns:
        One row per level (`layer`, `head`), way of exchange (`by`) and direction (`into`): `rho` with an interval over the parts, `p` and `n`
        parts; NaN where shares of the gain are withheld.
    """
    correlations = []
    for level, changed in (("layer", layers), ("head", heads)):
        measured = changed[changed["rows"] == rows].set_index(["layer", "head"] if level == "head" else ["layer"])["kl_base_tuned"]
        site = "layer" if level == "layer" else "z"
        for (by, into), part in cross[cross["site"] == site].groupby(["by", "into"], sort=False):
            carried = part.set_index(["layer", "head"] if level == "head" else ["layer"])["normalised"]
            both = pd.concat([measured, carried], axis=1, join="inner").to_numpy()
            correlations.append({"level": level, "by": by, "into": into, **asdict(rank_correlation(*both.T)), "n": len(both)})
    return pd.DataFrame(correlations)
