"""The first screen: its sentences say what the tables show with their intervals, and withhold what they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechscope.report.contents import Contents
from mechscope.report.shared import estimated
from mechscope.report.statements import QUESTIONS
from mechscope.report.summary import Summary
from mechscope.report.theme import number
from mechscope.studies.paper_2505_17073.interventions import layers_carry
from mechscope.studies.paper_2505_17073.judgement import Scope
from tests.report import synthetic, synthetic_circuits


def contents(made: dict[str, pd.DataFrame], **manifest: Any) -> Contents:
    return Contents(Path(), made, {}, synthetic.manifest() | manifest)


@pytest.fixture
def made() -> dict[str, pd.DataFrame]:
    """Return a study of 6 layers by 8 heads in which three layers carry more of the gain than any others."""
    made = synthetic.tables(6, 8)
    sets = made["layer_sets"]
    chosen = sets.index[sets["selected"]]
    sets.loc[chosen, ["p_random", "p_less"]] = [0.02, 0.98]
    return made


def said(made: dict[str, pd.DataFrame], **manifest: Any) -> list[str]:
    return [finding.sentence for finding in Summary.of(contents(made, **manifest)).verdict]


def test_the_verdict_answers_in_five_sentences_in_a_readers_order(made: dict[str, pd.DataFrame]) -> None:
    document = made["outputs"]["rows"] == "document"
    made["outputs"].loc[document, ["loss_change_low", "loss_change_high"]] = [-0.05, 0.01]
    compared, aim, where, gain, lora = said(made)
    assert compared == "The base model gpt2-news-7m was compared with the tuned model samsum/tuned (n = 200 documents)."
    assert aim == (
        "Fine-tuning did what it was meant to: the loss on the summaries' tokens fell (−0.560 [−0.580, −0.540] nats per token). "
        "On the 48 documents of the controls it changed by −0.100; beside it, 1 of other seeds −0.0900, 2 of shuffled summaries −0.0600 to "
        "−0.0500, 2 of noise of the same size −0.00300 to −0.00200. A price is not shown: on "
        "the documents' tokens the loss is not shown to have changed, from 3.29 to 3.27 nats per token (−0.0200 [−0.0500, +0.0100]); over all tokens it "
        "changed by −0.100 [−0.120, −0.0800], and the next-token distributions are 0.110 [0.102, 0.118] nats of KL apart (n = 200 documents)."
    )
    heads, layers = (made[name].query("rows == 'all'") for name in ("heads", "layers"))
    changed = heads[heads["write_change_verdict"] == "changed"]
    count = layers["kl_base_tuned_verdict"].eq("changed").sum()
    top = changed.sort_values("write_change").iloc[-1]
    assert where.startswith(
        f"It changed, by more than the smallest effect of interest: what {len(changed)} of 48 heads write (most {top['component']}, "
        f"{estimated(top, 'write_change')} of it); the attention of {count} of 6 layers (most layer "
    )
    assert where.endswith("; n = 32 documents).")
    assert gain.startswith(
        "The most changed layers (layers 0 and 1) carry more of the gain than others do: 62\u202f% beside 20\u202f% to 50\u202f% of 4 other"
    )
    assert lora.startswith("LoRA in these layers, at equal parameters, is ")


@pytest.mark.parametrize(
    ("standard", "random", "said_of"),
    [
        ((0.01, 0.03), (-0.03, -0.01), ("better than LoRA in every layer", "worse than LoRA in random layers")),
        ((-0.03, -0.01), (0.01, 0.03), ("worse than LoRA in every layer", "better than LoRA in random layers")),
        (
            (-0.01, 0.03),
            (-0.03, 0.01),
            ("not shown to be better or worse than LoRA in every layer", "not shown to be better or worse than LoRA in random"),
        ),
    ],
)
def test_whether_lora_pays_is_the_interval_of_rouge_1(
    made: dict[str, pd.DataFrame], standard: tuple[float, float], random: tuple[float, float], said_of: tuple[str, str]
) -> None:
    summary = made["bakeoff_summary"]
    own = (summary["metric"] == "rouge1") & (summary["strategy"] == "targeted_layers")
    for name, (low, high) in (("standard", standard), ("random", random)):
        columns = [f"vs_{name}", f"vs_{name}_low", f"vs_{name}_high"]
        # another metric says the opposite
        summary.loc[~own, columns] = [-(low + high) / 2, -high, -low]
        summary.loc[own, columns] = [(low + high) / 2, low, high]
    lora = said(made)[-1]
    against = [
        f"{words} ({number(mean, sign=True)} ["
        for words, mean in zip(said_of, (sum(standard) / 2, sum(random) / 2), strict=False)
        if "better or" not in words
    ]
    assert all(words in lora for words in (*against, *said_of))


@pytest.mark.parametrize(
    ("ranks", "ends", "words"),
    [
        ((0.024, 0.99), (0.05, 0.2), "carry more of the gain than others do"),
        ((0.026, 0.99), (0.05, 0.2), "are not shown to carry more of the gain than others do"),
        ((0.04, 0.99), (0.05, 0.2), "are not shown to carry more of the gain than others do"),
        ((0.024, 0.99), (-0.05, 0.2), "are not shown to carry more of the gain than others do"),
        ((0.99, 0.024), (-0.2, -0.05), "carry less of the gain than others do"),
        ((0.99, 0.026), (-0.2, -0.05), "are not shown to carry more of the gain than others do"),
        ((0.99, 0.024), (-0.2, 0.05), "are not shown to carry more of the gain than others do"),
    ],
)
def test_layers_carry_more_or_less_as_the_claim_on_them_is_judged(
    made: dict[str, pd.DataFrame], ranks: tuple[float, float], ends: tuple[float, float], words: str
) -> None:
    sets = made["layer_sets"]
    sets.loc[sets["selected"], ["p_random", "p_less", "more", "more_low", "more_high"]] = [*ranks, sum(ends) / 2, *ends]
    gain = said(made)[3]
    assert gain.startswith(f"The most changed layers (layers 0 and 1) {words}: ")
    # four other sets could never show it
    assert ("cannot show it" in gain) is words.startswith("are not")
    verdict = layers_carry(made, Scope()).verdict
    assert verdict == {"carry more": "supported", "carry less": "contradicted"}.get(words[:10], "undecided")


def test_a_price_is_told(made: dict[str, pd.DataFrame]) -> None:
    outputs = made["outputs"].set_index("rows", drop=False)
    columns = ["loss_base", "loss_tuned", "loss_change", "loss_change_low", "loss_change_high"]
    outputs.loc["document", columns] = [1.35, 3.02, 1.67, 1.6, 1.7]
    _, aim, *_ = said({**made, "outputs": outputs.reset_index(drop=True)})
    assert "At a price: on the documents' tokens the loss rose, from 1.35 to 3.02 nats per token (+1.67 [+1.60, +1.70])" in aim


@pytest.mark.parametrize(
    ("low", "high", "begins"),
    [
        (0.1, 0.3, "Fine-tuning did the opposite of what it was meant to: the loss on the summaries' tokens rose"),
        (-0.1, 0.3, "Fine-tuning is not shown to have done what it was meant to: the loss on the summaries' tokens changed"),
    ],
)
def test_what_fine_tuning_did_is_said_as_far_as_its_interval_goes(
    made: dict[str, pd.DataFrame], low: float, high: float, begins: str
) -> None:
    outputs = made["outputs"].assign(loss_change=(low + high) / 2, loss_change_low=low, loss_change_high=high)
    assert said({**made, "outputs": outputs})[1].startswith(begins)


def test_a_gain_that_is_not_there_is_withheld_from_the_verdict_the_findings_and_the_cards(made: dict[str, pd.DataFrame]) -> None:
    reason = "fine-tuning did not lower the loss on these summaries"
    sets = made["layer_sets"].assign(withheld=reason)
    summary = Summary.of(contents({**made, "layer_sets": sets}))
    assert summary.verdict[3].sentence.startswith(f"Whether these places (layers 0 and 1) carry the gain: withheld, as {reason}")
    (group,) = (group for group in summary.groups if group.heading == QUESTIONS["gain"])
    assert all(finding.withheld == reason and "%" not in finding.sentence for finding in group.findings)
    assert [finding.card.value for finding in group.findings if finding.card] == ["withheld"]


def test_layers_that_a_draw_would_match_are_not_said_to_carry_more(made: dict[str, pd.DataFrame]) -> None:
    sets = made["layer_sets"].assign(p_random=0.13)
    assert "are not shown to carry more of the gain than others do" in said({**made, "layer_sets": sets})[3]


def test_few_seeds_withhold_whether_lora_pays(made: dict[str, pd.DataFrame]) -> None:
    summary = made["bakeoff_summary"].assign(withheld="too few seeds: 1 of at least 3")
    assert said({**made, "bakeoff_summary": summary})[-1].startswith("Whether LoRA there pays: withheld, as too few seeds: 1 of at least 3")


def test_a_difference_alone_says_what_is_not_known_from_it(made: dict[str, pd.DataFrame]) -> None:
    alone = {name: made[name] for name in ("heads", "layers", "outputs", "weights", "smallest_effects")}
    assert said(alone)[-1] == "Not measured in this run: whether these places carry the gain, and whether LoRA there pays."


def test_changes_too_small_to_matter_are_no_verdict_of_change(made: dict[str, pd.DataFrame]) -> None:
    for name in ("heads", "layers", "outputs"):
        for column in made[name].filter(like="_verdict"):
            made[name][column] = "negligible"
    summary = Summary.of(contents(made))
    where = summary.verdict[2].sentence
    assert where == (
        "It is not shown to have changed what any of 48 heads write, the attention of any of 6 layers or what any of 6 MLPs write by more than the smallest "
        "effect of interest (n = 32 documents)."
    )
    (group,) = (group for group in summary.groups if group.heading == QUESTIONS["where"])
    assert not [finding for finding in group.findings if finding.table in ("heads", "layers")]
    assert len([finding for finding in group.folded if finding.table in ("heads", "layers")]) == 5


def test_a_change_of_mlps_alone_is_a_change(made: dict[str, pd.DataFrame]) -> None:
    made["heads"] = made["heads"].assign(write_change_verdict="negligible")
    made["layers"] = made["layers"].assign(kl_base_tuned_verdict="negligible", mlp_write_change_verdict="changed")
    where = said(made)[2]
    assert where.startswith("It changed, by more than the smallest effect of interest: what 6 of 6 MLPs write (most layer ")
    assert "not shown to have changed: what any of 48 heads write or the attention of any of 6 layers" in where


def test_few_documents_withhold_where_the_model_changed(made: dict[str, pd.DataFrame]) -> None:
    for name in ("heads", "layers"):
        counts = [column for column in map(str, made[name].columns) if column == "n" or column.endswith("_n")]
        made[name] = made[name].assign(**dict.fromkeys(counts, 8))
    assert said(made)[2] == "Where it changed the model: withheld, as a verdict needs 12 documents (n = 8 documents)."


def test_a_loss_without_an_interval_is_no_statement(made: dict[str, pd.DataFrame]) -> None:
    made["outputs"] = made["outputs"].assign(loss_change_low=np.nan, loss_change_high=np.nan, n=4)
    summary = Summary.of(contents(made))
    assert summary.verdict[1].sentence == (
        "What fine-tuning did to the loss on the summaries' tokens: withheld, as an interval needs 6 documents (n = 4 documents)."
    )
    findings = [each.sentence for group in summary.groups for each in (*group.findings, *group.folded) if each.table == "outputs"]
    assert [sentence for sentence in findings if "has no interval" in sentence]
    assert not [sentence for sentence in findings if "not shown" in sentence and "loss" in sentence and "smallest" not in sentence]


def test_a_change_too_small_to_matter_is_not_what_it_was_meant_to_do(made: dict[str, pd.DataFrame]) -> None:
    made["outputs"] = made["outputs"].assign(
        loss_change=-3e-4, loss_change_low=-4e-4, loss_change_high=-2e-4, loss_change_verdict="negligible"
    )
    aim = said(made)[1]
    assert aim.startswith(
        "Fine-tuning changed next to nothing: the loss on the summaries' tokens moved by less than the smallest effect of interest (−0.000300"
    )
    assert "The price is negligible" in aim
    assert "meant to" not in aim


def test_controls_that_lower_the_loss_as_much_stand_in_the_first_answer(made: dict[str, pd.DataFrame]) -> None:
    controls = made["controls"]
    tuned = float(controls.loc[controls["kind"] == "tuned", "loss_change"].iloc[0])
    nulls = ~controls["kind"].isin(["tuned", "seed"])
    controls.loc[nulls, "loss_change"] = np.linspace(tuned - 0.1, tuned + 0.1, int(nulls.sum()))
    assert f"it changed by {number(tuned, sign=True)}; beside it, " in said(made)[1]
    assert ", so it does not stand out among controls. " in said(made)[1]
    (loss,) = (
        each
        for group in Summary.of(contents(made)).groups
        for each in group.findings
        if each.table == "controls" and "summary loss" in each.text
    )
    assert loss.text.endswith("so it does not stand out among controls")
    # another seed of the same training is no null
    controls.loc[nulls, "loss_change"] = tuned + 1.0
    controls.loc[controls["kind"] == "seed", "loss_change"] = tuned - 0.1
    assert "does not stand out" not in said(made)[1]
    controls.loc[nulls, "loss_change"] = np.nan
    assert not [
        each
        for group in Summary.of(contents(made)).groups
        for each in group.findings
        if each.table == "controls" and "summary loss" in each.text
    ]


def test_equal_fingerprints_are_one_model(made: dict[str, pd.DataFrame]) -> None:
    models = {label: {"source": label, "family": "gpt2", "fingerprint": "x"} for label in ("base", "tuned")}
    readings = {"head_roles": made["heads"].iloc[:0]}
    (only,) = Summary.of(contents(readings, models=models)).verdict
    assert only.sentence.startswith("The two models are identical: their weights have one fingerprint")


def test_trainings_that_did_not_arrive_stand_beside_what_is_said_of_lora(made: dict[str, pd.DataFrame]) -> None:
    made["bakeoff"] = made["bakeoff"].assign(converged=False)
    lora = Summary.of(contents(made)).verdict[-1]
    every = len(made["bakeoff"])
    assert f"{every} of {every} trainings had not converged: placements are compared at this budget, not at their best." in [
        caveat.text for caveat in lora.caveats
    ]


def test_identical_models_are_one_sentence_and_nothing_else(made: dict[str, pd.DataFrame]) -> None:
    made["weights"] = made["weights"].assign(change=0.0, relative_change=0.0)
    summary = Summary.of(contents(made))
    (only,) = summary.verdict
    assert only.sentence == (
        f"The two models are identical: all {len(made['weights'])} weight matrices and vectors are equal, so there is no change to report."
    )
    assert summary.groups == ()
    assert summary.cards == ()


def test_circuits_of_identical_models_are_not_compared() -> None:
    tables = synthetic_circuits.diff_tables(4, 4)
    shift = tables["circuit_shift"]
    tables["circuit_shift"] = shift.assign(tuned=shift["base"], shift=0.0)
    (only,) = Summary.of(contents(tables)).verdict
    assert only.sentence.startswith(f"The two models do not differ on these texts: all {len(shift):,} edges have the same score in both")
