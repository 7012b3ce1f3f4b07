"""The section of controls, and what the section of claims says of units and of what would overturn a verdict."""

from __future__ import annotations

import pandas as pd
import pytest

from mechscope.report.sections.claims import SECTION as CLAIMS
from mechscope.report.sections.controls import SECTION as CONTROLS
from tests.report import synthetic
from tests.report.drawn import cards_of
from tests.report.synthetic_controls import MODELS


@pytest.fixture
def tables() -> dict[str, pd.DataFrame]:
    made = synthetic.tables(4, 4)
    return {name: table for name, table in made.items() if name.startswith("control")}


def test_the_finding_names_every_kind_with_its_numbers(tables: dict[str, pd.DataFrame]) -> None:
    heads = tables["control_heads"]
    for control, share in (("tuned", 3 / 4), ("seed 1", 1 / 2), ("mixed 0", 1 / 4), ("mixed 1", 1 / 8), ("noise 0", 1.0), ("noise 1", 0.0)):
        own = heads.index[(heads["control"] == control) & (heads["rows"] == "all")]
        heads.loc[own, "entropy_change"] = [-0.01] * int(16 * share) + [0.01] * (16 - int(16 * share))
    focused, _, loss = (finding.sentence for finding in CONTROLS.findings(tables))
    assert focused == (
        "The share of heads with lower entropy is 75\u202f% in the tuned model; beside it, 1 of other seeds 50\u202f%, 2 of shuffled summaries 12\u202f% to "
        "25\u202f%, 2 of noise of the same size 0\u202f% to 100\u202f%; so it does not stand out among controls (n = 48 documents)."
    )
    assert loss.startswith(
        "The change of the summary loss is −0.100 in the tuned model (nats per token); beside it, 1 of other seeds −0.0900, 2 of"
    )


def test_it_is_said_of_what_lies_among_its_controls_that_it_does_not_stand_out(tables: dict[str, pd.DataFrame]) -> None:
    said = "; so it does not stand out among controls"
    models = tables["controls"]
    seed, null = models["kind"] == "seed", ~models["kind"].isin(["tuned", "seed"])
    for loss, stands_out in ((models["loss_change"][null].mean(), False), (-3.0, True), (models["loss_change"][null].max() + 1, True)):
        found = CONTROLS.findings(
            {**tables, "controls": models.assign(loss_change=models["loss_change"].where(models["kind"] != "tuned", loss))}
        )[-1]
        assert (said not in found.text) == stands_out
    # another seed of the same training is no null
    alike = models.assign(loss_change=models["loss_change"].where(~(seed | (models["kind"] == "tuned")), -3.0))
    assert said not in CONTROLS.findings({**tables, "controls": alike})[-1].text


def test_every_model_is_a_row_and_the_tuned_one_is_strong(tables: dict[str, pd.DataFrame]) -> None:
    (shown,) = CONTROLS.views(tables)
    assert [row[0].text for row in shown.view.rows] == [name for name, _, _ in MODELS]
    assert [row[0].strong for row in shown.view.rows] == [True] + [False] * 5
    assert [row[1].text for row in shown.view.rows][2:5] == ["shuffled summaries", "shuffled summaries", "noise of the same size"]


def test_noise_alone_is_said_to_be_no_control_training(tables: dict[str, pd.DataFrame]) -> None:
    assert list(CONTROLS.caveats(tables)) == []
    models = tables["controls"]
    (caveat,) = CONTROLS.caveats({**tables, "controls": models[models["kind"].isin(["tuned", "noise"])]})
    assert caveat.text.startswith("No control training was given")
    assert caveat.weakens == "controls"


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
    (card,) = cards_of(claims(("one", "undecided", "More seeds."), ("two", "supported", "Other trainings.")))
    assert card.value == "1 of 2"
    assert card.note == "0 contradicted, 1 undecided. What would overturn “two”: Other trainings."
    (card,) = cards_of(claims(("one", "withheld", ""), ("two", "undecided", "A control.")))
    assert card.note == "0 contradicted, 1 undecided, 1 withheld. What would overturn “two”: A control."


def test_every_claim_shows_its_unit_and_what_would_overturn_it() -> None:
    (shown,) = CLAIMS.views(claims(("one", "undecided", "More seeds."), ("two", "supported", "")))
    assert shown.view.columns[2:] == ("measured here", "value and 95\u202f% interval", "unit", "verdict")
    assert [(row[2].note, row[-2].text, row[-1].text) for row in shown.view.rows] == [
        ("What would overturn it: More seeds.", "training", "undecided"),
        ("", "training", "supported"),
    ]


def test_rows_about_noise_are_no_claims_of_the_paper_and_what_is_decided_is_named() -> None:
    tables = claims(
        ("few_edges", "supported", ""), ("steps.equal_rank", "contradicted", ""), ("heads.noise", "supported", ""), ("x", "undecided", "")
    )
    (finding,) = CLAIMS.findings(tables)
    assert finding.sentence.startswith(
        "Of 3 claims of and about the paper (arXiv 2505.17073) tested here: 1 supported (few edges), 1 contradicted (steps, equal rank), 1 undecided"
    )
    assert finding.card is not None
    assert finding.card.value == "1 of 3"
