"""A fine-tuned model beside its controls, as tables: `controls`, `control_heads` and `control_layers`.

Only what claims and figures about controls read is measured: attention's KL and entropy change, the turn of the residual stream, the loss. Everything
else about the tuned model is in `heads` and `layers`, over all documents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from mechscope import ranks
from mechscope.choices import ControlKind
from mechscope.data.prompt import Batch, Encoded, batches
from mechscope.difference import Measured
from mechscope.difference.lockstep import HEAD_MEASURES, LAYER_MEASURES, OUTPUT_MEASURES, ROWS, launch
from mechscope.difference.one_pass import chosen
from mechscope.instrument import Execution
from mechscope.instrument.memory import each
from mechscope.stats.inference import Estimate, estimate
from mechscope.stats.moments import Moments
from mechscope.subject import Pair
from mechscope.subject.noise import relative_change

_HEADS = ("kl_base_tuned", "entropy_change")
_LAYERS = ("kl_base_tuned", "entropy_change", "cosine_distance")
_ENDS = {"": "mean", "_low": "low", "_high": "high"}


@dataclass(frozen=True)
class Control:
    """Another training of the same base.

    Attributes:
        name: What it is called: the last part of its source, or all of it where two would share that.
        source: Hub id, directory or adapter.
        kind: What it was trained on, beside the tuned model.
        seed: Its training's seed; None where it is not known.
    """

    name: str
    source: str
    kind: ControlKind
    seed: int | None


def control_tables(
    controls: Iterable[tuple[Control, Pair]], encoded: Encoded, *, execution: Execution = Execution()
) -> dict[str, pd.DataFrame]:
    """Measure models against the same base on the same documents.

    Args:
        controls: What each is, and the base beside it; one pair is held at a time. The tuned model itself is the first.
        encoded: The documents.
        execution: Tokens of a batch, progress.

    Returns:
        `controls` (one row per model), `control_heads` and `control_layers` (the same with its heads and layers, per kind of query rows).
    """
    found: dict[str, list[pd.DataFrame]] = {"controls": [], "control_heads": [], "control_layers": []}
    for control, pair in controls:
        execution.told(f"comparing with {control.name}", 0, len(encoded))
        values = _values(pair, encoded, execution)
        named: dict[str, Any] = {"control": control.name, "kind": control.kind}
        heads = _heads(values["heads"])
        found["control_heads"].append(heads.assign(**named))
        found["control_layers"].append(_layers(values["layers"], heads).assign(**named))
        loss = estimate(_moments(values["outputs"]))
        summary = ROWS.index("summary")
        row = {
            **named,
            "seed": control.seed,
            "source": control.source,
            "n": int(loss.n[summary, 0]),
            **{f"loss_change{end}": float(getattr(loss, name)[summary, 0]) for end, name in _ENDS.items()},
            "weight_change": relative_change(pair),
        }
        found["controls"].append(pd.DataFrame([row]).astype({"seed": "Int64"}))
    return {name: pd.concat(tables, ignore_index=True) for name, tables in found.items()}


def _values(pair: Pair, encoded: Encoded, execution: Execution) -> dict[str, np.ndarray]:
    """Return every document's means, in the order of the documents; ranks share the batches."""
    tokens = execution.tokens_per_batch or chosen({"": pair}, encoded)
    # padding on the right is seen by nothing, so any token will do
    own = ranks.own(batches(encoded.examples, tokens_per_batch=tokens, pad_id=0))
    wanted = {"heads": (HEAD_MEASURES, _HEADS), "layers": (LAYER_MEASURES, _LAYERS), "outputs": (OUTPUT_MEASURES, ("loss_change",))}
    found: dict[str, dict[str, np.ndarray]] = {}
    for measured in each(partial(_measured, pair), own):
        parts = {name: getattr(measured, name)[:, :, [known.index(one) for one in names]] for name, (known, names) in wanted.items()}
        found |= {document: {name: part[at] for name, part in parts.items()} for at, document in enumerate(measured.ids)}
    for others in ranks.exchange(found):
        found |= others
    return {name: np.stack([found[example.id][name] for example in encoded.examples]) for name in wanted}


def _measured(pair: Pair, batch: Batch) -> Measured:
    """Compare two models on a batch, without pooled states and without what takes further passes."""
    return launch([pair], batch, sample=(), same_input=[()])[0].fetch()


def _moments(values: np.ndarray) -> Moments:
    moments = Moments(values.shape[1:])
    moments.update_many(values)
    return moments


def _heads(values: np.ndarray) -> pd.DataFrame:
    """Return one row per kind of rows, layer and head, from ``(document, rows, measure, layer, head)``."""
    of = estimate(_moments(values))
    layer, head = (index.ravel() for index in np.indices(values.shape[3:]))
    tables = []
    for at, rows in enumerate(ROWS):
        places = {"rows": rows, "layer": layer, "head": head, "component": [f"a{one}.h{two}" for one, two in zip(layer, head, strict=True)]}
        tables.append(pd.DataFrame({**places, **_columns(of, _HEADS, at)}))
    return pd.concat(tables, ignore_index=True)


def _layers(values: np.ndarray, heads: pd.DataFrame) -> pd.DataFrame:
    """Return one row per kind of rows and layer, from ``(document, rows, measure, layer)`` and the heads' table."""
    of = estimate(_moments(values))
    change = heads["entropy_change"]
    focused = heads.assign(focused=(change < 0).where(change.notna())).groupby(["rows", "layer"])["focused"].mean()
    tables = []
    for at, rows in enumerate(ROWS):
        layers = list(range(values.shape[-1]))
        shares = [float(focused[rows, layer]) for layer in layers]
        tables.append(pd.DataFrame({"rows": rows, "layer": layers, **_columns(of, _LAYERS, at), "share_focused": shares}))
    return pd.concat(tables, ignore_index=True)


def _columns(of: Estimate, names: tuple[str, ...], rows: int) -> dict[str, np.ndarray]:
    columns = {"n": of.n[rows, 0].ravel()}
    for at, name in enumerate(names):
        columns[name] = of.mean[rows, at].ravel()
        columns[f"{name}_se"] = of.standard_error[rows, at].ravel()
    return columns
