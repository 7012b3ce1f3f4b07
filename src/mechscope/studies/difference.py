"""The difference between models as the tables of a run: heads, layers, weights, outputs, and the replicates that selections are tested on."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch

from mechscope.data.prompt import Encoded
from mechscope.difference import attention_patterns, differences, smallest_effects
from mechscope.difference.smallest import Level
from mechscope.instrument import Execution
from mechscope.settings.smallest import SmallestSettings
from mechscope.store.stage import Stage
from mechscope.studies.groups import Measuring
from mechscope.studies.noted import note_layers_without_heads
from mechscope.subject import Pair

RESAMPLED = ("kl_base_tuned", "entropy_change", "write_change")
"""Statistics of heads whose bootstrap replicates are kept."""
# how often a long measurement is saved
_CHECKPOINT_SECONDS = 30.0


def measure_difference(
    pair: Pair,
    encoded: Encoded,
    *,
    settings: Measuring,
    stage: Stage,
    further: Mapping[str, Pair] | None = None,
    execution: Execution,
) -> dict[str, pd.DataFrame]:
    """Measure what fine-tuning changed; replicates and whole attention patterns go into the stage's tensors.

    Args:
        pair: The base and the tuned model.
        encoded: Documents as tokens.
        settings: What is measured.
        stage: The stage that is being done: it keeps the state of an unfinished measurement.
        further: Other pairs, such as tuned–LoRA and base–LoRA in paper 1: only their layers are kept. Models that pairs share are run once.
        execution: Tokens of a batch (by default what free memory allows), seed of the bootstrap, progress.

    Returns:
        The tables `heads`, `layers`, `weights`, `outputs` and `smallest_effects`; with further pairs also `pairs`.
    """
    note_layers_without_heads(pair.base, "heads")
    smallest = smallest_effects(
        pair.base, encoded.examples, given=_given(settings.smallest), documents=settings.smallest.documents, seed=execution.seed
    )
    by_pair = differences(
        {"": pair, **(further or {})},
        encoded,
        in_full=[""],
        gini=settings.gini,
        replicates=settings.replicates,
        geometry_documents=settings.geometry_documents,
        same_input_documents=settings.same_input_documents,
        smallest=smallest,
        stage=stage,
        checkpoint_seconds=_CHECKPOINT_SECONDS,
        execution=execution,
    )
    whole = by_pair.pop("")
    tables = {name: getattr(whole, name) for name in ("heads", "layers", "weights", "outputs")}
    tables["smallest_effects"] = smallest.table
    if by_pair:
        tables["pairs"] = pd.concat([other.layers.assign(pair=name) for name, other in by_pair.items()], ignore_index=True)
    replicates = {
        f"{name}.{rows}": torch.from_numpy(whole.replicates(name, rows)) for name in RESAMPLED for rows in ("all", "document", "summary")
    }
    stage.write_tensors("replicates", replicates)
    if settings.pattern_documents:
        shown = encoded.examples[: settings.pattern_documents]
        maps = {
            f"{index}.{side}": tensor for index, example in enumerate(shown) for side, tensor in attention_patterns(pair, example).items()
        }
        stage.write_tensors("patterns", maps, meta={"ids": [example.id for example in shown]})
    return tables


def _given(settings: SmallestSettings) -> dict[tuple[Level, str], float]:
    """Return the smallest effects that are set, by table and quantity; one of attention or of writes holds for heads and layers alike."""
    keys: dict[tuple[Level, str], float | None] = {
        ("heads", "entropy_change"): settings.entropy_change,
        ("heads", "kl_base_tuned"): settings.attention_kl,
        ("layers", "kl_base_tuned"): settings.attention_kl,
        ("heads", "write_change"): settings.write_change,
        ("layers", "write_change"): settings.write_change,
        ("layers", "mlp_write_change"): settings.write_change,
        ("layers", "cosine_distance"): settings.residual_cosine,
        ("outputs", "kl_base_tuned"): settings.output_kl,
        ("outputs", "loss_change"): settings.loss_change,
    }
    return {key: value for key, value in keys.items() if value is not None}
