"""Readings on the page: tables and sentences say what the run's tables say, text is escaped, and what is absent is left out."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from mechscope.report.contents import Contents
from mechscope.report.sections import sections, table_specs
from tests.report import synthetic, synthetic_circuits, synthetic_weights
from tests.report import synthetic_reading as invented
from tests.report.drawn import NASTY, findings_of, hostile, page_of, page_text, view_of, views_of
from tests.report.test_page import Page

READING = ("lens", "attribution", "roles", "token-attention", "head-weights", "neurons")


def test_tokens_of_a_head_stand_beside_each_other_in_base_tuned_and_change(tables: dict[str, pd.DataFrame]) -> None:
    view = view_of(views_of(tables, "head-weights"), "Tokens that heads pair, OV: attended → written").view
    assert view.columns == ("head", "base", "tuned", "change")
    row = next(row for row in view.rows if (row[0].text, row[0].note) == ("a0.h0", "suppressed"))
    table = tables["weight_tokens"].query("component == 'a0.h0' and matrix == 'ov' and sign == 'suppressed'")
    for cell, model in zip(row[1:], ("base", "tuned", "change"), strict=True):
        first = table[table["model"] == model].sort_values("place").iloc[0]
        assert cell.text.split("\n")[0] == f"␣{first['source'][1:]} → ␣{first['target'][1:]} (−8.00)"
        assert len(cell.text.split("\n")) == 5


def test_singular_directions_have_both_sides_of_each_end_on_one_line(tables: dict[str, pd.DataFrame]) -> None:
    view = view_of(views_of(tables, "head-weights"), "Singular directions of W_QK, change").view
    assert view.columns == ("head", "direction", "end", "singular value", "query", "key")
    for row in view.rows:
        assert [row[4].text, row[5].text] == [f"' query {row[2].text}' ' the'", f"' key {row[2].text}' ' the'"]


def test_composition_is_sorted_by_distance_from_random(tables: dict[str, pd.DataFrame]) -> None:
    view = view_of(views_of(tables, "head-weights"), "Heads that compose, base").view
    distances = [row[-1].sort for row in view.rows]
    assert distances == sorted(distances, key=lambda z: -abs(z or 0))
    assert view.rows[0][2].text in ("Q", "K", "V")


def test_neurons_written_out_come_first_and_contexts_show_tokens(tables: dict[str, pd.DataFrame]) -> None:
    shown = views_of(tables, "neurons")
    view = view_of(shown, "Neurons, base").view
    assert {row[0].text for row in view.rows[:4]} == {f"m{layer}.n3" for layer in range(4)}
    contexts = view_of(shown, "Where neurons fire most, base").view
    assert [cell.text for cell in contexts.rows[0]] == ["m0.n3", "8.00", "␣harbour", "approved the new «harbour»", "␣on", "␣on, ␣in"]
    changed = view_of(shown, "Neurons that fine-tuning changed").view
    assert changed.rows[0][0].text == "m3.n39"


@pytest.mark.parametrize(
    ("change", "q", "said"),
    [(0.5, 0.001, "rose"), (-0.5, 0.001, "fell"), (0.5, 0.9, "change significantly")],
)
def test_rise_and_fall_are_told_only_where_significant(tables: dict[str, pd.DataFrame], change: float, q: float, said: str) -> None:
    table = tables["lens_change"].assign(log_probability_change=change, log_probability_change_q=q)
    (sentence,) = findings_of({"lens_change": table})
    assert said in sentence
    assert ("rose" in sentence or "fell" in sentence) is (q < 0.05)


@pytest.mark.parametrize("name", sorted(name for own in READING for name in sections()[own].tables))
def test_each_table_alone_with_only_its_needed_columns_makes_a_page(name: str, tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    numbered = [column for column in tables[name] if str(column).startswith(tuple(table_specs()[name].numbered))]
    own = {name: tables[name][[*table_specs()[name].required, *numbered]]}
    page = Page(page_of(own, tmp_path))
    assert "Not part of this run" not in page.text
    assert page.ids() & set(sections()) - {"caveats"} == {owner for owner in READING if name in sections()[owner].tables}


def test_page_of_each_kind_of_run_has_its_sections(tmp_path: Path) -> None:
    wanted = {
        "lens": (invented.lens_tables(2, 2, positions=12), {"lens", "tuned-lens", "attribution"}),
        "roles": (invented.heads_tables(4, 4, positions=12), {"roles", "token-attention"}),
        "weights": (synthetic_weights.weights_tables(4, 4), {"head-weights", "neurons"}),
        "one": (invented.heads_tables(4, 4, positions=12, models=("model",)), {"roles", "token-attention"}),
    }
    for kind, (made, wanted_sections) in wanted.items():
        page = Page(page_of(made, tmp_path / kind, title=f"The {kind} of gpt2"))
        assert page.ids() & set(sections()) == {"caveats", *wanted_sections}, kind
        assert ("lens-grid" in page.ids()) is (kind == "lens")
        assert f"The {kind} of gpt2" in page.text
        assert ("in the base model" in page.text.lower() or "Fine-tuning" in page.text) is (kind != "one"), kind


def test_a_study_shows_readings_among_its_sections_and_keeps_its_title(tmp_path: Path) -> None:
    study = {name: table for name, table in synthetic.tables(4, 4).items() if name in ("heads", "layers")}
    made = {**study, **invented.lens_tables(4, 4, positions=12), **invented.heads_tables(4, 4, positions=12)}
    contents = Contents.read(synthetic.write_run(tmp_path / "run", made))
    page = Page(page_text(contents))
    assert {"heads", "layers", "claims", "roles", "lens", "lens-grid"} <= page.ids()
    listed = [(a["href"] or "")[1:] for tag, a in page.elements if tag == "a" and (a.get("href") or "").startswith("#")]
    assert listed[1:] == [a["id"] for tag, a in page.elements if tag == "section"]
    assert "What fine-tuning changed in gpt2-news-7m" in page.text
    assert "Mean over heads" in page.text


def test_attention_without_its_tokens_says_what_is_missing(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    page = Page(page_of({"attention_edges": tables["attention_edges"]}, tmp_path))
    assert "The run does not have the table attention_tokens" in page.text
    assert "token-by-token" not in page.ids()


def test_findings_of_readings_tell_how_many_texts_they_are_of(tables: dict[str, pd.DataFrame]) -> None:
    made = {name: table for name, table in tables.items() if not name.startswith(("weight_", "composition"))}
    sentences = findings_of(made, *READING)
    assert len(sentences) == 11
    assert [sentence for sentence in sentences if "n = " not in sentence] == []


def test_a_page_without_readings_has_nothing_of_them(run: Path) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "reading" not in text.split("<script>")[0].split("</style>")[0]
    assert "lens-grid" not in text
    assert "dataset.lens" not in text


def test_markup_in_tokens_and_names_is_text(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    text = page_of(hostile(tables), tmp_path)
    page = Page(text)
    assert "<script>alert(" not in text
    assert len(page.scripts) == 5
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
    assert NASTY.replace(" ", "") in page.text.replace(" ", "")
    for kind in ("lens_grid", "token_attention"):
        (held,) = re.findall(rf'<script type="application/json" id="{kind}-data">(.*?)</script>', text, flags=re.S)
        assert NASTY in json.loads(held)[0]["tokens"]
        assert not set("<>&") & set(held)


def test_equal_tables_give_an_equal_page_whatever_the_hash_seed(tmp_path: Path) -> None:
    made = {**invented.all_tables(2, 2, positions=8), **synthetic_circuits.circuit_tables(2, 2)}
    folder = synthetic.write_run(tmp_path / "run", made)
    script = (
        "import hashlib, sys\nfrom mechscope.report.contents import Contents\nfrom mechscope.report.page import fill, html\n"
        "from mechscope.report.summary import Summary\nc = Contents.read(sys.argv[1])\ns = Summary.of(c)\n"
        "print(hashlib.sha256(html(c, s, fill(c, s)).encode()).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    ran = subprocess.run([sys.executable, "-c", script, str(folder)], env=environment, capture_output=True, text=True, check=True)
    contents = Contents.read(folder)
    assert ran.stdout.strip() == hashlib.sha256(page_text(contents).encode()).hexdigest()
