"""What heads copy equals ranks in the dense OV matrix; built heads score their extremes, untrained ones chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mechscope.data.newsroom import newsroom_tokenizer
from mechscope.heads import copying_roles, roles_table
from mechscope.heads.copying_roles import successions
from mechscope.instrument.execution import Execution
from mechscope.instrument.readout import Readout
from mechscope.instrument.wiring import Wiring
from mechscope.subject.load import Subject, load
from tests import families


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "opt", "qwen3", "gemma2"])
@torch.no_grad()
def test_scores_are_ranks_in_the_dense_matrix(family):
    subject = families.subject(family, torch.float64)
    copying, suppression = copying_roles(subject)
    wiring, readout, size = Wiring(subject), Readout.of(subject), families.VOCABULARY
    everything = torch.arange(size)
    embedded = subject.anatomy.embedding(everything).double()
    norm_of = wiring.attention_norm
    for layer in range(families.LAYERS):
        norm = norm_of(layer)
        rows = embedded if norm is None else norm.normalised(embedded)[0]
        for head in range(families.HEADS):
            value = rows @ wiring.folded(layer, "value")[head // wiring.group].T
            dense = value @ wiring.writer(layer)[0][head] @ readout.directions(everything).T
            dense = dense - dense.mean(1, keepdim=True)
            expected = [(dense[token] < dense[token, token]).sum().item() / (size - 1) for token in range(size)]
            np.testing.assert_allclose(copying.score[:, layer, head], expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(suppression.score, 1 - copying.score, rtol=0, atol=1e-12)
    assert (copying.null == 0.5).all()
    assert copying.texts == tuple(map(str, range(size)))


def one_head(ov: torch.Tensor, embedding: torch.Tensor, tokenizer: object = None) -> Subject:
    """Return a GPT-2 of two layers with one head each; W_V W_O of the second is given, and what it reads are plain unit embeddings."""
    words, width = embedding.shape
    model = (
        GPT2LMHeadModel(
            GPT2Config(vocab_size=words, n_embd=width, n_layer=2, n_head=1, n_positions=32, bos_token_id=None, eos_token_id=None)
        )
        .double()
        .eval()
    )
    with torch.no_grad():
        model.transformer.wte.weight.copy_(embedding)
        for block in model.transformer.h:
            block.attn.c_attn.weight.zero_()
            block.attn.c_proj.weight.copy_(torch.eye(width))
        model.transformer.h[1].attn.c_attn.weight[:, 2 * width :] = ov
    return load(model, tokenizer=tokenizer)


def embeddings(words: int, width: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(words, width, generator=torch.Generator().manual_seed(1)).double(), dim=-1)


def test_heads_that_copy_and_that_suppress_score_one():
    width = 64
    for sign, names in ((1.0, ("copying", "negative-ov")), (-1.0, ("negative-ov", "copying"))):
        found = {one.role.name: one for one in copying_roles(one_head(sign * torch.eye(width), embeddings(200, width)), n=50)}
        assert (found[names[0]].score[:, 1] == 1).all()
        assert (found[names[1]].score[:, 1] == 0).all()
        # a head that writes nothing has no rank
        assert (found[names[0]].score[:, 0] == 0.5).all()
        table = roles_table(tuple(found.values()))
        assert set(zip(table["role"][table["has_role"]], table["component"][table["has_role"]], strict=True)) == {(names[0], "a1.h0")}


def test_a_head_that_writes_what_comes_next_is_a_successor_head():
    tokenizer = newsroom_tokenizer()
    embedding = embeddings(len(tokenizer), 256)
    plain = one_head(torch.zeros(256, 256), embedding, tokenizer)
    steps = successions(plain)
    assert len(steps) >= 20
    words = {tokenizer.decode([step.token]): tokenizer.decode([step.others[0]]) for step in steps}
    assert words[" Monday"] == " Tuesday"
    ov = sum(torch.outer(embedding[step.token], embedding[step.others[0]]) for step in steps)
    assert isinstance(ov, torch.Tensor)
    *_, found = copying_roles(one_head(ov, embedding, tokenizer), n=10)
    assert found.role.name == "successor"
    assert found.score[:, 1].mean() == 1
    assert (found.score[:, 0] == 0).all()
    np.testing.assert_allclose(found.null[0], 1 / len(steps[0].others))


@pytest.mark.parametrize("seed", range(3))
def test_untrained_models_score_at_the_null(seed):
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=500, n_embd=256, n_layer=3, n_head=8, n_positions=32)).eval()
    table = roles_table(copying_roles(load(model), execution=Execution(seed=seed)))
    assert not table["has_role"].any()
    copying = table[table["role"] == "copying"]
    # over heads the mean is chance; one head's own mean lies a trace of W_OV off it
    assert abs(copying["excess"].mean()) < 3 * copying["excess"].std() / len(copying) ** 0.5
    assert copying["excess"].abs().max() < 0.1


def test_tokens_are_the_same_in_both_models_of_a_pair_and_no_tokenizer_means_no_successors():
    one, two = (copying_roles(families.subject("gpt2", seed=seed), n=20) for seed in (0, 1))
    assert [each.texts for each in one] == [each.texts for each in two]
    assert len(one) == 2
    assert successions(families.subject("gpt2")) == ()
