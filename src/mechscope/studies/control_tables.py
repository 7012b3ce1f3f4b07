"""A fine-tuned model beside its controls, as tables: `controls`, and the tables of a difference once more with a row for every model.

Every model is measured by the functions that measure the tuned one (`mechscope.difference`), against the same base and on the same documents, so a row
of `control_heads` is what `heads` of a run on that model says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from mechscope.choices import ControlKind
from mechscope.data.prompt import Encoded
from mechscope.difference import SmallestEffects, difference
from mechscope.instrument import Execution
from mechscope.subject import Pair

MEASURED = ("heads", "layers", "outputs", "weights")
"""Tables of a difference that are made for every model: `control_heads` and so on."""


@dataclass(frozen=True)
class Control:
    """Another training of the same base.

    Attributes:
        name: What it is called: the last part of its source, or all of it where two would share that.
        source: Hub id, directory or adapter.
        kind: What it was trained on, beside the tuned model.
        seed: Its training's seed, or the number of a draw of noise; None where it is not known.
    """

    name: str
    source: str
    kind: ControlKind
    seed: int | None


def control_tables(
    controls: Iterable[tuple[Control, Pair]],
    encoded: Encoded,
    *,
    known: Mapping[str, Mapping[str, pd.DataFrame]] | None = None,
    gini: bool = False,
    geometry_documents: int = 300,
    same_input_documents: int = 32,
    smallest: SmallestEffects | None = None,
    execution: Execution = Execution(),
) -> dict[str, pd.DataFrame]:
    """Measure models against the same base on the same documents.

    Args:
        controls: What each is, and the base beside it; one pair is held at a time. The tuned model itself is the first.
        encoded: The documents.
        known: Tables (`MEASURED`) of models that were measured on these documents already, by name.
        gini: As for `difference`.
        geometry_documents: As for `difference`.
        same_input_documents: As for `difference`.
        smallest: As for `difference`.
        execution: Tokens of a batch, seed, progress.

    Returns:
        `controls` (one row per model), and `control_heads`, `control_layers`, `control_outputs`, `control_weights`: the tables of a difference with the
        columns `control`, `kind` (`control_kind` where matrices have a kind of their own) and `seed`. Of noise only the first draw's
        weights are decomposed: another draw's spectrum is the same but for chance.
    """
    known = known or {}
    models: list[dict[str, Any]] = []
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in MEASURED}
    drawn = False
    for control, pair in controls:
        tables = known.get(control.name)
        if tables is None:
            whole = difference(
                pair,
                encoded,
                gini=gini,
                # selections of controls are not resampled
                replicates=0,
                geometry_documents=geometry_documents,
                same_input_documents=same_input_documents,
                smallest=smallest,
                spectra=not (control.kind == "noise" and drawn),
                execution=_told_of(control, execution),
            )
            tables = {name: getattr(whole, name) for name in MEASURED}
        drawn |= control.kind == "noise"
        named = {"control": control.name, "kind": control.kind, "seed": control.seed}
        for name, table in tables.items():
            parts[name].append(beside_columns(table, named))
        models.append({**named, "source": control.source, **_whole(tables)})
    found = {f"control_{name}": pd.concat(tables, ignore_index=True) for name, tables in parts.items()}
    return {"controls": pd.DataFrame(models).astype({"seed": "Int64"}), **found}


def beside_columns(table: pd.DataFrame, named: Mapping[str, Any]) -> pd.DataFrame:
    """Return a table with the columns that say which control it is of; its kind is `control_kind` where the table has kinds of its own."""
    kind = "control_kind" if "kind" in table else "kind"
    return table.assign(control=named["control"], **{kind: named["kind"]}, seed=named["seed"]).astype({"seed": "Int64"})


def of_each(tables: Mapping[str, pd.DataFrame]) -> Iterator[tuple[dict[str, Any], list[pd.DataFrame]]]:
    """Yield of every model what it is (`control`, `kind`, `seed`) and its rows of each of some tables of controls."""
    names = ["control", "kind", "seed"]
    first = next(iter(tables.values()))
    for named in first[names].drop_duplicates().to_dict("records"):
        yield (
            {str(key): value for key, value in named.items()},
            [table[table["control"] == named["control"]].drop(columns=names) for table in tables.values()],
        )


def _whole(tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Return a model's numbers as a whole: what training did to the loss on summaries, and to all weights."""
    outputs, weights = tables["outputs"], tables["weights"]
    on_summaries = outputs[outputs["rows"] == "summary"]
    return {
        "n": int(on_summaries["n"].iloc[0]),
        **{name: float(on_summaries[name].iloc[0]) for name in ("loss_change", "loss_change_low", "loss_change_high")},
        "weight_change": float(np.linalg.norm(weights["change"]) / np.linalg.norm(weights["norm_base"])),
    }


def _told_of(control: Control, execution: Execution) -> Execution:
    """Return how to work on a control: its name stands before what is told of the work."""
    if execution.progress is None:
        return execution
    progress = execution.progress
    return replace(execution, progress=lambda label, done, total: progress(f"{control.name}: {label}", done, total))
