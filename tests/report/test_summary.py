"""The first screen: a verdict that follows from the tables, findings by question and effect, and what weakens them beside them."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from mechscope.report.page import fill
from mechscope.report.statements import QUESTIONS
from mechscope.report.summary import Summary
from tests.report import synthetic_circuits
from tests.report.drawn import page_text
from tests.report.test_page import Page
from tests.report.test_verdict import contents, made, said

__all__ = ["made"]  # a fixture of the tests below


def test_findings_stand_under_questions_the_largest_effect_first_and_what_is_withheld_last(made: dict[str, pd.DataFrame]) -> None:
    made["layer_sets"] = made["layer_sets"].assign(withheld="the gain is not shown")
    groups = Summary.of(contents(made)).groups
    order = [list(QUESTIONS.values()).index(group.heading) for group in groups]
    assert order == sorted(order)
    for group in groups:
        effects = [finding.effect for finding in group.findings if not finding.withheld]
        assert effects == sorted(effects, reverse=True)
        withheld = [bool(finding.withheld) for finding in group.findings]
        assert withheld == sorted(withheld)


def test_a_warning_of_a_stage_is_a_caveat_beside_what_it_weakens_and_withholds_what_was_left_out(made: dict[str, pd.DataFrame]) -> None:
    notes = [
        {"weakens": "heads", "text": "two documents were cut", "withheld": ""},
        {"weakens": "circuit_overlap", "text": "edges were scored on 7 texts, too few", "withheld": "what the circuits share"},
        {"weakens": "", "text": "a check of the model failed", "withheld": ""},
    ]
    summary = Summary.of(contents(made, stages={"difference": {"outputs": {}, "caveats": notes[:2]}}, caveats=notes[2:]))
    sentences = [finding.sentence for group in summary.groups for finding in group.findings]
    assert "What the circuits share: withheld, as edges were scored on 7 texts, too few." in sentences
    beside = [
        finding
        for group in summary.groups
        for finding in group.findings
        if "Two documents were cut." in [each.text for each in finding.caveats]
    ]
    assert [finding.table for finding in beside] == ["heads"]
    table = {row["caveat"]: [row["section"], row["weakens"], row["withheld"]] for row in summary.table().to_dict("records")}
    assert table["Two documents were cut."] == ["heads", "heads", False]
    assert table["Edges were scored on 7 texts, too few."] == ["circuit-change", "circuit_overlap", True]
    assert table["A check of the model failed."] == ["", "", False]


def test_few_texts_stand_beside_the_statement_that_they_weaken() -> None:
    tables = synthetic_circuits.diff_tables(4, 4)
    tables["circuit_gain"] = tables["circuit_gain"].assign(n=8)
    summary = Summary.of(contents(tables))
    (gain,) = (finding for group in summary.groups for finding in (*group.findings, *group.folded) if finding.table == "circuit_gain")
    assert "Only 8 texts were read; intervals from fewer than 30 are rough." in [caveat.text for caveat in gain.caveats]


@pytest.mark.parametrize(("carry", "share", "headline"), [(0.0244, "2.44", True), (0.0488, "4.88", False)])
def test_edges_carry_more_of_the_gain_by_the_rank_that_the_claim_is_judged_by(carry: float, share: str, headline: bool) -> None:
    tables = synthetic_circuits.diff_tables(4, 4)
    gain = tables["circuit_gain"]
    tuned = gain["kind"] == "tuned"
    gain.loc[tuned, ["p_random", "p_less"]] = [carry, 1.0]
    groups = Summary.of(contents(tables)).groups
    shown = [finding for group in groups for finding in group.findings if finding.table == "circuit_gain"]
    folded = [finding for group in groups for finding in group.folded if finding.table == "circuit_gain"]
    (said,) = shown if headline else folded
    assert f"; {share}\u202f% of all sets, itself counted, carry at least as much" in said.text
    assert ("not shown to be more" in said.text) != headline


def test_a_share_of_the_gain_without_random_edges_beside_it_is_no_headline() -> None:
    tables = synthetic_circuits.diff_tables(4, 4)
    tables["circuit_gain"] = tables["circuit_gain"].query("kind == 'tuned'").reset_index(drop=True)
    summary = Summary.of(contents(tables))
    assert not [finding for group in summary.groups for finding in group.findings if finding.table == "circuit_gain"]
    assert not [finding for finding in summary.verdict if finding.table == "circuit_gain"]
    (folded,) = (finding for group in summary.groups for finding in group.folded if finding.table == "circuit_gain")
    assert "this does not say that they carry more than any others" in folded.sentence


def test_the_circuit_names_its_metric_and_what_its_sign_means() -> None:
    tables = synthetic_circuits.diff_tables(4, 4)
    tables["circuit_curve"] = tables["circuit_curve"].assign(metric="loss")
    sentences = " ".join(finding.sentence for group in Summary.of(contents(tables)).groups for finding in group.findings)
    assert (
        "Edges are scored by the loss on the target, in nats per token (lower is better): an edge with a positive score helps, as it pulls the loss down"
        in sentences
    )


def test_the_page_begins_with_the_verdict_and_shows_the_same_findings(made: dict[str, pd.DataFrame]) -> None:
    held = contents(made)
    summary, text = Summary.of(held), Page(page_text(held)).text

    def plain(sentence: str) -> str:
        return re.sub(r"\s+", " ", sentence)

    verdict = [text.index(plain(finding.sentence)) for finding in summary.verdict]
    assert verdict == sorted(verdict)
    # by which command it was made is told after it
    assert verdict[-1] < text.index("--out 'runs/my run'")
    for group in summary.groups:
        assert group.heading in text
        for finding in (*group.findings, *group.folded):
            assert plain(finding.sentence) in text
            assert all(plain(caveat.text) in text for caveat in finding.caveats)
    for finding in summary.cards:
        assert finding.sample in text
    assert "https://arxiv.org/abs/2505.17073" in text


def test_the_table_of_caveats_is_a_section_of_the_page(made: dict[str, pd.DataFrame]) -> None:
    few = {name: made[name].assign(n=9) for name in ("heads", "layers", "outputs")}
    held = contents({**made, **few})
    table = Summary.of(held).table()
    assert list(table) == ["section", "weakens", "caveat", "withheld"]
    assert set(table.loc[table["caveat"].str.startswith("Only 9 documents"), "weakens"]) == {"heads", "layers", "outputs"}
    filled = {each.section.id: each for each in fill(held, Summary.of(held))}
    assert len(filled["caveats"].views[0].view.rows) == len(table)


def test_numbers_that_are_missing_are_not_printed(made: dict[str, pd.DataFrame]) -> None:
    made["outputs"] = made["outputs"].assign(loss_change_low=np.nan, loss_change_high=np.nan)
    assert not [sentence for sentence in said(made) if "nan" in sentence]
