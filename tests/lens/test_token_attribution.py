"""A head's contribution split by source token, and a text's by position, add up to the whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mechscope.data.pairs import Pairs
from mechscope.errors import SettingsError
from mechscope.instrument import record
from mechscope.lens.question import METRICS
from mechscope.lens.token_attribution import attribute_positions, attribute_sources
from tests import families
from tests.lens.residual_oracle import CLOSE, Slow, attributed, make_pairs, subject_of


@pytest.fixture(params=families.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=METRICS)
def metric(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@torch.no_grad()
def test_source_tokens_bring_what_the_pattern_and_the_values_say(family: str, metric: str) -> None:
    subject, pairs = subject_of(family), make_pairs()
    found = attribute_sources(subject, pairs, "a0.h1,a2.h3", metric=metric)
    seen: dict[Any, Any] = {(row.text, row.component, row.query, row.source): row for row in found.itertuples()}
    for pair in pairs:
        slow, ids = Slow(subject, pair), torch.tensor([pair.clean])
        with record(subject, "value") as recording:
            subject.plain(ids, attention_mask=torch.ones_like(ids))
        usual = subject.plain.config._attn_implementation
        subject.plain.set_attn_implementation("eager")
        patterns = subject.plain(ids, attention_mask=torch.ones_like(ids), output_attentions=True).attentions
        subject.plain.set_attn_implementation(usual)
        queries = [at - 1 for at in range(*pair.target or ())] if metric == "target-logit" else [len(pair.clean) - 1]
        for layer, head in ((0, 1), (2, 3)):
            block = subject.anatomy.blocks[layer]
            value = recording["value", layer][0, :, head // (families.HEADS // subject.anatomy.n_kv_heads)]
            own = [key[2:] for key in seen if key[:2] == (pair.id, f"a{layer}.h{head}")]
            assert own == [(query, source) for query in queries for source in range(query + 1)]
            for query, source in ((queries[0], 0), (queries[-1], queries[-1] // 2), (queries[-1], queries[-1])):
                z = torch.zeros(len(pair.clean), families.HEADS * value.shape[-1], dtype=torch.float64)
                share = patterns[layer][0, head, query, source]
                z[query, head * value.shape[-1] : (head + 1) * value.shape[-1]] = share * value[source]
                written = block.output.module(z) - block.output.module(torch.zeros_like(z))
                if slow.gemma:
                    written = slow.behind(block.attention_write, block.output.module(slow.read(block.output.module)), written)
                row = seen[pair.id, f"a{layer}.h{head}", query, source]
                # eager attention computes its softmax in float32
                assert row.attention == pytest.approx(float(share), abs=1e-6)
                assert row.effect == pytest.approx(slow.without(written, metric), abs=1e-6)
                assert row.token == f"#{pair.clean[source]}"


def test_source_tokens_sum_to_the_head(family: str, metric: str) -> None:
    found = attribute_sources(subject_of(family), make_pairs(), "layers:0-2", metric=metric)
    sums = found.groupby(["text", "component"])["effect"].sum()
    whole = attributed(family, metric)
    for row, text in enumerate(whole.texts):
        for index, part in enumerate(whole.parts):
            if part.kind == "head":
                assert sums[text, part.component] == pytest.approx(whole.effects[row, index], rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(found.groupby(["text", "component", "query"])["attention"].sum(), 1, **CLOSE)


def test_positions_average_to_the_text(family: str) -> None:
    found = attribute_positions(subject_of(family), make_pairs())
    means = found.groupby(["text", "component"])["effect"].mean()
    whole = attributed(family, "target-logit")
    for row, pair in enumerate(make_pairs()):
        for index, part in enumerate(whole.parts):
            if part.kind not in ("cap", "residual"):
                assert means[pair.id, part.component] == pytest.approx(whole.effects[row, index], rel=1e-9, abs=1e-9)
        of_text = found[(found["text"] == pair.id) & (found["component"] == "m1")]
        assert list(of_text["position"]) == [at - 1 for at in range(*pair.target or ())]
        assert list(of_text["token"]) == [f"#{pair.clean[at]}" for at in of_text["position"]]


def test_tokens_are_spelled_where_there_is_a_tokenizer() -> None:
    subject = replace(subject_of("gpt2"), tokenizer=families.tokenizer())
    pair = make_pairs().pairs[0]
    found = attribute_sources(subject, Pairs((pair,), "test"), "a1.h0")
    assert list(found["token"]) == [f"w{token}" for token in pair.clean]


def test_only_heads_look_at_tokens() -> None:
    subject, pairs = subject_of("gpt2"), make_pairs()
    with pytest.raises(SettingsError, match=r"a3\.h0"):
        attribute_sources(subject, pairs, "a3.h0")
    with pytest.raises(SettingsError, match="no heads"):
        attribute_sources(subject, pairs, "m1")
