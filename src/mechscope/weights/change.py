"""Which heads did fine-tuning change most, by what they do: ‖ΔW_OV‖ / ‖W_OV‖ and ‖ΔW_QK‖ / ‖W_QK‖.

A circuit is a product, so this is not the change of its matrices (`difference.compare_weights` has that): W_V and W_O can both turn without the head doing
anything else, and a change of a norm's gain counts as one of the heads behind it. What the change is about, in tokens, `ov_tokens`, `qk_tokens` and
`singular_tokens` show for the same pair.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import torch

from mechscope.subject.components import Components, chosen_heads
from mechscope.subject.pair import Pair
from mechscope.weights.bilinear import Bilinear
from mechscope.weights.forms import Forms
from mechscope.weights.rotary import is_bilinear

_SIZES = ("norm", "change", "relative", "place")
CHANGE_COLUMNS = ("layer", "head", "component", *(f"{matrix}_{size}" for matrix in ("ov", "qk") for size in _SIZES))


@torch.no_grad()
def head_changes(pair: Pair, *, heads: Components | str | None = None, offset: int = 0) -> pd.DataFrame:
    """Rank heads by how much their circuits changed.

    Args:
        pair: The two models; base and tuned may be one model without and with its adapter.
        heads: Which heads; by default all.
        offset: Query position less key position at which W_QK of rotary families is compared.

    Returns:
        One row per head, the largest `ov_relative` first: `layer`, `head`, `component`, `ov_norm` (of the base), `ov_change` (‖ΔW_OV‖_F), `ov_relative`,
        `ov_place` (from 1), `qk_norm`, `qk_change`, `qk_relative`, `qk_place`. Norms' gains are folded in. `qk_*` are NaN, and the place missing, where
        queries and keys have norms of their own.

    Raises:
        SettingsError: Heads or the offset do not fit the model.
        ModelError: Heads cannot be taken apart.
    """
    base, tuned = Forms(pair.base), Forms(pair.tuned)
    rows: list[dict[str, Any]] = []
    bilinear: dict[int, bool] = {}
    for layer, head in chosen_heads(pair.base.anatomy, heads):
        if layer not in bilinear:
            bilinear[layer] = is_bilinear(pair.base, layer) and is_bilinear(pair.tuned, layer)
        row = {"layer": layer, "head": head, "component": f"a{layer}.h{head}", **_sizes("ov", base.ov(layer, head), tuned.ov(layer, head))}
        if bilinear[layer]:
            row |= _sizes("qk", *(forms.qk(layer, head, offset=offset) for forms in (base, tuned)))
        else:
            row |= dict.fromkeys(("qk_norm", "qk_change", "qk_relative"), math.nan)
        rows.append(row)
    table = pd.DataFrame(rows)
    for matrix in ("ov", "qk"):
        table[f"{matrix}_place"] = table[f"{matrix}_relative"].rank(ascending=False, method="first").astype("Int64")
    return table[list(CHANGE_COLUMNS)].sort_values("ov_place").reset_index(drop=True)


def _sizes(matrix: str, base: Bilinear, tuned: Bilinear) -> dict[str, float]:
    norm, change = base.norm(), tuned.minus(base).norm()
    relative = 0.0 if change == 0 else change / norm if norm > 0 else math.nan
    return {f"{matrix}_norm": norm, f"{matrix}_change": change, f"{matrix}_relative": relative}
