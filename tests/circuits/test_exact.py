"""The exact effect of an edge is the metric with that edge closed less the clean metric, as a pass by hand says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mechscope.circuits.exact import exact_effects
from mechscope.circuits.graph import Circuit, Graph
from mechscope.errors import DataError, SettingsError
from mechscope.instrument.execution import Execution
from tests import families
from tests.causal.pairs import random_pairs
from tests.circuits.brute import FAMILIES, TOLERANCE, brute_metric, brute_written

PAIRS = random_pairs(3)


@pytest.mark.parametrize("metric", ["logit-diff", "loss"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_effect_of_an_edge_is_what_closing_it_changes(family: str, metric: str) -> None:
    subject = families.subject(family, torch.float64)
    names = Graph.of(subject).names
    chosen = names[:: 17 if metric == "logit-diff" else 61]
    found = exact_effects(subject, PAIRS, edges=chosen, metric=metric)
    assert found.per_text is not None
    for text, pair in enumerate(PAIRS):
        rest = brute_written(subject.model, family, pair.corrupt)
        everything = brute_metric(subject.model, family, pair, set(names), rest=rest, metric=metric)
        for edge in chosen:
            without = brute_metric(subject.model, family, pair, set(names) - {edge}, rest=rest, metric=metric)
            assert found.per_text[text, names.index(edge)] == pytest.approx(without - everything, abs=TOLERANCE[family])
    assert np.nanmax(np.abs(found.mean)) > 0.01


def test_a_closed_edge_carries_nothing_or_the_corrupt_value_as_asked() -> None:
    subject, edges = families.subject("gpt2", torch.float64), ["embed->m1", "a0.h2->a2.h1<k>", "m1->logits"]
    found = exact_effects(subject, PAIRS, edges=edges, source="zero")
    names = found.graph.names
    nothing = {name: torch.zeros(1, families.WIDTH, dtype=torch.float64) for name in found.graph.senders}
    for edge in edges:
        closed = [brute_metric(subject.model, "gpt2", pair, set(names) - {edge}, rest=nothing) for pair in PAIRS]
        whole = [brute_metric(subject.model, "gpt2", pair, set(names), rest=nothing) for pair in PAIRS]
        assert found[edge] == pytest.approx(np.mean(np.subtract(closed, whole)), abs=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "phi", "llama", "gemma2"])
def test_effects_do_not_depend_on_batches_nor_on_which_other_edges_are_asked(family: str) -> None:
    subject = families.subject(family, torch.float64)
    whole = exact_effects(subject, PAIRS)
    assert whole.per_text is not None
    assert np.isfinite(whole.mean).all()
    np.testing.assert_allclose(whole.mean, whole.per_text.mean(0), rtol=0, atol=1e-12)
    apart = exact_effects(subject, PAIRS, execution=Execution(tokens_per_batch=1))
    assert apart.per_text is not None
    np.testing.assert_allclose(apart.per_text, whole.per_text, rtol=0, atol=TOLERANCE[family])
    for edges in (["m0->logits", "embed->a0.h0<v>"], Circuit.of(whole.graph, ["embed->a0.h0<v>", "m0->logits"])):
        some = exact_effects(subject, PAIRS, edges=edges)
        for edge in ("m0->logits", "embed->a0.h0<v>"):
            assert some[edge] == pytest.approx(whole[edge], abs=TOLERANCE[family])
        assert np.isnan(some.mean).sum() == len(whole.graph) - 2


def test_edges_metrics_and_sources_that_do_not_exist_are_refused() -> None:
    subject = families.subject("gpt2", torch.float64)
    parallel: Any = families.subject("phi", torch.float64)
    with pytest.raises(SettingsError, match="parallel block"):
        exact_effects(parallel, PAIRS, edges=["a0.h0->m0"])
    with pytest.raises(SettingsError, match=r"a0\.h9"):
        exact_effects(subject, PAIRS, edges=["a0.h9->m1"])
    with pytest.raises(DataError, match="metric"):
        exact_effects(subject, PAIRS, edges=["m0->m1"], metric="perplexity")
    wrong: Any = "noise"
    with pytest.raises(SettingsError, match="noise"):
        exact_effects(subject, PAIRS, edges=["m0->m1"], source=wrong)
