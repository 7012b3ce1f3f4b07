"""The section of controls, and what the section of claims says of units and of what would overturn a verdict."""

from __future__ import annotations

import pandas as pd
import pytest

from mechscope.report.sections.claims import SECTION as CLAIMS
from mechscope.report.sections.controls import SECTION as CONTROLS
from tests.report.synthetic_controls import MODELS, controls_tables


@pytest.fixture
def tables() -> dict[str, pd.DataFrame]:
    return controls_tables(4, 4)


def test_the_finding_names_every_kind_with_its_numbers(tables: dict[str, pd.DataFrame]) -> None:
    heads = tables["control_heads"]
    for control, share in (("tuned", 3 / 4), ("seed 1", 1 / 2), ("mixed 0", 1 / 4), ("mixed 1", 1 / 8), ("noise 0", 1.0), ("noise 1", 0.0)):
        own = heads.index[(heads["control"] == control) & (heads["rows"] == "all")]
        heads.loc[own, "entropy_change"] = [-0.01] * int(16 * share) + [0.01] * (16 - int(16 * share))
    (finding,) = CONTROLS.findings(tables)
    assert finding.startswith("Beside its controls (how many in brackets), over 48 documents: heads with lower entropy: tuned 75\u202f%, ")
    assert (
        "other seeds 50\u202f% (1); shuffled summaries 12\u202f% to 25\u202f% (2); noise of the same size 0\u202f% to 100\u202f% (2)"
        in finding
    )
    assert "change of the summary loss (nats per token): tuned −0.100, other seeds −0.100 (1)" in finding


def test_every_model_is_a_row_and_the_tuned_one_is_strong(tables: dict[str, pd.DataFrame]) -> None:
    (shown,) = CONTROLS.views(tables)
    assert [row[0].text for row in shown.view.rows] == [name for name, _ in MODELS]
    assert [row[0].strong for row in shown.view.rows] == [True] + [False] * 5
    assert [row[1].text for row in shown.view.rows][2:5] == ["shuffled summaries", "shuffled summaries", "noise of the same size"]


def test_figures_hold_the_numbers_of_the_tables(tables: dict[str, pd.DataFrame]) -> None:
    figures = {figure.name: figure for figure in CONTROLS.figures(tables)}
    (drawn,) = figures["controls-kl"].datasets.values()
    layers = tables["control_layers"]
    assert len(drawn) == len(layers)
    wanted = {(row["rows"], row["layer"], row["control"]): row["kl_base_tuned"] for row in layers.to_dict("records")}
    assert all(row["value"] == pytest.approx(wanted[row["rows"], row["layer"], row["control"]], rel=1e-5) for row in drawn)
    points = next(rows for rows in figures["controls-heads"].datasets.values() if "tuned" in rows[0])
    heads = tables["control_heads"].set_index(["control", "rows", "component"])["entropy_change"]
    point = next(row for row in points if (row["rows"], row["component"], row["series"]) == ("all", "a1.h2", "shuffled summaries"))
    assert point["tuned"] == pytest.approx(heads["tuned", "all", "a1.h2"], rel=1e-5)
    assert point["mean"] == pytest.approx((heads["mixed 0", "all", "a1.h2"] + heads["mixed 1", "all", "a1.h2"]) / 2, rel=1e-5)
    for figure in figures.values():
        assert figure.svg().startswith("<svg")


def test_noise_alone_is_said_to_be_no_control_training(tables: dict[str, pd.DataFrame]) -> None:
    assert list(CONTROLS.caveats(tables)) == []
    models = tables["controls"]
    (caveat,) = CONTROLS.caveats({**tables, "controls": models[models["kind"].isin(["tuned", "noise"])]})
    assert caveat.startswith("No control training was given")


def claims(*rows: tuple[str, str, str]) -> dict[str, pd.DataFrame]:
    return {
        "claims": pd.DataFrame(
            [
                {
                    "claim": claim,
                    "statement": "It is.",
                    "paper": "So.",
                    "measured": "This.",
                    "value": 0.1,
                    "low": 0.0,
                    "high": 0.2,
                    "verdict": verdict,
                    "note": "",
                    "unit": "training",
                    "overturn": overturn,
                }
                for claim, verdict, overturn in rows
            ]
        )
    }


def test_the_card_ends_with_what_would_overturn_it() -> None:
    (card,) = CLAIMS.cards(claims(("one", "undecided", "More seeds."), ("two", "supported", "Other trainings.")))
    assert card.value == "1 of 2"
    assert card.note == "0 contradicted, 1 undecided. What would overturn “two”: Other trainings."
    (card,) = CLAIMS.cards(claims(("one", "withheld", ""), ("two", "undecided", "A control.")))
    assert card.note == "0 contradicted, 1 undecided, 1 withheld. What would overturn “two”: A control."


def test_every_claim_shows_its_unit_and_what_would_overturn_it() -> None:
    (shown,) = CLAIMS.views(claims(("one", "undecided", "More seeds."), ("two", "supported", "")))
    assert shown.view.columns[2:] == ("measured here", "value and 95 % interval", "unit", "verdict")
    assert [(row[2].note, row[-2].text, row[-1].text) for row in shown.view.rows] == [
        ("What would overturn it: More seeds.", "training", "undecided"),
        ("", "training", "supported"),
    ]


def test_rows_about_noise_are_no_claims_of_the_paper_and_what_is_decided_is_named() -> None:
    tables = claims(
        ("few_edges", "supported", ""), ("steps.equal_rank", "contradicted", ""), ("heads.noise", "supported", ""), ("x", "undecided", "")
    )
    (sentence,) = CLAIMS.findings(tables)
    assert sentence.startswith(
        "Of 3 claims of and about arXiv 2505.17073 tested here: 1 supported (few edges), 1 contradicted (steps, equal rank), 1 undecided"
    )
    assert CLAIMS.cards(tables)[0].value == "1 of 3"
