"""The attention lens: a map per head, in the subspace the head writes to, trained to say what the model says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mechscope.data.pairs import Pairs, from_tokens
from mechscope.instrument import record
from mechscope.lens.attention_lens import train_attention_lens
from mechscope.lens.logit_lens import logit_lens
from mechscope.lens.places import SITES, LensPlace
from mechscope.lens.training import evaluate_lens
from mechscope.lens.translators import Translator, Translators
from mechscope.settings.lens import TunedLensSettings
from mechscope.subject.load import load
from tests import families

SHORT = TunedLensSettings(steps=3, tokens_per_step=40, learning_rate=1e-2)


def texts(n: int = 6, length: int = 10, seed: int = 0) -> Pairs:
    return from_tokens(torch.stack(families.documents(seed=seed, lengths=(length,) * n)))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3", "gemma2"])
def test_a_heads_basis_spans_all_it_writes(family: str) -> None:
    subject = families.subject(family, torch.float64)
    maps = train_attention_lens(subject, texts(), layers=[1], settings=SHORT).translators.maps
    assert [place.component for place in maps] == [f"a1.h{head}" for head in range(families.HEADS)]
    with torch.no_grad(), record(subject, "head_output") as seen:
        subject.plain(torch.tensor([texts().pairs[0].clean]))
    post = getattr(subject.anatomy.blocks[1].module, "post_attention_layernorm", None) if family == "gemma2" else None
    for head, found in enumerate(maps.values()):
        basis = found.basis
        assert basis is not None
        assert found.weight.shape == (families.WIDTH, subject.anatomy.d_head)
        torch.testing.assert_close(basis @ basis.T, torch.eye(subject.anatomy.d_head, dtype=torch.float64), rtol=1e-9, atol=1e-9)
        written = seen["head_output", 1][0, :, head]
        if post is not None:  # a norm stands behind: its gain is part of what the head writes
            written = written * (1 + post.weight)
        torch.testing.assert_close(written @ basis.T @ basis, written, rtol=1e-6, atol=1e-6)


def test_untrained_maps_are_the_logit_lens_of_heads() -> None:
    subject = families.subject("llama", torch.float64)
    plain = logit_lens(subject, texts(), sites=("head_output",))
    zero = {place: Translator.identity(torch.zeros(1, 32, dtype=torch.float64)) for place in plain.places}
    lens = logit_lens(subject, texts(), sites=("head_output",), translators=Translators(zero, subject.fingerprint, families.LAYERS))
    pd.testing.assert_frame_equal(lens.table(), plain.table())


@torch.no_grad()
def test_a_map_in_a_basis_is_the_whole_map_it_stands_for() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 8, generator=generator, dtype=torch.float64)).Q.T
    weight, bias, rows = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((32, 8), (32,), (5, 32)))
    expected = rows + rows @ (weight @ basis).T + bias
    torch.testing.assert_close(Translator(weight, bias, basis)(rows), expected, rtol=1e-9, atol=1e-9)


def test_training_lowers_the_divergence_of_every_head_on_other_texts() -> None:
    subject = families.subject("gpt2")
    settings = TunedLensSettings(steps=60, tokens_per_step=80, learning_rate=2e-2)
    trained = train_attention_lens(subject, texts(64), layers=[2], settings=settings)
    judged = evaluate_lens(subject, texts(12, seed=1), trained.translators)
    assert judged.component.tolist() == ["a2.h0", "a2.h1", "a2.h2", "a2.h3"]
    assert (judged.kl_change_high < 0).all()


def test_a_head_that_decides_the_output_is_translated_exactly() -> None:
    """With nothing else in the stream, the model's output is a function of one head's values: its lens says what the model says."""
    model = families.build("gpt2", torch.float64, n_embd=16, n_head=1, n_layer=1, activation_function="linear")
    block = model.transformer.h[0]
    model.transformer.wpe.weight.data.zero_()
    block.ln_2 = torch.nn.Identity()
    block.mlp.c_proj.weight.data *= 0.3
    # one-token texts: the head writes W_O W_V of its own token, and the stream is cut off in front of it
    block.register_forward_pre_hook(lambda _, args: (args[0] * 1e-9, *args[1:]))
    subject = load(model)
    one_token = from_tokens(torch.arange(3, 97)[:, None].expand(-1, 2).contiguous())
    settings = TunedLensSettings(steps=300, tokens_per_step=128, learning_rate=3e-2, weight_decay=0.0)
    trained = train_attention_lens(subject, one_token, settings=settings)
    judged = evaluate_lens(subject, one_token, trained.translators)
    assert judged.kl_logit_lens.item() > 0.1
    assert judged.kl_tuned.item() < 1e-3 * judged.kl_logit_lens.item()


def test_maps_of_heads_are_saved_and_come_back(tmp_path: Path) -> None:
    subject, path = families.subject("llama"), tmp_path / "heads.safetensors"
    trained = train_attention_lens(subject, texts(), layers=[0, 2], settings=SHORT).translators
    trained.save(path)
    loaded = Translators.load(path, subject)
    assert list(loaded.maps) == list(trained.maps) == [LensPlace("head_output", layer, head) for layer in (0, 2) for head in range(4)]
    one, other = (logit_lens(subject, texts(), sites=("head_output",), layers=[0, 2], translators=maps) for maps in (trained, loaded))
    for before, after in zip(one.texts, other.texts, strict=True):
        assert np.array_equal(before.top_log_probability, after.top_log_probability)
    assert "head_output" in SITES
