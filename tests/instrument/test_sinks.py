"""Heads with a learned sink (gpt-oss): every number beside the family's own maps, in which a row sums to one less what the sink takes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mechscope.data.pairs import collate_pairs, from_tokens
from mechscope.heads.attention import mass_at, masses_at, run_probes, strongest
from mechscope.heads.segments import uniform
from mechscope.heads.shown import attention_edges
from mechscope.instrument import AttentionCall, Edit, Knockout, compare, describe, intervene, load, model_inputs, observed, pattern
from mechscope.lens.token_attribution import _pattern_rows
from mechscope.subject.load import Subject
from tests import families
from tests.matrix.plain import build


@pytest.fixture(scope="module")
def model() -> Any:
    return build("gpt_oss", 0, torch.float64)


@pytest.fixture(scope="module")
def subject(model: Any) -> Subject:
    return load(copy.deepcopy(model))


@torch.no_grad()
def maps(model: Any, ids: Tensor) -> list[Tensor]:
    return [one[0] for one in model(input_ids=ids[None], output_attentions=True).attentions]


def calls_of(subject: Subject, ids: Tensor, real: Tensor | None = None) -> list[AttentionCall]:
    calls: list[AttentionCall] = []
    with torch.no_grad(), observed(subject, calls.append):
        subject.model(**model_inputs(ids, real), use_cache=False)
    return calls


def xlogx(p: Tensor) -> Tensor:
    return torch.xlogy(p, p)


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_entropy_is_given_over_the_keys_and_with_the_sink_and_masses_sum_to_one_with_it(model: Any, subject: Subject, side: str) -> None:
    texts = families.documents(lengths=(12, 7))
    batch = families.padded(texts, side)
    for layer, call in enumerate(calls_of(subject, batch.ids, batch.real)):
        everything = {"all": batch.real}
        found = describe(call, batch.real, segments=everything, gini=True)
        for row in range(len(batch.ids)):
            p = maps(model, texts[row])[layer]
            s = 1 - p.sum(-1)
            assert s.max() > 0.1, "the sink takes a part"

            def own(values: Tensor | None, row: int = row) -> Tensor:
                assert values is not None
                return values[row].T[batch.real[row]].T

            torch.testing.assert_close(own(found.learned_sink), s)
            torch.testing.assert_close(own(found.segments["all"]), 1 - s)
            torch.testing.assert_close(own(found.entropy), -xlogx(p / p.sum(-1, keepdim=True)).sum(-1))
            torch.testing.assert_close(own(found.entropy_with_sink), -xlogx(p).sum(-1) - xlogx(s))
            torch.testing.assert_close(own(found.sink), p[..., 0])
            places = torch.arange(p.shape[-1], dtype=p.dtype)
            torch.testing.assert_close(own(found.distance), places - (p * places).sum(-1) / p.sum(-1))
            relative = own(found.relative_entropy)
            assert ((relative >= -1e-9) & (relative <= 1 + 1e-9) | relative.isnan()).all()


def test_the_divergence_counts_the_sink_as_one_more_key(model: Any, subject: Subject) -> None:
    other = build("gpt_oss", 1, torch.float64)
    ids = families.documents()[0]
    for one, two, p, q in zip(
        calls_of(subject, ids[None]), calls_of(load(copy.deepcopy(other)), ids[None]), maps(model, ids), maps(other, ids), strict=True
    ):
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
        expected = torch.where(p > 0, p * (p.clamp(min=1e-300) / q.clamp(min=1e-300)).log(), 0.0).sum(-1)
        torch.testing.assert_close(compare(one, two).kl_base_tuned[0], expected)
        assert compare(one, one).kl_base_tuned.abs().max() < 1e-9


def test_masses_on_keys_and_shown_edges_are_those_of_the_maps(model: Any, subject: Subject) -> None:
    ids = families.documents()[0]
    length = len(ids)
    columns = torch.arange(length).expand(1, length, length)
    real = torch.ones(1, length, dtype=torch.bool)
    for layer, (call, p) in enumerate(zip(calls_of(subject, ids[None]), maps(model, ids), strict=True)):
        torch.testing.assert_close(masses_at(call, columns, real)[0], p)
        torch.testing.assert_close(mass_at(call, columns, real)[0], p.sum(-1))
        torch.testing.assert_close(pattern(call)[0], p)
        assert torch.equal(strongest(call, real)[0], p.argmax(-1))
        rows = torch.tensor([3, 9])
        torch.testing.assert_close(_pattern_rows(call, 0, rows, [1, 3], torch.float64), p[[1, 3]][:, rows].transpose(0, 1))
        assert uniform(call).sinks is None
        shown = attention_edges(subject, ids.tolist(), [(layer, 2)])
        where = (torch.full((len(shown),), 2), torch.tensor(shown["query"].to_numpy()), torch.tensor(shown["key"].to_numpy()))
        torch.testing.assert_close(torch.tensor(shown["weight"].to_numpy(), dtype=p.dtype), p[where], rtol=1e-6, atol=1e-9)


@torch.no_grad()
def test_knockouts_and_edits_leave_the_sink_its_share(model: Any, subject: Subject) -> None:
    ids = families.documents()[0][None]
    queries, keys = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    queries[:, 8:], keys[:, 5:8] = True, True
    before = calls_of(subject, ids)[1]
    calls: list[AttentionCall] = []
    with intervene(subject, Knockout(1, queries, keys)), observed(subject, calls.append):
        subject.model(ids)
    p, cut = pattern(before)[0], pattern(calls[1])[0]
    s = 1 - p.sum(-1, keepdim=True)
    hidden = queries[0][:, None] & keys[0][None]
    kept = p.masked_fill(hidden, 0.0)
    torch.testing.assert_close(cut, kept / (kept.sum(-1, keepdim=True) + s))
    plain = subject.model(ids).logits
    with intervene(subject, Edit("key", 1, lambda key: key, heads=(2,))):
        torch.testing.assert_close(subject.model(ids).logits, plain)


def test_texts_of_probes_run_like_any_other(subject: Subject) -> None:
    texts = from_tokens(torch.stack([families.documents(lengths=(9,), seed=seed)[0] for seed in range(3)]))
    found = run_probes(subject, texts, lambda call, batch: pattern(call).sum(-1)[..., -1])
    batch = collate_pairs(texts.pairs)
    expected = torch.stack([pattern(call).sum(-1)[..., -1] for call in calls_of(subject, batch.clean)], dim=1)
    torch.testing.assert_close(torch.from_numpy(found), expected)
