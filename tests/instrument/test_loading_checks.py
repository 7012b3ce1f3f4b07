"""What is known at load is said at load, and what is only unusual loads: zeros, training mode, frequencies by length, padding on both sides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mechscope.data.documents import Corpus, Document
from mechscope.errors import DataError, ModelError
from mechscope.instrument import CachedRun, Edit, Reading, Walk, check_subject, describe, intervene, load, observed, record
from mechscope.studies.corpora import encode_for
from mechscope.studies.groups import DocumentFormat
from mechscope.subject.pair import pair
from tests import families


@torch.no_grad()
def test_models_with_parts_at_zero_load() -> None:
    for family, name, rows in (
        ("gpt2", "c_attn", slice(8, 16)),
        ("llama", "q_proj", slice(8, 16)),
        ("llama", "k_proj", slice(0, 8)),
        ("qwen3", "v_proj", slice(None)),
    ):
        model = families.build(family)
        for path, module in model.named_modules():
            if path.endswith(name):
                (module.weight if name != "c_attn" else module.weight.T)[rows] = 0.0
                if module.bias is not None:
                    module.bias[rows] = 0.0
        assert load(model).family == family
    model = families.build("llama")  # a block as LLaMA Pro inserts it, which writes nothing yet
    model.model.layers[1].self_attn.o_proj.weight.zero_()
    model.model.layers[1].mlp.down_proj.weight.zero_()
    load(model)


def test_a_check_that_compares_with_zero_still_fails_where_only_one_side_is_zero() -> None:
    model = families.build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[8:16] = 0.0
    subject = load(model)
    block = subject.anatomy.blocks[1]
    blocks = list(subject.anatomy.blocks)
    blocks[1] = replace(block, heads=replace(block.own_heads, query=replace(block.query, starts=(8, 0, 16, 24))))
    wrong = replace(subject, anatomy=replace(subject.anatomy, blocks=tuple(blocks)))
    assert "each head's slice of the weights is where it should be" in {item.name for item in check_subject(wrong) if not item.passed}


def dropping() -> Any:
    return families.build("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)


def test_every_measurement_is_in_evaluation_mode_and_gives_the_model_back_as_it_was() -> None:
    model = dropping()
    subject, ids = load(model), families.documents()[0][None]
    edit = Edit("z", 1, 0.0, heads=(2,))

    @torch.no_grad()
    def measured() -> list[Tensor]:
        with record(subject, "residual", "pattern") as recording:
            seen = model(ids).logits
        with intervene(subject, edit):
            changed = model(ids).logits
        run = CachedRun(subject, ids, sites=("z",))
        ((_, rows),) = run.rerun([[edit]], Reading.of(torch.ones_like(ids, dtype=torch.bool)))
        walk = Walk(subject, ids)
        return [seen, changed, rows, walk.run(), recording["pattern", 2], recording.stack("residual")]

    expected = measured()
    model.train()
    model.transformer.h[1].eval()  # some modules may have a mode of their own
    before = [module.training for module in model.modules()]
    for found, value in zip(measured(), expected, strict=True):
        assert torch.equal(found, value)
    with pytest.raises(RuntimeError), observed(subject):
        raise RuntimeError
    assert [module.training for module in model.modules()] == before
    load(model)
    assert [module.training for module in model.modules()] == before, "loading tests the model and leaves it in its mode"


LONG: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "llama": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, "max_position_embeddings": 10},
        (14, 9, 12, 10),
    ),
    "phi3": (
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [9.0, 5.0, 3.0, 2.0],
                "factor": 6.0,
            },
            "original_max_position_embeddings": 10,
        },
        (14, 9, 12, 10),
    ),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", LONG)
@torch.no_grad()
def test_frequencies_follow_each_texts_own_length_whatever_stands_beside_or_came_before(family: str, side: str) -> None:
    changes, lengths = LONG[family]
    texts = families.documents(lengths=lengths)
    subject = load(families.build(family, **changes))
    batch = families.padded(texts, side)
    state = {name: value.clone() for name, value in subject.plain.named_buffers()}
    calls: list[Any] = []
    with observed(subject, calls.append):
        walk = Walk(subject, batch.ids, batch.real)
        logits = walk.logits(walk.run())
    run = CachedRun(subject, batch.ids, batch.real, sites=("z",))
    ((_, rows),) = run.rerun([[Edit("z", 1, lambda z: z)]], Reading.of(batch.real))
    assert all(torch.equal(value, state[name]) for name, value in subject.plain.named_buffers()), "the model keeps its own state"
    again = walk.logits(rows[0]).split([len(text) for text in texts])
    for row, text in enumerate(texts):
        fresh = families.build(family, **changes)  # one that has seen no longer text
        fresh.set_attn_implementation("eager")
        alone = fresh(input_ids=text[None], output_attentions=True)
        torch.testing.assert_close(batch.rows(logits, row), alone.logits[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again[row], alone.logits[0], rtol=1e-4, atol=1e-4)
        for call, pattern in zip(calls, alone.attentions, strict=True):
            found = describe(call, batch.real).entropy[row].T[batch.real[row]].T
            torch.testing.assert_close(found, -torch.xlogy(pattern[0], pattern[0]).sum(-1), rtol=1e-4, atol=1e-4)


def test_a_model_that_sees_what_follows_is_refused() -> None:
    model = families.build("gemma3", use_bidirectional_attention=True, layer_types=["sliding_attention"] * 3)
    with pytest.raises(ModelError, match=r"gemma3_text.*a token does not see what follows it"):
        load(model)


def test_a_tied_base_and_an_untied_tuned_model_are_refused_before_anything_is_measured() -> None:
    base, tuned = load(families.build("llama", tie_word_embeddings=True)), load(families.build("llama", tie_word_embeddings=False))
    for one, other in ((base, tuned), (tuned, base)):
        with pytest.raises(
            ModelError, match=r"unembeds with its embedding, .* with a weight of its own: their weights do not pair up; save"
        ):
            pair(one, other)


@pytest.mark.parametrize("name", ["pad", "bos", "eos"])
def test_control_tokens_that_the_embedding_lacks_are_refused_at_load(name: str) -> None:
    tokenizer = families.tokenizer()
    tokenizer.add_special_tokens({f"{name}_token": "<new>"})
    with pytest.raises(
        ModelError, match=rf"the tokenizer's {name} token '<new>' has id 97, the embedding has 97 tokens: call resize_token"
    ):
        load(families.build("gpt2"), tokenizer=tokenizer)


def test_documents_with_tokens_that_the_embedding_lacks_are_refused_before_the_model_runs() -> None:
    tokenizer = families.tokenizer(101)
    subject = load(families.build("gpt2"), tokenizer=tokenizer)
    document = " ".join(f"w{at}" for at in range(90, 101))
    with pytest.raises(DataError, match=r"document '1' holds token 100 \('w100'\), the embedding of .* has 97 tokens"):
        encode_for(DocumentFormat(), Corpus((Document("1", document, "w5 w6"),), "here"), subject)


def test_a_warning_names_a_model_in_memory_by_its_class_and_size(caplog: pytest.LogCaptureFixture) -> None:
    model = families.build("llama")
    own = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *args, **kwargs: 2 * own(*args, **kwargs)
    load(model)
    (message,) = [record.getMessage() for record in caplog.records if "failed" in record.getMessage()]
    assert message.startswith("LlamaForCausalLM of 3 layers × 4 heads, width 32: check 'the parts add up")
    assert "\n" not in message
