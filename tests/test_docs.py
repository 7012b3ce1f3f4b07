"""The examples of the documentation run as they stand, one after another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.slow
def test_every_example_of_the_page_on_interventions_runs() -> None:
    text = (DOCS / "interventions.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.S | re.M)
    assert len(blocks) >= 9
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"interventions.md, example {number + 1}", "exec"), names)
    assert names["restored"].table["positions"].unique().tolist() == ["fact", "last"]
    # at the end of the last layer the clean value is everything
    last = names["restored"].table.iloc[-1]
    assert (last["component"], last["positions"]) == ("resid5", "last")
    assert abs(last["normalised"] - 1) < 1e-3


@pytest.mark.slow
def test_every_example_of_the_page_on_circuits_runs() -> None:
    text = (DOCS / "circuits.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.S | re.M)
    assert len(blocks) >= 5
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"circuits.md, example {number + 1}", "exec"), names)
    assert str(names["scores"].cost) == "6 forward, 5 backward passes"
    assert names["graph"].names[:2] == ("embed->a0.h0<q>", "embed->a0.h1<q>")
    # the two models of the example are one: every edge scores the same, and nothing is gained
    assert (names["overlap"]["jaccard"] == 1).all()
    assert (names["shift"]["shift"] == 0).all()
    assert names["gain"].base == names["gain"].tuned
    # all edges are the model
    assert abs(names["curve"].table["faithfulness"].iloc[-1] - 1) < 1e-4


@pytest.mark.slow
def test_every_example_of_the_page_on_reading_runs(tmp_path: Path) -> None:
    text = (DOCS / "reading.md").read_text(encoding="utf-8").replace("/tmp/", f"{tmp_path}/")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.S | re.M)
    assert len(blocks) >= 8
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"reading.md, example {number + 1}", "exec"), names)
    # read at the last layer, the lens is the model
    last = names["reading"].summary(rows="target").set_index("component").loc["resid5"]
    assert last["kl"] < 1e-5
    assert last["agreement"] == 1
    assert abs(names["parts"].effects.sum(1) - names["parts"].values).max() < 1e-4
    # twenty steps of training already bring the lens nearer to the model
    plain, tuned = (names[name].summary(rows="all").set_index("component")["kl"] for name in ("reading", "tuned_reading"))
    assert tuned["resid1"] < plain["resid1"]
    has = names["table"][names["table"]["has_role"]]
    assert set(has.loc[has["role"] == "induction", "component"]) == {"a1.h0", "a1.h1", "a1.h2", "a1.h3"}
