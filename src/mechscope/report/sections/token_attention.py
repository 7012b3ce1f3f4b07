"""Where chosen heads look in a few texts, token by token."""

from __future__ import annotations

from mechscope.report.marks.token_attention import token_attention
from mechscope.report.section import Panel, Section, Tables, number, table

_TEXT = "id of the text"

TABLES = {
    "attention_tokens": table(
        "One row per text and position.",
        text=_TEXT,
        position="position, from 0",
        token="token there",
        segment="part of the text: document, summary, or text (neither)",
    ),
    "attention_edges": table(
        "One row per model, text, head, query and key: of every query the eight strongest keys, from a weight of 0.01.",
        model="base, tuned or model",
        text=_TEXT,
        component="the head, such as a3.h5",
        query="position of the token that attends",
        key="position of the token that it attends to",
        weight=number("attention of the query to the key", "share"),
    ),
}


def _panels(tables: Tables) -> list[Panel]:
    held, dropped, missing = token_attention(tables), 0, ""
    if held is None:
        missing = next((name for name in TABLES if name not in tables), "attention_tokens of these texts")
    else:
        dropped = held["dropped"]
    return [Panel("token_attention", {"name": "token-by-token", "dropped": dropped, "missing": missing}, held, scripts=("reading.js",))]


SECTION = Section(
    id="token-attention",
    heading="Attention, token by token",
    intro=(
        "Where a head looks, token by token. Hover over a token to see which earlier tokens it attends to; click to keep it, or focus a text and move with "
        "the arrow keys. Only the strongest keys of every query are kept."
    ),
    tables=TABLES,
    panels=_panels,
)
