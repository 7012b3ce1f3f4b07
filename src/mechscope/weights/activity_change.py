"""What fine-tuning did to neurons: which fire more, less, or on other things, on the same texts.

Both models read every text; per neuron the change of its mean activation and of how often it is active, text by text, so that intervals and tests are of
paired differences (Benjamini–Hochberg over all neurons of the model). Neurons are ranked by the change in units of the activation's spread over
tokens. A neuron that kept its weights may still change, as it reads what changed before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from mechscope.data.pairs import PairBatch, Pairs
from mechscope.errors import ModelError
from mechscope.instrument.execution import Execution
from mechscope.instrument.mlp import Mlps
from mechscope.instrument.texts import over_texts
from mechscope.stats.inference import benjamini_hochberg, estimate
from mechscope.stats.skewness import ThirdMoments
from mechscope.subject import Pair
from mechscope.weights.activity import ENDS, Activity
from mechscope.weights.contexts import TopContexts
from mechscope.weights.neurons import names

_ENDS = ("se", "low", "high", "p", "q")
COLUMNS = (
    *("layer", "neuron", "component", "n"),
    *("mean_base", "mean_tuned", "mean_change", *(f"mean_change_{end}" for end in _ENDS)),
    *("active_base", "active_tuned", "active_change", *(f"active_change_{end}" for end in _ENDS)),
    *("mean_change_sd", "rank", "dead_base", "dead_tuned", "contexts_overlap"),
)


@dataclass(frozen=True)
class ActivityChange:
    """What neurons do in a base model and its tuned version.

    Attributes:
        base: What they do in the base model.
        tuned: What they do in the tuned model.
        changes: By layer, moments over texts of tuned − base, ``(2, neuron)``: mean activation, and share of tokens where a neuron is active.
    """

    base: Activity
    tuned: Activity
    changes: tuple[ThirdMoments, ...]

    def merge(self, other: ActivityChange) -> None:
        """Add what the same models did on other texts.

        Raises:
            DataError: A text is in both.
        """
        self.base.merge(other.base)
        self.tuned.merge(other.tuned)
        for own, more in zip(self.changes, other.changes, strict=True):
            own.merge(more)

    def table(self) -> pd.DataFrame:
        """Build the table of all neurons, one row each.

        Returns:
            `layer`, `neuron`, `component`, `n` (texts); `mean_base`, `mean_tuned`, `mean_change` with `_se`, `_low`, `_high`, `_p`, `_q`; the same for
            `active` (share of tokens); `mean_change_sd`: the change of the mean in units of the spread over tokens (root of the two models' mean
            variance; NaN where neither varies); `rank` by its size, 1 the most changed; `dead_base`, `dead_tuned`; `contexts_overlap`: Jaccard index of
            the two models' strongest contexts, 1 for the same tokens of the same texts, NaN where neither has any.
        """
        table = pd.concat([self._layer_table(layer) for layer in range(len(self.changes))], ignore_index=True)
        for name in ("mean", "active"):
            table[f"{name}_change_q"] = benjamini_hochberg(table[f"{name}_change_p"])
        table["rank"] = table["mean_change_sd"].abs().rank(ascending=False, method="first", na_option="bottom").astype(int)
        return table[list(COLUMNS)]

    def _layer_table(self, layer: int) -> pd.DataFrame:
        base, tuned, change = self.base.layers[layer], self.tuned.layers[layer], estimate(self.changes[layer])
        columns: dict[str, object] = {**names(layer, np.arange(change.n.shape[1])), "n": change.n[0]}
        for index, name in enumerate(("mean", "active")):
            columns |= {f"{name}_base": base.by_text.mean[index], f"{name}_tuned": tuned.by_text.mean[index]}
            columns[f"{name}_change"] = change.mean[index]
            columns |= {f"{name}_change_{end}": getattr(change, whole)[index] for end, whole in {**ENDS, "p": "p"}.items()}
        spread = np.sqrt((base.tokens.variance + tuned.tokens.variance) / 2)
        columns["mean_change_sd"] = np.divide(change.mean[0], spread, out=np.full(spread.shape, np.nan), where=spread > 0)
        columns |= {"dead_base": base.active == 0, "dead_tuned": tuned.active == 0}
        columns["contexts_overlap"] = overlap(base.contexts, tuned.contexts)
        return pd.DataFrame(columns)


def activity_change(pair: Pair, texts: Pairs, *, contexts: int = 5, execution: Execution = Execution()) -> ActivityChange:
    """Measure what every neuron of two models does on the same texts, in one pass.

    Args:
        pair: The base and the tuned model.
        texts: Their clean sides are read.
        contexts: How many of the strongest activations are kept per neuron.
        execution: Tokens of a batch (2,048 by default), progress.

    Raises:
        DataError: There are no texts, or one does not fit a model.
        ModelError: The models' MLPs cannot be taken apart or have different numbers of neurons, or an activation is not finite.
        SettingsError: A number is below 1.
    """
    mlps = Mlps(pair.base), Mlps(pair.tuned)
    if mlps[0].widths != mlps[1].widths:
        raise ModelError(
            f"base and tuned have MLPs of different widths ({mlps[0].widths} and {mlps[1].widths}): their neurons cannot be paired"
        )
    base, tuned = (Activity(side, texts, contexts=contexts) for side in mlps)
    change = ActivityChange(base, tuned, tuple(ThirdMoments((2, width)) for width in mlps[0].widths))

    def both(batch: PairBatch) -> tuple[Activity, Activity, list[np.ndarray]]:
        (before, one), (after, two) = base.of(mlps[0], batch), tuned.of(mlps[1], batch)
        return before, after, [there - here for here, there in zip(one, two, strict=True)]

    execution.told("texts", 0, len(texts))
    for _, (before, after, changes) in over_texts(texts, both, execution, tokens=2048, label="texts"):
        base.add(before)
        tuned.add(after)
        for moments, values in zip(change.changes, changes, strict=True):
            moments.update_many(values)
    return change


def overlap(one: TopContexts, two: TopContexts) -> Float[np.ndarray, " neuron"]:
    """Return the Jaccard index of two models' contexts of every neuron; NaN where neither has any."""
    both = ((one.place[:, None] == two.place[None]) & one.filled[:, None]).sum((0, 1)).numpy()
    either = one.filled.sum(0).numpy() + two.filled.sum(0).numpy() - both
    return np.divide(both, either, out=np.full(both.shape, np.nan), where=either > 0)
