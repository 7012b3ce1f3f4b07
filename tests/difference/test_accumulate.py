"""Accumulated statistics merge, and continue from a saved state to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pandas.testing import assert_frame_equal

from mechscope.data.prompt import collate
from mechscope.difference.accumulate import Accumulated
from mechscope.difference.lockstep import Measured, measure
from mechscope.difference.one_pass import assemble
from mechscope.difference.weights import compare_weights
from tests import families
from tests.difference import oracle

PARTS = ("heads", "layers", "outputs", "resampled", "pooled")


@pytest.fixture(scope="module")
def measured() -> list[Measured]:
    both = oracle.models("llama")
    documents = oracle.examples(lengths=(23, 12, 17, 9, 20, 15, 11))
    return [measure(both, collate([one], pad_id=0)) for one in documents]


def empty(*, documents: int = 4) -> Accumulated:
    return Accumulated(n_layers=families.LAYERS, n_heads=families.HEADS, replicates=30, geometry_documents=documents, seed=5)


def over(measured: list[Measured], start: Accumulated | None = None) -> Accumulated:
    accumulated = empty() if start is None else start
    for one in measured:
        accumulated.update(one)
    return accumulated


def assert_equal_states(one: Accumulated, other: Accumulated, rtol: float = 0.0) -> None:
    first, second = one.state(), other.state()
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_allclose(value, second[name], rtol=rtol, atol=0, err_msg=name)


@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_two_parts_merge_to_the_whole(measured: list[Measured], cut: int):
    merged = over(measured[:cut])
    merged.merge(over(measured[cut:]))
    assert_equal_states(merged, over(measured), rtol=1e-12)


@pytest.mark.parametrize("cut", [0, 3])
def test_a_saved_state_continues_to_the_last_bit(measured: list[Measured], cut: int):
    state = {name: value.clone() for name, value in over(measured[:cut]).state().items()}
    resumed = Accumulated(n_layers=families.LAYERS, n_heads=families.HEADS, replicates=30, geometry_documents=4, seed=5)
    resumed.load_state(state)
    assert_equal_states(over(measured[cut:], resumed), over(measured))


def test_a_state_does_not_change_when_more_is_accumulated(measured: list[Measured]):
    accumulated = over(measured[:3])
    state = accumulated.state()
    kept = {name: value.clone() for name, value in state.items()}
    over(measured[3:], accumulated)
    assert all(torch.equal(value, kept[name]) for name, value in state.items())


def test_tables_do_not_depend_on_the_order_of_documents(measured: list[Measured]):
    weights = compare_weights(oracle.models("llama"))
    one, other = (assemble(over(order), weights, {}) for order in (measured, measured[::-1]))
    for name in ("heads", "layers", "outputs"):
        assert_frame_equal(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-12)


def test_pooled_states_are_one_layer_of_one_model_per_document(measured: list[Measured]):
    accumulated = over(measured, empty(documents=100))
    states = accumulated.pooled_states("tuned", "summary", 2)
    expected = np.stack([one.pooled[0, 1, 2, 2] for one in measured])
    assert states.shape == expected.shape
    assert {row.tobytes() for row in states} == {row.tobytes() for row in expected}


def test_replicates_of_one_measure_are_means_of_its_documents(measured: list[Measured]):
    accumulated = over(measured)
    values = np.stack([one.heads[0, 1, oracle.HEAD_NAMES.index("entropy_change")] for one in measured])
    replicates = accumulated.replicates("entropy_change", "document")
    drawn = ~np.isnan(replicates[:, 0, 0])
    assert drawn.all()
    assert (replicates >= values.min(0) - 1e-12).all()
    assert (replicates <= values.max(0) + 1e-12).all()
    np.testing.assert_allclose(replicates.mean(0), values.mean(0), atol=3 * values.std(0).max() / np.sqrt(len(measured)))


def test_gini_measures_have_their_place():
    batch = collate(oracle.examples(), pad_id=0)
    accumulated = Accumulated(n_layers=families.LAYERS, n_heads=families.HEADS, gini=True, replicates=5)
    accumulated.update(measure(oracle.models("gpt2"), batch, gini=True))
    table = assemble(accumulated, compare_weights(oracle.models("gpt2")), {}).heads
    assert table["gini_tuned"].between(0, 1).all()
    measured = [name for name in table.columns if not name.endswith("_verdict")]
    assert measured[-3:] == ["gini_base", "gini_tuned", "weight_change"]
