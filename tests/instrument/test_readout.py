"""Logits taken apart are the model's logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mechscope.instrument import Walk
from mechscope.instrument.readout import Readout
from mechscope.subject.load import load
from mechscope.weights.vocabulary import Vocabulary
from tests import families

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
# RMS norms compute in float32 whatever the type; with LayerNorm everything is float64
RMS: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
LAYERNORM = ("gpt2", "gpt_neox", "opt", "phi")


def close(family: str) -> dict[str, Any]:
    return CLOSE if family in LAYERNORM else RMS


@pytest.fixture(params=families.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@torch.no_grad()
def test_logits_are_the_models(family: str) -> None:
    subject = families.subject(family, torch.float64)
    ids = torch.stack(families.documents(lengths=(9, 9)))
    readout, hidden = Readout.of(subject), Walk(subject, ids).run()
    expected = subject.plain(ids).logits
    torch.testing.assert_close(readout.capped(readout.logits(hidden)), expected, **close(family))


@torch.no_grad()
def test_directions_and_constants_add_up_to_logits(family: str) -> None:
    subject = families.subject(family, torch.float64)
    ids = torch.stack(families.documents(lengths=(9, 9)))
    readout, hidden = Readout.of(subject), Walk(subject, ids).run()
    tokens = torch.arange(5, 50)
    parts = torch.stack([hidden * 0.3, hidden * 0.7])  # any split of what was written
    found = (parts @ readout.directions(tokens).T * readout.scale(hidden)).sum(0) + readout.constant(tokens)
    torch.testing.assert_close(found, readout.logits(hidden)[..., tokens], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_vectors_may_be_folded_instead_of_the_tokens(family: str) -> None:
    subject = families.subject(family, torch.float64)
    readout, vectors = Readout.of(subject), Walk(subject, families.documents(lengths=(9,))[0][None]).run()
    directions = readout.directions(torch.arange(subject.anatomy.vocab_size))
    torch.testing.assert_close(readout.folded(vectors) @ readout.weight.T, vectors @ directions.T, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_frozen_scale_makes_logits_linear(family: str) -> None:
    subject = families.subject(family, torch.float64)
    ids = families.documents(lengths=(9,))[0][None]
    readout, hidden = Readout.of(subject), Walk(subject, ids).run()
    scale, everything = readout.scale(hidden), torch.arange(subject.anatomy.vocab_size)
    half = readout.logits(hidden / 2, scale) - readout.constant(everything)
    torch.testing.assert_close(half * 2, readout.logits(hidden) - readout.constant(everything), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_tied_and_untied_unembeddings_with_a_bias(tied: bool) -> None:
    model = families.build("phi", torch.float64, tie_word_embeddings=tied)  # phi's unembedding has a bias
    subject = load(model)
    ids = families.documents(lengths=(9,))[0][None]
    readout = Readout.of(subject)
    assert readout.bias is not None
    torch.testing.assert_close(readout.logits(Walk(subject, ids).run()), model(ids).logits, **CLOSE)


@torch.no_grad()
def test_an_adapter_on_the_unembedding_counts_where_it_is_active() -> None:
    from peft import LoraConfig, get_peft_model

    model = families.build("llama", torch.float64)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    adapted = load(wrapped.double().eval())
    ids = families.documents(lengths=(9,))[0][None]
    for view in (adapted, adapted.without_adapter()):
        with view.active():
            expected = view.plain(ids).logits
        torch.testing.assert_close(Readout.of(view).logits(Walk(view, ids).run()), expected, **RMS)
    assert not torch.equal(Readout.of(adapted).weight, Readout.of(adapted.without_adapter()).weight)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "norm"), [("gpt2", "ln_f"), ("llama", "model.norm"), ("gpt_neox", "final_layer_norm"), ("gemma2", "model.norm")]
)
def test_a_final_norm_that_an_adapter_trains_is_that_of_the_view_whatever_is_switched_on(family: str, norm: str) -> None:
    targets = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"]}.get(family, ["q_proj"])
    config = LoraConfig(target_modules=targets, modules_to_save=[norm], fan_in_fan_out=family == "gpt2")
    tuned = load(get_peft_model(families.build(family, torch.float64), config, autocast_adapter_dtype=False))
    (copy,) = (value for name, value in tuned.model.named_parameters() if "modules_to_save" in name and name.endswith("weight"))
    copy.add_(torch.randn(copy.shape, generator=torch.Generator().manual_seed(0)).to(copy))
    plain = tuned.without_adapter()
    vectors = torch.randn(3, tuned.anatomy.d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = Vocabulary(families.subject(family, torch.float64)).written(vectors)
    with_it, without_it = Vocabulary(tuned), Vocabulary(plain)
    for view in (tuned, plain):
        with view.active():
            torch.testing.assert_close(without_it.written(vectors), before, **CLOSE)
            assert (with_it.written(vectors) - before).abs().max() > 0.1
