"""The lens on the page: its grid and curves hold the tables' own numbers, and what does not fit is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mechscope.report.marks import lens_grid as grids_module
from mechscope.report.marks.figure import script_json
from mechscope.report.marks.lens_grid import CELLS, lens_grids
from mechscope.report.marks.packed import shown
from mechscope.report.theme import name_of
from tests.report import synthetic_reading as invented
from tests.report.drawn import counts, figures_of, named, numbers, page_of, rows_of, view_of, views_of
from tests.report.test_page import Page


def test_lens_grid_holds_every_cell_of_the_table(tables: dict[str, pd.DataFrame]) -> None:
    held = lens_grids(tables)
    assert held is not None
    assert held["dropped"] == 0
    table, listed = tables["lens_grid"], np.array(held["tokens"], dtype=object)
    assert len(held["grids"]) == table.groupby(["text", "lens"]).ngroups == 4
    for grid in held["grids"]:
        assert grid["rows"] == ["embed", "resid0", "resid1", "resid2", "resid3"]
        shape = (len(grid["rows"]), len(grid["positions"]))
        for model in grid["models"]:
            own = table[(table["text"] == grid["text"]) & (table["lens"] == grid["lens"]) & (table["model"] == model["model"])]
            own = own.sort_values(["layer", "position"])
            for measure in ("probability", "entropy", "kl"):
                assert numbers(model[measure]) == pytest.approx(own[measure].to_numpy(), rel=5e-3, abs=1e-9, nan_ok=True)
            assert counts(model["rank"]).tolist() == own["rank"].tolist()
            tops, shares = counts(model["likeliest"]).reshape(5, -1), numbers(model["shares"]).reshape(5, *shape)
            for rank in range(5):
                assert listed[tops[rank]].tolist() == [shown(token) for token in own[f"top_{rank + 1}"]]
                assert shares[rank].ravel() == pytest.approx(own[f"p_{rank + 1}"].to_numpy(), rel=5e-3, abs=1e-9)
        tokens = tables["lens_tokens"].query("text == @grid['text']")
        assert listed[counts(grid["token"])].tolist() == [shown(token) for token in tokens["token"]]
        assert listed[counts(grid["segment"])].tolist() == [name_of(segment) for segment in tokens["segment"]]


def test_rows_of_a_grid_run_from_the_embedding_to_the_last_layer() -> None:
    table = invented.lens_grid(("a",), 3, 12, ("model",), ("logit",)).sample(frac=1, random_state=0)
    held = lens_grids({"lens_grid": table})
    assert held is not None
    assert held["grids"][0]["rows"] == ["embed", *(f"resid{layer}" for layer in range(12))]


def test_shuffled_rows_give_the_same_grid(tables: dict[str, pd.DataFrame]) -> None:
    grid = tables["lens_grid"]
    one = grid[(grid["text"] == grid["text"].iloc[0]) & (grid["lens"] == "logit") & (grid["model"] == "base")]
    held = [lens_grids({"lens_grid": rows}) for rows in (one, one.sort_values("layer"), one.sort_values("position", kind="stable"))]
    assert held[0] is not None
    for other in held[1:]:
        assert other is not None
        assert [numbers(each["grids"][0]["models"][0]["kl"]).tolist() for each in (other,)] == [
            numbers(held[0]["grids"][0]["models"][0]["kl"]).tolist()
        ]


def test_a_grid_of_48_layers_by_1024_positions_by_two_models_weighs_less_than_five_megabytes() -> None:
    table = invented.lens_grid(("a",), 1024, 48, invented.PAIR, ("logit",))
    held = lens_grids({"lens_grid": table, "lens_tokens": invented.lens_tokens(("a",), 1024)})
    assert held is not None
    assert len(held["grids"][0]["positions"]) == 1024
    assert len(script_json(held)) < 4.5e6
    assert len(script_json(held)) / len(table) < 40


def test_what_a_page_holds_of_grids_is_bounded_and_what_it_leaves_out_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = invented.lens_tables(4, 4, positions=40)
    monkeypatch.setattr(grids_module, "CELLS", 2 * 40 * 5 * 2)
    held = lens_grids(made)
    assert held is not None
    assert (len(held["grids"]), held["dropped"]) == (2, 2)
    assert "2 more grids are in the table lens_grid" in Page(page_of(made, tmp_path)).text


def test_of_a_text_longer_than_the_bound_the_end_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made = invented.lens_tables(4, 4, positions=40, texts=("a",), lenses=("logit",))
    monkeypatch.setattr(grids_module, "CELLS", 15 * 5 * 2)
    held = lens_grids(made)
    assert held is not None
    assert held["grids"][0]["positions"] == list(range(25, 40))
    assert CELLS >= 48 * 1024 * 2


def test_lens_curves_hold_the_table_with_the_embedding_first(tables: dict[str, pd.DataFrame]) -> None:
    figure = named(figures_of(tables, "lens"), "lens-log-probability")
    points = {(row["series"], row["dash"], row["place"]): (row["value"], row["low"], row["high"]) for row in rows_of(figure, "place")}
    own = tables["lens_summary"].query("site == 'residual'")
    assert len(points) == len(own)
    for row in own.to_dict("records"):
        place = "embed" if row["layer"] < 0 else str(row["layer"])
        wanted = (row["log_probability"], row["log_probability_low"], row["log_probability_high"])
        assert points[row["model"], f"{row['lens']} lens", place] == pytest.approx(wanted, rel=1e-5)
    assert figure.spec["layer"][0]["encoding"]["x"]["sort"] == ["embed", "0", "1", "2", "3"]


def test_what_the_lens_shows_to_have_changed_is_sorted_by_being_sure(tables: dict[str, pd.DataFrame]) -> None:
    change = tables["lens_change"].assign(log_probability_change_q=1.0)
    change.loc[change["component"] == "resid1", "log_probability_change_q"] = 0.001
    shown_table = view_of(views_of({"lens_change": change}), "Where the lens's prediction changed")
    assert shown_table.view.rows[0][0].text == "resid1"
    assert [row[0].strong for row in shown_table.view.rows[:2]] == [True, False]
