"""What a dashboard's script needs: an index of latents by column, and of every latent its examples, histogram, tokens and relations, packed.

An example of 25 tokens takes 75 bytes: two for each token's number among all spelled ones, one for its activation as a share of the latent's largest in steps
of 1/255 (what is active at all is never 0). The script unpacks a latent when it is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from mechscope.report.marks.packed import Tokens, whole
from mechscope.report.marks.tables import line
from mechscope.report.theme import label, name_of

# the darkest shade, that of a latent's largest activation
_FULL = 255


def dashboard(name: str, tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Return a dictionary's dashboard as plain JSON values.

    Args:
        name: The dictionary.
        tables: The run's tables: `dashboard_latents`, and where they are there `dashboard_examples`, `dashboard_tokens`, `dashboard_correlations`,
            `dashboard_chance`.
    """
    latents = _own(tables, "dashboard_latents", name)
    at = {component: row for row, component in enumerate(latents["component"])}
    spelling = tables.get("dashboard_tokens")
    spelled = Tokens()
    texts = dict(zip(spelling["token"], spelling["text"], strict=True)) if spelling is not None else {}
    first = latents.iloc[0]
    columns = {
        "name": [label(component) for component in latents["component"]],
        **{column: _rounded(latents[column]) for column in ("active", "density", "share", "largest", "effect") if column in latents},
    }
    if "class" in latents:
        columns["class"] = [name_of(each) if isinstance(each, str) and each else "" for each in latents["class"]]
    if "explanation" in latents:
        columns["explanation"] = [line(each) if isinstance(each, str) else "" for each in latents["explanation"]]
    return {
        "dictionary": label(name),
        "tokens_read": int(first["tokens"]),
        "texts_read": int(first["n"]),
        "columns": columns,
        "bars": {"first": [int(each) for each in latents["bar"]], "counts": [[int(n) for n in counts] for counts in latents["counts"]]},
        **{column: _lists(latents[column], spelled) for column in ("promotes", "suppresses")},
        "examples": _examples(_own(tables, "dashboard_examples", name), at, latents["largest"].to_numpy(dtype=float), texts, spelled),
        "related": _related(_own(tables, "dashboard_correlations", name), at),
        "chance": _chance(_own(tables, "dashboard_chance", name), at),
        # last: all that is spelled
        "tokens": spelled.listed,
    }


def _own(tables: Mapping[str, pd.DataFrame], table: str, name: str) -> pd.DataFrame:
    whole_table = tables.get(table)
    return pd.DataFrame() if whole_table is None else whole_table[whole_table["dictionary"] == name]


def _rounded(values: pd.Series) -> list[float | None]:
    return [None if pd.isna(value) else float(f"{float(value):.4g}") for value in values]


def _lists(lists: pd.Series, spelled: Tokens) -> dict[str, Any]:
    """Return lists of tokens one behind another, and how long each is."""
    counts = [len(each) for each in lists]
    every = [token for each in lists for token in each]
    return {"counts": whole(np.array(counts)), "tokens": whole(spelled.add(np.array(every, dtype=object)))}


def _examples(
    examples: pd.DataFrame, at: Mapping[str, int], largest: np.ndarray, texts: Mapping[int, str], spelled: Tokens
) -> dict[str, Any] | None:
    """Return the examples latent after latent: how many each has, and of every one its group, place in its text, length, and token after token."""
    examples = examples[examples["component"].isin(at)] if len(examples) else examples
    if examples.empty:
        return None
    latent = examples["component"].map(at).to_numpy(dtype=np.int64)
    order = np.lexsort((examples["place"], examples["decile"], latent))
    examples, latent = examples.iloc[order], latent[order]
    lengths = np.array([len(ids) for ids in examples["ids"]], dtype=np.int64)
    values = np.concatenate([np.asarray(each, dtype=float) for each in examples["values"]])
    share = values / np.repeat(largest[latent], lengths)
    # what is active at all is seen
    levels = np.where(values > 0, np.clip(np.round(_FULL * share), 1, _FULL), 0)
    ids = np.concatenate([np.asarray(each, dtype=np.int64) for each in examples["ids"]])
    distinct, places = np.unique(ids, return_inverse=True)
    numbers = spelled.add(np.array([texts.get(int(token), f"#{token}") for token in distinct], dtype=object))
    named, text = pd.factorize(examples["text"])
    return {
        "counts": whole(np.bincount(latent, minlength=len(at))),
        "decile": whole(examples["decile"].to_numpy(dtype=float)),
        "position": whole(examples["position"].to_numpy(dtype=float)),
        "peak": whole((examples["position"] - examples["start"]).to_numpy(dtype=float)),
        "lengths": whole(lengths),
        "value": _rounded(examples["value"]),
        "text": whole(named),
        "texts": [label(each) for each in text],
        "tokens": whole(numbers[places]),
        "levels": whole(levels),
    }


def _related(related: pd.DataFrame, at: Mapping[str, int]) -> list[list[list[Any]]]:
    """Return what goes with each latent: kind, name, correlation."""
    found: list[list[list[Any]]] = [[] for _ in at]
    for row in related.to_dict("records"):
        if row["component"] in at:
            found[at[row["component"]]].append([str(row["kind"]), label(row["other"]), float(f"{row['correlation']:.3g}")])
    return found


def _chance(chance: pd.DataFrame, at: Mapping[str, int]) -> list[dict[str, float]]:
    """Return of each latent the largest correlation with shuffled tokens, by kind."""
    found: list[dict[str, float]] = [{} for _ in at]
    for row in chance.to_dict("records"):
        if row["component"] in at:
            found[at[row["component"]]][str(row["kind"])] = float(f"{row['shuffled']:.3g}")
    return found
