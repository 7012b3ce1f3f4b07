"""Pattern statistics equal what plain Hugging Face's whole attention maps give, whatever the family, the type and the padding."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mechscope.instrument import AttentionCall, PatternComparison, compare, describe, observed, pattern
from mechscope.instrument.walk import model_inputs
from mechscope.subject.load import Subject
from tests import families
from tests.instrument import attention_oracle as oracle

PADDINGS = ("none", "left", "right")
DTYPES = (torch.float32, torch.float64)
# relative and absolute deviation allowed: what the issue states; the absolute part is for rows whose entropy or divergence is nearly zero
TOLERANCE: dict[torch.dtype, dict[str, Any]] = {torch.float32: {"rtol": 1e-4, "atol": 2e-5}, torch.float64: {"rtol": 1e-9, "atol": 1e-11}}
TEXTS = families.documents()

every_family = pytest.mark.parametrize("family", families.FAMILIES)
every_padding = pytest.mark.parametrize("padding", PADDINGS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


@torch.no_grad()
def calls(subject: Subject, texts: families.Texts) -> list[AttentionCall]:
    """Collect every layer's attention call of one pass."""
    seen: list[AttentionCall] = []
    with observed(subject, seen.append):
        subject.plain(**model_inputs(texts.ids, texts.real), use_cache=False)
    return seen


def document_rows(value: Tensor, texts: families.Texts, document: int) -> Tensor:
    """Cut one document out of ``(batch, head, query)``: ``(head, token)``."""
    return value[document][:, texts.real[document]].double()


def article(texts: families.Texts) -> Tensor:
    """Mark each document's real tokens 2 to 5 as a segment."""
    rank = texts.real.cumsum(1) - 1
    return texts.real & (rank >= 2) & (rank < 6)


@every_dtype
@every_padding
@every_family
def test_statistics_equal_those_of_whole_maps(family: str, padding: str, dtype: torch.dtype) -> None:
    subject, texts = families.subject(family, dtype), families.padded(TEXTS, padding)
    segments = {"article": article(texts)}
    for layer, call in enumerate(calls(subject, texts)):
        found = describe(call, texts.real, segments=segments)
        exact = describe(call, texts.real, segments=segments, method="exact")
        for document in range(len(texts.ids)):
            p = oracle.truth(subject.plain, TEXTS[document]).maps[layer]
            length = p.shape[-1]
            positions = torch.arange(length)
            expected = {
                "entropy": oracle.entropy(p),
                "distance": (p * (positions[:, None] - positions)).sum(-1),
                "sink": p[..., 0],
                "article": p[..., 2:6].sum(-1),
            }
            for name, truth in expected.items():
                for statistics in (found, exact):
                    value = statistics.segments[name] if name == "article" else getattr(statistics, name)
                    torch.testing.assert_close(document_rows(value, texts, document), truth.double(), **TOLERANCE[dtype])


@every_dtype
@every_padding
@every_family
def test_divergence_equals_that_of_whole_maps_in_both_directions(family: str, padding: str, dtype: torch.dtype) -> None:
    base, tuned = families.subject(family, dtype), families.subject(family, dtype, 1)
    texts = families.padded(TEXTS, padding)
    for layer, (one, two) in enumerate(zip(calls(base, texts), calls(tuned, texts), strict=True)):
        results = [compare(one, two, texts.real), compare(one, two, texts.real, method="exact")]
        for document in range(len(texts.ids)):
            p, q = (oracle.truth(model.plain, TEXTS[document]).maps[layer] for model in (base, tuned))
            for found in results:
                expected = (
                    (found.kl_base_tuned, oracle.divergence(p, q)),
                    (found.kl_tuned_base, oracle.divergence(q, p)),
                    (found.base.entropy, oracle.entropy(p)),
                    (found.tuned.entropy, oracle.entropy(q)),
                )
                for value, truth in expected:
                    torch.testing.assert_close(document_rows(value, texts, document), truth, **TOLERANCE[dtype])


@every_padding
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_the_whole_pattern_equals_the_eager_map(family: str, padding: str) -> None:
    subject, texts = families.subject(family), families.padded(TEXTS, padding)
    for layer, call in enumerate(calls(subject, texts)):
        whole = pattern(call)
        for document in range(len(texts.ids)):
            real = texts.real[document]
            torch.testing.assert_close(
                whole[document][:, real][:, :, real].double(),
                oracle.truth(subject.plain, TEXTS[document]).maps[layer],
                rtol=1e-4,
                atol=1e-6,
            )


@every_padding
def test_a_pattern_gives_nothing_to_padding_and_rows_sum_to_one(padding: str) -> None:
    subject, texts = families.subject("llama"), families.padded(TEXTS, padding)
    for call in calls(subject, texts):
        for document, whole in enumerate(pattern(call, dtype=torch.float64)):
            real = texts.real[document]
            assert not whole[:, real][:, :, ~real].any()
            torch.testing.assert_close(whole[:, real].sum(-1), torch.ones(4, int(real.sum()), dtype=torch.float64))


@every_padding
@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_relative_entropy_is_entropy_over_the_largest_a_row_can_have(family: str, padding: str) -> None:
    subject, texts = families.subject(family), families.padded(TEXTS, padding)
    for call in calls(subject, texts):
        found = describe(call, texts.real)
        for document, text in enumerate(TEXTS[: len(texts.ids)]):
            support = torch.arange(1, len(text) + 1).double()
            if family in families.WINDOWED:
                support = support.clamp(max=families.WINDOW)
            expected = document_rows(found.entropy, texts, document)[:, 1:] / support[1:].log()
            relative = document_rows(found.relative_entropy, texts, document)
            torch.testing.assert_close(relative[:, 1:], expected, rtol=1e-5, atol=1e-6)
            assert relative[:, 0].isnan().all(), "a row that sees one key has no relative entropy"


@every_padding
def test_gini_equals_the_mean_difference_between_all_pairs_of_keys(padding: str) -> None:
    subject, texts = families.subject("mistral", torch.float64), families.padded(TEXTS, padding)
    for layer, call in enumerate(calls(subject, texts)):
        found = describe(call, texts.real, gini=True).gini
        assert found is not None
        for document in range(len(texts.ids)):
            p = oracle.truth(subject.plain, TEXTS[document]).maps[layer]
            rows = document_rows(found, texts, document)
            for (head, query), shares in oracle.rows(p):
                shares = shares[-families.WINDOW :]  # a sliding window hides what lies further back
                spread = sum(abs(a - b) for a in shares for b in shares)
                assert rows[head, query] == pytest.approx(spread / (2 * len(shares) * sum(shares)), abs=1e-9)


def call_with_scores(scores: Tensor) -> AttentionCall:
    """Make a one-head call whose score matrix is given: the queries are its rows, the keys the unit vectors."""
    length = len(scores)
    query, key = scores[None, None], torch.eye(length, dtype=scores.dtype)[None, None]
    return AttentionCall(layer=0, query=query, key=key, value=key, z=key.transpose(1, 2), scaling=1.0)


@pytest.mark.parametrize("method", ["fused", "exact"])
@every_dtype
def test_a_uniform_head_has_the_entropy_log_n_and_looks_back_half_way(dtype: torch.dtype, method: Any) -> None:
    found = describe(call_with_scores(torch.zeros(8, 8, dtype=dtype)), method=method)
    n = torch.arange(1, 9, dtype=dtype)
    torch.testing.assert_close(found.entropy[0, 0], n.log(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.relative_entropy[0, 0, 1:], torch.ones(7, dtype=dtype))
    torch.testing.assert_close(found.distance[0, 0], (n - 1) / 2, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.sink[0, 0], 1 / n)


@pytest.mark.parametrize("method", ["fused", "exact"])
def test_a_previous_token_head_looks_one_back_without_entropy(method: Any) -> None:
    found = describe(call_with_scores(200.0 * torch.diag(torch.ones(7), -1)), method=method)
    torch.testing.assert_close(found.distance[0, 0], torch.tensor([0.0] + [1.0] * 7), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.entropy[0, 0], torch.zeros(8), rtol=0, atol=1e-4)


def test_gini_is_zero_for_a_uniform_row_and_one_minus_one_over_n_for_a_single_key() -> None:
    uniform = describe(call_with_scores(torch.zeros(8, 8, dtype=torch.float64)), gini=True).gini
    single = describe(call_with_scores(800 * torch.eye(8, dtype=torch.float64)), gini=True).gini
    n = torch.arange(1, 9, dtype=torch.float64)
    assert uniform is not None
    assert single is not None
    torch.testing.assert_close(uniform[0, 0], torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(single[0, 0], 1 - 1 / n, rtol=0, atol=1e-12)


def test_divergence_of_two_hand_made_rows_is_the_sum_worked_out_by_hand() -> None:
    scores = torch.zeros(2, 2, dtype=torch.float64)
    p = call_with_scores(scores)
    q = call_with_scores(scores + torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)]], dtype=torch.float64))
    found = compare(p, q)
    # second row: P = (1/2, 1/2), Q = (1/4, 3/4)
    assert found.kl_base_tuned[0, 0, 1].item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-12)
    assert found.kl_tuned_base[0, 0, 1].item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-12)


def divergences(found: PatternComparison) -> Tensor:
    return torch.stack([found.kl_base_tuned, found.kl_tuned_base])


@every_padding
@every_family
def test_a_model_compared_with_itself_diverges_by_nothing(family: str, padding: str) -> None:
    subject, texts = families.subject(family), families.padded(TEXTS, padding)
    for call in calls(subject, texts):
        found = divergences(compare(call, call, texts.real)).transpose(2, 3)[:, texts.real]
        assert found.abs().max() < 1e-6
        exact = divergences(compare(call, call, texts.real, method="exact")).transpose(2, 3)[:, texts.real]
        assert not exact.any()


@every_padding
def test_a_soft_cap_and_a_short_window_take_the_exact_path(padding: str) -> None:
    texts = families.padded(TEXTS, padding)
    for family in ("gemma2", "mistral"):
        for call in calls(families.subject(family), texts):
            assert torch.equal(
                describe(call, texts.real).entropy.nan_to_num(), describe(call, texts.real, method="exact").entropy.nan_to_num()
            )
            with pytest.raises(ValueError, match="soft cap, a window"):
                describe(call, texts.real, method="fused")


def test_a_mask_with_holes_takes_the_exact_path() -> None:
    subject, texts = families.subject("gpt2"), families.padded(TEXTS, "none")
    real = texts.real.clone()
    real[0, 4] = False
    call = calls(subject, replace(texts, real=real))[0]
    with pytest.raises(ValueError, match="holes in its mask"):
        describe(call, real, method="fused")
    p = pattern(call, dtype=torch.float64)[0]
    assert not p[:, 5:, 4].any()
    torch.testing.assert_close(
        document_rows(describe(call, real).entropy, replace(texts, real=real), 0), oracle.entropy(p[:, real[0]]), rtol=1e-5, atol=1e-6
    )


def test_a_window_as_long_as_the_text_takes_the_fused_path_and_is_right() -> None:
    subject = families.subject("mistral", torch.float64)
    texts = families.padded([TEXTS[0][: families.WINDOW]], "none")
    maps = oracle.truth(subject.plain, texts.ids[0]).maps
    for expected, call in zip(maps, calls(subject, texts), strict=True):
        torch.testing.assert_close(describe(call, texts.real, method="fused").entropy[0], oracle.entropy(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@every_padding
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_half_precision_models_are_measured_in_single_precision(family: str, padding: str, dtype: torch.dtype) -> None:
    one, two = (calls(families.subject(family, dtype, seed), families.padded(TEXTS, padding)) for seed in (0, 1))
    real = families.padded(TEXTS, padding).real
    for base, tuned in zip(one, two, strict=True):
        widened = [replace(call, query=call.query.double(), key=call.key.double()) for call in (base, tuned)]
        found, expected = compare(base, tuned, real), compare(widened[0], widened[1], real, method="exact")
        for value, truth in (
            (found.base.entropy, expected.base.entropy),
            (found.base.distance, expected.base.distance),
            (found.kl_base_tuned, expected.kl_base_tuned),
        ):
            assert value.dtype == torch.float32
            rows = real[:, None].expand_as(value)
            torch.testing.assert_close(value[rows].double(), truth[rows], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("family", "padding"), [("mistral", "left"), ("gpt2", "none"), ("gpt2", "right")])
def test_blocks_of_queries_join_to_the_same_statistics(monkeypatch: pytest.MonkeyPatch, family: str, padding: str) -> None:
    texts = families.padded(TEXTS, padding)
    seen = calls(families.subject(family), texts)
    whole = [describe(call, texts.real, gini=True, method="exact") for call in seen]
    monkeypatch.setattr("mechscope.instrument.kernels._BLOCK", 2 * len(texts.ids) * 4 * 14)  # two query rows at a time
    for one, call in zip(whole, seen, strict=True):
        parts = describe(call, texts.real, gini=True, method="exact")
        for name in ("entropy", "distance", "sink", "gini", "relative_entropy"):
            torch.testing.assert_close(getattr(parts, name), getattr(one, name), equal_nan=True, rtol=1e-5, atol=1e-6)


def test_heads_taken_one_at_a_time_give_the_same_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = families.padded(TEXTS, "left")
    one, two = (calls(families.subject("llama", seed=seed), texts) for seed in (0, 1))
    whole = [compare(base, tuned, texts.real) for base, tuned in zip(one, two, strict=True)]
    monkeypatch.setattr("mechscope.instrument.kernels._OPERAND", 1)
    for expected, base, tuned in zip(whole, one, two, strict=True):
        found = compare(base, tuned, texts.real)
        torch.testing.assert_close(found.kl_base_tuned, expected.kl_base_tuned, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.tuned.distance, expected.tuned.distance, rtol=1e-5, atol=1e-6)
