"""Ablation equals a model whose component writes something else; means and resamples come from where they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mechscope.causal import Resample, ablate, ablate_together, mean_of, random_like
from mechscope.data.pairs import Pairs, collate_pairs
from mechscope.errors import SettingsError
from mechscope.instrument import record
from mechscope.instrument.execution import Execution
from mechscope.instrument.walk import model_inputs
from mechscope.subject import Components
from mechscope.subject.load import Subject, load
from tests import families
from tests.causal.pairs import random_pairs

TEXTS = random_pairs(4)
FOUR = ("gpt2", "llama", "gpt_neox", "qwen3")


@torch.no_grad()
def losses(model: torch.nn.Module, texts: Pairs = TEXTS) -> list[float]:
    found = []
    for text in texts:
        assert text.target is not None
        first, end = text.target
        ids = torch.tensor([text.clean])
        log_p = model(**model_inputs(ids, None), use_cache=False).logits.log_softmax(-1)
        found.append(-log_p[0, first - 1 : end - 1].gather(1, ids[0, first:end, None]).mean().item())
    return found


@pytest.mark.parametrize("family", FOUR)
def test_zero_ablation_equals_a_model_without_that_heads_output_weights_or_that_mlps(family: str) -> None:
    subject = families.subject(family, torch.float64)
    found = ablate(subject, TEXTS)
    assert list(found.table["component"]) == [f"a{layer}.h{head}" for layer in range(3) for head in range(4)] + ["m0", "m1", "m2"]
    np.testing.assert_allclose(found.unchanged, losses(subject.plain), rtol=1e-9)
    for name in ("a0.h1", "a2.h3", "m0", "m2"):
        other = load(families.build(family, torch.float64))
        block = other.anatomy.blocks[int(name[1])]
        with torch.no_grad():
            if name[0] == "a":
                block.output.weight(int(name[4])).zero_()
            else:
                for parameter in block.mlp_down.parameters():
                    parameter.zero_()
        row = found.table.index[found.table["component"] == name][0]
        np.testing.assert_allclose(found.values[row], losses(other.plain), rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("family", FOUR)
def test_keeping_only_one_ablates_all_the_others(family: str) -> None:
    subject = families.subject(family, torch.float64)
    kept = ablate(subject, TEXTS, mode="keep", components="a0.h1,a1.h2,m1")
    together = ablate_together(subject, TEXTS, ["a1.h2,m1", "a0.h1,m1", "a0.h1,a1.h2", "a0.h1,a1.h2,m1"])
    np.testing.assert_allclose(kept.values, together.values[:3], rtol=1e-9)
    assert np.abs(together.values[3] - together.unchanged).max() > 1e-4


def test_a_mean_is_that_over_the_reference_texts_real_tokens_padded_or_not() -> None:
    subject = families.subject("llama", torch.float64)
    one, many = (mean_of(subject, TEXTS, ["z", "embedding"], execution=Execution(tokens_per_batch=size)) for size in (1, 1000))
    values = []
    for text in TEXTS:
        with torch.no_grad(), record(subject, "z") as recording:
            subject.plain(torch.tensor([text.clean]), use_cache=False)
        values.append(recording["z", 1][0])
    expected = torch.cat(values).mean(0)
    torch.testing.assert_close(one.values["z", 1], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(many.values["z", 1], expected, rtol=1e-9, atol=1e-12)


def test_a_mean_per_position_needs_texts_of_one_length_and_fits_only_those() -> None:
    subject = families.subject("gpt2", torch.float64)
    even = random_pairs(3, lengths=(8,))
    reference = mean_of(subject, even, ["z"], per_position=True)
    assert reference.values["z", 0].shape == (8, 4, 8)
    found = ablate(subject, even, sites=["head"], source=reference)
    assert np.isfinite(found.values).all()
    with pytest.raises(SettingsError, match="a mean per position needs texts of one length, these have 7 to 12 tokens"):
        mean_of(subject, TEXTS, ["z"], per_position=True)
    with pytest.raises(SettingsError, match="a value per position for texts of 8 tokens, pair 'pair 1' has 12"):
        ablate(subject, TEXTS, sites=["head"], source=reference)
    with pytest.raises(SettingsError, match="the mean reference holds z, not 'mlp_output' of layer 0"):
        ablate(subject, even, source=reference)


def test_resampling_takes_every_texts_values_once_and_never_its_own() -> None:
    subject: Subject = families.subject("gpt2", torch.float64)
    texts = random_pairs(5, lengths=(6,))
    batch = collate_pairs(texts.pairs)
    with torch.no_grad(), record(subject, "z") as recording:
        subject.plain(batch.clean, use_cache=False)
    drawn = Resample(3).bind(subject, batch, {"z"}, {})("z", 1)
    assert isinstance(drawn, torch.Tensor)
    partner = [next(at for at in range(5) if torch.allclose(drawn[row], recording["z", 1][at])) for row in range(5)]
    assert sorted(partner) == list(range(5))
    assert all(row != at for row, at in enumerate(partner))
    with pytest.raises(SettingsError, match="another text of the batch, and there is only one"):
        ablate(subject, texts.first(1), source="resample")


def test_random_head_sets_have_the_same_number_of_heads_in_every_layer() -> None:
    anatomy = families.subject("gpt2").anatomy
    sets = random_like(Components.parse("a0.h1,a2.h0,a2.h3"), anatomy, 50, seed=1)
    assert all([layer for layer, _ in each.heads] == [0, 2, 2] for each in sets)
    assert len({str(each) for each in sets}) > 10
    assert [str(each) for each in sets] == [str(each) for each in random_like(Components.parse("a0.h1,a2.h0,a2.h3"), anatomy, 50, seed=1)]
    with pytest.raises(SettingsError, match="are all heads of their layers: no other set has the same layer profile"):
        random_like(Components.parse("layers:1"), anatomy, 5)
    with pytest.raises(SettingsError, match="hold no heads"):
        random_like(Components.parse("m1"), anatomy, 5)
