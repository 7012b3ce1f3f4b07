"""`mechscope calibrate`: rates of known truths, what is allowed of them, and the page; the product's own truths in the small form (slow)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mechscope.errors import SettingsError
from mechscope.report.calibration import calibration_page
from mechscope.report.theme import percent
from mechscope.studies.calibration import rates, truth
from mechscope.studies.calibration.rates import rates_table
from mechscope.studies.calibration.truth import Truth, all_truths
from mechscope.studies.jobs.calibrate import JOB
from mechscope.studies.paper_2505_17073.claims import CLAIMS
from tests.studies.running import run


def said(*verdicts: str) -> Truth:
    """Return a null whose verdicts come one after another with the seed."""
    return Truth(
        claim="it_changed",
        world="nothing changed",
        kind="null",
        unit="document",
        draw=lambda seed: verdicts[seed % len(verdicts)],
        wrong=("supported", "contradicted"),
        small=40,
        full=400,
    )


def given(monkeypatch: pytest.MonkeyPatch, truths: Sequence[Truth]) -> None:
    for module in (truth, rates):
        monkeypatch.setattr(module, "all_truths", lambda: tuple(truths))


def test_rates_are_counted_and_what_is_wrong_too_often_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent, loud = said("undecided"), replace(said("supported", "undecided", "contradicted", "undecided"), claim="it_grew")
    covered = replace(said(*["inside"] * 19, "outside"), claim="mean", kind="coverage", size=8.0)
    narrow = replace(covered, claim="share", draw=lambda seed: ("inside", "outside", "withheld", "withheld")[seed % 4])
    found = replace(loud, claim="it_is", kind="planted", right=("supported",), size=0.5)
    given(monkeypatch, [silent, loud, covered, narrow, found])
    result = run(JOB, tmp_path / "run")
    table = result.calibration.set_index("claim")
    assert table["n"].to_dict() == {"it_changed": 40, "it_grew": 40, "mean": 40, "share": 20, "it_is": 40}
    assert table["rate"].to_dict() == {"it_changed": 0.0, "it_grew": 0.5, "mean": 0.95, "share": 0.5, "it_is": 0.25}
    assert table["holds"].to_dict() == {"it_changed": True, "it_grew": False, "mean": True, "share": False, "it_is": True}
    assert table["withheld"].fillna(0).to_dict()["share"] == 0.5
    page = calibration_page(result.calibration)
    assert f"\n- Not calibrated: it_grew where nothing changed: {percent(0.5)} (n = 40 draws).\n" in page
    assert "\n- 1 of 2 rates of wrong verdicts are shown not to be as claimed; " in page
    assert "**0.500" in page
    only = run(JOB, tmp_path / "other", claims="it_grew", form="full", seed=1).calibration
    assert (only["n"].item(), only["rate"].item()) == (400, 0.5)


def test_a_killed_run_goes_on_at_its_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def fails_once(seed: int) -> str:
        drawn.append(seed)
        if len(drawn) == 1:
            raise KeyboardInterrupt
        return "undecided"

    first: list[int] = []

    def never_fails(seed: int) -> str:
        first.append(seed)
        return "undecided"

    given(monkeypatch, [replace(said("undecided"), draw=never_fails), replace(said(), draw=fails_once)])
    with pytest.raises(KeyboardInterrupt):
        run(JOB, tmp_path / "run")
    assert len(run(JOB, tmp_path / "run").calibration) == 2
    assert first == list(range(40))


def test_an_allowance_grows_with_the_binomial_error_of_few_draws() -> None:
    few, many = said("undecided"), said("undecided")
    table = rates_table([few, many], [{"undecided": 20}, {"undecided": 2000}])
    assert table["allowed_to"].iloc[0] > 0.15
    assert 0.05 < table["allowed_to"].iloc[1] < 0.065


def test_a_claim_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="setting 'claims' names it_flew: known are"):
        run(JOB, tmp_path / "run", claims="it_flew")


def test_every_claim_of_the_paper_has_a_null() -> None:
    nulls = {truth.claim for truth in all_truths() if truth.kind == "null"}
    counted = {"fewer_parameters"}  # no draw is involved: parameters are counted
    # one function judges both protocols, and a circuit's arms as those of layers
    drawn = {
        claim.replace("equal_rank", "equal_parameters").replace("targeted", arms) for claim in nulls for arms in ("targeted", "circuit")
    }
    assert {claim.name for claim in CLAIMS} - counted <= nulls | drawn


def test_a_claim_can_be_named_among_others() -> None:
    assert not [truth.claim for truth in all_truths() if "," in truth.claim]


@pytest.mark.slow
def test_every_verdict_and_interval_is_as_right_as_it_says(tmp_path: Path) -> None:
    table = run(JOB, tmp_path / "run").calibration
    assert table.loc[~table["holds"], ["claim", "world", "n", "rate"]].to_dict("records") == []
