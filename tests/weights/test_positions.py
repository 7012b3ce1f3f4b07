"""Position space shows heads that look by place: scores by offset equal slow loops, and a planted previous-token head is seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mechscope.errors import ModelError, SettingsError
from mechscope.heads import pattern_roles, roles_table
from mechscope.subject.load import load
from mechscope.weights import Forms, Vocabulary, position_rows, position_scores
from tests import families
from tests.weights import oracle


def learned(family: str) -> torch.Tensor:
    model = families.subject(family, torch.float64).plain
    if family == "gpt2":
        return model.transformer.wpe.weight.detach()
    return model.model.decoder.embed_positions.weight.detach()[2:]  # OPT's first two rows are never read


@pytest.mark.parametrize("family", families.FAMILIES)
def test_positions_are_found_where_they_are_learned(family: str) -> None:
    found = position_rows(families.subject(family, torch.float64))
    if family in ("gpt2", "opt"):
        assert found is not None
        torch.testing.assert_close(found, learned(family), rtol=1e-12, atol=1e-12)
    else:
        assert found is None


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_learned_positions_score_as_a_loop_over_pairs_says(family: str) -> None:
    subject = families.subject(family, torch.float64)
    table = position_scores(subject, heads="a0.h1,a2.h2", offsets=5)
    assert set(table["space"]) == {"learned"}
    found = table.set_index(["layer", "offset"])[["score", "share"]].to_dict("index")
    for layer, head in ((0, 1), (2, 2)):
        one, form = oracle.head(subject.plain, family, layer, head), Forms(subject).qk(layer, head)
        rows = one.norm.standard(learned(family))
        assert form.left_constant is not None
        assert form.right_constant is not None
        q, k = rows @ one.folded(one.q) + form.left_constant, rows @ one.folded(one.k) * one.scaling + form.right_constant
        sums, best = [0.0] * 5, [0] * 5
        for query in range(4, families.POSITIONS):
            scores = [float(q[query] @ k[key]) for key in range(query + 1)]
            for offset in range(5):
                sums[offset] += scores[query - offset]
            nearest = query - max(range(query + 1), key=scores.__getitem__)
            if nearest < 5:
                best[nearest] += 1
        for offset in range(5):
            row = found[layer, offset]
            assert row["score"] == pytest.approx(sums[offset] / 60, abs=1e-9)
            assert row["share"] == pytest.approx(best[offset] / 60, abs=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_rotary_families_score_as_the_mean_over_all_pairs_of_tokens(family: str) -> None:
    subject = families.subject(family, torch.float64)
    table = position_scores(subject, heads="a1.h3", offsets=4)
    forms, vocabulary = Forms(subject), Vocabulary(subject)
    assert set(table["space"]) == {"rotary"}
    assert table["share"].isna().all()
    for offset, score in zip(table["offset"], table["score"], strict=True):
        form = forms.qk(1, 3, offset=int(offset))
        dense = vocabulary.read(form, 1) @ vocabulary.read(form, 1, side="right").T
        assert score == pytest.approx(float(dense.mean()), abs=1e-6)


def test_a_head_that_looks_at_the_token_before_is_seen() -> None:
    model = families.build("gpt2", torch.float64, n_positions=16, n_layer=1, n_head=1)
    with torch.no_grad():
        model.transformer.wpe.weight.copy_(torch.eye(16, 32))
        block = model.transformer.h[0]
        block.ln_1.weight.fill_(1.0)
        block.ln_1.bias.zero_()
        block.attn.c_attn.bias.zero_()
        query, key, _ = block.attn.c_attn.weight.split(32, dim=1)
        query.copy_(torch.eye(32))
        key.copy_(torch.eye(32).roll(1, dims=1))  # position p looks like p + 1 as a key
    table = position_scores(load(model), offsets=4).set_index("offset")
    assert table["share"].tolist() == [0, 1, 0, 0]
    assert table["score"].idxmax() == 1


def test_offsets_beyond_the_model_and_families_with_norms_of_queries_are_errors() -> None:
    with pytest.raises(SettingsError, match="64 positions"):
        position_scores(families.subject("gpt2"), offsets=65)
    with pytest.raises(ModelError, match="qwen3"):
        position_scores(families.subject("qwen3"), offsets=2)


def test_positions_alone_do_not_say_which_heads_attend_to_the_token_before(shared: Path) -> None:
    """What the docstring says of a real GPT-2: the heads that do it on texts are not those that their positions single out."""
    subject = load(str(shared / "models" / "gpt2-news-7m"))
    by_position = position_scores(subject, offsets=16).query("offset == 1").set_index("component")["share"].rank(ascending=False)
    roles = roles_table(pattern_roles(subject, n=8)).query("role == 'previous-token'").set_index("component")
    measured = roles["excess"].nlargest(4)
    assert measured.min() > 0.05
    assert by_position[measured.index].min() > 10
