"""What heads and MLPs write: against explicit vectors for every family, on chosen documents, and with the digits of small changes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechscope.data.prompt import collate
from mechscope.difference.lockstep import HEAD_MEASURES, LAYER_MEASURES, launch, measure
from mechscope.difference.writes import Writers
from mechscope.instrument import record
from mechscope.subject import Pair, Subject
from tests import families
from tests.difference import oracle
from tests.difference.test_one_pass import run

OWN, SAME = HEAD_MEASURES.index("write_change_own"), HEAD_MEASURES.index("write_change")
MLPS = [LAYER_MEASURES.index(name) for name in ("mlp_write_change", "mlp_write_change_own")]


def ratio(base: Tensor, tuned: Tensor) -> np.ndarray:
    """Return ‖tuned − base‖ over ‖base‖, each summed over the tokens (the second axis)."""
    return ((tuned - base).norm(dim=-1).sum(1) / base.norm(dim=-1).sum(1)).numpy()


@torch.no_grad()
def written(subject: Subject, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return every head's and every MLP's vectors of one text: ``(layer, token, head, d_model)`` and ``(layer, token, d_model)``."""
    with record(subject, "head_output", "mlp_output") as recording:
        subject.model(ids)
    return recording.stack("head_output")[:, 0], recording.stack("mlp_output")[:, 0]


# behind attention Gemma has a norm, which `head_output` leaves out; the oracle of test_lockstep has it
@pytest.mark.parametrize("family", [name for name in families.FAMILIES if not name.startswith("gemma")])
def test_writes_on_own_input_are_those_of_explicit_vectors(family: str) -> None:
    both, example = oracle.models(family), oracle.examples()[0]
    found = measure(both, collate([example], pad_id=0))
    ids = torch.tensor([example.input_ids])
    (heads, mlps), (other_heads, other_mlps) = written(both.base, ids), written(both.tuned, ids)
    np.testing.assert_allclose(found.heads[0, 0, OWN], ratio(heads, other_heads), rtol=1e-9)
    np.testing.assert_allclose(found.layers[0, 0, MLPS[1]], ratio(mlps, other_mlps), rtol=1e-9)
    # the first block reads the embeddings in both cases, which differ here; with the base's they would not
    same = Pair(both.base, with_embedding_of(both), both.vocab_size)
    again = measure(same, collate([example], pad_id=0))
    np.testing.assert_allclose(again.heads[0, 0, OWN, 0], again.heads[0, 0, SAME, 0], rtol=1e-9)


def with_embedding_of(both: Pair) -> Subject:
    """Return the tuned model with everything before the first block as in the base."""
    from mechscope.subject.load import load

    model = copy.deepcopy(both.tuned.plain)
    inside = tuple(f"{block.name}." for block in both.base.anatomy.blocks)
    base = dict(both.base.plain.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(inside):
                parameter.copy_(base[name])
    return load(model)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_only_the_chosen_documents_run_on_the_same_input(family: str, padding: Any) -> None:
    both, batch = oracle.models(family), collate(oracle.examples(), pad_id=0, padding=padding)
    every = measure(both, batch)
    some = launch([both], batch, same_input=[("doc3", "doc1")])[0].fetch()
    chosen = np.isin(some.ids, ("doc3", "doc1"))
    np.testing.assert_allclose(some.heads[chosen][:, :, SAME], every.heads[chosen][:, :, SAME], rtol=1e-9)
    np.testing.assert_allclose(some.layers[chosen][:, :, MLPS[0]], every.layers[chosen][:, :, MLPS[0]], rtol=1e-9)
    assert np.isnan(some.heads[~chosen][:, :, SAME]).all()
    assert np.isnan(some.layers[~chosen][:, :, MLPS[0]]).all()
    others = [index for index in range(len(HEAD_MEASURES)) if index != SAME]
    np.testing.assert_array_equal(some.heads[:, :, others], every.heads[:, :, others])


def test_a_sample_of_documents_is_counted() -> None:
    found = run(oracle.models("llama"), same_input_documents=2)
    assert set(found.heads["write_change_n"]) == set(found.layers["mlp_write_change_n"]) == {2}
    assert set(found.heads["write_change_own_n"]) == {len(oracle.examples())}
    assert found.heads["write_change"].notna().all()


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
def test_small_changes_keep_their_digits_in_float32(size: float) -> None:
    base = families.build("gpt2", torch.float64)
    exact = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in exact.transformer.h:
            block.attn.c_proj.weight.mul_(1 + size * torch.randn(block.attn.c_proj.weight.shape, generator=generator).double())
    batch = collate(oracle.examples(), pad_id=0)
    single = [copy.deepcopy(model).float() for model in (base, exact)]
    expected = measure(oracle.two(*(copy.deepcopy(model).double() for model in single)), batch).heads[:, 0, SAME]
    found = measure(oracle.two(*single), batch).heads[:, 0, SAME]
    # a difference of norms' squares would be lost below about 3e-4, the root of float32's rounding
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-7)
    assert expected.mean() == pytest.approx(size, rel=0.6)


def test_no_change_of_nothing_is_no_change_and_a_change_of_nothing_has_no_size() -> None:
    base = families.build("gpt2")
    with torch.no_grad():
        base.transformer.h[1].attn.c_proj.weight[:8] = 0  # head 0 writes nothing
    unchanged, tuned = copy.deepcopy(base), copy.deepcopy(base)
    with torch.no_grad():
        tuned.transformer.h[1].attn.c_proj.weight[:8] = 0.1
    batch = collate(oracle.examples(), pad_id=0)
    assert (measure(oracle.two(base, unchanged), batch).heads[:, 0, SAME, 1, 0] == 0).all()
    assert np.isnan(measure(oracle.two(base, tuned), batch).heads[:, 0, SAME, 1, 0]).all()


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2"])
def test_a_factor_is_as_small_as_it_can_be(family: str) -> None:
    both = oracle.models(family)
    anatomy = both.base.anatomy
    factor = Writers(both).factor(1)
    assert factor.shape == (anatomy.n_heads, 2 * anatomy.d_head, min(2 * anatomy.d_head, anatomy.d_model))
    assert factor[:, : anatomy.d_head, anatomy.d_head :].abs().max() == 0
