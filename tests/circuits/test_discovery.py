"""Every method answers under its name, says what it cost, and refuses what does not fit it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mechscope.circuits.acdc import acdc
from mechscope.circuits.attribution import METHODS, attribute_edges
from mechscope.circuits.discovery import DISCOVERIES, SEEDED, discover
from mechscope.circuits.exact import exact_effects
from mechscope.circuits.graph import Circuit, Graph
from mechscope.circuits.pruning import prune_edges
from mechscope.circuits.routes import flow_routes
from mechscope.circuits.scores import EdgeScores
from mechscope.circuits.sender_outputs import SenderOutputs
from mechscope.data.pairs import Pairs
from mechscope.errors import DataError, SettingsError
from mechscope.instrument.execution import Execution
from mechscope.subject.load import Subject, load
from tests import families
from tests.causal.pairs import random_pairs
from tests.slips import slip

PAIRS = random_pairs(2, lengths=(7,))  # one batch, so that passes can be counted
QUICK: dict[str, Any] = {"thresholds": (0.05,), "pruning_steps": 4}


class Counted:
    """Blocks that ran forward, and blocks that a gradient went back through."""

    forward = 0
    backward = 0


@contextmanager
def counted(subject: Subject) -> Iterator[Counted]:
    """Count the runs of every block; the model's structure is found out before."""
    Graph.of(subject)
    found = Counted()

    def back(_: Tensor) -> None:
        found.backward += 1

    def ahead(module: nn.Module, args: Any, output: Any) -> None:
        found.forward += 1
        value = output[0] if isinstance(output, tuple) else output
        if value.requires_grad:
            value.register_hook(back)

    handles = [block.module.register_forward_hook(ahead) for block in subject.anatomy.blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", DISCOVERIES)
def test_every_method_scores_every_edge_and_says_what_it_cost(family: str, method: str) -> None:
    found = discover(families.subject(family), PAIRS, method=method, **QUICK)
    assert found.method == method
    assert found.graph == Graph.of(families.subject(family))
    assert np.isfinite(found.mean).all()
    assert len(np.unique(found.mean)) > (1 if method == "acdc" else 20)
    assert found.cost.forward >= 1
    assert (found.cost.backward > 0) == (method in METHODS or method == "edge-pruning")
    if found.per_text is not None:
        np.testing.assert_allclose(found.per_text.mean(0), found.mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", DISCOVERIES)
def test_settings_arrive_at_the_method(method: str) -> None:
    subject = families.subject("gpt2", torch.float64)
    means = SenderOutputs.mean_over(subject, PAIRS)
    source: Any = means if method in ("eap", "eap-ig-activations", "exact") else "corrupt"
    given: dict[str, Any] = {"metric": "probability", "source": source}
    found = discover(
        subject,
        PAIRS,
        method=method,
        steps=3,
        points="midpoint",
        thresholds=(0.02,),
        fraction=0.2,
        pruning_steps=3,
        **given,
        execution=Execution(seed=4),
    )
    number = round(0.2 * len(Graph.of(subject)))
    same: dict[str, Any] = {"method": method, "steps": 3, "points": "midpoint", **given}
    direct: dict[str, Callable[[], EdgeScores]] = {
        "exact": lambda: exact_effects(subject, PAIRS, **given),
        "acdc": lambda: acdc(subject, PAIRS, thresholds=(0.02,), **given).scores,
        "edge-pruning": lambda: prune_edges(subject, PAIRS, n_edges=number, steps=3, **given, execution=Execution(seed=4)).scores,
        "flow-routes": lambda: flow_routes(subject, PAIRS),
    }
    expected = attribute_edges(subject, PAIRS, **same) if method in METHODS else direct[method]()
    np.testing.assert_allclose(found.mean, expected.mean, rtol=0, atol=1e-9)
    assert found.cost == expected.cost
    if method not in ("flow-routes", "acdc"):
        other = discover(
            subject, PAIRS, method=method, steps=3, pruning_steps=3, fraction=0.2, execution=Execution(seed=4)
        )  # other metric, source, points
        assert np.abs(other.mean - found.mean).max() > 1e-3


@pytest.mark.parametrize("method", DISCOVERIES)
def test_only_methods_that_draw_depend_on_the_seed(method: str) -> None:
    subject = families.subject("gpt2")
    one, other = (discover(subject, PAIRS, method=method, **QUICK, execution=Execution(seed=seed)).mean for seed in (0, 1))
    assert bool((one != other).any()) == (method in SEEDED)


@pytest.mark.parametrize("method", METHODS)
def test_notes_tell_scores_of_other_points_apart_where_there_are_points(method: str) -> None:
    subject = families.subject("gpt2")
    noted = discover(subject, PAIRS, method=method, steps=2, points="midpoint").notes
    integrated = {"steps": 2, "points": "midpoint"} if "ig" in method else {}
    assert {key: noted[key] for key in ("steps", "points") if key in noted} == integrated


# costs


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("points", ["left", "midpoint"])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_methods_cost_the_passes_that_they_run(family: str, method: Any, points: Any, steps: int) -> None:
    subject = families.subject(family, torch.float64)
    for metric in ("logit-diff", "kl") if method != "eap" else ("logit-diff",):
        with counted(subject) as runs:
            cost = attribute_edges(subject, PAIRS, method=method, points=points, steps=steps, metric=metric).cost
        assert (runs.forward / families.LAYERS, runs.backward / families.LAYERS) == (cost.forward, cost.backward)


@pytest.mark.parametrize("method", ["eap", "eap-ig-activations"])
@pytest.mark.parametrize("source", ["zero", "mean", "model"])
def test_only_a_source_that_is_run_costs_a_run(method: Any, source: str) -> None:
    subject, other = load(families.build("gpt2")), load(families.build("gpt2", seed=1))
    given: Any = {"zero": "zero", "mean": SenderOutputs.mean_over(subject, PAIRS), "model": other}[source]
    with counted(subject) as runs, counted(other) as others:
        cost = attribute_edges(subject, PAIRS, method=method, steps=2, source=given).cost
    assert ((runs.forward + others.forward) / families.LAYERS, runs.backward / families.LAYERS) == (cost.forward, cost.backward)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_flow_routes_cost_one_pass(family: str) -> None:
    subject = families.subject(family)
    with counted(subject) as runs:
        cost = discover(subject, PAIRS, method="flow-routes").cost
    assert (runs.forward, runs.backward) == (families.LAYERS, 0)
    assert (cost.forward, cost.backward) == (1, 0)


def test_the_cost_does_not_grow_with_the_texts() -> None:
    subject = families.subject("gpt2")
    for method in METHODS:
        costs = [
            discover(subject, random_pairs(n, lengths=(7,)), method=method, steps=1, execution=Execution(tokens_per_batch=16)).cost
            for n in (1, 3)
        ]
        assert costs[0] == costs[1]


# what does not fit


def test_a_method_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(
        SettingsError, match=r"method 'EAP' is not known: use one of eap, eap-ig, .*, exact, acdc, edge-pruning, flow-routes"
    ):
        discover(families.subject("gpt2"), PAIRS, method="EAP")


@pytest.mark.parametrize(
    ("method", "given", "says"),
    [
        ("eap", {"metric": "kl"}, "metric 'kl' is least, so flat, at the clean run"),
        ("eap-ig", {"source": "zero"}, "runs between the clean and the corrupt text, so the source must be 'corrupt'"),
        ("clean-corrupted", {"source": "zero"}, "runs between the clean and the corrupt text, so the source must be 'corrupt'"),
        ("eap-ig", {"steps": 0}, "at least one step, not 0"),
        ("eap-ig", {"points": "right"}, "points 'right' are not known: use left or midpoint"),
        ("acdc", {"thresholds": ()}, "there are no thresholds"),
    ],
)
def test_settings_that_do_not_fit_the_method_are_refused(method: str, given: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        discover(families.subject("gpt2"), PAIRS, method=method, **given)


@pytest.mark.parametrize("method", [method for method in DISCOVERIES if method != "flow-routes"])
def test_a_metric_or_source_that_is_not_known_and_texts_that_do_not_differ_are_refused(method: str) -> None:
    subject = families.subject("gpt2")
    with pytest.raises(DataError, match="metric 'accuracy' is not known"):
        discover(subject, PAIRS, method=method, metric="accuracy", **QUICK)
    with pytest.raises(SettingsError, match=r"source 'noise' is not known|the source must be 'corrupt'"):
        discover(subject, PAIRS, method=method, source=slip("noise"), **QUICK)
    same = Pairs((PAIRS.pairs[0], replace(PAIRS.pairs[1], corrupt=PAIRS.pairs[1].clean)), "same")
    with pytest.raises(DataError, match="pair 'pair 1' has the same clean and corrupt text"):
        discover(subject, same, method=method, **QUICK)


@pytest.mark.parametrize("method", DISCOVERIES)
def test_an_empty_set_of_texts_is_refused(method: str) -> None:
    with pytest.raises((DataError, SettingsError)):
        discover(families.subject("gpt2"), Pairs((), "none"), method=method, **QUICK)


def test_flow_routes_need_no_corrupt_text_that_differs() -> None:
    same = Pairs(tuple(replace(pair, corrupt=pair.clean) for pair in PAIRS), "same")
    subject = families.subject("gpt2")
    np.testing.assert_array_equal(discover(subject, same, method="flow-routes").mean, discover(subject, PAIRS, method="flow-routes").mean)


def test_every_method_puts_an_edge_that_carries_the_answer_before_one_that_carries_nothing() -> None:
    """Nothing reads head a1.h2, whose slice of W_O is zero; the embedding reaches the logits directly."""
    model = families.build("gpt2", torch.float64)
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight[2 * 8 : 3 * 8] = 0
    subject = load(model)
    graph = Graph.of(subject)
    idle = Circuit.full(graph) - Circuit.full(graph).without(["a1.h2"])
    for method in DISCOVERIES:
        if method in ("edge-pruning", "acdc"):  # learned, and greedy: their own tests show it
            continue
        size = np.abs(discover(subject, PAIRS, method=method).mean)
        leaving = [name for name in idle.names if name.startswith("a1.h2->")]
        assert max(size[graph.index(name)] for name in leaving) < 1e-12
        assert size.max() > 1e-2
        if method != "flow-routes":  # what flows in is not what matters
            assert size[idle.edges].max() < 1e-12
