"""Waterfalls of logit attribution end where the sums end."""

from __future__ import annotations

import itertools

import pandas as pd
import pytest

from mechscope.report.sections.attribution import PARTS
from tests.report import synthetic_reading as invented
from tests.report.drawn import figures_of, named, rows_of


def test_waterfall_ends_at_the_sum_and_every_bar_begins_where_the_last_ended(tables: dict[str, pd.DataFrame]) -> None:
    table, drawn = tables["logit_attribution"], figures_of(tables, "attribution")
    for by in ("components", "layers"):
        for i, model in enumerate(invented.PAIR):
            steps = rows_of(named(drawn, f"attribution-{by}-{i + 1}"), "start")
            total = table.loc[table["model"] == model, "effect"].sum()
            assert steps[-1] | {"part": "total", "way": "total", "start": 0} == steps[-1]
            assert steps[-1]["end"] == pytest.approx(total, rel=1e-5)
            assert steps[0]["start"] == 0
            for before, after in itertools.pairwise(steps[:-1]):
                assert after["start"] == pytest.approx(before["end"], abs=1e-5)
            assert sum(step["effect"] for step in steps[:-1]) == pytest.approx(total, abs=1e-4)


def test_base_and_tuned_have_the_same_parts_in_the_same_order_on_the_same_axis(tables: dict[str, pd.DataFrame]) -> None:
    base, tuned = (named(figures_of(tables, "attribution"), f"attribution-components-{i}") for i in (1, 2))
    assert [row["part"] for row in rows_of(base, "start")] == [row["part"] for row in rows_of(tuned, "start")]
    assert len(rows_of(base, "start")) == PARTS + 2
    domains = [
        [layer["encoding"]["x"]["scale"]["domain"] for layer in figure.spec["layer"] if layer["mark"]["type"] == "bar"]
        for figure in (base, tuned)
    ]
    assert domains[0] == domains[1]


def test_interval_of_a_bar_stands_at_its_end(tables: dict[str, pd.DataFrame]) -> None:
    table = tables["logit_attribution"].query("model == 'base'").set_index("component")
    for step in rows_of(named(figures_of(tables, "attribution"), "attribution-components-1"), "start")[:-2]:
        own = table.loc[step["part"]]
        assert step["low"] - step["end"] == pytest.approx(own["low"] - own["effect"], abs=1e-4)
        assert step["high"] - step["end"] == pytest.approx(own["high"] - own["effect"], abs=1e-4)


def test_layers_of_the_waterfall_are_sums_of_heads_and_bias_and_of_the_mlp(tables: dict[str, pd.DataFrame]) -> None:
    table = tables["logit_attribution"].query("model == 'base'")
    steps = {row["part"]: row["effect"] for row in rows_of(named(figures_of(tables, "attribution"), "attribution-layers-1"), "start")}
    for layer in range(4):
        own = table[table["layer"] == layer]
        attention = own["kind"].isin(["head", "attention bias"])
        assert steps[f"attention {layer}"] == pytest.approx(own.loc[attention, "effect"].sum(), rel=1e-4)
        assert steps[f"MLP {layer}"] == pytest.approx(own.loc[~attention, "effect"].sum(), rel=1e-4)


def test_change_walks_from_the_base_total_to_the_tuned_total(tables: dict[str, pd.DataFrame]) -> None:
    table, steps = tables["logit_attribution"], rows_of(named(figures_of(tables, "attribution"), "attribution-change"), "start")
    totals = table.groupby("model")["effect"].sum()
    assert (steps[0]["part"], steps[-1]["part"]) == ("base, total", "tuned, total")
    assert steps[0]["end"] == pytest.approx(totals["base"], rel=1e-5)
    assert steps[1]["start"] == pytest.approx(totals["base"], rel=1e-5)
    assert steps[-2]["end"] == pytest.approx(steps[-1]["end"], rel=1e-5)
    assert steps[-1]["end"] == pytest.approx(totals["tuned"], rel=1e-5)
