"""Readings on the page: grids and attention hold the tables' own numbers, figures end where sums end, text is escaped, and what is absent is left out."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechscope.report import lens_grid as grids_module
from mechscope.report import token_attention as attention_module
from mechscope.report.attribution import PARTS, attribution_figures
from mechscope.report.contents import REQUIRED, Contents
from mechscope.report.figure import Figure
from mechscope.report.figures import figures
from mechscope.report.lens_figures import lens_figures, lens_views
from mechscope.report.lens_grid import CELLS, lens_grids
from mechscope.report.packed import MISSING, POWER, Words, packed, shown, whole
from mechscope.report.page import html
from mechscope.report.reading import reading, reading_figures
from mechscope.report.reading_cards import reading_cards
from mechscope.report.reading_summary import READING, reading_sentences
from mechscope.report.roles import role_figures, role_views
from mechscope.report.tabled import Shown
from mechscope.report.token_attention import token_attention
from mechscope.report.weight_views import neuron_views, weight_views
from tests.report import synthetic, synthetic_circuits, synthetic_weights
from tests.report import synthetic_reading as invented
from tests.report.test_page import Page

NASTY = synthetic.HOSTILE[1]


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    return invented.all_tables()


def counts(held: Mapping[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(held["data"]), dtype=f"<u{held['bytes']}")


def numbers(held: Mapping[str, Any]) -> np.ndarray:
    codes = np.frombuffer(base64.b64decode(held["data"]), dtype="<u2")
    return np.where(codes == MISSING, np.nan, held["max"] * (codes / (MISSING - 1)) ** POWER)


def rows_of(figure: Figure, *columns: str) -> list[dict[str, Any]]:
    return [row for rows in figure.datasets.values() for row in rows if set(columns) <= set(row)]


def named(drawn: list[Figure], name: str) -> Figure:
    (figure,) = (figure for figure in drawn if figure.name == name)
    return figure


def view_of(shown_tables: list[Shown], heading: str) -> Shown:
    (found,) = (each for each in shown_tables if each.heading == heading)
    return found


def page_of(made: dict[str, pd.DataFrame], tmp_path: Path, *, study: dict[str, object] | None = None) -> str:
    """Return the page of a run with these tables; no figure is written to a file."""
    contents = Contents.read(synthetic.write_run(tmp_path / "run", made, study=study or {"model": "models/gpt2"}))
    return html(contents, figures(contents.tables) | reading_figures(contents.tables))


def test_packed_numbers_keep_three_digits_down_to_a_millionth_of_the_largest() -> None:
    values = np.concatenate([np.geomspace(12.5e-6, 12.5, 400), [0.0]])
    assert numbers(packed(values)) == pytest.approx(values, rel=2e-3, abs=1e-12)
    assert numbers(packed(values))[-2] == 12.5


def test_packed_numbers_know_what_is_missing_and_rounding_below_zero() -> None:
    found = numbers(packed(np.array([np.nan, -1e-9, 2.0, np.inf])))
    assert np.isnan(found[[0, 3]]).all()
    assert found[1:3].tolist() == [0.0, 2.0]
    assert np.isnan(numbers(packed(np.array([np.nan])))).all()
    assert numbers(packed(np.zeros(2))).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("largest", "width"), [(65535, 2), (65536, 4)])
def test_counts_take_as_few_bytes_as_hold_them(largest: int, width: int) -> None:
    held = whole(np.array([0, 1, largest, np.nan]))
    assert held["bytes"] == width
    assert counts(held).tolist() == [0, 1, largest, 0]


def test_every_word_is_held_once_and_none_can_break_a_line() -> None:
    words = Words()
    places = words.add(pd.Series([" the", "\n", None, " the", "a\u202eb", ""]))
    assert [words.listed[place] for place in places] == [" the", "↵", "", " the", "a·b", ""]
    assert words.add(np.array([" the"]))[0] == places[0]
    assert len(shown("w" * 5000)) == 61


def test_lens_grid_holds_every_cell_of_the_table(tables: dict[str, pd.DataFrame]) -> None:
    words = Words()
    held = lens_grids(tables, words)
    assert held is not None
    assert held["dropped"] == 0
    table, listed = tables["lens_grid"], np.array(words.listed, dtype=object)
    assert len(held["grids"]) == table.groupby(["text", "lens"]).ngroups == 4
    for grid in held["grids"]:
        assert grid["rows"] == ["embedding", "resid0", "resid1", "resid2", "resid3"]
        shape = (len(grid["rows"]), len(grid["positions"]))
        for model in grid["models"]:
            own = table[(table["text"] == grid["text"]) & (table["lens"] == grid["lens"]) & (table["model"] == model["model"])]
            own = own.sort_values(["layer", "position"])
            for measure in ("probability", "entropy", "kl"):
                assert numbers(model[measure]) == pytest.approx(own[measure].to_numpy(), rel=5e-3, abs=1e-9, nan_ok=True)
            assert counts(model["rank"]).tolist() == own["rank"].tolist()
            tops, shares = counts(model["words"]).reshape(5, -1), numbers(model["shares"]).reshape(5, *shape)
            for rank in range(5):
                assert listed[tops[rank]].tolist() == [shown(token) for token in own[f"top_{rank + 1}"]]
                assert shares[rank].ravel() == pytest.approx(own[f"p_{rank + 1}"].to_numpy(), rel=5e-3, abs=1e-9)
        tokens = tables["lens_tokens"].query("text == @grid['text']")
        assert listed[counts(grid["token"])].tolist() == [shown(token) for token in tokens["token"]]
        assert listed[counts(grid["segment"])].tolist() == tokens["segment"].tolist()


def test_rows_of_a_grid_run_from_the_embedding_to_the_last_layer() -> None:
    table = invented.lens_grid(("a",), 3, 12, ("model",), ("logit",)).sample(frac=1, random_state=0)
    held = lens_grids({"lens_grid": table}, Words())
    assert held is not None
    assert held["grids"][0]["rows"] == ["embedding", *(f"resid{layer}" for layer in range(12))]


def test_shuffled_rows_give_the_same_grid(tables: dict[str, pd.DataFrame]) -> None:
    grid = tables["lens_grid"]
    one = grid[(grid["text"] == grid["text"].iloc[0]) & (grid["lens"] == "logit") & (grid["model"] == "base")]
    found = [
        lens_grids({"lens_grid": rows}, Words()) for rows in (one, one.sort_values("layer"), one.sort_values("position", kind="stable"))
    ]
    assert found[0] is not None
    for other in found[1:]:
        assert other is not None
        assert [numbers(each["grids"][0]["models"][0]["kl"]).tolist() for each in (other,)] == [
            numbers(found[0]["grids"][0]["models"][0]["kl"]).tolist()
        ]


def test_a_grid_of_48_layers_by_1024_positions_by_two_models_weighs_less_than_five_megabytes() -> None:
    table = invented.lens_grid(("a",), 1024, 48, invented.PAIR, ("logit",))
    held = reading({"lens_grid": table, "lens_tokens": invented.lens_tokens(("a",), 1024)})
    assert held.grids is not None
    assert len(held.grids["grids"][0]["positions"]) == 1024
    assert len(held.json) < 4.5e6
    assert len(held.json) / len(table) < 40


def test_what_a_page_holds_of_grids_is_bounded_and_what_it_leaves_out_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = invented.lens_tables(4, 4, positions=40)
    monkeypatch.setattr(grids_module, "CELLS", 2 * 40 * 5 * 2)
    held = lens_grids(made, Words())
    assert held is not None
    assert (len(held["grids"]), held["dropped"]) == (2, 2)
    assert "2 more grids are in the table lens_grid" in Page(page_of(made, tmp_path)).text


def test_of_a_text_longer_than_the_bound_the_end_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made = invented.lens_tables(4, 4, positions=40, texts=("a",), lenses=("logit",))
    monkeypatch.setattr(grids_module, "CELLS", 15 * 5 * 2)
    held = lens_grids(made, Words())
    assert held is not None
    assert held["grids"][0]["positions"] == list(range(25, 40))
    assert CELLS >= 48 * 1024 * 2


def test_attention_holds_the_keys_of_every_query_strongest_first(tables: dict[str, pd.DataFrame]) -> None:
    held = token_attention(tables, Words())
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
    held = token_attention(tables, Words())
    assert held is not None
    having = tables["head_roles"].query("has_role")
    for head in held["texts"][0]["heads"]:
        assert set(filter(None, head["role"].split(", "))) == set(having.loc[having["component"] == head["name"], "role"])
    assert any(head["role"] for head in held["texts"][0]["heads"])


def test_heads_beyond_the_bound_are_counted(monkeypatch: pytest.MonkeyPatch, tables: dict[str, pd.DataFrame]) -> None:
    edges = tables["attention_edges"]
    monkeypatch.setattr(attention_module, "EDGES", int((edges["text"] == edges["text"].iloc[0]).sum()))
    held = token_attention(tables, Words())
    assert held is not None
    assert sum(len(text["heads"]) for text in held["texts"]) + held["dropped"] == 6
    assert held["dropped"] >= 2


def test_attention_of_1024_tokens_weighs_little() -> None:
    edges = invented.attention_edges(("a",), 1024, ("a0.h0", "a0.h1", "a0.h2", "a0.h3"), invented.PAIR)
    held = reading({"attention_edges": edges, "attention_tokens": invented.lens_tokens(("a",), 1024)})
    assert len(held.json) / len(edges) < 6.5
    assert len(held.json) < 4e5


def test_waterfall_ends_at_the_sum_and_every_bar_begins_where_the_last_ended(tables: dict[str, pd.DataFrame]) -> None:
    table, drawn = tables["logit_attribution"], attribution_figures(tables)
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
    base, tuned = (named(attribution_figures(tables), f"attribution-components-{i}") for i in (1, 2))
    assert [row["part"] for row in rows_of(base, "start")] == [row["part"] for row in rows_of(tuned, "start")]
    assert len(rows_of(base, "start")) == PARTS + 2
    domains = [
        [layer["encoding"]["x"]["scale"]["domain"] for layer in figure.spec["layer"] if layer["mark"]["type"] == "bar"]
        for figure in (base, tuned)
    ]
    assert domains[0] == domains[1]


def test_interval_of_a_bar_stands_at_its_end(tables: dict[str, pd.DataFrame]) -> None:
    table = tables["logit_attribution"].query("model == 'base'").set_index("component")
    for step in rows_of(named(attribution_figures(tables), "attribution-components-1"), "start")[:-2]:
        own = table.loc[step["part"]]
        assert step["low"] - step["end"] == pytest.approx(own["low"] - own["effect"], abs=1e-4)
        assert step["high"] - step["end"] == pytest.approx(own["high"] - own["effect"], abs=1e-4)


def test_layers_of_the_waterfall_are_sums_of_heads_and_bias_and_of_the_mlp(tables: dict[str, pd.DataFrame]) -> None:
    table = tables["logit_attribution"].query("model == 'base'")
    steps = {row["part"]: row["effect"] for row in rows_of(named(attribution_figures(tables), "attribution-layers-1"), "start")}
    for layer in range(4):
        own = table[table["layer"] == layer]
        attention = own["kind"].isin(["head", "attention bias"])
        assert steps[f"attention {layer}"] == pytest.approx(own.loc[attention, "effect"].sum(), rel=1e-4)
        assert steps[f"MLP {layer}"] == pytest.approx(own.loc[~attention, "effect"].sum(), rel=1e-4)


def test_change_walks_from_the_base_total_to_the_tuned_total(tables: dict[str, pd.DataFrame]) -> None:
    table, steps = tables["logit_attribution"], rows_of(named(attribution_figures(tables), "attribution-change"), "start")
    totals = table.groupby("model")["effect"].sum()
    assert (steps[0]["part"], steps[-1]["part"]) == ("base, total", "tuned, total")
    assert steps[0]["end"] == pytest.approx(totals["base"], rel=1e-5)
    assert steps[1]["start"] == pytest.approx(totals["base"], rel=1e-5)
    assert steps[-2]["end"] == pytest.approx(steps[-1]["end"], rel=1e-5)
    assert steps[-1]["end"] == pytest.approx(totals["tuned"], rel=1e-5)


def test_role_map_runs_from_null_to_the_largest_score_and_marks_who_has_it(tables: dict[str, pd.DataFrame]) -> None:
    found = {(row["role"], row["component"]): row for row in rows_of(named(role_figures(tables), "roles-1"), "strength")}
    own = tables["head_roles"].query("model == 'base'")
    assert len(found) == len(own)
    for row in own.to_dict("records"):
        drawn = found[row["role"], row["component"]]
        assert drawn["strength"] == pytest.approx((row["score"] - row["null"]) / (1.0 - row["null"]), abs=1e-5)
        assert drawn["has"] is row["has_role"]


def test_a_role_without_a_stated_range_runs_to_its_best_head(tables: dict[str, pd.DataFrame]) -> None:
    roles = tables["head_roles"].query("model == 'base'")
    drawn = rows_of(named(role_figures({"head_roles": roles}), "roles"), "strength")
    assert max(row["strength"] for row in drawn if row["role"] == "induction") == 1.0


def test_role_changes_outline_what_is_significant_and_leave_out_the_mean(tables: dict[str, pd.DataFrame]) -> None:
    changes = tables["head_role_changes"]
    drawn = rows_of(named(role_figures(tables), "roles-change"), "surely")
    heads = changes[changes["component"] != "all"]
    assert len(drawn) == len(heads)
    assert sum(row["surely"] for row in drawn) == (heads["q"] < 0.05).sum() > 0


def test_role_tables_put_the_mean_over_heads_first(tables: dict[str, pd.DataFrame]) -> None:
    found = role_views(tables)
    assert found[0].heading == "How much of each role the model has"
    whole_ = tables["head_role_changes"].query("component == 'all'").sort_values("change", ascending=False)
    assert [row[0].text for row in found[0].view.rows] == whole_["role"].tolist()
    assert [row[3].strong for row in found[0].view.rows] == (whole_["q"] < 0.05).tolist()


def test_each_role_lists_its_highest_heads(tables: dict[str, pd.DataFrame]) -> None:
    own = tables["head_roles"].query("model == 'tuned'")
    rows = view_of(role_views(tables), "Heads of each role, tuned").view.rows
    for role in invented.ROLES:
        top = own[own["role"] == role].sort_values("score", ascending=False, kind="stable").head(3)
        assert [row[1].text for row in rows if row[0].text == role] == top["component"].tolist()


def test_lens_curves_hold_the_table_with_the_embedding_first(tables: dict[str, pd.DataFrame]) -> None:
    figure = named(lens_figures(tables), "lens-log-probability")
    found = {(row["series"], row["dash"], row["place"]): (row["value"], row["low"], row["high"]) for row in rows_of(figure, "place")}
    own = tables["lens_summary"].query("site == 'residual'")
    assert len(found) == len(own)
    for row in own.to_dict("records"):
        place = "emb" if row["layer"] < 0 else str(row["layer"])
        wanted = (row["log_probability"], row["log_probability_low"], row["log_probability_high"])
        assert found[row["model"], f"{row['lens']} lens", place] == pytest.approx(wanted, rel=1e-5)
    assert figure.spec["layer"][0]["encoding"]["x"]["sort"] == ["emb", "0", "1", "2", "3"]


def test_what_the_lens_shows_to_have_changed_is_sorted_by_being_sure(tables: dict[str, pd.DataFrame]) -> None:
    change = tables["lens_change"].assign(log_probability_change_q=1.0)
    change.loc[change["component"] == "resid1", "log_probability_change_q"] = 0.001
    (found,) = lens_views({"lens_change": change})
    assert found.view.rows[0][0].text == "resid1"
    assert [row[0].strong for row in found.view.rows[:2]] == [True, False]


def test_tokens_of_a_head_stand_beside_each_other_in_base_tuned_and_change(tables: dict[str, pd.DataFrame]) -> None:
    view = view_of(weight_views(tables), "Tokens that heads pair, OV: attended → written").view
    assert view.columns == ("head", "base", "tuned", "change")
    row = next(row for row in view.rows if (row[0].text, row[0].note) == ("a0.h0", "suppressed"))
    table = tables["weight_tokens"].query("component == 'a0.h0' and matrix == 'ov' and sign == 'suppressed'")
    for cell, model in zip(row[1:], ("base", "tuned", "change"), strict=True):
        first = table[table["model"] == model].sort_values("place").iloc[0]
        assert cell.text.split("\n")[0] == f"␣{first['source'][1:]} → ␣{first['target'][1:]} (−8.00)"
        assert len(cell.text.split("\n")) == 5


def test_singular_directions_have_both_sides_of_each_end_on_one_line(tables: dict[str, pd.DataFrame]) -> None:
    view = view_of(weight_views(tables), "Singular directions of W_QK, change").view
    assert view.columns == ("head", "direction", "end", "singular value", "query", "key")
    for row in view.rows:
        assert [row[4].text, row[5].text] == [f"' query {row[2].text}' ' the'", f"' key {row[2].text}' ' the'"]


def test_composition_is_sorted_by_distance_from_random(tables: dict[str, pd.DataFrame]) -> None:
    view = view_of(weight_views(tables), "Heads that compose, base").view
    distances = [row[-1].sort for row in view.rows]
    assert distances == sorted(distances, key=lambda z: -abs(z or 0))
    assert view.rows[0][2].text in ("Q", "K", "V")


def test_neurons_written_out_come_first_and_contexts_show_tokens(tables: dict[str, pd.DataFrame]) -> None:
    found = neuron_views(tables)
    view = view_of(found, "Neurons, base").view
    assert {row[0].text for row in view.rows[:4]} == {f"m{layer}.n3" for layer in range(4)}
    contexts = view_of(found, "Where neurons fire most, base").view
    assert [cell.text for cell in contexts.rows[0]] == ["m0.n3", "8.00", "␣harbour", "approved the new «harbour»", "␣on", "␣on, ␣in"]
    changed = view_of(found, "Neurons that fine-tuning changed").view
    assert changed.rows[0][0].text == "m3.n39"


@pytest.mark.parametrize(
    ("change", "q", "said"),
    [(0.5, 0.001, "rose"), (-0.5, 0.001, "fell"), (0.5, 0.9, "change significantly")],
)
def test_rise_and_fall_are_told_only_where_significant(tables: dict[str, pd.DataFrame], change: float, q: float, said: str) -> None:
    table = tables["lens_change"].assign(log_probability_change=change, log_probability_change_q=q)
    (sentence,) = reading_sentences({"lens_change": table})
    assert said in sentence
    assert ("rose" in sentence or "fell" in sentence) is (q < 0.05)


def test_roles_without_significant_change_are_said_not_to_have_changed(tables: dict[str, pd.DataFrame]) -> None:
    still = reading_sentences({"head_role_changes": tables["head_role_changes"].assign(q=0.5)})
    assert still == ["No role's mean over heads changed significantly; 0 of 128 single heads' scores changed at q < 0.05."]
    moved = " ".join(reading_sentences({"head_role_changes": tables["head_role_changes"].assign(q=0.01, change=-0.2, low=-0.3, high=-0.1)}))
    assert "fell (−0.200 [−0.300, −0.100])" in moved
    assert "rose" not in moved


def test_cards_count_heads_with_a_role(tables: dict[str, pd.DataFrame]) -> None:
    having = tables["head_roles"].query("has_role and model == 'tuned'")["component"].nunique()
    assert f"{having} of 16" in [card.value for card in reading_cards({"head_roles": tables["head_roles"]})]


@pytest.mark.parametrize("name", sorted(READING))
def test_each_table_alone_with_only_its_needed_columns_makes_a_page(name: str, tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    own = {name: tables[name][list(REQUIRED[name])]}
    page = Page(page_of(own, tmp_path))
    assert "Not part of this run" not in page.text
    assert not {"heads", "weights", "claims", "bakeoff"} & page.ids()


def test_page_of_each_kind_of_run_has_its_sections(tmp_path: Path) -> None:
    wanted = {
        "lens": (invented.lens_tables(2, 2, positions=12), {"lens", "lens-grid", "attribution"}, "Layer by layer: gpt2 before and after"),
        "heads": (invented.heads_tables(4, 4, positions=12), {"roles", "token-attention"}, "What the heads of gpt2 do, before and after"),
        "weights": (synthetic_weights.weights_tables(4, 4), {"head-weights", "neurons"}, "What the weights of gpt2 say, before and after"),
        "one": (invented.heads_tables(4, 4, positions=12, models=("model",)), {"roles"}, "What the heads of gpt2 do"),
    }
    every = {"lens", "attribution", "roles", "token-attention", "head-weights", "neurons"}
    for kind, (made, sections, title) in wanted.items():
        page = Page(page_of(made, tmp_path / kind))
        assert sections <= page.ids()
        assert not (every - sections - {"token-attention"}) & page.ids()
        assert title in page.text
        assert ("before and after" in page.text) is (kind != "one")


def test_a_study_shows_readings_among_its_sections_and_keeps_its_title(tmp_path: Path) -> None:
    study = {name: table for name, table in synthetic.tables(4, 4).items() if name in ("heads", "layers")}
    text = page_of(
        {**study, **invented.lens_tables(4, 4, positions=12), **invented.heads_tables(4, 4, positions=12)},
        tmp_path,
        study=synthetic.settings(),
    )
    page = Page(text)
    assert {"heads", "layers", "claims", "roles", "lens", "lens-grid"} <= page.ids()
    listed = [(a["href"] or "")[1:] for tag, a in page.elements if tag == "a" and (a.get("href") or "").startswith("#")]
    assert listed[1:] == [a["id"] for tag, a in page.elements if tag == "section"]
    assert "What fine-tuning changed in gpt2-news-7m" in page.text
    assert "Mean over heads" in page.text


def test_a_page_without_readings_has_nothing_of_them(run: Path) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "reading" not in text.split("<script>")[0].split("</style>")[0]
    assert "lens-grid" not in text
    assert "dataset.lens" not in text


def hostile(made: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Return the tables with markup in every token and every other text of data."""
    made = {name: table.copy() for name, table in made.items()}
    texts = {
        "lens_tokens": ("token", "target", "segment", "text"), "lens_grid": ("top_1", "top_2", "text", "lens"), "weight_tokens": ("source", "target"),
        "weight_singular": ("tokens",), "neurons": ("promotes", "reads"), "neuron_contexts": ("token", "context", "next"),
        "attention_tokens": ("token", "segment", "text"), "attention_edges": ("text",), "role_definitions": ("definition", "source", "null"),
        "head_cards": ("attends_to", "top_tokens", "role"),
    }  # fmt: skip
    for name, columns in texts.items():
        for column in columns:
            made[name][column] = NASTY
    made["lens_grid"] = made["lens_grid"].drop_duplicates(["model", "component", "position"])
    return made


def test_markup_in_tokens_and_names_is_text(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    text = page_of(hostile(tables), tmp_path)
    page = Page(text)
    assert "<script>alert(" not in text
    assert len(page.scripts) == 4
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
    assert NASTY.replace(" ", "") in page.text.replace(" ", "")
    (held,) = re.findall(r'<script type="application/json" id="reading">(.*?)</script>', text, flags=re.S)
    assert NASTY in json.loads(held)["words"]
    assert not set("<>&") & set(held)


def test_equal_tables_give_an_equal_page_whatever_the_hash_seed(tmp_path: Path) -> None:
    made = {**invented.all_tables(2, 2, positions=8), **synthetic_circuits.circuit_tables(2, 2)}
    folder = synthetic.write_run(tmp_path / "run", made)
    script = (
        "import hashlib, sys\nfrom mechscope.report.contents import Contents\nfrom mechscope.report.page import html\n"
        "from mechscope.report.reading import reading_figures\nc = Contents.read(sys.argv[1])\n"
        "print(hashlib.sha256(html(c, reading_figures(c.tables)).encode()).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    ran = subprocess.run([sys.executable, "-c", script, str(folder)], env=environment, capture_output=True, text=True, check=True)
    contents = Contents.read(folder)
    assert ran.stdout.strip() == hashlib.sha256(html(contents, reading_figures(contents.tables)).encode()).hexdigest()


def test_figures_of_small_panels_keep_their_width_in_files_and_in_the_page(tables: dict[str, pd.DataFrame]) -> None:
    figure = named(role_figures(tables), "roles-1")
    assert "facet" in figure.page_spec()
    assert "width" not in figure.export()
    width = float(re.findall(r'<svg[^>]* width="([\d.]+)"', figure.svg())[0])
    assert 300 < width < 1100
    assert not math.isnan(width)
