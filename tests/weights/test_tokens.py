"""Tables of tokens hold the entries of the dense circuits, and scores are the model's own."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from mechscope.errors import ModelError, SettingsError
from mechscope.instrument import AttentionCall, observed
from mechscope.subject.load import Subject, load
from mechscope.weights import Forms, Vocabulary, is_bilinear, ov_tokens, qk_tokens, score_matrices
from tests import families
from tests.weights import oracle

HEADS = ((0, 3), (1, 2), (2, 1))
NAMES = "a0.h3,a1.h2,a2.h1"


def require_entries(table: pd.DataFrame, dense: Tensor, names: tuple[str, str], signs: tuple[str, str], *, k: int, atol: float) -> None:
    """Check one head's rows against its dense matrix."""
    rows, columns = (torch.tensor(table[f"{name}_id"].to_numpy()) for name in names)
    torch.testing.assert_close(torch.tensor(table["value"].to_numpy()), dense[rows, columns], rtol=atol, atol=atol)
    for sign, largest in zip(signs, (True, False), strict=True):
        found = table[table["sign"] == sign]
        assert list(found["place"]) == list(range(1, k + 1))
        expected = dense.flatten().topk(k, largest=largest).values
        torch.testing.assert_close(torch.tensor(found["value"].to_numpy()), expected, rtol=atol, atol=atol)


# OV


@pytest.mark.parametrize("raw", [False, True], ids=["normalised", "raw"])
@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_the_whole_matrix_of_a_heads_ov_circuit_has_these_extreme_entries(family: str, raw: bool) -> None:
    subject = families.subject(family, torch.float64)
    table = ov_tokens(subject, heads=NAMES, k=9, embedding="raw" if raw else "normalised")
    assert list(table["component"].unique()) == NAMES.split(",")
    for layer, head in HEADS:
        dense = oracle.dense_ov(subject.plain, family, layer, head, raw=raw)
        part = table[(table["layer"] == layer) & (table["head"] == head)]
        # Gemma scales its raw embedding by a float32 √32
        atol = 1e-6 if raw and family == "gemma2" else 1e-9
        require_entries(part, dense, ("source", "target"), ("promoted", "suppressed"), k=9, atol=atol)


@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_each_source_has_the_targets_of_its_own_row(family: str) -> None:
    subject, sources = families.subject(family, torch.float64), [5, 96, 40]
    table = ov_tokens(subject, heads=NAMES, sources=sources, k=4)
    assert len(table) == 3 * 2 * 3 * 4
    for layer, head in HEADS:
        dense = oracle.dense_ov(subject.plain, family, layer, head)
        for source in sources:
            rows = table[(table["layer"] == layer) & (table["source_id"] == source)]
            require_entries(rows.assign(source_id=0), dense[source][None], ("source", "target"), ("promoted", "suppressed"), k=4, atol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gpt_neox"])
@torch.no_grad()
def test_a_head_that_attends_to_a_token_alone_moves_the_logits_by_its_row(family: str) -> None:
    """Layer 0 of the model itself, positions off: z W_O for two tokens that stand alone differ as their rows do."""
    subject = load(without_positions(family))
    model, calls, ids = subject.plain, list[AttentionCall](), torch.tensor([[11], [70]])
    with observed(subject, calls.append):
        model(ids)
    table = ov_tokens(subject, heads="a0.h2", sources=[11, 70], k=families.VOCABULARY)
    rows = table[table["sign"] == "promoted"].sort_values(["source_id", "target_id"])["value"].to_numpy()
    found = torch.tensor(rows).view(2, families.VOCABULARY)
    z = calls[0].z[:, 0, 2]
    moved = (z[1] - z[0]) @ oracle.head(model, family, 0, 2).o @ oracle.directions(model, family).T
    torch.testing.assert_close(found[1] - found[0], moved, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "opt"])
@torch.no_grad()
def test_the_effective_embedding_adds_what_the_first_mlp_makes_of_the_token(family: str) -> None:
    subject = families.subject(family, torch.float64)
    model, plain = subject.plain, oracle.tokens(subject.plain, family)
    vocabulary = Vocabulary(subject, embedding="raw", effective=True)
    torch.testing.assert_close(vocabulary.rows(0), plain, rtol=1e-9, atol=1e-9)
    match family:
        case "gpt2":
            block = model.transformer.h[0]
            written = block.mlp(block.ln_2(plain))
        case "gpt_neox":
            block = model.gpt_neox.layers[0]
            written = block.mlp(block.post_attention_layernorm(plain))
        case "opt":
            block = model.model.decoder.layers[0]
            written = block.fc2(block.activation_fn(block.fc1(block.final_layer_norm(plain))))
        case _:
            block = model.model.layers[0]
            written = block.mlp(block.post_attention_layernorm(plain))
    for layer in (1, 2):
        torch.testing.assert_close(vocabulary.rows(layer), plain + written, rtol=1e-9, atol=1e-9)


def test_tokens_are_written_as_text_and_without_a_tokenizer_as_numbers() -> None:
    model = families.build("gpt2")
    bare, named = (ov_tokens(load(model, tokenizer=one), heads="a0.h0", sources=[7], k=1) for one in (None, families.tokenizer()))
    short = ov_tokens(load(model, tokenizer=families.tokenizer(90)), heads="a0.h0", sources=[7, 93], k=1)
    assert set(short["source"]) == {"w7", "#93"}, "rows of the embedding that no token has"
    assert list(bare["source"]) == ["#7", "#7"]
    assert list(named["source"]) == ["w7", "w7"]
    assert list(named["target"]) == [f"w{target}" for target in named["target_id"]]
    assert list(bare["target"]) == [f"#{target}" for target in bare["target_id"]]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sources": [3, 97]}, r"sources \[97\].*0 to 96"),
        ({"sources": []}, "sources is empty"),
        ({"k": 0}, "at least 1"),
        ({"heads": "a9.h0"}, "a9.h0 does not exist"),
        ({"heads": "m1"}, "hold no heads"),
        ({"embedding": "other"}, "normalised or raw"),
    ],
)
def test_settings_that_do_not_fit_are_errors_that_say_so(options: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        ov_tokens(families.subject("gpt2"), **options)


# QK


def without_positions(family: str, **changes: Any) -> Any:
    """Build a model whose learned positions, if any, are zero."""
    model = families.build(family, torch.float64, **changes)
    with torch.no_grad():
        if family == "gpt2":
            model.transformer.wpe.weight.zero_()
        elif family == "opt":
            model.model.decoder.embed_positions.weight.zero_()
    return model


def model_scores(subject: Subject, ids: Tensor) -> Tensor:
    """Return layer 0's own scores before soft cap and mask: (text, head, query, key)."""
    calls: list[AttentionCall] = []
    with observed(subject, calls.append), torch.no_grad():
        subject.plain(ids)
    call = calls[0]
    key = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)
    return call.query @ key.transpose(2, 3) * call.scaling


CHANGES: list[tuple[str, dict[str, Any]]] = [(family, {}) for family in oracle.BILINEAR]
CHANGES += [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}}),
    ("gpt_neox", {"rotary_pct": 1.0}),
]


@pytest.mark.parametrize(("family", "changes"), CHANGES)
@torch.no_grad()
def test_scores_from_weights_are_the_models_own_at_every_offset(family: str, changes: dict[str, Any]) -> None:
    subject = load(without_positions(family, **changes))
    ids = families.documents(lengths=(7,))[0][None]
    expected = model_scores(subject, ids)[0]
    forms, vocabulary = Forms(subject), Vocabulary(subject)
    for head in range(families.HEADS):
        for offset in (0, 1, 4):
            form = forms.qk(0, head, offset=offset)
            found = vocabulary.read(form, 0)[ids[0]] @ vocabulary.read(form, 0, side="right")[ids[0]].T
            for query in range(offset, 7):
                torch.testing.assert_close(found[query, query - offset], expected[head, query, query - offset], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("offset", [0, 2])
@torch.no_grad()
def test_the_keys_of_a_query_are_those_that_the_model_scores_highest_and_lowest(family: str, offset: int) -> None:
    subject, query, filler = load(without_positions(family)), 23, 50
    texts = torch.tensor([[key] + [filler] * (offset - 1) + [query] for key in range(families.VOCABULARY)]) if offset else None
    if texts is None:  # a token that attends to itself can be no other: what the weights say of it is tested above
        ids = torch.full((1, 1), query)
        expected = model_scores(subject, ids)[0, :, 0, 0]
        table = qk_tokens(subject, heads="layers:0", queries=[query], k=families.VOCABULARY)
        own = table[(table["key_id"] == query) & (table["sign"] == "attended")]["value"]
        torch.testing.assert_close(torch.tensor(own.to_numpy()), expected, rtol=1e-5, atol=1e-5)
        return
    scores = model_scores(subject, texts)[:, :, offset, 0]
    table = qk_tokens(subject, heads="layers:0", queries=[query], offset=offset, k=6)
    assert set(table["offset"]) == {offset}
    for head in range(families.HEADS):
        for sign, largest in (("attended", True), ("avoided", False)):
            rows = table[(table["head"] == head) & (table["sign"] == sign)]
            best = scores[:, head].topk(6, largest=largest)
            assert rows["key_id"].tolist() == best.indices.tolist()
            torch.testing.assert_close(torch.tensor(rows["value"].to_numpy()), best.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "opt", "gemma2"])
def test_read_raw_the_whole_matrix_is_the_bare_product_of_weights(family: str) -> None:
    subject = families.subject(family, torch.float64)
    table = qk_tokens(subject, heads=NAMES, k=5, embedding="raw")
    rows = oracle.tokens(subject.plain, family)
    for layer, head in HEADS:
        dense = rows @ oracle.head(subject.plain, family, layer, head).qk @ rows.T
        part = table[(table["layer"] == layer) & (table["head"] == head)]
        require_entries(part, dense, ("query", "key"), ("attended", "avoided"), k=5, atol=1e-6 if family == "gemma2" else 1e-9)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_families_that_norm_their_queries_and_keys_are_refused_by_name(family: str) -> None:
    subject = families.subject(family)
    assert not is_bilinear(subject, 1)
    with pytest.raises(ModelError, match=f"{family}.*norm of queries and keys"):
        qk_tokens(subject, heads="a1.h0")


@pytest.mark.parametrize("family", oracle.BILINEAR)
def test_offset_counts_where_there_is_a_rotary_embedding_only(family: str) -> None:
    here, there = score_matrices(families.subject(family, torch.float64), 1, [0, 3])
    assert torch.equal(here, there) == (family in ("gpt2", "opt"))
    scale = here[0, 0]
    torch.testing.assert_close(here, scale * torch.eye(len(here), dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("offset", [-1, 64])
def test_offsets_outside_the_model_are_errors(offset: int) -> None:
    with pytest.raises(SettingsError, match="from 0 to 63"):
        qk_tokens(families.subject("llama"), heads="a0.h0", queries=[3], offset=offset)
