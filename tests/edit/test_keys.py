"""The second moment of keys is numpy's of what a plain Hugging Face model's MLP reads, however it was added up, and is kept under the weights' own name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mechscope.data.pairs import Pairs, PromptPair
from mechscope.edit import KeyMoments, down_map, kept_key_moments, key_moments
from mechscope.errors import DataError, ModelError, SettingsError
from mechscope.instrument import Execution
from mechscope.subject.load import load
from tests import families


def texts(lengths: tuple[int, ...] = families.LENGTHS, seed: int = 0) -> Pairs:
    """Return random texts."""
    documents = [tuple(text.tolist()) for text in families.documents(seed=seed, lengths=lengths)]
    return Pairs(tuple(PromptPair(str(at), ids, ids) for at, ids in enumerate(documents)), "made for tests")


def neurons(model: Any, layer_name: str, ids: tuple[int, ...]) -> np.ndarray:
    """Return what a module of a plain model reads of a text, by a hook."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(layer_name).register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(len(ids), -1)))
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    return seen[0].double().numpy()


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt2", "transformer.h.1.mlp.c_proj"),
        ("llama", "model.layers.1.mlp.down_proj"),
        ("gpt_neox", "gpt_neox.layers.1.mlp.dense_4h_to_h"),
        ("opt", "model.decoder.layers.1.fc2"),
    ],
)
def test_it_is_that_of_the_inputs_of_the_last_map(family: str, name: str) -> None:
    subject = load(families.build(family, torch.float64))
    moments = key_moments(subject, texts(), layers=[1], execution=Execution(tokens_per_batch=30))
    rows = np.concatenate([neurons(subject.plain, name, pair.clean) for pair in texts()])
    assert down_map(subject, 1).parameter == f"{name}.weight"
    assert moments.n == sum(families.LENGTHS)
    np.testing.assert_allclose(moments.mean(1).numpy(), rows.T @ rows / len(rows), rtol=1e-10, atol=1e-12)


def test_parts_add_up_to_the_whole() -> None:
    subject, whole = families.subject("llama", torch.float64), texts((5, 9, 7, 8))
    halves = [key_moments(subject, Pairs(whole.pairs[part], ""), layers=[0, 2]) for part in (slice(2), slice(2, 4))]
    merged, expected = halves[0].merged(halves[1]), key_moments(subject, whole, layers=[2, 0])
    assert (merged.n, list(merged.sums)) == (29, [0, 2])
    for layer in (0, 2):
        torch.testing.assert_close(merged.mean(layer), expected.mean(layer), rtol=1e-12, atol=1e-14)
    with pytest.raises(DataError, match="layers 0, 2 cannot be added to those of 1"):
        merged.merged(key_moments(subject, whole, layers=[1]))


def test_a_ridge_is_a_share_of_the_mean_diagonal() -> None:
    moments = KeyMoments(2, {0: torch.diag(torch.tensor([2.0, 6.0], dtype=torch.float64))})
    assert moments.mean(0, ridge=0.1).diagonal().tolist() == pytest.approx([1.2, 3.2])
    assert moments.as_identity().mean(0).tolist() == [[1, 0], [0, 1]]


def test_it_is_kept_by_weights_and_not_by_the_name_of_the_model(tmp_path: Path) -> None:
    one, other = (load(families.build("gpt2", seed=seed)) for seed in (0, 1))
    passes: list[Any] = []
    one.anatomy.embedding.register_forward_pre_hook(lambda module, args: passes.append(args))
    first = kept_key_moments(tmp_path, one, texts(), layers=[1])
    assert passes
    passes.clear()
    again = kept_key_moments(tmp_path, one, texts(), layers=[1])
    assert not passes
    assert again.n == first.n
    assert torch.equal(again.mean(1), first.mean(1))
    others = kept_key_moments(tmp_path, other, texts(), layers=[1])
    assert not torch.allclose(others.mean(1), first.mean(1))
    assert len([path for path in tmp_path.iterdir() if not path.name.startswith(".")]) == 2


def test_layers_that_cannot_be_edited_are_refused_by_name() -> None:
    with pytest.raises(SettingsError, match="layer 3 does not exist: the model has layers 0-2"):
        key_moments(families.subject("gpt2"), texts(), layers=[3])
    with pytest.raises(ModelError, match="the MLP of layer 0 is a mixture of 4 experts: no single map writes for every token"):
        key_moments(families.subject("gpt_oss"), texts(), layers=[0])
