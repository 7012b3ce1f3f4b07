"""From accumulated statistics to tidy tables: heads, layers, outputs.

One row per head (or layer, or output) and kind of query rows. Means are over documents; every change carries a standard error, a 95 % interval by
Student's t, and per head a p and a Benjamini–Hochberg q over all heads of that kind of rows. Quantities with a smallest effect of interest have a verdict,
corrected over all heads (layers) of that kind of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from mechscope.difference.accumulate import Accumulated
from mechscope.difference.lockstep import GINI_MEASURES, LAYER_MEASURES, OUTPUT_MEASURES, ROWS
from mechscope.difference.smallest import QUANTITIES, Level, SmallestEffects
from mechscope.stats.geometry import cka, rsa
from mechscope.stats.inference import Estimate, benjamini_hochberg, estimate
from mechscope.stats.ranking import layer_score
from mechscope.stats.skewness import ThirdMoments
from mechscope.stats.verdicts import verdicts

# columns in the order of the contract (issue: "others build on them")
_HEADS = (
    "entropy_base",
    "entropy_tuned",
    "entropy_change",
    "entropy_change_se",
    "entropy_change_low",
    "entropy_change_high",
    "entropy_change_p",
    "entropy_change_q",
    "relative_entropy_base",
    "relative_entropy_tuned",
    "kl_base_tuned",
    "kl_base_tuned_se",
    "kl_tuned_base",
    "kl_tuned_base_se",
    "distance_base",
    "distance_tuned",
    "sink_base",
    "sink_tuned",
    "z_cosine_distance",
    *(f"{name}{end}" for name in ("write_change", "write_change_own") for end in ("", "_se", "_low", "_high", "_n")),
)


def heads_table(
    accumulated: Accumulated, weight_change: np.ndarray, smallest: SmallestEffects | None = None, *, layers: Sequence[int]
) -> pd.DataFrame:
    """Build the table `heads`, one row per kind of rows, layer and head; `weight_change` is ``(layer, head)``, `layers` are those that attend."""
    estimates = estimate(accumulated.heads)
    names = accumulated.head_measures
    wanted = (*_HEADS, *(name for name in GINI_MEASURES if name in names))
    n_layers, n_heads = weight_change.shape
    layer, head = (index.ravel() for index in np.indices((n_layers, n_heads)))
    layer = np.array(layers)[layer]
    tables = []
    for index, rows in enumerate(ROWS):
        columns = _columns(estimates, names, index)
        columns["entropy_change_q"] = benjamini_hochberg(columns["entropy_change_p"])
        table = pd.DataFrame(
            {
                "rows": rows,
                "layer": layer,
                "head": head,
                "component": [f"a{one}.h{two}" for one, two in zip(layer, head, strict=True)],
                "n": columns["entropy_change_n"].ravel(),
                **{name: columns[name].ravel() for name in wanted},
                "weight_change": weight_change.ravel(),
                **_verdicts("heads", accumulated.heads, names, index, smallest),
            }
        )
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def layers_table(
    accumulated: Accumulated, heads: pd.DataFrame, weight_change: np.ndarray, smallest: SmallestEffects | None = None
) -> pd.DataFrame:
    """Build the table `layers`, one row per kind of rows and layer; `heads` is the heads table, `weight_change` is ``(layer,)``."""
    estimates = estimate(accumulated.layers)
    change = heads["entropy_change"]
    # a head that was not measured (no document has such rows) is neither focused nor not
    focused = heads.assign(focused=(change < 0).where(change.notna())).groupby(["rows", "layer"])["focused"].mean()
    tables = []
    for index, rows in enumerate(ROWS):
        columns = _columns(estimates, LAYER_MEASURES, index)
        layers = range(len(weight_change))
        table = pd.DataFrame(
            {
                "rows": rows,
                "layer": list(layers),
                "n": columns["kl_base_tuned_n"],
                **{name: columns[name] for name in LAYER_MEASURES[:3]},
                "share_focused": [float(focused.get((rows, layer), np.nan)) for layer in layers],
                **{name: columns[name] for name in LAYER_MEASURES[3:]},
                "cka": [_geometry(cka, accumulated, rows, layer) for layer in layers],
                "rsa": [_geometry(rsa, accumulated, rows, layer) for layer in layers],
                "weight_change": weight_change,
            }
        )
        # layers without heads have no attention to be ranked by
        table["score"] = layer_score(table[table["layer"].isin(heads["layer"])])
        bounds = {f"{name}_{end}": columns[f"{name}_{end}"] for name in LAYER_MEASURES for end in ("se", "low", "high")}
        bounds |= {f"{name}_n": columns[f"{name}_n"] for name in LAYER_MEASURES if "write_change" in name}
        bounds |= _verdicts("layers", accumulated.layers, LAYER_MEASURES, index, smallest)
        tables.append(pd.concat([table, pd.DataFrame(bounds)], axis=1))
    return pd.concat(tables, ignore_index=True)


def outputs_table(accumulated: Accumulated, smallest: SmallestEffects | None = None) -> pd.DataFrame:
    """Build the table `outputs`: next-token KL (nats) and loss (nats per token), one row per kind of predicted tokens."""
    estimates = estimate(accumulated.outputs)
    rows = []
    for index, kind in enumerate(ROWS):
        columns = {name: float(value) for name, value in _columns(estimates, OUTPUT_MEASURES, index).items()}
        row: dict[str, object] = {"rows": kind, "n": int(columns["loss_change_n"])}
        for name in ("kl_base_tuned", "kl_tuned_base"):
            row.update({key: columns[key] for key in (name, f"{name}_se", f"{name}_low", f"{name}_high")})
        row.update({name: columns[name] for name in ("loss_base", "loss_tuned")})
        row.update({key: columns[key] for key in ("loss_change", *(f"loss_change_{end}" for end in ("se", "low", "high", "p")))})
        row.update({name: found[0] for name, found in _verdicts("outputs", accumulated.outputs, OUTPUT_MEASURES, index, smallest).items()})
        rows.append(row)
    return pd.DataFrame(rows)


def _verdicts(
    table: Level, moments: ThirdMoments, names: tuple[str, ...], rows: int, smallest: SmallestEffects | None
) -> dict[str, np.ndarray]:
    """Decide of every quantity that has a smallest effect of interest whether it changed, for one kind of rows."""
    found = {}
    for quantity in QUANTITIES:
        if quantity.table == table:
            delta = float("nan") if smallest is None else smallest[table, quantity.name]
            own = moments.part((rows, names.index(quantity.name)))
            found[f"{quantity.name}_verdict"] = verdicts(own, delta, signed=quantity.signed).reshape(-1)
    return found


def _columns(estimates: Estimate, names: tuple[str, ...], rows: int) -> dict[str, np.ndarray]:
    """Name every measure's mean, standard error, interval, p and n for one kind of rows."""
    columns = {}
    for index, name in enumerate(names):
        columns[name] = estimates.mean[rows, index]
        columns[f"{name}_se"] = estimates.standard_error[rows, index]
        columns[f"{name}_low"] = estimates.low[rows, index]
        columns[f"{name}_high"] = estimates.high[rows, index]
        columns[f"{name}_p"] = estimates.p[rows, index]
        columns[f"{name}_n"] = estimates.n[rows, index]
    return columns


def _geometry(similarity: Callable[[np.ndarray, np.ndarray], float], accumulated: Accumulated, rows: str, layer: int) -> float:
    if not len(accumulated.pooled):
        return float("nan")
    return similarity(accumulated.pooled_states("base", rows, layer), accumulated.pooled_states("tuned", rows, layer))
