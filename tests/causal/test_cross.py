"""Exchanging everything gives the other model, exchanging nothing changes nothing, and weights go back where they were."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from mechscope.causal import cross_patch, swapped
from mechscope.causal.parts import parts_of
from mechscope.errors import SettingsError
from mechscope.instrument.walk import model_inputs
from mechscope.subject import Pair, Subject, pair
from mechscope.subject.load import load
from tests import families
from tests.causal.pairs import random_pairs
from tests.slips import slip

FOUR = ("gpt2", "llama", "gpt_neox", "qwen3")
TEXTS = random_pairs()


def two(family: str) -> Pair:
    base, tuned = families.build(family, torch.float64), families.build(family, torch.float64)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(7)
        for parameter in tuned.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return pair(load(base), load(tuned))


@torch.no_grad()
def losses(model: Any) -> np.ndarray:
    """Return each text's loss on its target, by Hugging Face alone."""
    found = []
    for text in TEXTS:
        ids = torch.tensor([text.clean])
        assert text.target is not None
        first, end = text.target
        log_p = model(**model_inputs(ids, None), use_cache=False).logits.log_softmax(-1)
        found.append(-log_p[0, first - 1 : end - 1].gather(1, ids[0, first:end, None]).mean().item())
    return np.array(found)


@pytest.mark.parametrize("family", FOUR)
def test_unchanged_runs_are_the_models_own_losses(family: str) -> None:
    both = two(family)
    found = cross_patch(both, TEXTS, levels=("mlp",))
    np.testing.assert_allclose(found["into_base"].unchanged, losses(both.base.model), rtol=1e-9)
    np.testing.assert_allclose(found["into_tuned"].unchanged, losses(both.tuned.model), rtol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])  # in GPT-2 the unembedding is the embedding
def test_the_last_residual_stream_carries_everything_but_the_unembedding(family: str) -> None:
    both = two(family)
    mixed = copy.deepcopy(both.tuned.model)
    given, own = dict(both.base.weights()), dict(mixed.named_parameters())
    with torch.no_grad():
        for part in parts_of(both.base, ("unembedding",), "weights"):
            for name in part.weights:
                own[name].copy_(given[name])
    found = cross_patch(both, TEXTS, levels=("residual",))["into_base"]
    np.testing.assert_allclose(found.values[-1], losses(mixed), rtol=1e-9)


@pytest.mark.parametrize("family", FOUR)
def test_exchanging_a_components_weights_equals_a_model_built_so(family: str) -> None:
    both = two(family)
    levels = ("layer", "attention", "mlp", "embedding", "unembedding")
    found = cross_patch(both, TEXTS, levels=levels, by="weights")
    parts = parts_of(both.base, levels, "weights")
    sides: list[tuple[Any, Subject, Subject]] = [("into_base", both.base, both.tuned), ("into_tuned", both.tuned, both.base)]
    for into, receiver, giver in sides:
        given = dict(giver.weights())
        for row, part in enumerate(parts):
            mixed = copy.deepcopy(receiver.model)
            own = dict(mixed.named_parameters())
            with torch.no_grad():
                for name in part.weights:
                    own[name].copy_(given[name])
            np.testing.assert_allclose(found[into].values[row], losses(mixed), rtol=1e-9, err_msg=f"{into} {part.columns['component']}")


def test_a_heads_weights_are_its_own_rows_and_columns() -> None:
    both = two("llama")
    found = cross_patch(both, TEXTS, levels=("head",), by="weights")["into_base"]
    row = next(at for at, name in enumerate(found.table["component"]) if name == "a1.h2")
    mixed = copy.deepcopy(both.base.model)
    mine, theirs = (model.model.layers[1].self_attn for model in (mixed, both.tuned.model))
    with torch.no_grad():
        mine.q_proj.weight[16:24] = theirs.q_proj.weight[16:24]  # head 2 of width 8; it shares key/value head 1 with head 3
        mine.k_proj.weight[8:16] = theirs.k_proj.weight[8:16]
        mine.v_proj.weight[8:16] = theirs.v_proj.weight[8:16]
        mine.o_proj.weight[:, 16:24] = theirs.o_proj.weight[:, 16:24]
    np.testing.assert_allclose(found.values[row], losses(mixed), rtol=1e-9)


@pytest.mark.parametrize("by", ["activations", "weights"])
def test_all_layers_and_both_ends_together_are_the_whole_gain(by: Any) -> None:
    both = two("llama")
    # the same ends, so that the blocks alone make the difference
    own, given = dict(both.tuned.model.named_parameters()), dict(both.base.model.named_parameters())
    with torch.no_grad():
        for name in own:
            if ".layers." not in name:
                own[name].copy_(given[name])
    found = cross_patch(both, TEXTS, levels=(), sets=("layers:0-2", "a0.h1"), by=by)
    for into in ("into_base", "into_tuned"):
        other = found["into_tuned" if into == "into_base" else "into_base"].unchanged
        np.testing.assert_allclose(found[into].values[0], other, rtol=1e-9)
        assert abs(found[into].values[1] - other).max() > 1e-3


def test_weights_are_exactly_restored_also_after_an_exception() -> None:
    both = two("gpt2")
    before = {name: value.clone() for name, value in both.base.model.state_dict().items()}
    with swapped(both.base, dict(both.tuned.weights())):
        np.testing.assert_allclose(losses(both.base.model), losses(both.tuned.model), rtol=1e-12)
    with pytest.raises(RuntimeError, match="body"), swapped(both.base, dict(both.tuned.weights())):
        raise RuntimeError("body")
    for name, value in both.base.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_an_adapter_is_exchanged_with_the_same_model_without_it() -> None:
    model = families.build("llama", torch.float64)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).double()
    tuned = load(adapted)
    both = pair(tuned.without_adapter(), tuned)
    merged = copy.deepcopy(adapted).merge_and_unload()
    plain = pair(load(families.build("llama", torch.float64)), load(merged))
    for by in ("activations", "weights"):
        found = cross_patch(both, TEXTS, levels=("layer", "head"), by=by)
        expected = cross_patch(plain, TEXTS, levels=("layer", "head"), by=by)
        for into in ("into_base", "into_tuned"):
            np.testing.assert_allclose(found[into].values, expected[into].values, rtol=1e-9)


def test_levels_that_do_not_exist_or_do_not_fit_are_named() -> None:
    both = two("gpt2")
    with pytest.raises(SettingsError, match="level 'heads' is not known: use some of layer, attention"):
        cross_patch(both, TEXTS, levels=("heads",))
    with pytest.raises(SettingsError, match="level 'residual' cannot be exchanged by weights, only by activations"):
        cross_patch(both, TEXTS, levels=("residual",), by="weights")
    with pytest.raises(SettingsError, match="not by 'gradients'"):
        cross_patch(both, TEXTS, by=slip("gradients"))
