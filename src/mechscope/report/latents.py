"""Latents as sections show them: the columns of their examples, and how these and the tokens that they write stand in a table."""

from __future__ import annotations

import pandas as pd

from mechscope.report.marks.tables import Table
from mechscope.report.section import Column, number

# examples that stand beside a latent
_SHOWN = 3

PROMOTES = "tokens whose logits it raises most, by what it writes, straight through the final norm and the unembedding"
SUPPRESSES = "tokens whose logits it lowers most"
EXAMPLES: dict[str, Column | str] = {
    "place": "the place among its examples, from 1",
    "value": number("its value"),
    "text": "the text's id",
    "position": "the token's place in the text, from 0",
    "before": "what stands before the token",
    "token": "the token",
    "after": "what stands behind it",
}


def with_examples(listed: pd.DataFrame, examples: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Return a table of latents with the column `examples`: the first of those of the same `keys`, in a line."""
    texts = {
        key: " ⋯ ".join(f"{row.before}⟦{row.token}⟧{row.after}" for row in own.sort_values("place").head(_SHOWN).itertuples())
        for key, own in examples.groupby(keys, sort=False)
    }
    return listed.assign(examples=[texts.get(tuple(row), "") for row in listed[keys].itertuples(index=False)])


def in_words(view: Table) -> Table:
    """Add what latents promote and suppress, and their examples, to a table of them."""
    view = view.token_lists("promotes", "promotes", most=6).token_lists("suppresses", "suppresses", most=4)
    return view.texts("examples", "most active at ⟦token⟧")
