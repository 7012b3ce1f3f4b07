"""What the page's script needs to show where chosen heads look, token by token, in one model or in base and tuned side by side.

Of every query only its strongest keys are known (the table keeps at most eight, of weight 0.01 and more), so a head of a text of 1,024 tokens is at
most some 8,000 edges. They are packed as in `packed`: per query the number of its keys, then keys and weights, strongest first. A page holds at most
`EDGES` of them; it says of how many heads the Parquet table has more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from mechscope.report.marks.packed import POWER, Tokens, packed, segment_name, whole
from mechscope.report.theme import label, name_of

EDGES = 300_000
"""Edges (query, key) of all heads, texts and models that a page holds: 1.6 MB."""


def token_attention(tables: Mapping[str, pd.DataFrame]) -> dict[str, Any] | None:
    """Return the attention of all texts, and the number of heads left out (`dropped`), as plain JSON values.

    None where there is none or its tokens are not known.

    Args:
        tables: The run's tables: `attention_edges` with the tokens of `attention_tokens`, and the heads' roles where `head_roles` is there.
    """
    edges, tokens = tables.get("attention_edges"), tables.get("attention_tokens")
    if edges is None or tokens is None:
        return None
    models = list(dict.fromkeys(edges["model"]))
    left, texts, dropped, spelled = EDGES, [], 0, Tokens()
    roles = _roles(tables.get("head_roles"))
    for text, own in tokens.groupby("text", sort=False):
        own = own.drop_duplicates("position").sort_values("position", kind="stable")
        heads, of_text = [], edges[edges["text"] == text]
        for component, part in of_text.groupby("component", sort=False):
            part = part[part["query"].isin(own["position"]) & part["key"].isin(own["position"])]
            if len(part) > left:
                dropped += 1
                continue
            left -= len(part)
            name = label(component)
            heads.append({"name": name, "role": roles.get(name, ""), "models": _weights(part, models, own["position"].to_numpy())})
        if heads:
            token, segment = whole(spelled.add(own["token"])), whole(spelled.add(own["segment"].map(segment_name)))
            texts.append({"text": label(text), "n": len(own), "token": token, "segment": segment, "heads": heads})
    if not texts:
        return None
    return {"tokens": spelled.listed, "models": [name_of(model) for model in models], "texts": texts, "dropped": dropped, "power": POWER}


def _weights(edges: pd.DataFrame, models: list[Any], positions: np.ndarray) -> list[dict[str, Any]]:
    """Return one head's edges per model: the number of keys of every query, keys and weights, strongest first."""
    where, by_model = pd.Series(np.arange(len(positions)), index=positions), []
    for model in models:
        own = edges[edges["model"] == model]
        own = own.assign(at=own["query"].map(where)).sort_values(["at", "weight", "key"], ascending=[True, False, True], kind="stable")
        per_query = np.bincount(own["at"].to_numpy(dtype=np.int64), minlength=len(positions))
        by_model.append(
            {
                "counts": whole(per_query),
                "keys": whole(own["key"].map(where).to_numpy(dtype=float)),
                "weights": packed(own["weight"].to_numpy(dtype=float)),
            }
        )
    return by_model


def _roles(roles: pd.DataFrame | None) -> dict[str, str]:
    """Return what the heads that have a role are, in words, by name."""
    if roles is None:
        return {}
    having = roles[roles["has_role"]]
    return {
        label(component): ", ".join(dict.fromkeys(name_of(role) for role in part["role"]))
        for component, part in having.groupby("component", sort=False)
    }
