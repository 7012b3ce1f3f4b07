"""Noise as large as what fine-tuning changed: of the right size in every matrix, in a random direction, and nothing else is touched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mechscope.subject import Pair, Subject, pair
from mechscope.subject.load import load
from mechscope.subject.noise import noise_pairs, plain_copy, weight_changes
from tests.families import build

FAMILIES = ("gpt2", "llama", "gpt_neox", "qwen3")


def changed(subject: Subject, share: float = 0.02) -> Subject:
    """Return a copy of a model whose every parameter moved by another size."""
    model = copy.deepcopy(subject.model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(
                torch.randn(parameter.shape, generator=generator)
                * share
                * (1 + number % 5)
                * (parameter.std() if parameter.numel() > 1 else 1)
            )
    return load(model, tokenizer=subject.tokenizer, device="cpu")


def base_of(family: str, **options: Any) -> Subject:
    return load(build(family, **options), device="cpu")


@pytest.fixture(params=FAMILIES)
def both(request: pytest.FixtureRequest) -> Pair:
    base = base_of(request.param)
    return pair(base, changed(base))


def matrices(subject: Subject, name: str, weight: torch.Tensor) -> list[torch.Tensor]:
    """Cut a fused query, key and value map by hand: GPT-2 keeps them side by side in columns, GPT-NeoX interleaved by head in rows."""
    if name.endswith("c_attn.weight"):
        return list(weight.split(weight.shape[1] // 3, dim=1))
    if name.endswith("c_attn.bias"):
        return list(weight.split(len(weight) // 3))
    if "query_key_value" in name:
        per_head = weight.reshape(subject.anatomy.n_heads, 3, -1)
        return [per_head[:, part] for part in range(3)]
    return [weight]


def test_every_matrix_has_noise_of_the_norm_of_its_change(both: Pair) -> None:
    base, tuned = dict(both.base.weights()), dict(both.tuned.weights())
    for noisy in noise_pairs(both, 2, seed=3):
        for name, weight in noisy.tuned.weights():
            noise, change = (matrices(both.base, name, other - base[name]) for other in (weight, tuned[name]))
            for ours, theirs in zip(noise, change, strict=True):
                assert float(ours.norm()) == pytest.approx(float(theirs.norm()), rel=1e-3), name


def test_no_noise_is_drawn_of_the_size_of_no_change(both: Pair) -> None:
    assert list(noise_pairs(Pair(both.base, both.base, both.vocab_size), 2)) == []


def test_noise_has_no_direction_in_common_with_the_change_or_another_draw(both: Pair) -> None:
    def flat(weights: Any) -> torch.Tensor:
        return torch.cat([(weight - base[name]).flatten() for name, weight in weights])

    base = dict(both.base.weights())
    drawn = [flat(noisy.tuned.weights()) for noisy in noise_pairs(both, 2)]
    directions = torch.stack([flat(both.tuned.weights()), *drawn])
    cosines = torch.corrcoef(directions)
    # thousands of entries: independent directions are orthogonal but for a few hundredths
    assert (cosines - torch.eye(3)).abs().max() < 0.1


def test_base_and_tuned_are_left_to_the_bit_and_a_draw_can_be_had_again(both: Pair) -> None:
    before = [{name: weight.clone() for name, weight in side.weights()} for side in (both.base, both.tuned)]
    first = [{name: weight.clone() for name, weight in noisy.tuned.weights()} for noisy in noise_pairs(both, 2, seed=5)]
    again = [{name: weight.clone() for name, weight in noisy.tuned.weights()} for noisy in noise_pairs(both, 2, seed=5)]
    other = next(noise_pairs(both, 1, seed=6))
    for side, weights in zip((both.base, both.tuned), before, strict=True):
        assert all(torch.equal(weights[name], weight) for name, weight in side.weights())
    assert all(torch.equal(one[name], two[name]) for one, two in zip(first, again, strict=True) for name in one)
    assert any(not torch.equal(first[0][name], weight) for name, weight in other.tuned.weights())


def test_what_did_not_change_gets_no_noise() -> None:
    base = base_of("gpt2")
    tuned = load(copy.deepcopy(base.model), device="cpu")
    with torch.no_grad():
        dict(tuned.plain.named_parameters())[f"{tuned.anatomy.blocks[1].output.name}.weight"].add_(0.01)
    noisy = next(noise_pairs(pair(base, tuned), 1))
    moved = [name for (name, ours), (_, theirs) in zip(base.weights(), noisy.tuned.weights(), strict=True) if not torch.equal(ours, theirs)]
    assert moved == [f"{base.anatomy.blocks[1].output.name}.weight"]


def test_an_adapter_is_imitated_by_its_merged_change() -> None:
    torch.manual_seed(0)
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    tuned = load(model, device="cpu")
    both = pair(tuned.without_adapter(), tuned)
    base = dict(both.base.weights())
    merged = {name: float((weight - base[name]).norm()) for name, weight in both.tuned.weights()}
    noisy = next(noise_pairs(both, 1))
    assert not noisy.tuned.is_adapter
    sizes = {name: float((weight - base[name]).norm()) for name, weight in noisy.tuned.weights()}
    assert {name for name, size in sizes.items() if size} == {name for name, size in merged.items() if size}
    assert sizes == pytest.approx(merged, rel=1e-3)
    assert any("q_proj" in name for name, size in sizes.items() if size)


def test_in_bfloat16_noise_keeps_its_norm_through_rounding() -> None:
    base = load(build("llama").bfloat16(), device="cpu")
    both = pair(base, changed(base, 0.004))
    plain = dict(both.base.weights())
    changes = weight_changes(both)
    noisy = next(noise_pairs(both, 1))
    for name, weight in noisy.tuned.weights():
        if weight.ndim == 2:
            assert float((weight.double() - plain[name].double()).norm()) == pytest.approx(changes[name][0].norm, rel=0.05), name


def test_a_copy_of_an_adapted_model_acts_as_it_does() -> None:
    torch.manual_seed(0)
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned = load(model, device="cpu")
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        for subject in (tuned, tuned.without_adapter()):
            with subject.active():
                wanted = subject.model(ids).logits
            torch.testing.assert_close(plain_copy(subject)(ids).logits, wanted)
