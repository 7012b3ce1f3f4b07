"""What neurons do on texts: how often and how strongly they fire, on what, and what their firing depends on. One pass, bounded memory.

A neuron is *active* where what comes out of its activation function is above zero: for ReLU, GELU and SiLU, where what goes into it is. In gated MLPs
that is an open gate; the neuron itself, gate times the other side, may then have either sign, and contexts are ordered by size. Kinds of neurons
(Voita et al. 2024, "Neurons in large language models: dead, n-gram, positional"): dead ones are never active; positional ones depend on position
more than on all else (R² of the activation on position, in excess of chance, above a half); token-bound ones have their strongest activations all on one token.

Everything is an accumulator: summed over batches, and over shards of texts by `merge`.
"""

from __future__ import annotations

from copy import copy

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import check_fits
from mechscope.errors import DataError, ModelError, SettingsError
from mechscope.instrument.attention import observed
from mechscope.instrument.execution import Execution
from mechscope.instrument.mlp import Mlps
from mechscope.instrument.texts import over_texts
from mechscope.instrument.walk import Walk
from mechscope.stats.inference import estimate
from mechscope.subject import Subject
from mechscope.weights.layer_activity import LayerActivity, Tokens
from mechscope.weights.neurons import names

# position explains more of a positional neuron than all else together
POSITIONAL = 0.5
# the upper 95 % bound of a rate that was never seen in n trials is 3/n
_RULE_OF_THREE = 3.0


class Activity:
    """Statistics of all neurons over texts.

    Attributes:
        texts: Ids of the texts; contexts name them by number.
        layers: One per layer.
        n_tokens: Tokens seen.
    """

    def __init__(self, mlps: Mlps, texts: Pairs, *, contexts: int = 5) -> None:
        """Start with no tokens.

        Args:
            mlps: The MLPs of the model.
            texts: All texts that will be added.
            contexts: How many of the strongest activations are kept per neuron.

        Raises:
            SettingsError: `contexts` is below 1.
            DataError: There are no texts, or one does not fit the model.
        """
        if contexts < 1:
            raise SettingsError(f"contexts is {contexts}: keep at least 1 per neuron")
        check_fits(mlps.subject, texts)
        self.texts, self.n_tokens = tuple(pair.id for pair in texts), 0
        if not self.texts:
            raise DataError("there are no texts: nothing to measure neurons on")
        longest = max(len(pair.clean) for pair in texts)
        self.layers = [
            LayerActivity(width, gated=parts.gate is not None, contexts=contexts, longest=longest)
            for width, parts in zip(mlps.widths, mlps.parts, strict=True)
        ]

    @torch.no_grad()
    def of(self, mlps: Mlps, batch: PairBatch) -> tuple[Activity, list[Float[np.ndarray, "text 2 neuron"]]]:
        """Run a model on a batch of these texts (their clean sides; `indices` says which); what is returned is added by `add`.

        Returns:
            The statistics of the batch; and for every layer what each of its texts, in ascending order of their numbers, is in `LayerActivity.by_text`.

        Raises:
            ModelError: An activation is not finite.
        """
        subject, tokens, by_text = mlps.subject, self._tokens(batch), []
        of_batch = copy(self)
        of_batch.layers, of_batch.n_tokens = [layer.empty() for layer in self.layers], len(tokens.rows)
        with observed(subject):
            walk = Walk(subject, batch.clean, batch.real)
            hidden = walk.hidden
            for layer, into in enumerate(of_batch.layers):
                with mlps.watched(layer) as seen:
                    hidden = walk.step(layer, hidden)
                values, fired = (_rows(one, tokens.rows) for one in (seen.neurons, seen.activation))
                by_text.append(into.update(values, fired > 0, tokens))
                if not np.isfinite(by_text[-1]).all():
                    raise ModelError(
                        f"model {subject.source!r} in {subject.dtype}: neurons of layer {layer} are not finite: load it in bfloat16 or float32"
                    )
        return of_batch, by_text

    def add(self, other: Activity) -> None:
        """Add what the same model did on others of these texts."""
        for own, more in zip(self.layers, other.layers, strict=True):
            own.merge(more, texts_before=0)
        self.n_tokens += other.n_tokens

    def merge(self, other: Activity) -> None:
        """Add what the same model did on other texts.

        Raises:
            DataError: A text is in both.
            ValueError: The other object has other layers, neurons or numbers of contexts.
        """
        if both := set(self.texts).intersection(other.texts):
            raise DataError(f"text {sorted(both)[0]!r} is in both: it would count twice; merge what was measured on different texts")
        for own, more in zip(self.layers, other.layers, strict=True):
            own.merge(more, texts_before=len(self.texts))
        self.texts, self.n_tokens = (*self.texts, *other.texts), self.n_tokens + other.n_tokens

    def table(self) -> pd.DataFrame:
        """Build the table of all neurons, one row each.

        Returns:
            `layer`, `neuron`, `component`, `n` (texts), `n_tokens`; over texts, `mean` (activation) and `active` (share of tokens where the neuron is
            active), each with `_se`, `_low`, `_high`; over tokens `sd`, `minimum`, `maximum`, `active_tokens`; `dead` (never active) and `active_bound`,
            the upper 95 % bound of a dead neuron's rate (3 / tokens, as if tokens were independent; NaN for others); `position_r2` and what it is by
            chance, `position_r2_chance` (one for all), `positional` (above `POSITIONAL` once chance is taken off); `contexts` (how many are kept),
            `token_purity` (share of them on the commonest token; NaN below two), `token_id` (that token, -1 for none), `token_bound` (the full
            number of contexts, at least two, all on it).
        """
        return pd.concat([self._layer_table(layer, activity) for layer, activity in enumerate(self.layers)], ignore_index=True)

    def _layer_table(self, layer: int, activity: LayerActivity) -> pd.DataFrame:
        by_text, r2, chance = estimate(activity.by_text), activity.position_r2, activity.position_r2_chance
        purity, token = activity.purity()
        dead, contexts = activity.active == 0, activity.contexts.filled.sum(0).numpy()
        over_texts = {}
        for index, name in enumerate(("mean", "active")):
            over_texts[name] = by_text.mean[index]
            over_texts.update({f"{name}_{end}": getattr(by_text, whole)[index] for end, whole in ENDS.items()})
        columns = {**names(layer, np.arange(len(r2))), "n": by_text.n[0], "n_tokens": self.n_tokens, **over_texts}
        columns |= {"sd": np.sqrt(activity.tokens.variance), "minimum": activity.minimum, "maximum": activity.maximum}
        columns |= {"active_tokens": activity.active, "dead": dead}
        columns["active_bound"] = np.where(dead, _RULE_OF_THREE / max(self.n_tokens, 1), np.nan)
        columns |= {"position_r2": r2, "position_r2_chance": chance, "positional": (r2 - chance) / (1 - chance) > POSITIONAL}
        columns |= {"contexts": contexts, "token_purity": purity, "token_id": token}
        columns["token_bound"] = (contexts == len(activity.contexts.token)) & (purity == 1.0)
        return pd.DataFrame(columns)

    def _tokens(self, batch: PairBatch) -> Tokens:
        order = sorted(range(len(batch.pairs)), key=lambda row: batch.indices[row])
        width, rows, text, position = batch.clean.shape[1], [], [], []
        for row in order:
            length = len(batch.pairs[row].clean)
            places = torch.arange(length)
            rows.append(row * width + batch.shift(row) + places)
            text.append(torch.full((length,), batch.indices[row]))
            position.append(places)
        flat = torch.cat(rows)
        return Tokens(flat, torch.cat(text), torch.cat(position), batch.clean.flatten()[flat], [len(one) for one in rows])


def neuron_activity(subject: Subject, texts: Pairs, *, contexts: int = 5, execution: Execution = Execution()) -> Activity:
    """Measure what every neuron does on texts, in one pass.

    Args:
        subject: The model.
        texts: Their clean sides are read.
        contexts: How many of the strongest activations are kept per neuron.
        execution: Tokens of a batch (2,048 by default), progress.

    Raises:
        DataError: There are no texts, or one does not fit the model.
        ModelError: The model's MLPs cannot be taken apart, or an activation is not finite.
        SettingsError: A number is below 1.
    """
    mlps = Mlps(subject)
    activity = Activity(mlps, texts, contexts=contexts)
    execution.told("texts", 0, len(texts))
    for _, (of_batch, _) in over_texts(texts, lambda batch: activity.of(mlps, batch), execution, tokens=2048, label="texts"):
        activity.add(of_batch)
    return activity


# columns of an estimate, by what they are called behind its name
ENDS = {"se": "standard_error", "low": "low", "high": "high"}


def _rows(values: Tensor, rows: Int[Tensor, " n"]) -> Float[Tensor, "n neuron"]:
    flat = values.reshape(-1, values.shape[-1])[rows.to(values.device)]
    return flat if flat.element_size() > 2 else flat.float()
