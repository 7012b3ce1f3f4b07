"""The difference between a model and its fine-tuned version, or between the models of several pairs, in one pass over documents.

    1. batch by batch, walk the models in lock-step and reduce to per-document means (`lockstep`);
    2. add these to constant-size statistics (`accumulate`), saving them now and then (`share`);
    3. compare the weights (`weights`);
    4. turn the statistics into tables (`tables`), with a verdict on every quantity for which a smallest effect of interest is given.

The unit of statistics is the document. Results do not depend on padding; batching changes them only by rounding.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from mechscope import ranks
from mechscope.data.prompt import Encoded
from mechscope.difference.accumulate import Accumulated
from mechscope.difference.lockstep import Pending, launch, models_of
from mechscope.difference.share import Share
from mechscope.difference.smallest import SmallestEffects
from mechscope.difference.tables import heads_table, layers_table, outputs_table
from mechscope.difference.weights import WeightDifference, compare_weights_of
from mechscope.difference.writes import Writers
from mechscope.errors import DataError
from mechscope.instrument.execution import Execution
from mechscope.instrument.memory import FEWEST, Halving, tokens_that_fit
from mechscope.shapes import by_shape
from mechscope.stats.geometry import BottomK
from mechscope.subject import Pair

if TYPE_CHECKING:
    from mechscope.store.stage import Stage


@dataclass(frozen=True)
class Difference:
    """What fine-tuning changed.

    Attributes:
        heads: One row per kind of query rows, layer that attends, and head (`heads.parquet`).
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

    __repr__ = by_shape

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables by the names that they have in a run folder, so that the page's figures can be drawn of them (`mechscope.plot`)."""
        return {"heads": self.heads, "layers": self.layers, "weights": self.weights, "outputs": self.outputs}

    def replicates(self, name: str, rows: str = "all") -> np.ndarray:
        """Return bootstrap means of `kl_base_tuned`, `entropy_change` or `write_change`, ``(replicate, layer, head)``, of the layers that attend."""
        return self.accumulated.replicates(name, rows)


def difference(
    pair: Pair,
    encoded: Encoded,
    *,
    gini: bool = False,
    replicates: int = 200,
    geometry_documents: int = 300,
    same_input_documents: int = 32,
    smallest: SmallestEffects | None = None,
    spectra: bool = True,
    stage: Stage | None = None,
    checkpoint_seconds: float = 30.0,
    execution: Execution = Execution(),
) -> Difference:
    """Measure the difference between two models over documents: `differences` for one pair, with the same arguments and errors."""
    return differences(
        {"pair": pair},
        encoded,
        gini=gini,
        replicates=replicates,
        geometry_documents=geometry_documents,
        same_input_documents=same_input_documents,
        smallest=smallest,
        spectra=spectra,
        stage=stage,
        checkpoint_seconds=checkpoint_seconds,
        execution=execution,
    )["pair"]


def differences(
    pairs: Mapping[str, Pair],
    encoded: Encoded,
    *,
    in_full: Collection[str] | None = None,
    gini: bool = False,
    replicates: int = 200,
    geometry_documents: int = 300,
    same_input_documents: int = 32,
    smallest: SmallestEffects | None = None,
    spectra: bool = True,
    stage: Stage | None = None,
    checkpoint_seconds: float = 30.0,
    execution: Execution = Execution(),
) -> dict[str, Difference]:
    """Measure the differences of several pairs of models over documents, running a model that they have in common once.

    Several ranks share the documents; each gets the whole result, equal to a single process's up to rounding.

    Args:
        pairs: The base and the tuned model of each, by name.
        encoded: The documents as tokens.
        in_full: Names of the pairs that get Gini coefficients, bootstrap replicates and runs on the same input, where those are wanted; all by default.
        gini: Also the Gini coefficient of the attention patterns.
        replicates: Bootstrap replicates for the stability of selections.
        geometry_documents: Most documents whose pooled states are kept for CKA and RSA.
        same_input_documents: Most documents on which tuned blocks also run on the base's residual stream, for `write_change`; of the pairs in full.
        smallest: Smallest effects of interest, by which verdicts are given; without any, all verdicts are "not measured".
        spectra: Whether weight changes are decomposed: ranks, singular values, intruder dimensions.
        stage: A stage of a run folder to keep partial state in; a killed run continues from it with an equal result.
        checkpoint_seconds: About how often that state is saved.
        execution: Tokens of every model's batches (by default what free memory allows; a continued run keeps its batches, unless a smaller number is
            given), seed (of the bootstrap and of that sample), progress.

    Raises:
        DataError: A document is longer than the models can read.
        RunError: Not even one document at a time fits into memory.
    """
    longest = max((len(example) for example in encoded.examples), default=0)
    room = min(pair.max_positions for pair in pairs.values())
    if longest > room:
        raise DataError(f"a document has {longest:,} tokens, the models read at most {room:,}: lower max_tokens")

    whole = pairs.keys() if in_full is None else in_full

    def nothing() -> list[Accumulated]:
        return [
            Accumulated(
                n_layers=pair.base.anatomy.n_layers,
                n_heads=pair.base.anatomy.n_heads,
                n_attending=len(pair.base.anatomy.attending),
                gini=gini and name in whole,
                replicates=replicates if name in whole else 0,
                geometry_documents=geometry_documents,
                seed=execution.seed,
            )
            for name, pair in pairs.items()
        ]

    share = Share(encoded.examples, nothing, execution.tokens_per_batch or chosen(pairs, encoded))
    if stage is not None:
        share.resume(stage, most=execution.tokens_per_batch)
    before, sent = share.done, 0
    # how many rounds lie between two checkpoints; the first tells how long one takes
    every, saved, halving = 1, time.monotonic(), Halving()
    ids = [example.id for example in encoded.examples]
    same_input = BottomK.chosen(ids, same_input_documents, execution.seed)
    measured = partial(
        launch,
        tuple(pairs.values()),
        same_input=[same_input if name in whole else () for name in pairs],
        writers=[Writers(pair) for pair in pairs.values()],
        gini=[at for at, name in enumerate(pairs) if gini and name in whole],
        sample=BottomK.chosen(ids, geometry_documents, execution.seed),
    )
    # while a device works on a batch, the numbers of the one before are fetched; a CPU has done its work, and need not hold them
    ahead = int(any(subject.device.type != "cpu" for subject in models_of(tuple(pairs.values()))))
    waiting: deque[tuple[int, list[list[Pending]]]] = deque()

    def take(most: int) -> None:
        """Fetch the numbers of all but the newest batches."""
        while len(waiting) > most:
            number, parts = waiting.popleft()
            for part in parts:
                for accumulated, pending in zip(share.accumulated, part, strict=True):
                    accumulated.update(pending.fetch())
            share.finish(number)

    for turn, (number, batch) in enumerate(share.rounds(), start=1):
        if batch is not None:
            waiting.append((number, list(halving.run(measured, batch))))
            take(ahead)
            sent += len(batch)
        execution.told("comparing documents", min(before + sent * ranks.size(), len(encoded)), len(encoded))
        if stage is not None and turn % every == 0:
            take(0)
            share.save(stage)
            every = ranks.agreed(max(1, round(every * checkpoint_seconds / max(time.monotonic() - saved, 1e-3))))
            saved = time.monotonic()
    take(0)
    if before + sent * ranks.size() != len(encoded):
        execution.told("comparing documents", len(encoded), len(encoded))
    weights = compare_weights_of(tuple(pairs.values()), spectra=spectra, execution=execution)
    return {
        name: assemble(accumulated, changed, encoded.problems, smallest)
        for name, accumulated, changed in zip(pairs, share.together(), weights, strict=True)
    }


def chosen(pairs: Mapping[str, Pair], encoded: Encoded) -> int:
    """Return the default tokens of a batch: what memory allows, but for ranks to share at least 32 batches, unless documents are few."""
    shared = max(1, sum(map(len, encoded.examples)) // 32)
    models = models_of(tuple(pairs.values()))
    return ranks.agreed(min(tokens_that_fit(models[0], models=len(models)), max(FEWEST, 2 ** (shared.bit_length() - 1))))


def assemble(
    accumulated: Accumulated, weights: WeightDifference, problems: dict[str, int], smallest: SmallestEffects | None = None
) -> Difference:
    """Turn accumulated statistics into tables."""
    heads = heads_table(accumulated, weights.heads, smallest, layers=weights.attending)
    return Difference(
        heads=heads,
        layers=layers_table(accumulated, heads, weights.layers, smallest),
        weights=weights.table,
        outputs=outputs_table(accumulated, smallest),
        accumulated=accumulated,
        problems=problems,
    )
