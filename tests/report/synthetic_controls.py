"""Invented tables of a tuned model beside its controls: the tuned model's own, larger or smaller."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

MODELS = (
    ("tuned", "tuned", 1.0),
    ("seed 1", "seed", 0.9),
    ("mixed 0", "shuffled", 0.5),
    ("mixed 1", "shuffled", 0.6),
    ("noise 0", "noise", 0.02),
    ("noise 1", "noise", 0.03),
)
"""Name, kind, and how many times the tuned model's changes a model's are."""
CHANGES = ("change", "kl_base_tuned", "kl_tuned_base", "cosine_distance")
"""What stands in the names of columns of changes, which vanish where nothing changed."""

SPECTRA = ("effective_rank", "stable_rank", "intruders")


def controls_tables(tables: Mapping[str, pd.DataFrame], *, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Return `controls`, `control_heads` and so on of six models, from the tables of the tuned one."""
    random = np.random.default_rng(seed)
    made: dict[str, list[pd.DataFrame]] = {name: [] for name in ("heads", "layers", "outputs", "weights", "selection")}
    models = []
    for at, (name, kind, times) in enumerate(MODELS):
        number = at if kind != "shuffled" else None
        models.append(
            {
                "control": name,
                "kind": kind,
                "seed": number,
                "source": f"runs/{name}",
                "n": 48,
                "loss_change": -0.1 * times,
                "loss_change_low": -0.2 * times,
                "loss_change_high": 0.0,
                "weight_change": 0.01 if kind != "noise" else 0.01001,
            }
        )
        for table, parts in made.items():
            own = _of_model(tables[table], times, random).assign(control=name, seed=number, **{_kind_of(table): kind})
            if table == "weights" and name == "noise 1":
                # of noise only the first draw's spectra are computed
                own[[column for column in map(str, own) if column.startswith("sv") or column in SPECTRA]] = float("nan")
            parts.append(own)
    return {
        "controls": pd.DataFrame(models).astype({"seed": "Int64"}),
        **{f"control_{name}": pd.concat(parts, ignore_index=True).astype({"seed": "Int64"}) for name, parts in made.items()},
    }


def _kind_of(table: str) -> str:
    return "control_kind" if table in ("weights", "selection") else "kind"


def _of_model(table: pd.DataFrame, times: float, random: np.random.Generator) -> pd.DataFrame:
    """Return a table whose changes are so many times as large, each a little otherwise."""
    table = table.drop(columns=["frequency", "n_resamples"], errors="ignore").copy()
    if "rank" in table:
        table["chosen"] = table["chosen"] ^ (random.random(len(table)) < 0.2 * (times < 1))
    else:
        spread = np.exp(0.1 * random.normal(size=len(table)) * (times < 1))
        for column in table.columns:
            if any(word in column for word in CHANGES) and table[column].dtype == float and not column.endswith(("_p", "_q")):
                table[column] *= times * spread
    if "n" in table:
        table["n"] = 48
    return table
