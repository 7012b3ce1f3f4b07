"""The smallest effect of interest of each quantity: a change that is not larger is nobody's finding.

By default it is twice what the base model itself differs by when it is computed in another precision (bfloat16; float32 for a model that runs in half
precision), at its worst head or layer: whoever loads a model in bfloat16 accepts such a difference without noticing. Twice, because of two models that
run in bfloat16 both are rounded. The floor is a property of the model, does not shrink with the number of documents, and costs two passes over a few.
What two halves of the documents differ by is the alternative, but it falls with the root of their number, so that any change exceeds it in the end
(simulated, 48 heads with changes of 1e-3 nats of entropy: 5, 35 and 46 are called changed over 16, 300 and 3,000 documents), and the tests hold it already,
as the standard error.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch

from mechscope import ranks
from mechscope.data.prompt import Example, collate
from mechscope.difference.lockstep import HEAD_MEASURES, LAYER_MEASURES, OUTPUT_MEASURES, Measured, measure
from mechscope.errors import SettingsError
from mechscope.instrument.memory import free_memory
from mechscope.stats.geometry import BottomK
from mechscope.subject import Pair, Subject
from mechscope.subject.load import load
from mechscope.subject.placement import known_to_be_slow

log = logging.getLogger(__name__)

Level = Literal["heads", "layers", "outputs"]
_NAMES: dict[Level, tuple[str, ...]] = {"heads": HEAD_MEASURES, "layers": LAYER_MEASURES, "outputs": OUTPUT_MEASURES}
_FLOORS = 2.0


@dataclass(frozen=True)
class Quantity:
    """A quantity on which a verdict is given.

    Attributes:
        table: Which table it is a column of.
        name: The column.
        unit: Its unit.
        signed: Whether it may be negative; others cannot be zero either, but between equal models.
    """

    table: Level
    name: str
    unit: str
    signed: bool = False


QUANTITIES = (
    Quantity("heads", "entropy_change", "nats", signed=True),
    Quantity("heads", "kl_base_tuned", "nats"),
    Quantity("heads", "write_change", "of the base's"),
    Quantity("layers", "kl_base_tuned", "nats"),
    Quantity("layers", "cosine_distance", "1 − cosine"),
    Quantity("layers", "write_change", "of the base's"),
    Quantity("layers", "mlp_write_change", "of the base's"),
    Quantity("outputs", "kl_base_tuned", "nats per token"),
    Quantity("outputs", "loss_change", "nats per token", signed=True),
)


class SmallestEffects(Mapping[tuple[Level, str], float]):
    """Smallest effects of interest by table and quantity; NaN where none is known. `table` says where each is from."""

    def __init__(self, table: pd.DataFrame) -> None:
        """Take a table as `smallest_effects` returns it."""
        self.table = table
        keys: list[tuple[Level, str]] = list(zip(table["table"], table["quantity"], strict=True))
        self._of = dict(zip(keys, map(float, table["smallest"]), strict=True))

    def __getitem__(self, key: tuple[Level, str]) -> float:
        """Return δ of a table's quantity."""
        return self._of[key]

    def __iter__(self) -> Iterator[tuple[Level, str]]:
        """Go over the quantities."""
        return iter(self._of)

    def __len__(self) -> int:
        """Return how many quantities there are."""
        return len(self._of)


def smallest_effects(
    base: Subject, examples: Sequence[Example], *, given: Mapping[tuple[Level, str], float] | None = None, documents: int = 8, seed: int = 0
) -> SmallestEffects:
    """Return the smallest effect of interest of every quantity: what is given, else from the precision floor of the base model.

    Args:
        base: The base model.
        examples: Documents, of which a few are read.
        given: Effects that the user sets, by table and quantity.
        documents: Most documents to read.
        seed: Of their choice.

    Returns:
        A mapping with a `table`: one row per quantity, with `table`, `quantity`, `smallest` (NaN where it is not known), `unit`, `source`, `floor`
        (what the model differs by in two precisions, at the worst head or layer and kind of rows) and `n` (documents behind it).

    Raises:
        SettingsError: An effect is given for what is no quantity, or is not above zero.
    """
    given = given or {}
    known = {(one.table, one.name) for one in QUANTITIES}
    for key, value in given.items():
        if key not in known or not value > 0:
            raise SettingsError(f"smallest effect {value!r} of {'.'.join(key)}: give a number above zero for one of {_listed(known)}")
    chosen = BottomK.chosen((example.id for example in examples), documents, seed)
    read = [example for example in examples if example.id in chosen]
    floors: dict[tuple[Level, str], float] = {}
    other = other_precision(base.dtype)
    if known - given.keys() and read:
        # one rank for all: the others get its numbers
        floors = ranks.by_first(lambda: precision_floor(base, read))
    rows = []
    for one in QUANTITIES:
        key = (one.table, one.name)
        floor = floors.get(key, float("nan"))
        if key in given:
            smallest, source = given[key], "set"
        elif np.isnan(floor):
            smallest, source = float("nan"), "not measured: the model does not fit into memory once more, in another precision; set it"
        else:
            # equal in both precisions (a model of zeros): the smallest number that is not zero stands for no difference at all
            smallest = max(_FLOORS * floor, float(np.finfo(np.float32).tiny))
            source = f"twice what the base model differs by in {_name(other)} against {_name(base.dtype)}"
        rows.append({"table": one.table, "quantity": one.name, "smallest": smallest, "unit": one.unit, "source": source, "floor": floor})
    return SmallestEffects(pd.DataFrame(rows).assign(n=len(read) if floors else 0))


def precision_floor(subject: Subject, examples: Sequence[Example]) -> dict[tuple[Level, str], float]:
    """Measure what a model differs from itself by in another precision, by the functions that compare models.

    Args:
        subject: The model.
        examples: Documents, run one at a time.

    Returns:
        Of each quantity the mean over documents of its absolute value, at the worst head or layer and kind of rows; empty where the model does not fit
        into memory a second time, or is spread over devices.
    """
    other = in_other_precision(subject)
    if other is None:
        return {}
    pair = Pair(subject, other, subject.anatomy.vocab_size)
    found = [measure(pair, collate([example], pad_id=0)) for example in examples]
    return {(one.table, one.name): _worst(found, one) for one in QUANTITIES}


def in_other_precision(subject: Subject) -> Subject | None:
    """Return a copy of a model in `other_precision`; None where it lies on several devices or not in memory, or a copy would not fit."""
    parameters = list(subject.plain.parameters())
    dtype = other_precision(subject.dtype)
    size = sum(parameter.numel() for parameter in parameters) * dtype.itemsize
    # half is left to the work itself
    if len({parameter.device for parameter in parameters}) > 1 or parameters[0].is_meta or 2 * size > free_memory(subject.device):
        log.warning(
            "no smallest effects of %s: a copy of it in %s does not fit beside it",
            subject.source,
            _name(dtype),
            extra={"weakens": "smallest_effects"},
        )
        return None
    with known_to_be_slow():
        copied = load(copy.deepcopy(subject.model).to(dtype))
    return copied if subject.adapted or not copied.is_adapter else copied.without_adapter()


def other_precision(dtype: torch.dtype) -> torch.dtype:
    """Return the precision that a model's own is held against: half precision against float32, anything wider against bfloat16."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16


def _worst(found: Sequence[Measured], quantity: Quantity) -> float:
    values = np.concatenate([getattr(one, quantity.table) for one in found])[:, :, _NAMES[quantity.table].index(quantity.name)]
    measured = ~np.isnan(values)
    # of absolute values: what has a sign may cancel over a few documents, by luck
    means = np.where(measured, np.abs(values), 0.0).sum(0) / np.maximum(measured.sum(0), 1)
    return float(means.max())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(keys: set[tuple[Level, str]]) -> str:
    return ", ".join(sorted(".".join(key) for key in keys))
