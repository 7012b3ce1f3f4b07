"""The sections of circuit runs: figures and sentences say what the tables say, text is escaped, and the page obeys its policy."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from mechscope.report.marks.circuit_slider import pictures
from tests.report import synthetic
from tests.report import synthetic_circuits as invented
from tests.report.circuit_pages import drawn_edges, run_of
from tests.report.drawn import cards_of, caveats_of, figures_of, findings_of, named, rows_of, view_of, views_of
from tests.report.test_page import Page


def test_each_figure_is_there_only_with_its_table() -> None:
    tables = invented.diff_tables(4, 4) | {"circuit_time": invented.time_tables()["circuit_time"]}
    wanted = {
        "circuit_curve": {"circuit-faithfulness"},
        "circuit_overlap": {"circuit-overlap-nodes", "circuit-overlap-edges"},
        "circuit_shift": {"circuit-shift"},
        "circuit_gain": {"circuit-gain"},
        "circuit_time": {"circuit-time", "circuit-size-time"},
        "circuit_components": set[str](),
    }
    for name, figures in wanted.items():
        assert {figure.name for figure in figures_of({name: tables[name]})} == figures


def test_faithfulness_is_drawn_beside_random_circuits_and_without_the_empty_one() -> None:
    tables = invented.diff_tables(4, 4)
    (figure,) = figures_of({"circuit_curve": tables["circuit_curve"]})
    drawn = {(row["series"], row["kind"], row["edges"]): (row["value"], row["low"], row["high"]) for row in rows_of(figure, "value")}
    for row in tables["circuit_curve"].to_dict("records"):
        for kind, columns in (("circuit", ("faithfulness", "low", "high")), ("random circuits", ("random", "random_low", "random_high"))):
            key = (row["model"], kind, row["edges"])
            if row["edges"] == 0:
                assert key not in drawn
            else:
                assert drawn[key] == pytest.approx(tuple(row[column] for column in columns), rel=1e-5)


def test_overlap_is_drawn_with_chance_and_with_each_models_own_noise() -> None:
    overlap = invented.diff_tables(4, 4)["circuit_overlap"]
    figure = named(figures_of({"circuit_overlap": overlap}), "circuit-overlap-edges")
    row = overlap[(overlap["what"] == "edges") & (overlap["fraction"] == 0.01)].iloc[0]
    drawn = {each["series"]: each["value"] for each in rows_of(figure, "value") if each["fraction"] == 0.01}
    assert drawn == pytest.approx(
        {
            "base and tuned": row["jaccard"],
            "models exchanged": row["exchanged"],
            "random circuits": row["null"],
        },
        rel=1e-5,
    )


def test_shift_cell_is_the_mean_size_of_the_shifts_between_two_layers() -> None:
    shift = invented.diff_tables(4, 4)["circuit_shift"]
    (figure,) = figures_of({"circuit_shift": shift})
    drawn = {(row["sender"], row["receiver"]): row["mean"] for row in rows_of(figure, "mean")}
    for ends, (sender, receiver) in {("1", "3"): (1, 3), ("embed", "0"): (-1, 0), ("2", "logits"): (2, 4)}.items():
        own = shift[(shift["sender_layer"] == sender) & (shift["receiver_layer"] == receiver)]
        assert drawn[ends] == pytest.approx(own["shift"].abs().mean(), rel=1e-5)
    assert ("3", "1") not in drawn


def test_a_ratio_far_outside_is_drawn_at_the_edge_and_said() -> None:
    curve = invented.circuit_tables(2, 2)["circuit_curve"]
    curve.loc[7, "random"] = -40.0
    (figure,) = figures_of({"circuit_curve": curve})
    assert "run from -40 to 1" in figure.caption


def test_change_is_claimed_only_beyond_noise() -> None:
    overlap = invented.diff_tables(4, 4)["circuit_overlap"]
    assert findings_of({"circuit_overlap": overlap})[0].startswith("The circuits of base and tuned differ: they share a Jaccard index of ")
    for noisy in (overlap.assign(p=0.06), overlap.assign(change=-0.01)):
        assert findings_of({"circuit_overlap": noisy})[0].startswith(
            "No difference between the circuits of base and tuned was shown: they share"
        )
    unknown = overlap.drop(columns=["exchanged", "change", "p"])
    assert "exchanged" not in findings_of({"circuit_overlap": unknown})[0]


def test_what_was_not_measured_is_left_out_rather_than_drawn() -> None:
    tables = invented.circuit_tables(2, 2)
    numbers = ["faithfulness", "low", "high", "random", "random_low", "random_high"]
    tables["circuit_curve"][numbers] = np.nan
    tables["circuit_summary"].loc[0, ["value", "low", "high"]] = np.nan
    (picture,) = pictures(tables)
    assert figures_of({"circuit_curve": tables["circuit_curve"]}) == []
    assert picture.curve_svg() == ""
    assert picture.faithfulness_words() == ("not measured", "not measured")


def test_random_circuits_of_the_chosen_size_come_from_the_curve_where_the_summary_has_none() -> None:
    tables = invented.circuit_tables(12, 12, chosen=325)
    tables["circuit_summary"].loc[0, ["random", "random_low", "random_high"]] = np.nan
    (picture,) = pictures(tables)
    assert picture.chosen is not None
    assert picture.chosen["random"] == pytest.approx(0.01**1.5, rel=1e-9)


def test_measures_of_all_models_stand_side_by_side_with_random_circuits() -> None:
    summary = invented.diff_tables(4, 4)["circuit_summary"]
    summary.loc[(summary["model"] == "tuned") & (summary["measure"] == "CPR"), "value"] = 0.5
    view = view_of(views_of({"circuit_summary": summary}), "Measures").view
    assert view.columns == ("measure", "base", "tuned")
    lines = {row[0].text: row[1:] for row in view.rows}
    assert [cell.text for cell in lines["edges"]] == ["200", "260"]
    (cpr,) = (cells for name, cells in lines.items() if name.startswith("CPR"))
    assert [cell.sort for cell in cpr] == [0.742, 0.5]
    assert cpr[0].note == "[0.700, 0.780] · random 0.310 [0.280, 0.350]"


def test_sentence_tells_size_and_faithfulness_of_the_circuit() -> None:
    tables = invented.circuit_tables(12, 12)
    sentence, metric = findings_of(tables)
    assert sentence.startswith(
        "The circuit of the model, 200 of 32,491 edges (0.62\u202f%), keeps 0.861 [0.812, 0.903] of what the model does"
    )
    assert sentence.endswith("(n = 64 texts).")
    assert metric.startswith("Edges are scored by ")


def test_a_circuit_whose_faithfulness_may_be_zero_is_said_to_carry_nothing_for_sure() -> None:
    tables = invented.circuit_tables(12, 12)
    faithful = tables["circuit_summary"]["measure"] == "faithfulness"
    assert "the interval holds zero" not in findings_of(tables)[0]
    tables["circuit_summary"].loc[faithful, "low"] = -0.1
    sentence, _ = findings_of(tables)
    assert "; these texts do not show that it carries anything, as the interval holds zero (n = 64 texts)" in sentence
    assert "[−0.100, 0.903]" in sentence


def test_large_numbers_are_those_of_the_first_and_the_last_model() -> None:
    tables = invented.of_models(("base", "step 10", "tuned"), 4, 4)
    cards = {card.label: card for card in cards_of(tables)}
    sizes = tables["circuit_edges"].groupby("model")["in_circuit"].sum()
    assert list(cards) == ["faithfulness, base", "faithfulness, tuned"]
    assert f"; {sizes['tuned']} of " in cards["faithfulness, tuned"].note
    assert cards["faithfulness, base"].note.startswith("[0.812, 0.903]; random circuits of its size keep 0.0700 [0.0100, 0.160]; ")


def test_few_texts_are_a_caveat_that_comes_first() -> None:
    tables = invented.circuit_tables(2, 2)
    assert not any(caveat.startswith("Only") for caveat in caveats_of(tables))
    few = tables | {"circuit_edges": tables["circuit_edges"].assign(n=8)}
    assert caveats_of(few)[0] == "Only 8 texts were read; intervals from fewer than 30 are rough."


def test_sentence_of_a_training_goes_from_the_first_to_the_last_checkpoint() -> None:
    (sentence,) = findings_of({"circuit_time": invented.time_tables()["circuit_time"].iloc[::-1]})
    assert "from 0.200 [0.100, 0.300] to 0.860 [0.810, 0.900]" in sentence
    assert "from 120 to 200 edges" in sentence
    assert (
        "Jaccard index of 0.150 with the first (random circuits with as many edges in every layer: 0.0300; n = 4 checkpoints)" in sentence
    )


def test_page_of_one_circuit_shows_its_sections_and_misses_no_other(tmp_path: Path) -> None:
    tables = invented.circuit_tables(4, 4)
    folder = run_of(tmp_path, "circuit", tables)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert {"circuit", "circuit-components", "circuit-model"} <= page.ids()
    assert not {"circuit-change", "circuit-time", "heads", "claims", "bakeoff"} & page.ids()
    assert "Not part of this run" not in page.text
    assert "The circuit of gpt2" in page.text
    svg = (folder / "figures" / "circuit-model.svg").read_text(encoding="utf-8")
    assert len(drawn_edges(svg)) == tables["circuit_edges"]["in_circuit"].sum() > 100
    assert (folder / "figures" / "circuit-model.png").read_bytes().startswith(b"\x89PNG")


def test_page_of_checkpoints_shows_every_circuit_and_its_way_over_training(tmp_path: Path) -> None:
    page = Page((run_of(tmp_path, "circuit", invented.time_tables(2, 2)) / "report.html").read_text(encoding="utf-8"))
    assert {"circuit-step-0", "circuit-step-100", "circuit-step-1000", "circuit-final", "circuit-time"} <= page.ids()


def test_a_study_with_circuits_shows_them_beside_its_other_sections(tmp_path: Path) -> None:
    tables = {name: table for name, table in synthetic.tables(4, 4).items() if name in ("heads", "layers")}
    page = Page(
        (
            run_of(tmp_path, "summarization", {**tables, **invented.circuit_tables(4, 4)}, sections=synthetic.STUDY) / "report.html"
        ).read_text(encoding="utf-8")
    )
    assert {"heads", "layers", "claims", "circuit"} <= page.ids()
    assert "circuit-change" not in page.ids()


def test_equal_tables_give_an_equal_page(diff_run: Path, tmp_path: Path) -> None:
    again = run_of(tmp_path, "circuit-diff", invented.diff_tables(4, 4))
    assert (again / "report.html").read_bytes() == (diff_run / "report.html").read_bytes()
    assert (again / "figures" / "circuit-base.svg").read_bytes() == (diff_run / "figures" / "circuit-base.svg").read_bytes()


def test_markup_in_a_token_is_text(diff_run: Path) -> None:
    written = (diff_run / "report.html").read_text(encoding="utf-8")
    page = Page(written)
    assert "<script>alert(" not in written
    assert invented.TOKENS in page.text
    assert "b" not in {tag for tag, _ in page.elements}


def test_markup_in_a_models_name_is_text(tmp_path: Path) -> None:
    nasty = synthetic.HOSTILE[1]
    folder = run_of(tmp_path, "circuit", {name: table.assign(model=nasty) for name, table in invented.circuit_tables(2, 2).items()})
    written = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script>alert(" not in written
    assert len(Page(written).scripts) == 4
    (picture,) = (file for file in (folder / "figures").glob("circuit-*.svg") if "faithfulness" not in file.name)
    assert "<script" not in picture.read_text(encoding="utf-8")


def test_policy_allows_the_pages_scripts_and_no_other(diff_run: Path) -> None:
    page = Page((diff_run / "report.html").read_text(encoding="utf-8"))
    (policy,) = [a["content"] or "" for tag, a in page.elements if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    # the first two hold numbers, not code
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in page.scripts[2:]]
    assert re.findall(r"'sha256-[^']*'", policy) == hashes
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
