"""The difference between a model and its fine-tuned version, in one pass over documents.

    1. compare the weights;
    2. batch by batch, walk both models in lock-step and reduce to per-document means (`measure`);
    3. add these to constant-size statistics (`accumulate`), saving them now and then;
    4. turn the statistics into tables (`tables`).

The unit of statistics is the document. Results do not depend on padding; batching changes them only by rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from mechscope.data.prompt import Encoded, batches
from mechscope.difference.accumulate import Accumulated
from mechscope.difference.lockstep import measure
from mechscope.difference.tables import heads_table, layers_table, outputs_table
from mechscope.difference.weights import WeightDifference, compare_weights
from mechscope.errors import DataError
from mechscope.subject import Pair

if TYPE_CHECKING:
    from mechscope.store.stage import Stage

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Difference:
    """What fine-tuning changed.

    Attributes:
        heads: One row per kind of query rows, layer and head (`heads.parquet`).
        layers: One row per kind of query rows and layer (`layers.parquet`).
        weights: One row per weight matrix (`weights.parquet`).
        outputs: Next-token KL and losses (`outputs.parquet`).
        accumulated: The statistics they were made from, with the bootstrap replicates that selections are tested on.
        problems: Documents left out or cut, by reason.
    """

    heads: pd.DataFrame
    layers: pd.DataFrame
    weights: pd.DataFrame
    outputs: pd.DataFrame
    accumulated: Accumulated
    problems: dict[str, int]

    def replicates(self, name: str, rows: str = "all") -> np.ndarray:
        """Return bootstrap means of `kl_base_tuned` or `entropy_change`, ``(replicate, layer, head)``."""
        return self.accumulated.replicates(name, rows)


def difference(
    pair: Pair,
    encoded: Encoded,
    *,
    tokens_per_batch: int = 8192,
    gini: bool = False,
    replicates: int = 200,
    geometry_documents: int = 300,
    seed: int = 0,
    stage: Stage | None = None,
    checkpoint_seconds: float = 30.0,
    progress: Progress | None = None,
) -> Difference:
    """Measure the difference between two models over documents.

    Args:
        pair: The base and the tuned model.
        encoded: The documents as tokens.
        tokens_per_batch: Tokens of both models' batches, padding included; decides the memory.
        gini: Also the Gini coefficient of the attention patterns.
        replicates: Bootstrap replicates for the stability of selections.
        geometry_documents: Most documents whose pooled states are kept for CKA and RSA.
        seed: Seed of the bootstrap and of that sample.
        stage: A stage of a run folder to keep partial state in; a killed run continues from it with an equal result.
        checkpoint_seconds: How often that state is saved.
        progress: Called with a label, documents done and documents in all.

    Raises:
        DataError: A document is longer than the models can read.
    """
    longest = max((len(example) for example in encoded.examples), default=0)
    if longest > pair.max_positions:
        raise DataError(f"a document has {longest:,} tokens, the models read at most {pair.max_positions:,}: lower max_tokens")
    anatomy = pair.base.anatomy
    accumulated = Accumulated(
        n_layers=anatomy.n_layers,
        n_heads=anatomy.n_heads,
        gini=gini,
        replicates=replicates,
        geometry_documents=geometry_documents,
        seed=seed,
    )
    done = 0
    if stage is not None and (resumed := stage.resume()) is not None:
        state, meta = resumed
        accumulated.load_state(state)
        done = int(meta["batches"])
    total, seen, saved = len(encoded), 0, time.monotonic()
    # padding on the right is seen by nothing, so any token will do and no tokenizer is needed
    for index, batch in enumerate(batches(encoded.examples, tokens_per_batch=tokens_per_batch, pad_id=0)):
        seen += len(batch.examples)
        if index < done:
            continue
        accumulated.update(measure(pair, batch, gini=gini))
        if progress is not None:
            progress("comparing documents", seen, total)
        if stage is not None and time.monotonic() - saved >= checkpoint_seconds:
            stage.checkpoint(accumulated.state(), {"batches": index + 1})
            saved = time.monotonic()
    label = None if progress is None else lambda at, of: progress("comparing weights", at, of)
    weights = compare_weights(pair, progress=label)
    return assemble(accumulated, weights, encoded.problems)


def assemble(accumulated: Accumulated, weights: WeightDifference, problems: dict[str, int]) -> Difference:
    """Turn accumulated statistics into tables."""
    heads = heads_table(accumulated, weights.heads)
    return Difference(
        heads=heads,
        layers=layers_table(accumulated, heads, weights.layers),
        weights=weights.table,
        outputs=outputs_table(accumulated),
        accumulated=accumulated,
        problems=problems,
    )
