"""The difference between models as the tables of a run: heads, layers, weights, outputs, and the replicates that selections are tested on."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch

from mechscope.data.prompt import Encoded
from mechscope.difference import attention_patterns, differences
from mechscope.instrument import Execution
from mechscope.store.stage import Stage
from mechscope.studies.groups import Measuring
from mechscope.subject import Pair

RESAMPLED = ("kl_base_tuned", "entropy_change")
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
        The tables `heads`, `layers`, `weights` and `outputs`; with further pairs also `pairs`.
    """
    by_pair = differences(
        {"": pair, **(further or {})},
        encoded,
        in_full=[""],
        gini=settings.gini,
        replicates=settings.replicates,
        geometry_documents=settings.geometry_documents,
        stage=stage,
        checkpoint_seconds=_CHECKPOINT_SECONDS,
        execution=execution,
    )
    whole = by_pair.pop("")
    tables = {name: getattr(whole, name) for name in ("heads", "layers", "weights", "outputs")}
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
