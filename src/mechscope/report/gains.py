"""How the shares of a gain that sets of latents carry are said, by the sections that say them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from mechscope.report.theme import interval, percent

MAIN = "crosscoder"
"""The dictionary of the two models themselves, among all that were trained."""
BESIDE = (("other latents", "as many other latents"), ("random vectors", "random vectors of their length"))


def sets_of(carried: pd.DataFrame, change: str, comparison: str = MAIN) -> list[tuple[str, Any]]:
    """Return the rows of a dictionary's sets for one change of a model, by the names of the sets."""
    rows = carried[(carried["comparison"] == comparison) & (carried["change"] == change)]
    return [(str(row["set"]), row) for _, row in rows.iterrows()]


def share_said(row: Any) -> str:
    """Write a share as a percentage with its interval."""
    return f"{percent(row['share'])} {interval(100 * row['share_low'], 100 * row['share_high'])}".strip()


def beside_said(own: Mapping[str, Any], how: str) -> str:
    """Say what stands beside the share of a set: those of as many other latents and of random vectors, of the sets that there are."""
    # random vectors are as long as the set's own
    small = {"other latents", "random vectors"} <= set(own) and 2 * own["other latents"]["energy"] < own["random vectors"]["energy"]
    notes = {"other latents": " (which write less than half as much)"} if small else {}
    said = [f"{share_said(own[name])} {how} {what}{notes.get(name, '')}" for name, what in BESIDE if name in own]
    return f", beside {' and '.join(said)}" if said else ""
