"""A component's card shows what it looks at and which words it argues for, equal to what one counts by hand."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from mechscope.circuits.cards import component_cards
from mechscope.circuits.graph import Circuit, Graph
from mechscope.data.pairs import Pairs, PromptPair, from_tokens
from mechscope.errors import DataError, SettingsError
from mechscope.instrument import Execution, record
from mechscope.subject.load import Subject, load
from tests import families

FAMILIES = ("gpt2", "llama", "gemma2", "phi")
WORDS = 6  # of so few words each occurs several times in a text


def repeating(lengths: tuple[int, ...] = (14, 9, 11)) -> Pairs:
    """Return texts of few words that differ from their corrupt versions at positions 2 and 4."""
    generator = torch.Generator().manual_seed(3)
    pairs = []
    for index, length in enumerate(lengths):
        clean = torch.randint(3, 3 + WORDS, (length,), generator=generator).tolist()
        corrupt = [3 + (word - 2) % WORDS if at in (2, 4) else word for at, word in enumerate(clean)]
        pairs.append(PromptPair(str(index), tuple(clean), tuple(corrupt), answers=(5,), wrong_answers=(20,), target=(length - 3, length)))
    return Pairs(tuple(pairs), "few words")


TEXTS = repeating()


@lru_cache
def subject_of(family: str) -> Subject:
    return families.subject(family, torch.float64)


def cards(subject: Subject, circuit: Circuit | None = None, **options: Any) -> Any:
    return component_cards(subject, TEXTS, circuit or Circuit.full(Graph.of(subject)), **options).set_index("component")


@torch.no_grad()
def seen(subject: Subject, ids: tuple[int, ...]) -> Any:
    with record(subject, "pattern", "head_output", "attention_output", "mlp_output", "residual") as recording:
        subject.plain(torch.tensor([ids]), use_cache=False)
    return recording


def rows_of(text: PromptPair, metric: str) -> list[int]:
    """Return where the metric is read: the last token, or those before the targets."""
    assert text.target is not None
    return [len(text.clean) - 1] if metric == "logit-diff" else [at - 1 for at in range(*text.target)]


def attended_by_hand(subject: Subject, layer: int, head: int, metric: str) -> str:
    total: dict[int, float] = defaultdict(float)
    rows = 0
    for text in TEXTS:
        pattern = seen(subject, text.clean)["pattern", layer][0, head]
        for row in rows_of(text, metric):
            rows += 1
            for key, token in enumerate(text.clean):
                total[token] += float(pattern[row, key])
    most = sorted(total.items(), key=lambda found: -found[1])[:5]
    return ", ".join(f"'#{token}' {share / rows:.0%}" for token, share in most if share > 0)


def writes(subject: Subject, ids: tuple[int, ...], name: str) -> Tensor:
    """Return what a component adds to the residual stream, ``(token, d_model)``."""
    recording = seen(subject, ids)
    if name.startswith("m"):
        return recording["mlp_output", int(name[1:])][0]
    layer, head = (int(part) for part in name[1:].split(".h"))
    written = recording["head_output", layer][0, :, head]
    if subject.family != "gemma2":
        return written
    # the norm after attention divides every head by the size of their sum
    norm = subject.plain.model.layers[layer].post_attention_layernorm
    size = recording["head_output", layer][0].sum(1).pow(2).mean(-1, keepdim=True).add(norm.eps).sqrt()
    return written / size * (1 + norm.weight)


@torch.no_grad()
def raised_by_hand(subject: Subject, name: str, metric: str, *, source: str = "corrupt") -> Tensor:
    """Return what a component adds to each word's logit from the corrupt to the clean run, with the clean run's norm, averaged over rows."""
    found = []
    for text in TEXTS:
        change = writes(subject, text.clean, name)
        if source == "corrupt":
            change = change - writes(subject, text.corrupt, name)
        last = seen(subject, text.clean)["residual", families.LAYERS - 1][0]
        if subject.family in ("gpt2", "phi"):
            norm = subject.plain.base_model.ln_f if subject.family == "gpt2" else subject.plain.base_model.final_layernorm
            change = change - change.mean(-1, keepdim=True)
            scaled = change / (last.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt() * norm.weight
        else:
            norm = subject.plain.base_model.norm
            gain, eps = (norm.weight, norm.variance_epsilon) if subject.family == "llama" else (1 + norm.weight, norm.eps)
            scaled = change / (last.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain
        found += [scaled[row] for row in rows_of(text, metric)]
    return torch.stack(found).mean(0) @ subject.plain.get_output_embeddings().weight.T


def spelled(logits: Tensor) -> str:
    words = sorted(range(len(logits)), key=lambda word: -float(logits[word]))[:5]
    return ", ".join(f"'#{word}' {float(logits[word]):+.2f}" for word in words)


@pytest.mark.parametrize("tokens_per_batch", [1, 512])
@pytest.mark.parametrize("metric", ["logit-diff", "loss"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_head_attends_to_the_words_that_its_pattern_weighs_most(family: str, metric: str, tokens_per_batch: int) -> None:
    subject = subject_of(family)
    found = cards(subject, metric=metric, execution=Execution(tokens_per_batch=tokens_per_batch))["attends_to"]
    for layer in range(families.LAYERS):
        for head in range(families.HEADS):
            assert found[f"a{layer}.h{head}"] == attended_by_hand(subject, layer, head, metric)
        assert found[f"m{layer}"] == ""


def test_a_head_that_looks_everywhere_alike_attends_to_each_word_as_often_as_it_occurs() -> None:
    model = families.build("gpt2", torch.float64)
    with torch.no_grad():
        made = model.transformer.h[1].attn.c_attn
        made.weight[:, :8], made.bias[:8] = 0, 0  # head 0's queries
    text = PromptPair("0", (7,) * 9 + (3, 4, 5, 6, 8, 9, 3), (7,) * 8 + (3, 3, 4, 5, 6, 8, 9, 3), answers=(5,), wrong_answers=(6,))
    subject = load(model)
    found = component_cards(subject, Pairs((text,), "one"), Circuit.of(Graph.of(subject), ["embed->a1.h0<q>", "a1.h0->logits"]))
    assert found["attends_to"].tolist() == ["'#7' 56%, '#3' 12%, '#4' 6%, '#5' 6%, '#6' 6%"]


@pytest.mark.parametrize("metric", ["logit-diff", "loss"])
@pytest.mark.parametrize("family", FAMILIES)
def test_top_tokens_are_direct_logit_attribution_with_the_final_norms_scale_kept(family: str, metric: str) -> None:
    subject = subject_of(family)
    found = cards(subject, metric=metric)["top_tokens"]
    for name in ("a0.h1", "a1.h3", "m1", "a2.h0", "m2"):
        assert found[name] == spelled(raised_by_hand(subject, name, metric)), name


def test_with_zero_as_the_source_it_is_everything_a_component_writes() -> None:
    subject = subject_of("llama")
    found = cards(subject, source="zero")["top_tokens"]
    for name in ("a1.h3", "m2"):
        assert found[name] == spelled(raised_by_hand(subject, name, "logit-diff", source="zero")), name


def test_a_head_that_writes_nothing_argues_for_no_word() -> None:
    model = families.build("phi", torch.float64)  # its unembedding has a bias, which is no component's
    with torch.no_grad():
        model.model.layers[2].self_attn.dense.weight[:, 8:16] = 0  # head 1 of width 8
    found = cards(load(model))
    assert all(word.endswith("+0.00") for word in found.loc["a2.h1", "top_tokens"].split(", "))
    assert not any(word.endswith("+0.00") for word in found.loc["a2.h2", "top_tokens"].split(", "))
    assert found.loc["a2.h1", "attends_to"]


def test_a_head_that_writes_a_words_own_direction_argues_for_that_word() -> None:
    model = families.build("gpt2", torch.float64)
    word, attention, embedding = 42, model.transformer.h[2].attn, model.transformer.wte.weight
    with torch.no_grad():
        attention.c_attn.weight[:, 64 + 16 : 64 + 24], attention.c_attn.bias[64 + 16 : 64 + 24] = 0, 1  # head 2's values
        attention.c_proj.weight[16:24] = (embedding[word] - embedding.mean(0)) / model.transformer.ln_f.weight
    found = cards(load(model), source="zero")["top_tokens"]
    assert found["a2.h2"].startswith("'#42' +")
    assert not found["a2.h1"].startswith("'#42' ")


def test_only_the_circuits_components_have_a_card_in_the_models_order() -> None:
    subject = subject_of("gpt2")
    circuit = Circuit.of(Graph.of(subject), ["embed->m0", "m0->a2.h3<k>", "a2.h3->logits", "embed->a1.h0<q>", "a1.h0->m2", "m2->logits"])
    found = component_cards(subject, TEXTS, circuit)
    assert found[["component", "layer"]].to_numpy().tolist() == [["m0", 0], ["a1.h0", 1], ["a2.h3", 2], ["m2", 2]]
    whole = cards(subject)
    for _, row in found.iterrows():
        assert row["attends_to"] == whole.loc[row["component"], "attends_to"]
        assert row["top_tokens"] == whole.loc[row["component"], "top_tokens"]
    assert component_cards(subject, TEXTS, Circuit.of(Graph.of(subject), ["embed->logits"])).empty


def test_with_a_tokenizer_words_stand_instead_of_numbers() -> None:
    plain = subject_of("gpt2")
    numbers, words = cards(plain), cards(load(plain.model, tokenizer=families.tokenizer()))
    for column in ("attends_to", "top_tokens"):
        for name in ("a0.h0", "a2.h3"):
            parts = (part.replace("'", "").removeprefix("#").split(" ") for part in numbers.loc[name, column].split(", "))
            spoken = {"0": "<pad>", "1": "<s>", "2": "</s>"}
            assert words.loc[name, column] == ", ".join(f"'{spoken.get(word, f'w{word}')}' {value}" for word, value in parts)


def test_a_circuit_of_another_model_and_texts_that_cannot_be_compared_are_refused() -> None:
    subject = subject_of("gpt2")
    with pytest.raises(SettingsError, match=r"a circuit of Graph\(.*n_heads=2.* does not belong to this model"):
        component_cards(subject, TEXTS, Circuit.full(Graph(3, 2)))
    with pytest.raises(SettingsError, match="does not belong to this model"):
        component_cards(subject, TEXTS, Circuit.full(Graph(3, 4, parallel=True)))
    same = from_tokens(torch.tensor([[5, 6, 7, 8]]))
    with pytest.raises(DataError, match="the same clean and corrupt text"):
        component_cards(subject, same, Circuit.full(Graph.of(subject)), metric="loss")
    assert len(component_cards(subject, same, Circuit.full(Graph.of(subject)), metric="loss", source="zero")) == 15
