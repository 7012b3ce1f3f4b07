"""Attention of single heads on the page: the tables' own edges, strongest first, and what does not fit is counted."""

from __future__ import annotations

import pandas as pd
import pytest

from mechscope.report.marks import token_attention as attention_module
from mechscope.report.marks.figure import script_json
from mechscope.report.marks.token_attention import token_attention
from tests.report import synthetic_reading as invented
from tests.report.drawn import counts, numbers


def test_attention_holds_the_keys_of_every_query_strongest_first(tables: dict[str, pd.DataFrame]) -> None:
    held = token_attention(tables)
    assert held is not None
    edges = tables["attention_edges"]
    seen = 0
    for text in held["texts"]:
        for head in text["heads"]:
            for model, own in zip(held["models"], head["models"], strict=True):
                part = edges[(edges["text"] == text["text"]) & (edges["component"] == head["name"]) & (edges["model"] == model)]
                part = part.sort_values(["query", "weight"], ascending=[True, False])
                assert counts(own["counts"]).tolist() == part["query"].value_counts().reindex(range(text["n"])).fillna(0).tolist()
                assert counts(own["keys"]).tolist() == part["key"].tolist()
                assert numbers(own["weights"]) == pytest.approx(part["weight"].to_numpy(), rel=2e-3)
                seen += len(part)
    assert seen == len(edges) > 1000


def test_a_head_that_has_a_role_is_offered_with_it(tables: dict[str, pd.DataFrame]) -> None:
    held = token_attention(tables)
    assert held is not None
    having = tables["head_roles"].query("has_role")
    for head in held["texts"][0]["heads"]:
        assert set(filter(None, head["role"].split(", "))) == set(having.loc[having["component"] == head["name"], "role"])
    assert any(head["role"] for head in held["texts"][0]["heads"])


def test_heads_beyond_the_bound_are_counted(monkeypatch: pytest.MonkeyPatch, tables: dict[str, pd.DataFrame]) -> None:
    edges = tables["attention_edges"]
    monkeypatch.setattr(attention_module, "EDGES", int((edges["text"] == edges["text"].iloc[0]).sum()))
    held = token_attention(tables)
    assert held is not None
    assert sum(len(text["heads"]) for text in held["texts"]) + held["dropped"] == 6
    assert held["dropped"] >= 2


def test_attention_of_1024_tokens_weighs_little() -> None:
    edges = invented.attention_edges(("a",), 1024, ("a0.h0", "a0.h1", "a0.h2", "a0.h3"), invented.PAIR)
    held = token_attention({"attention_edges": edges, "attention_tokens": invented.lens_tokens(("a",), 1024)})
    assert len(script_json(held)) / len(edges) < 6.5
    assert len(script_json(held)) < 4e5
