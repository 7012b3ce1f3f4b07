"""What is shown of a head's attention is what Hugging Face's eager attention gives, its largest entries."""

from __future__ import annotations

import pytest
import torch

from mechscope.errors import DataError, SettingsError
from mechscope.heads.shown import attention_edges
from mechscope.subject.load import load
from tests import families

HEADS = ((0, 1), (2, 3), (2, 0))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3", "gemma2", "mistral"])
@torch.no_grad()
def test_edges_are_the_largest_entries_of_the_pattern(family):
    model = families.build(family)
    ids = families.documents(lengths=(12,))[0]
    found = attention_edges(load(model), ids.tolist(), HEADS, strongest=3, least=0.05)
    model.set_attn_implementation("eager")
    whole = model(ids[None], output_attentions=True).attentions
    assert set(found["component"]) == {"a0.h1", "a2.h3", "a2.h0"}
    for layer, head in HEADS:
        rows = whole[layer][0, head]
        expected = {
            (query, int(key)): float(rows[query, key])
            for query in range(len(ids))
            for key in rows[query].argsort(descending=True)[:3]
            if rows[query, key] >= 0.05
        }
        own = found[found["component"] == f"a{layer}.h{head}"]
        assert dict(zip(zip(own["query"], own["key"], strict=True), own["weight"], strict=True)) == pytest.approx(expected, abs=1e-5)


def test_only_the_layers_that_are_needed_run():
    subject = load(families.build("gpt2"))
    ran = []
    for layer, block in enumerate(subject.anatomy.blocks):
        block.module.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    attention_edges(subject, [5, 6, 7], [(1, 0)])
    assert 2 not in ran


def test_wrong_input_is_refused():
    subject = families.subject("gpt2")
    with pytest.raises(SettingsError, match=r"head a9\.h0 does not exist"):
        attention_edges(subject, [5, 6], [(9, 0)])
    with pytest.raises(DataError, match="0 tokens"):
        attention_edges(subject, [], [(0, 0)])
    assert attention_edges(subject, [5, 6], []).empty
