"""What the tests ask of circuits, and how they read it."""

from __future__ import annotations

from typing import Any

import pandas as pd

from mechscope.data.newsroom import newsroom_model_path

MODEL = str(newsroom_model_path())
QUICK: dict[str, Any] = {"pairs": "newsroom:what", "limit": 12, "random_circuits": 2, "circuit_resamples": 4, "criteria": False}


def measure(table: pd.DataFrame, name: str) -> float:
    return float(table.loc[table["measure"] == name, "value"].iloc[0])
