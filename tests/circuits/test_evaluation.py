"""m(C) is what a brute-force run gives, faithfulness is a ratio of means with honest intervals, and areas are those of known curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mechscope.circuits import evaluation
from mechscope.circuits.evaluation import Evaluated, auroc, evaluate, faithfulness_curve, of_span
from mechscope.circuits.graph import Circuit, Graph
from mechscope.circuits.overlap import random_circuits
from mechscope.circuits.scores import Cost, EdgeScores
from mechscope.data.pairs import Pairs
from mechscope.errors import DataError, SettingsError
from mechscope.instrument.execution import Execution
from tests import families
from tests.causal.pairs import random_pairs, telling_pairs
from tests.circuits.brute import TOLERANCE, brute_metric, brute_written

TWO = ("gpt2", "llama")
FREE = Cost(0, 0)
NO_MODEL: Any = None  # where a curve's circuits are evaluated by `toy`


def scored(graph: Graph, values: np.ndarray) -> EdgeScores:
    return EdgeScores(graph, values, None, "made up", FREE)


def made(values: Any, clean: Any, empty: Any) -> Evaluated:
    values, clean, empty = (np.asarray(each, dtype=np.float64) for each in (values, clean, empty))
    return Evaluated(values, clean, empty, "logit-diff", FREE)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A model whose metric is a function of the circuit, the same for all texts up to an offset."""
    world: dict[str, Any] = {}

    def fake(subject: Any, pairs: Sequence[Any], circuits: Sequence[Circuit], **_: Any) -> Evaluated:
        share = np.array([world["share"](circuit) for circuit in circuits])
        offset = np.linspace(0, 1, len(pairs))
        return made(share[:, None] * (2 + offset) + offset, 2 + 2 * offset, offset)

    monkeypatch.setattr(evaluation, "evaluate", fake)
    return world


@pytest.mark.parametrize("family", TWO)
@pytest.mark.parametrize("source", ["corrupt", "zero"])
def test_circuits_of_any_size_give_what_a_brute_force_run_of_each_text_gives_in_the_order_of_the_pairs(family: str, source: Any) -> None:
    subject, pairs = families.subject(family, torch.float64), random_pairs(4)
    graph = Graph.of(subject)
    circuits = [random_circuits(graph, size, number=1, seed=size)[0] for size in (len(graph) // 3, len(graph) - 5)]
    circuits += [Circuit.full(graph), Circuit.empty(graph)]
    found = evaluate(subject, pairs, circuits, source=source, execution=Execution(tokens_per_batch=24))
    for index, pair in enumerate(pairs):
        rest = brute_written(subject.plain, family, pair.corrupt)
        if source == "zero":
            rest = {name: torch.zeros_like(value) for name, value in rest.items()}
        expected = [brute_metric(subject.plain, family, pair, circuit.names, rest=rest) for circuit in circuits]
        np.testing.assert_allclose(found.values[:, index], expected, rtol=TOLERANCE[family], atol=TOLERANCE[family], err_msg=pair.id)
        np.testing.assert_allclose([found.clean[index], found.empty[index]], expected[2:], rtol=TOLERANCE[family], atol=TOLERANCE[family])


@pytest.mark.parametrize("family", TWO)
@pytest.mark.parametrize("metric", ["logit-diff", "kl"])
def test_the_whole_model_is_faithful_the_empty_circuit_is_not_whichever_way_the_metric_counts(family: str, metric: str) -> None:
    subject = families.subject(family, torch.float64)
    pairs = telling_pairs(subject, 8)
    graph = Graph.of(subject)
    found = evaluate(subject, pairs, [Circuit.full(graph), Circuit.empty(graph)], metric=metric)
    assert (found.clean.mean() > found.empty.mean()) == (metric == "logit-diff")
    share = found.faithfulness()
    assert share.note is None
    np.testing.assert_allclose(share.value, [1, 0], atol=TOLERANCE[family])
    np.testing.assert_allclose([share.low, share.high], [[1, 0], [1, 0]], atol=TOLERANCE[family])


def test_how_circuits_and_texts_are_grouped_changes_nothing_and_equal_circuits_are_run_once() -> None:
    subject, pairs = families.subject("gpt2", torch.float64), random_pairs(5)
    graph = Graph.of(subject)
    one, two, three = random_circuits(graph, 100, number=3, seed=3)
    together = evaluate(subject, pairs, [one, two, one, three, two], execution=Execution(tokens_per_batch=4096))
    told: list[tuple[int, int]] = []
    alone = evaluate(
        subject,
        pairs,
        [one, two, one, three, two],
        execution=Execution(tokens_per_batch=1, progress=lambda _, done, total: told.append((done, total))),
    )
    np.testing.assert_allclose(alone.values, together.values, rtol=1e-9)
    np.testing.assert_array_equal(together.values[0], together.values[2])
    assert np.abs(together.values[0] - together.values[1]).max() > 1e-3
    assert together.cost == alone.cost == Cost(forward=3 + 2, backward=0)
    assert told == [(done, 15) for done in (3, 6, 9, 12, 15)]


def test_faithfulness_is_a_ratio_of_means() -> None:
    # the first text's own ratio is 3 and the second's 0.5, but the second moves the metric ten times as far
    share = made([[3, 5], [0, 0]], clean=[1, 10], empty=[0, 0]).faithfulness()
    assert share.note is not None  # two such texts cannot exclude that nothing differs
    clean, empty = np.array([1.0, 10] * 8), np.zeros(16)
    share = made([[3, 5] * 8, [0, 0] * 8], clean=clean, empty=empty).faithfulness()
    np.testing.assert_allclose(share.value, [8 / 11, 0], rtol=1e-12)


def test_an_interval_contains_the_value_and_halves_with_four_times_the_texts() -> None:
    random = np.random.default_rng(0)
    widths = []
    for texts in (50, 200, 800):
        clean = 3 + random.normal(size=texts)
        share = made((0.6 * clean + random.normal(size=texts))[None], clean=clean, empty=np.zeros(texts)).faithfulness()
        assert share.low[0] < share.value[0] < share.high[0]
        widths.append(share.high[0] - share.low[0])
    # the standard error of the ratio is close to sd / (mean span · √n) = 1 / (3 √n)
    np.testing.assert_allclose(widths, [2 * 1.96 / 3 / texts**0.5 for texts in (50, 200, 800)], rtol=0.2)


def test_texts_on_which_nothing_differs_have_no_faithfulness_and_so_for_few_texts() -> None:
    random = np.random.default_rng(0)
    noise = random.normal(size=12)
    share = of_span(np.ones((2, 12)), noise - noise.mean(), np.zeros(12))
    assert np.isnan(share.value).all()
    assert np.isnan(share.high).all()
    assert share.note is not None
    assert share.note.startswith("the whole model and the empty circuit do not differ in the metric, as far as 12 texts show: ")
    for texts in (1, 5):
        few = made([[1.5, 1.4, 1.2, 1.7, 1.6][:texts]], clean=[2, 2.1, 2.2, 2, 2.3][:texts], empty=[1, 1, 1, 1, 1][:texts]).faithfulness()
        assert np.isnan([few.value[0], few.low[0], few.high[0]]).all()
        assert few.note == f"too few texts: {texts} of at least 6"


def test_a_circuit_as_good_as_the_model_at_every_size_has_cpr_1_and_cmd_0(toy: dict[str, Any]) -> None:
    graph = Graph(2, 2)
    toy["share"] = lambda circuit: 1.0
    curve = faithfulness_curve(NO_MODEL, random_pairs(6), scored(graph, np.arange(len(graph)) + 1.0), random=2)
    np.testing.assert_allclose([curve.cpr.value, curve.cpr.low, curve.cpr.high, curve.cpr.random], 1, rtol=1e-12)
    np.testing.assert_allclose([curve.cmd.value, curve.cmd.low, curve.cmd.high, curve.cmd.random], 0, atol=1e-12)


def test_areas_of_curves_known_in_closed_form(toy: dict[str, Any]) -> None:
    graph = Graph(3, 3)
    scores = scored(graph, np.random.default_rng(0).normal(size=len(graph)))
    options: dict[str, Any] = {"fractions": (0.2, 0.5, 1.0), "prune": False, "random": 3}
    toy["share"] = lambda circuit: len(circuit) / len(graph)
    curve = faithfulness_curve(NO_MODEL, random_pairs(6), scores, **options)
    # f(k) = k from 0.2 to 1 has mean 0.6; sizes are rounded to whole edges
    near = 1 / len(graph)
    np.testing.assert_allclose([curve.cpr.value, curve.cmd.value], [0.6, 0.4], atol=near)
    # random circuits have the same sizes, and this metric sees nothing but the size
    np.testing.assert_allclose([curve.cpr.random, curve.cpr.random_low, curve.cpr.random_high], curve.cpr.value, rtol=1e-12)
    toy["share"] = lambda circuit: 1.5 if len(circuit) < len(graph) else 1.0
    curve = faithfulness_curve(NO_MODEL, random_pairs(6), scores, **options)
    # more than the model does is no gain for CMD: trapezoids 1.5 · 0.3 + 1.25 · 0.5 and 0.5 · 0.3 + 0.25 · 0.5, over a width of 0.8
    np.testing.assert_allclose([curve.cpr.value, curve.cmd.value], [1.075 / 0.8, 0.275 / 0.8], rtol=1e-12)


@pytest.mark.parametrize("family", TWO)
def test_a_curve_holds_what_its_circuits_give_and_ends_at_the_model_for_random_circuits_too(family: str) -> None:
    subject = families.subject(family, torch.float64)
    pairs = telling_pairs(subject, 8)
    graph = Graph.of(subject)
    scores = scored(graph, np.random.default_rng(0).normal(size=len(graph)))
    curve = faithfulness_curve(subject, pairs, scores, fractions=(0.1, 0.4, 0.8, 1.0), random=3, execution=Execution(tokens_per_batch=200))
    direct = evaluate(subject, pairs, curve.circuits, execution=Execution(tokens_per_batch=200))
    share = direct.faithfulness()
    close: dict[str, Any] = {"rtol": TOLERANCE[family], "atol": TOLERANCE[family]}
    np.testing.assert_allclose(curve.evaluated.values, direct.values, **close)
    np.testing.assert_allclose(curve.table["value"], direct.values.mean(1), **close)
    np.testing.assert_allclose(curve.table[["faithfulness", "low", "high"]].to_numpy().T, [share.value, share.low, share.high], **close)
    assert list(curve.table["edges"]) == [len(circuit) for circuit in curve.circuits]
    np.testing.assert_allclose(curve.table.iloc[-1][["faithfulness", "random", "random_low"]].to_numpy(float), 1, **close)
    f, k = curve.table["faithfulness"], [0.1, 0.4, 0.8, 1.0]
    by_hand = sum((k[i + 1] - k[i]) * (f[i] + f[i + 1]) / 2 for i in range(3)) / 0.9
    assert curve.cpr.value == pytest.approx(by_hand, rel=1e-9)
    assert curve.cpr.low < curve.cpr.value < curve.cpr.high
    assert curve.cmd.value > 0
    # three random circuits at three sizes, four of the curve and two plain runs; the whole model is one of the four
    assert curve.cost == Cost(forward=3 * 3 + 4 + 2, backward=0)
    again = faithfulness_curve(subject, pairs, scores, fractions=(0.1, 0.4, 0.8, 1.0), random=3, execution=Execution(tokens_per_batch=200))
    np.testing.assert_array_equal(curve.random, again.random)


def test_a_curve_over_texts_that_are_equal_in_both_versions_is_empty_and_says_why() -> None:
    subject = families.subject("gpt2", torch.float64)
    graph, pairs = Graph.of(subject), Pairs(tuple(replace(pair, corrupt=pair.clean) for pair in random_pairs(6)), "equal")
    curve = faithfulness_curve(subject, pairs, scored(graph, np.arange(len(graph)) + 1.0), fractions=(0.5, 1.0), random=1)
    assert curve.table[["faithfulness", "low", "random"]].isna().all(axis=None)
    assert np.isnan([curve.cpr.value, curve.cpr.low, curve.cmd.random]).all()
    assert "do not differ" in curve.notes["faithfulness"]
    assert (curve.table["withheld"] == curve.notes["faithfulness"]).all()


def test_without_random_circuits_a_curve_has_no_band(toy: dict[str, Any]) -> None:
    graph = Graph(2, 2)
    toy["share"] = lambda circuit: 1.0
    curve = faithfulness_curve(NO_MODEL, random_pairs(6), scored(graph, np.arange(len(graph)) + 1.0), random=0)
    assert curve.table[["random", "random_low", "random_high"]].isna().all(axis=None)
    assert np.isnan(curve.cpr.random)
    assert curve.cpr.value == pytest.approx(1)


def test_auroc_is_1_where_true_edges_are_strongest_whatever_their_sign_and_one_half_where_all_are_equal() -> None:
    graph = Graph(2, 2)
    truth = random_circuits(graph, 10, number=1, seed=0)[0]
    sign = np.where(np.arange(len(graph)) % 2, 1.0, -1.0)
    assert auroc(scored(graph, sign * np.where(truth.edges, 2.0, 1.0)), truth) == 1
    assert auroc(scored(graph, sign * np.where(truth.edges, 1.0, 2.0)), truth) == 0
    assert auroc(scored(graph, sign), truth) == 0.5
    # an edge that was not scored is not ranked: here it would have been the only mistake
    values = np.where(truth.edges, 2.0, 1.0)
    values[np.flatnonzero(truth.edges)[0]] = np.nan
    assert auroc(scored(graph, values), truth) == 1


def test_what_cannot_be_evaluated_is_refused() -> None:
    subject, pairs = families.subject("gpt2", torch.float64), random_pairs(2)
    graph = Graph.of(subject)
    full, values = Circuit.full(graph), np.arange(len(graph)) + 1.0
    with pytest.raises(SettingsError, match="no circuits to evaluate"):
        evaluate(subject, pairs, [])
    with pytest.raises(SettingsError, match="does not belong to this model"):
        evaluate(subject, pairs, [full, Circuit.full(Graph(1, 2))])
    with pytest.raises(DataError, match="the model reads 64"):
        evaluate(subject, random_pairs(1, lengths=(70,)), [full])
    for fractions in ((0.5,), (0.5, 0.1), (0.0, 1.0), (0.5, 1.5)):
        with pytest.raises(SettingsError, match="at least two fractions, rising"):
            faithfulness_curve(subject, pairs, scored(graph, values), fractions=fractions)
    with pytest.raises(SettingsError, match="-1 random circuits are not usable"):
        faithfulness_curve(subject, pairs, scored(graph, values), random=-1)
    with pytest.raises(DataError, match="use the same model"):
        auroc(scored(graph, values), Circuit.full(Graph(1, 2)))
    for truth in (full, Circuit.empty(graph)):
        with pytest.raises(DataError, match="some inside, some outside"):
            auroc(scored(graph, values), truth)
