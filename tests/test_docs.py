"""The examples of the documentation run as they stand, one after another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"


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
    assert (last["component"], last["positions"]) == ("r5", "last")
    assert abs(last["normalised"] - 1) < 1e-3


def test_every_example_of_the_page_on_circuits_runs() -> None:
    text = (DOCS / "circuits.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.S | re.M)
    assert len(blocks) >= 5
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"circuits.md, example {number + 1}", "exec"), names)
    assert str(names["scores"].cost) == "6 forward, 5 backward passes"
    assert names["graph"].names[:2] == ("input->a0.h0<q>", "input->a0.h1<q>")
    # the two models of the example are one: every edge scores the same, and nothing is gained
    assert (names["overlap"]["jaccard"] == 1).all()
    assert (names["shift"]["shift"] == 0).all()
    assert names["gain"].base == names["gain"].tuned
    # all edges are the model
    assert abs(names["curve"].table["faithfulness"].iloc[-1] - 1) < 1e-4
