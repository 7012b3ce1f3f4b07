"""Models of algorithmic tasks: few tokens, few positions, tokenizers of words without one for unknown words, or none at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from mechscope.data.pieces import Pieces
from mechscope.data.tasks import ioi
from mechscope.errors import DataError
from mechscope.instrument import load
from mechscope.studies.roles import repeated_tokens, role_tables


def words(*, start: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer of 26 letters, with spaces between them and no token for anything else."""
    vocabulary = {chr(ord("a") + 25 - at): at for at in range(26)} | ({"<s>": 26} if start else {})
    inner = Tokenizer(models.WordLevel(vocabulary))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    if start:
        from tokenizers.processors import TemplateProcessing

        inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 26)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>" if start else None)


@pytest.mark.parametrize("start", [False, True])
def test_a_tokenizer_that_cannot_spell_a_word_says_so_in_one_line(start: bool) -> None:
    pieces = Pieces(words(start=start))
    assert pieces.start_ids == ((26,) if start else ())
    assert pieces.ids(["a b", "c"]) == [[25, 24], [23]]
    with pytest.raises(DataError, match=r"cannot spell 'a hello': it has no token for some of its words"):
        pieces.ids(["a hello"])
    with pytest.raises(DataError, match="has 0 of 122 names as single tokens"):
        ioi(words(start=start), 4)


@pytest.mark.parametrize("tokenizer", ["words", "none"])
def test_roles_are_scored_as_far_as_a_small_world_allows(tokenizer: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=27, n_embd=16, n_layer=2, n_head=2, n_positions=8, bos_token_id=None, eos_token_id=None)
    subject = load(GPT2LMHeadModel(config).eval(), tokenizer=words(start=False) if tokenizer == "words" else None)
    tables = role_tables({"model": subject}, None, probes=8)
    assert {"previous-token", "induction", "duplicate-token"} <= set(tables["head_roles"]["role"])
    said = [record.getMessage() for record in caplog.records]
    assert len(said) <= 3
    assert all(len(one) < 200 for one in said), said
    (example,) = repeated_tokens(subject, 1)
    first, second = example.input_ids[slice(*example.document)], example.input_ids[slice(*example.summary)]
    assert first == second
    assert len(example) <= 8


def test_the_known_heads_of_a_public_toy_model_are_named(shared: Path) -> None:
    subject = load(shared / "models" / "induction-2L" / "from-scratch")
    table = role_tables({"model": subject}, None, probes=16)["head_roles"]
    found = {role: set(of.loc[of["has_role"], "component"]) for role, of in table.groupby("role")}
    assert found["previous-token"] == {"a0.h0"}
    assert found["induction"] == {"a1.h0"}
