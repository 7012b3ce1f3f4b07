"""A circuit is judged on other pairs than found it, and claimed only where it differs from chance and from noise."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechscope.circuits import attribute_edges, faithfulness_curve
from mechscope.circuits.criteria import Minimality
from mechscope.circuits.scores import Cost
from mechscope.data.newsroom_pairs import newsroom_pairs
from mechscope.data.pairs import Pairs
from mechscope.instrument import Execution, load
from mechscope.settings.discovery import DiscoverySettings
from mechscope.studies import circuits
from mechscope.studies.circuit_request import CircuitRequest
from mechscope.studies.circuits import judge_circuit
from mechscope.studies.paper_2505_17073.circuits import circuit_changed, few_edges_carry_gain
from mechscope.studies.paper_2505_17073.judgement import Scope
from tests.slips import slip
from tests.studies.running import MODEL, measure


def test_one_half_of_the_pairs_finds_the_circuit_and_the_other_judges_it() -> None:
    pairs = newsroom_pairs(13, role="where")
    request = CircuitRequest.of(pairs, DiscoverySettings(), seed=0)
    ids = [{pair.id for pair in part} for part in (request.scored_on, request.judged_on)]
    assert not ids[0] & ids[1]
    assert ids[0] | ids[1] == {pair.id for pair in pairs}
    assert len(request.judged_on) == 6
    everything = CircuitRequest.of(pairs, DiscoverySettings(held_out=0.0), seed=0)
    assert everything.scored_on is everything.judged_on is pairs
    few = CircuitRequest.of(Pairs(pairs.pairs[:5], "few"), DiscoverySettings(), seed=0)
    assert few.scored_on is few.judged_on
    # copies under other names stand on their text's side, and are no more pairs than it
    twice = Pairs((*pairs.pairs, *(replace(pair, id=f"copy of {pair.id}") for pair in pairs)), "twice")
    again = CircuitRequest.of(twice, DiscoverySettings(), seed=0)
    assert {pair.clean for pair in again.judged_on} == {pair.clean for pair in request.judged_on}
    assert not {pair.clean for pair in again.judged_on} & {pair.clean for pair in again.scored_on}
    copied = CircuitRequest.of(
        Pairs(tuple(replace(pairs.pairs[at % 5], id=str(at)) for at in range(20)), "copies"), DiscoverySettings(), seed=0
    )
    assert copied.scored_on is copied.judged_on


def test_without_a_size_the_circuit_is_the_smallest_that_is_faithful_enough_on_the_pairs_that_find_it() -> None:
    subject, pairs = load(MODEL), newsroom_pairs(16, role="what")
    options = DiscoverySettings(method="eap", random_circuits=0, criteria=False)
    request = CircuitRequest.of(pairs, options, seed=0)
    scores = attribute_edges(subject, request.scored_on, method="eap")
    own, judged = (faithfulness_curve(subject, part, scores, random=0).table for part in (request.scored_on, request.judged_on))

    def smallest(curve: pd.DataFrame, level: float) -> float:
        return float(curve.loc[(1 - curve["faithfulness"]).abs() <= 1 - level, "fraction"].iloc[0])

    # a level at which the two halves of the pairs give circuits of different sizes
    level = next(level for level in np.linspace(0.99, 0.02, 98) if smallest(own, level) != smallest(judged, level))
    execution = Execution(tokens_per_batch=256)
    report = judge_circuit(subject, scores, replace(request, settings=replace(options, faithful=level)), execution=execution)
    assert report.fraction == smallest(own, level)
    # and what is said of it was measured on the others
    here = judged[judged["fraction"] == report.fraction].iloc[0]
    assert measure(report.tables["circuit_summary"], "faithfulness") == pytest.approx(here["faithfulness"], abs=1e-4)


@pytest.mark.parametrize(
    ("shares", "size"), [((0.2, 1.6, 0.95), 0.5), ((0.2, 0.91, 1.0), 0.1), ((0.2, 1.2, 1.3), 1.0), ((1.05, 0.2, 1.0), 0.01)]
)
def test_too_much_of_the_models_effect_is_no_more_faithful_than_too_little(shares: tuple[float, ...], size: float) -> None:
    curve = SimpleNamespace(table=pd.DataFrame({"fraction": [0.01, 0.1, 0.5], "faithfulness": shares}))
    assert circuits._smallest(slip(curve), 0.9, model="a model") == size


def test_a_size_that_no_faithfulness_chose_is_said_with_the_model(caplog: pytest.LogCaptureFixture) -> None:
    curve = SimpleNamespace(table=pd.DataFrame({"faithfulness": [np.nan, np.nan]}), notes={"faithfulness": "nothing differs"})
    assert circuits._smallest(slip(curve), 0.9, model="news/base") == circuits.FALLBACK
    assert caplog.messages == ["in news/base nothing differs; its circuit is the 5 % strongest edges"]


def test_what_is_needed_is_counted_beside_what_chance_gives() -> None:
    def counted(parts: int) -> dict[str, Any]:
        table = pd.DataFrame({"p": [0.01, 0.04, 0.05, 0.5]})
        return circuits._needed(Minimality(table, np.zeros((4, 2)), np.zeros(parts), Cost(0, 0)))

    assert counted(99)["value"] == 2
    # ranks 1 to 4 of 100 are below 0.05
    assert counted(99)["random"] == pytest.approx(4 * 0.04)
    assert counted(10)["random"] == 0  # no p is below 1 / 11
    assert np.isnan([counted(0)["value"], counted(0)["random"]]).all()


def overlap_row(what: str, change: float, p: float) -> dict[str, Any]:
    numbers = {"jaccard": 0.5 - change, "null": 0.1, "exchanged": 0.5, "exchanged_low": 0.45, "exchanged_high": 0.55, "n": 40}
    return {"what": what, "fraction": 0.05, **numbers, "change": change, "p": p}


@pytest.mark.parametrize(
    ("change", "p", "verdict"), [(0.2, 0.005, "supported"), (0.04, 0.06, "undecided"), (0.0, 1.0, "undecided"), (-0.1, 0.01, "undecided")]
)
def test_circuits_differ_only_if_models_share_less_than_with_their_labels_exchanged(change: float, p: float, verdict: str) -> None:
    table = pd.DataFrame([overlap_row("edges", change, p), overlap_row("nodes", 0.0, 1.0)])
    claim = circuit_changed({"circuit_overlap": table}, Scope())
    assert claim is not None
    assert claim.verdict == verdict
    assert claim.unit == "text"
    assert claim.value == change
    # the sentence's shares give its difference
    assert f"share {0.5 - change:.2f}" in claim.measured
    assert f"0.50 (95\u202f% of exchanges 0.45 to 0.55), which is {change:+.2f} (p = {p:.3f})" in claim.measured
    assert "About these two models" in claim.note


def gain_rows(p_random: float, p_less: float, withheld: str = "") -> pd.DataFrame:
    rows = [
        {"fraction": 0.05, "kind": kind, "share": share, "low": share - 0.1, "high": share + 0.1, "random_sets": 40, "withheld": withheld}
        for kind, share in (("tuned", 0.6), ("random", 0.1))
    ]
    return pd.DataFrame(rows).assign(p_random=[p_random, np.nan], p_less=[p_less, np.nan])


@pytest.mark.parametrize(
    ("ranks", "verdict"), [((1 / 41, 1.0), "supported"), ((2 / 41, 40 / 41), "undecided"), ((1.0, 1 / 41), "contradicted")]
)
def test_few_edges_carry_the_gain_only_if_they_carry_more_than_random_ones(ranks: tuple[float, float], verdict: str) -> None:
    claim = few_edges_carry_gain({"circuit_gain": gain_rows(*ranks)}, Scope())
    assert claim is not None
    assert claim.verdict == verdict
    assert claim.value == pytest.approx(0.5)


def test_no_gain_gives_no_verdict() -> None:
    claim = few_edges_carry_gain({"circuit_gain": gain_rows(1 / 41, 1.0, "fine-tuning did not raise the logit-diff")}, Scope())
    assert claim is not None
    assert claim.verdict == "withheld"
    assert claim.measured == "Withheld: fine-tuning did not raise the logit-diff."
    assert np.isnan(claim.value)
