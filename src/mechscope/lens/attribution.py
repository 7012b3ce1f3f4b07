"""Direct logit attribution: how much of a logit difference each head, MLP, neuron and bias wrote itself.

The parts of the last residual stream, each through the final norm with its scale frozen and through the unembedding, sum to the logits exactly
(Elhage et al. 2021; used on IOI by Wang et al. 2023, section 3). The sum is checked against the model's own logits: what is missing is a row of
the table, `residual`, and is rounding. Logits are those before a soft cap (Gemma 2); what the cap changes is a row of its own.

What a part writes for later parts to read is not in its number: for that, see patching and circuits.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import PerText, check_fits
from mechscope.errors import DataError, SettingsError
from mechscope.instrument.execution import Execution
from mechscope.lens.decomposition import Decomposition, Part
from mechscope.lens.question import Question
from mechscope.shapes import by_shape
from mechscope.stats.inference import benjamini_hochberg, estimate, paired_difference
from mechscope.stats.skewness import ThirdMoments
from mechscope.subject import Subject

# what is no part of the model's: a bias adds the same whatever the text, a cap and rounding write nothing
_UNTESTED = ("constant", "cap", "residual")


@dataclass(frozen=True)
class LogitAttribution:
    """What every part of a model contributes to each text's metric.

    Attributes:
        metric: `logit-diff` or `target-logit`.
        texts: Ids of the texts.
        source: Hash of the pairs.
        parts: The summands, in the order of the model; `cap` (of models that cap their logits) and `residual` (rounding) stand last.
        effects: ``(text, part)``, in logits; each text's sum is its value.
        neurons: ``(text, neuron)`` by layer; they sum to their MLP's part.
        values: ``(text)``: the metric of the logits that the model itself gives out.
    """

    metric: str
    texts: tuple[str, ...]
    source: str
    parts: tuple[Part, ...]
    effects: Float[np.ndarray, "text part"]
    neurons: dict[int, Float[np.ndarray, "text neuron"]]
    values: Float[np.ndarray, " text"]

    __repr__ = by_shape

    def table(self) -> pd.DataFrame:
        """Return one row per part.

        Columns: `component`, `kind`, `layer`, `head` (−1 where there is none), `effect` (mean over texts, in logits), `low`, `high` (95 % interval
        over texts), `p`, `q` (Benjamini–Hochberg over the model's parts; NaN for `constant`, `cap` and `residual`), `n` (texts).
        """
        columns = _columns(self.effects, tested=[part.kind not in _UNTESTED for part in self.parts])
        return pd.DataFrame([asdict(part) for part in self.parts]).assign(**columns)

    def neuron_table(self) -> pd.DataFrame:
        """Return one row per neuron of the chosen layers, largest first; columns as in `table`, with `neuron` for `kind` and `head`."""
        effects = [self.neurons[layer] for layer in sorted(self.neurons)]
        if not effects:
            raise SettingsError("no layer's neurons were attributed: name layers with neurons=(…)")
        rows = [
            {"component": f"m{layer}.n{neuron}", "layer": layer, "neuron": neuron}
            for layer in sorted(self.neurons)
            for neuron in range(self.neurons[layer].shape[1])
        ]
        table = pd.DataFrame(rows).assign(**_columns(np.concatenate(effects, axis=1)))
        return table.sort_values("effect", key=np.abs, ascending=False, kind="stable", ignore_index=True)


def attribute_logits(
    subject: Subject, pairs: Pairs, *, metric: str = "logit-diff", neurons: Collection[int] = (), execution: Execution = Execution()
) -> LogitAttribution:
    """Attribute a metric of the clean texts to the parts of a model.

    Args:
        subject: The model.
        pairs: The texts; corrupt ones are not run.
        metric: `logit-diff` (right answers − wrong ones after the last token), or `target-logit` (the target tokens', or the right answers', less
            the mean over the vocabulary).
        neurons: Layers whose neurons are attributed one by one.
        execution: Tokens of a batch (1,024 by default), progress.

    Raises:
        MechscopeError: Texts, metric or layers do not fit the model, or it cannot be taken apart.
    """
    check_fits(subject, pairs)
    for layer in neurons:
        if not 0 <= layer < subject.anatomy.n_layers:
            raise SettingsError(f"layer {layer} does not exist: the model has layers 0-{subject.anatomy.n_layers - 1}")
    taken_apart, gathered = Decomposition(subject), PerText(pairs)

    def attributed(batch: PairBatch) -> dict[str, np.ndarray]:
        question = Question.of(metric, batch)
        contributions = taken_apart.of(batch, question, neurons=neurons)
        return {
            "parts": question.per_text(contributions.parts).T.numpy(),
            "cap": question.per_text(contributions.cap).numpy(),
            "metric": question.per_text(contributions.metric).numpy(),
            **{f"m{layer}": question.per_text(each).T.numpy() for layer, each in contributions.neurons.items()},
        }

    gathered.run(attributed, execution, tokens=1024, label="logit attribution")
    effects, parts = [gathered["parts"]], list(taken_apart.parts)
    if taken_apart.readout.softcap is not None:
        effects.append(gathered["cap"][None])
        parts.append(Part("cap", "cap"))
    effects.append((gathered["metric"] - np.concatenate(effects).sum(0))[None])
    parts.append(Part("residual", "residual"))
    return LogitAttribution(
        metric=metric,
        texts=tuple(pair.id for pair in pairs),
        source=pairs.hash,
        parts=tuple(parts),
        effects=np.concatenate(effects).T,
        neurons={layer: gathered[f"m{layer}"].T for layer in sorted(set(neurons))},
        values=gathered["metric"],
    )


def compare_attributions(base: LogitAttribution, tuned: LogitAttribution) -> pd.DataFrame:
    """Compare two models' attributions over the same texts, part by part.

    Returns:
        One row per part: `component`, `kind`, `layer`, `head`, `base`, `tuned` (mean effects, in logits), `change` (tuned − base, paired by text),
        `low`, `high` (95 % interval over texts), `p`, `q` (Benjamini–Hochberg over the models' parts), `n` (texts).

    Raises:
        DataError: The two are of other texts or another metric.
        SettingsError: The two models do not have the same parts.
    """
    if (base.source, base.metric) != (tuned.source, tuned.metric):
        raise DataError(
            f"the base's attribution is of {base.metric} over {len(base.texts)} texts, the tuned model's of {tuned.metric} over "
            f"{len(tuned.texts)}: attribute the same metric of the same pairs in both"
        )
    if base.parts != tuned.parts:
        different = {part.component for part in base.parts} ^ {part.component for part in tuned.parts}
        raise SettingsError(
            f"the two models do not have the same parts ({', '.join(sorted(different))}): compare a model with its tuned version"
        )
    columns = _columns(tuned.effects, base.effects, tested=[part.kind not in _UNTESTED for part in base.parts])
    table = pd.DataFrame([asdict(part) for part in base.parts])
    change = columns.pop("effect")
    return table.assign(base=base.effects.mean(0), tuned=tuned.effects.mean(0), change=change, **columns)


def _columns(after: np.ndarray, before: np.ndarray | None = None, *, tested: Collection[bool] | None = None) -> dict[str, np.ndarray]:
    """Return means over texts with intervals, and tests of those columns that are tested."""
    if before is None:
        moments = ThirdMoments(after.shape[1:])
        moments.update_many(after)
        estimates = estimate(moments)
    else:
        estimates = paired_difference(after, before)
    p = estimates.p if tested is None else np.where(list(tested), estimates.p, np.nan)
    return {"effect": estimates.mean, "low": estimates.low, "high": estimates.high, "p": p, "q": benjamini_hochberg(p), "n": estimates.n}
