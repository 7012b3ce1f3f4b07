"""Known truth: methods find the circuits of models whose circuit is known, and criteria tell a wrong circuit from it.

Two models are written by hand (`planted`), so the truth is what was written. The third is the two-layer Llama that was trained to do induction:
its truth is put together from its heads' patterns and from ablation, neither of which knows of edges (`trained`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import pytest
from torch import Tensor

from mechscope.causal import ablate
from mechscope.circuits.attribution import attribute_edges
from mechscope.circuits.criteria import completeness, minimality
from mechscope.circuits.evaluation import auroc, evaluate
from mechscope.circuits.exact import exact_effects
from mechscope.circuits.graph import Circuit, Graph
from mechscope.circuits.routes import flow_routes
from mechscope.circuits.scores import Cost, EdgeScores
from mechscope.data.pairs import Pairs
from mechscope.subject.load import Subject
from tests.causal.test_known_truth import PAIRS, WORDS, heads_by_role, inductive
from tests.circuits import planted
from tests.circuits.brute import brute_metric, brute_written


@dataclass(frozen=True)
class Known:
    """A model, texts and its true circuit."""

    subject: Subject
    pairs: Pairs
    truth: Circuit


@lru_cache(maxsize=8)
def known(name: str) -> Known:
    if name == "trained":
        return trained()
    model = getattr(planted, name)()
    return Known(model.subject, model.pairs, Circuit.of(Graph.of(model.subject), model.truth))


def trained() -> Known:
    """Return the model trained to do induction, with texts and truth.

    Texts read `… A B … A`; a third of the corrupt ones has another B, a third another word where A stood first, a third another A at the end. (All
    three at once make pairs between which no straight line of embeddings reads as text: integrated gradients then find less.)

    True are the edges by which induction is done (Olsson et al. 2022). There are no position embeddings, so all that heads read are words:

        input → q, k and v of the previous-token heads P               which word stood before
        P → k, input → q and v of the induction heads I                where that word is the current one; what stands there
        I → logits, I → M, M → logits                                 the answer, also by way of M, those MLPs behind I that ablation shows to matter

    P and I are told by their patterns alone. Left out, though P writes it and some of I reads it: P → v of I.
    """
    subject, texts = inductive(), []
    for number, pair in enumerate(PAIRS.first(24)):
        first, other = pair.segments["first"][0][0], next(word for word in range(WORDS) if word not in {*pair.clean, *pair.corrupt})
        corrupt = list(pair.corrupt if number % 3 == 0 else pair.clean)
        if number % 3:
            corrupt[first if number % 3 == 1 else -1] = other
        texts.append(replace(pair, corrupt=tuple(corrupt)))
    pairs = Pairs(tuple(texts), "induction, one word changed")
    before, after, _ = heads_by_role()
    assert {head[:2] for head in after} == {"a1"}
    lost = ablate(subject, pairs, sites=["mlp"], source="resample", metric="logit-diff").table.set_index("component")["effect"].abs()
    edges = [f"embed->{head}<{part}>" for head in before for part in "qkv"]
    edges += [f"{head}->{reader}<k>" for head in before for reader in after]
    edges += [f"embed->{head}<{part}>" for head in after for part in "qv"]
    edges += [f"{head}->{reader}" for head in after for reader in ("logits", "m1")]
    assert lost["m1"] > 5 * lost["m0"]
    edges.append("m1->logits")
    return Known(subject, pairs, Circuit.of(Graph.of(subject), edges))


@lru_cache(maxsize=16)
def scored(name: str, method: Literal["exact", "eap", "eap-ig"]) -> EdgeScores:
    model = known(name)
    if method == "exact":
        return exact_effects(model.subject, model.pairs)
    return attribute_edges(model.subject, model.pairs, method=method)


def by_chance(graph: Graph, seed: int) -> EdgeScores:
    return EdgeScores(graph, np.random.default_rng(seed).standard_normal(len(graph)), None, "random", Cost(0, 0))


@lru_cache(maxsize=4)
def written(name: str) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Return what every sender writes in each pair's clean and corrupt text, by the tests' own forward pass."""
    model = known(name).subject.model
    texts = [(pair.clean, pair.corrupt) for pair in known(name).pairs]
    one, two = ([brute_written(model, model.config.model_type, ids) for ids in version] for version in zip(*texts, strict=True))
    return list(zip(one, two, strict=True))


def metric_by_brute_force(name: str, keep: Collection[str]) -> float:
    """Return the mean logit difference of an edge set, likewise."""
    model, pairs = known(name).subject.model, zip(known(name).pairs, written(name), strict=True)
    return float(np.mean([brute_metric(model, model.config.model_type, pair, keep, rest=rest) for pair, (_, rest) in pairs]))


@pytest.mark.parametrize("name", ["induction", "logic"])
def test_what_was_written_is_what_the_model_does(name: str) -> None:
    """Of the metric between the whole model and none of it, the true edges alone carry 97–103 %, each alone is needed for a fifth and more."""
    truth = known(name).truth
    whole, none = (metric_by_brute_force(name, keep) for keep in (truth.graph.names, ()))
    assert whole > 4
    assert none < -4  # the corrupt texts' own answer is the wrong one

    def share(keep: Collection[str]) -> float:
        return (metric_by_brute_force(name, keep) - none) / (whole - none)

    assert share(truth.names) == pytest.approx(1, abs=0.03)
    for edge in truth.names:
        assert share([other for other in truth.names if other != edge]) < 0.8, edge
    assert abs(share([edge for edge in truth.graph.names if edge not in truth.names])) < 0.03


@pytest.mark.parametrize("name", ["induction", "logic"])
def test_no_part_is_deaf_to_what_differs(name: str) -> None:
    """What every head and MLP outside the circuit writes changes at least a tenth as much as what a true one writes, and no edge is without effect."""
    model = known(name)
    change = dict.fromkeys(model.truth.graph.senders, 0.0)
    for clean, corrupt in written(name):
        for sender in change:
            change[sender] += float((clean[sender] - corrupt[sender]).norm())
    inside = dict(zip(change, model.truth.nodes, strict=True))
    assert min(change[sender] for sender in change if not inside[sender]) > 0.1 * max(change[head] for head in change if inside[head])
    assert (scored(name, "exact").mean != 0).mean() > 0.9


@pytest.mark.parametrize("name", ["induction", "logic", "trained"])
def test_exact_effects_find_the_true_edges(name: str) -> None:
    assert auroc(scored(name, "exact"), known(name).truth) >= 0.98


@pytest.mark.parametrize("name", ["induction", "logic", "trained"])
def test_integrated_gradients_find_the_true_edges(name: str) -> None:
    assert auroc(scored(name, "eap-ig"), known(name).truth) >= 0.95


@pytest.mark.parametrize("name", ["induction", "logic", "trained"])
def test_random_scores_find_nothing(name: str) -> None:
    """The mean of 100 draws has a standard error below 0.015."""
    truth = known(name).truth
    assert np.mean([auroc(by_chance(truth.graph, seed), truth) for seed in range(100)]) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("name", ["logic", "trained"])
def test_integrated_gradients_find_more_than_one_gradient(name: str) -> None:
    truth = known(name).truth
    assert auroc(scored(name, "eap"), truth) < auroc(scored(name, "eap-ig"), truth)


@pytest.mark.parametrize("name", ["induction", "logic", "trained"])
def test_what_flows_is_a_weaker_guide_than_what_matters(name: str) -> None:
    """Information-flow routes look at no metric: better than chance, worse than all methods that do."""
    model = known(name)
    assert 0.6 < auroc(flow_routes(model.subject, model.pairs), model.truth) < 0.85


def test_a_single_gradient_misses_what_integrated_gradients_see() -> None:
    """The choice by z is saturated, and |x + y| has a kink where x and y differ: EAP sees less than a quarter of the effect, EAP-IG more than a third."""
    eap, ig, exact = scored("logic", "eap"), scored("logic", "eap-ig"), scored("logic", "exact")
    for edge in ("a0.h1->m1", "m1->a2.h1<v>", "a2.h1->a3.h0<q>"):
        assert abs(eap[edge]) < 0.25 * abs(exact[edge]), edge
        assert abs(ig[edge]) > 0.33 * abs(exact[edge]), edge


def test_a_slope_without_effect_misleads_gradients_but_not_interventions() -> None:
    """The decoy brings a sign, of which only the size is used: every gradient sees it, no intervention does."""
    ig, exact = scored("logic", "eap-ig"), scored("logic", "exact")
    needed = abs(exact["a0.h0->m1"])
    assert abs(exact["a0.h2->m1"]) < 0.03 * needed
    assert abs(ig["a0.h2->m1"]) > 0.1 * needed


def test_a_circuit_without_the_backup_is_faithful_but_not_complete() -> None:
    """Two heads do the same work. One is enough for the metric; only when it is taken away from both does the circuit part from the model."""
    model = known("backup")
    half = model.truth.without(["a0.h1"])
    both = evaluate(model.subject, model.pairs, [model.truth, half]).faithfulness().value
    assert both == pytest.approx([1, 1], abs=0.12)
    whole, missing = (completeness(model.subject, model.pairs, circuit).table["normalised"].max() for circuit in (model.truth, half))
    assert whole < 0.15
    assert missing > 0.8


@pytest.mark.parametrize(("name", "missing"), [("induction", "a0.h1"), ("logic", "a0.h1")])
def test_a_circuit_without_a_true_part_is_neither(name: str, missing: str) -> None:
    model = known(name)
    less = model.truth.without([missing])
    whole, part = evaluate(model.subject, model.pairs, [model.truth, less]).faithfulness().value
    assert whole > part + 0.25
    gaps = [
        completeness(model.subject, model.pairs, circuit, random=10, greedy=1).table["normalised"].max() for circuit in (model.truth, less)
    ]
    assert gaps[0] < 0.1 < 0.25 < gaps[1]


@pytest.mark.parametrize("name", ["induction", "logic"])
def test_a_superfluous_part_is_told_from_the_true_ones(name: str) -> None:
    """Every true part matters more than all random ones that are joined to the circuit; a superfluous one is like these."""
    model = known(name)
    head, edges = getattr(planted, name)().superfluous
    inflated = model.truth | Circuit.of(model.truth.graph, edges)
    found = minimality(model.subject, model.pairs, inflated, controls=30).table.set_index("component")
    assert found.loc[head, "p"] > 0.1
    assert found.loc[head, "normalised"] < 0.05
    true = found.drop(index=head)
    assert (true["p"] < 0.05).all()
    assert (true["normalised"] > 0.2).all()


def test_parts_that_stand_in_for_each_other_are_needed_beside_each_other() -> None:
    model = known("backup")
    found = minimality(model.subject, model.pairs, model.truth, sets=[("a0.h0",), ("a0.h1",)], random=0, controls=30).table
    found = found.set_index("component")
    assert (found["p"] < 0.05).all()
    assert found.loc["a0.h0", "beside"] == "a0.h1"
    assert found.loc["a0.h1", "beside"] == "a0.h0"
    alone = minimality(model.subject, model.pairs, model.truth, random=0, controls=30).table.set_index("component")
    assert (alone.loc[["a0.h0", "a0.h1"], "normalised"] < 0.15).all()
