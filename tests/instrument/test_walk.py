"""A walk block by block is the model's own forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mechscope.instrument import Walk, load, observed, record
from mechscope.instrument.walk import model_inputs, next_token_losses, unembed
from tests import families
from tests.instrument import attention_oracle as oracle

TEXTS = families.documents()
every_family = pytest.mark.parametrize("family", families.FAMILIES)
every_padding = pytest.mark.parametrize("padding", ["none", "left", "right"])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@torch.no_grad()
@every_padding
@every_family
def test_a_walk_gives_the_models_logits_and_hidden_states(family: str, padding: str) -> None:
    subject, texts = families.subject(family, torch.float64), families.padded(TEXTS, padding)
    # observed, because the oracle is exact while Gemma 2's own attention takes its softmax in float32
    with observed(subject):
        walk = Walk(subject, texts.ids, texts.real)
        stream = [walk.hidden]
        for layer in range(subject.anatomy.n_layers):
            stream.append(walk.step(layer, stream[-1]))
        logits = walk.logits(stream[-1])
        close(walk.run(), stream[-1])
    for document in range(len(texts.ids)):
        truth = oracle.truth(subject.plain, TEXTS[document])
        for found, expected in zip(stream, truth.hidden[:-1], strict=True):
            close(texts.rows(found, document), expected)
        close(texts.rows(logits, document), truth.logits)


@torch.no_grad()
@every_padding
@every_family
def test_a_walk_from_the_middle_is_the_rest_of_the_pass(family: str, padding: str) -> None:
    subject, texts = families.subject(family), families.padded(TEXTS, padding)
    with record(subject, "residual", "logits") as recording:
        subject.plain(**model_inputs(texts.ids, texts.real), use_cache=False)
        walk = Walk(subject, texts.ids, texts.real)
        logits = walk.logits(walk.run(recording["residual", 0], start=1))
        expected = recording["logits"]
    torch.testing.assert_close(logits[texts.real], expected[texts.real], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt"])
def test_logits_of_some_rows_are_those_rows_of_the_logits(family: str) -> None:
    subject, texts = families.subject(family, torch.float64), families.padded(TEXTS, "left")
    with observed(subject):
        walk = Walk(subject, texts.ids, texts.real)
        last = walk.run()
    close(walk.logits(last[texts.real]), walk.logits(last)[texts.real])


@torch.no_grad()
def test_a_recording_around_a_walk_holds_what_the_blocks_did_and_nothing_of_the_dry_pass() -> None:
    subject, texts = families.subject("llama"), families.padded(TEXTS, "none")
    with record(subject, "embedding", "residual", "z") as recording:
        walk = Walk(subject, texts.ids)
        assert not recording.values
        last = walk.run(walk.hidden, start=1)
    assert {key for key in recording.values if key[0] == "residual"} == {("residual", 1), ("residual", 2)}
    assert torch.equal(recording["residual", 2], last)


@torch.no_grad()
def test_two_models_walk_in_lock_step_without_disturbing_each_other() -> None:
    texts = families.padded(TEXTS, "left")
    subjects = [families.subject("llama", seed=seed) for seed in (0, 1)]
    alone = [Walk(subject, texts.ids, texts.real).run() for subject in subjects]
    walks = [Walk(subject, texts.ids, texts.real) for subject in subjects]
    hidden = [walk.hidden for walk in walks]
    for layer in range(families.LAYERS):
        hidden = [walk.step(layer, stream) for walk, stream in zip(walks, hidden, strict=True)]
    for found, expected in zip(hidden, alone, strict=True):
        assert torch.equal(found[texts.real], expected[texts.real])


@torch.no_grad()
def test_the_blocks_own_forward_comes_back_after_an_exception_in_the_dry_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = families.subject("gpt2", seed=3)
    ids = TEXTS[0][None]
    before = Walk(subject, ids).run()
    original = [block.module.forward for block in subject.anatomy.blocks]

    def fails(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("in the final norm")

    with monkeypatch.context() as patch:
        patch.setattr(subject.anatomy.final_norm, "forward", fails)
        with pytest.raises(RuntimeError, match="in the final norm"):
            Walk(subject, ids)
    assert [block.module.forward for block in subject.anatomy.blocks] == original
    assert not any("forward" in vars(block.module) for block in subject.anatomy.blocks)
    assert torch.equal(Walk(subject, ids).run(), before)


@torch.no_grad()
def test_a_step_sets_the_mode_of_its_own_block_only() -> None:
    model = families.build("gpt2", resid_pdrop=0.5)
    walk = Walk(load(model), families.documents()[0][None])
    expected = walk.step(1, walk.hidden)
    model.train()
    seen = []
    hook = walk.subject.anatomy.blocks[1].attention.register_forward_hook(
        lambda *_: seen.append([block.training for block in model.transformer.h])
    )
    assert torch.equal(walk.step(1, walk.hidden), expected)
    hook.remove()
    assert seen == [[True, False, True]]
    assert all(module.training for module in model.modules())


def test_a_forward_that_a_library_put_on_a_block_is_kept() -> None:
    subject = families.subject("gpt2", seed=4)
    block = subject.anatomy.blocks[1].module
    own = block.forward
    used: list[bool] = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        used.append(True)
        return own(*args, **kwargs)

    block.forward = wrapped
    try:
        walk = Walk(subject, TEXTS[0][None])
        assert block.forward is wrapped
        assert not used, "the dry pass runs no block"
        walk.run()
        assert used
    finally:
        del block.forward


def test_padding_on_the_right_needs_no_mask_and_padding_on_the_left_counts_real_tokens_only() -> None:
    right, left = families.padded(TEXTS, "right"), families.padded(TEXTS, "left")
    assert model_inputs(right.ids, right.real)["attention_mask"] is None
    positions = model_inputs(left.ids, left.real)["position_ids"]
    assert positions is not None
    for row, text in enumerate(TEXTS):
        assert positions[row][left.real[row]].tolist() == list(range(len(text)))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox", "opt"])
def test_next_token_losses_are_those_of_the_whole_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = families.subject(family, torch.float64)
    monkeypatch.setattr("mechscope.instrument.walk._WORDS", 10)  # several pieces, the last one shorter
    hidden = torch.randn(2, 5, families.WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    targets = torch.arange(10).view(2, 5) * 9
    with torch.no_grad():
        expected = -unembed(subject, hidden).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        torch.testing.assert_close(next_token_losses(subject, hidden, targets), expected, rtol=1e-9, atol=1e-10)
