"""Attention to named keys, and the strongest key, against whole maps of plain Hugging Face models, whatever hides keys and wherever padding is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mechscope.data.pairs import PairBatch, Pairs, PromptPair
from mechscope.errors import SettingsError
from mechscope.heads.attention import mass_at, masses_at, run_probes, strongest
from mechscope.instrument import AttentionCall, model_inputs, observed
from mechscope.instrument.execution import Execution
from mechscope.subject.load import Subject, load
from tests import families
from tests.families import Texts
from tests.instrument.attention_oracle import truth

# a plain, two rotary, one with norms of queries and keys, one with soft caps and windows
CHOSEN = ("gpt2", "llama", "gpt_neox", "qwen3", "gemma2")
DOCUMENTS = families.documents()


def calls(subject: Subject, texts: Texts, *, mask: bool = False) -> list[AttentionCall]:
    """Return every layer's attention call; with a mask also where padding on the right would need none."""
    kept: list[AttentionCall] = []
    inputs = model_inputs(texts.ids, texts.real)
    if mask:
        inputs["attention_mask"] = texts.real.long()
    with torch.no_grad(), observed(subject, lambda call: kept.append(call)):
        subject.plain(**inputs, use_cache=False)
    return kept


def some_keys(length: int, document: int) -> Tensor:
    """Return three keys for every row of a text, (token, 3): some behind the row, some none, at least two different."""
    generator = torch.Generator().manual_seed(document)
    keys = torch.randint(0, length, (length, 3), generator=generator)
    keys[:, 1] = (keys[:, 0] + 1) % length
    keys[:, 2] = torch.where(keys[:, 2] % 3 == 0, -1, (keys[:, 0] + 2) % length)
    return keys


def placed(texts: Texts) -> Tensor:
    """Put every document's keys where its tokens are; rows of padding ask for keys too."""
    keys = torch.zeros(*texts.ids.shape, 3, dtype=torch.int64)
    for row, document in enumerate(DOCUMENTS[: len(texts.ids)]):
        start = int(texts.real[row].int().argmax())
        own = some_keys(len(document), row)
        keys[row, texts.real[row]] = torch.where(own < 0, -1, own + start)
    return keys


def expected(subject: Subject, layer: int, document: int) -> Tensor:
    """Look the keys up in the whole map, one by one: (head, token, 3)."""
    p = truth(subject.model, DOCUMENTS[document]).maps[layer]
    found = torch.zeros(*p.shape[:2], 3, dtype=torch.float64)
    for row, keys in enumerate(some_keys(p.shape[1], document).tolist()):
        for place, key in enumerate(keys):
            if key >= 0:
                found[:, row, place] = p[:, row, key]
    return found


@pytest.mark.parametrize("family", CHOSEN)
@pytest.mark.parametrize("side", ["none", "right", "left", "right with a mask"])
def test_mass_is_what_the_whole_map_holds_at_the_keys(family: str, side: str) -> None:
    subject = families.subject(family, torch.float64)
    texts = families.padded(DOCUMENTS, side.split()[0])
    keys, hidden = placed(texts), 0
    for call in calls(subject, texts, mask="mask" in side):
        each, together = masses_at(call, keys, texts.real), mass_at(call, keys, texts.real)
        assert torch.equal(together, each.sum(-1))
        for row in range(len(texts.ids)):
            whole = expected(subject, call.layer, row)
            hidden += int((whole == 0).sum())
            real = texts.real[row]
            # families with RMS norms compute them in float32
            assert torch.allclose(each[row][:, real], whole, rtol=0, atol=1e-9 if family in ("gpt2", "gpt_neox") else 1e-5)
            assert (each[row][:, ~real] == 0).all()
    assert hidden, "no row asks for a key that it cannot see"


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
@pytest.mark.parametrize("side", ["none", "left"])
def test_blocks_of_few_rows_give_the_same(family: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of the exact path holds no keys behind its last row; keys asked for there are in the future."""
    subject, texts = families.subject(family, torch.float64), families.padded(DOCUMENTS, side)
    keys = placed(texts)
    whole = [(masses_at(call, keys, texts.real), strongest(call, texts.real)) for call in calls(subject, texts)]
    monkeypatch.setattr("mechscope.instrument.kernels._BLOCK", 3 * len(texts.ids) * families.HEADS * texts.ids.shape[1])
    for call, (masses, top) in zip(calls(subject, texts), whole, strict=True):
        assert torch.allclose(masses_at(call, keys, texts.real), masses, rtol=0, atol=1e-9)
        assert torch.equal(strongest(call, texts.real), top)


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_a_key_behind_the_window_gets_nothing(family: str) -> None:
    subject = families.subject(family)
    text = families.padded(DOCUMENTS[:1], "none")
    first = torch.zeros(1, len(DOCUMENTS[0]), 1, dtype=torch.int64)
    windowed = [call for call in calls(subject, text) if call.window is not None]
    assert windowed
    for call in windowed:
        mass = mass_at(call, first, text.real)[0]
        assert (mass[:, : families.WINDOW] > 0).all()
        assert (mass[:, families.WINDOW :] == 0).all()


def test_rows_sum_to_one_over_all_keys_in_half_precision_too() -> None:
    subject = load(families.build("llama", torch.bfloat16))
    text = families.padded(DOCUMENTS[:1], "none")
    every = torch.arange(text.ids.shape[1]).expand(1, text.ids.shape[1], -1)
    for call in calls(subject, text):
        assert torch.allclose(mass_at(call, every, text.real), torch.ones(()), atol=1e-5)


def test_large_common_keys_do_not_round_the_mass_away() -> None:
    """A bias of all keys moves scores by hundreds of thousands, and the pattern not at all."""
    text = families.padded(DOCUMENTS[:1], "none")
    call = calls(families.subject("gpt2"), text)[1]
    keys = placed(text)
    shifted = replace(call, key=call.key + 1e5)
    exact = mass_at(replace(call, query=call.query.double(), key=shifted.key.double()), keys, text.real)
    assert torch.allclose(mass_at(shifted, keys, text.real).double(), exact, atol=1e-3)


@pytest.mark.parametrize("family", CHOSEN)
@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_the_strongest_key_is_the_largest_of_the_map(family: str, side: str) -> None:
    subject, texts = families.subject(family, torch.float64), families.padded(DOCUMENTS, side)
    for call in calls(subject, texts):
        last = replace(call, query=call.query[:, :, 4:], mask=None if call.mask is None else call.mask[:, :, 4:])
        top, of_last = strongest(call, texts.real), strongest(last, texts.real)
        assert torch.equal(of_last, top[:, :, 4:])
        for row in range(len(texts.ids)):
            start = int(texts.real[row].int().argmax())
            largest = truth(subject.model, DOCUMENTS[row]).maps[call.layer].argmax(-1)
            assert torch.equal(top[row][:, texts.real[row]] - start, largest)
            assert (top[row][:, ~texts.real[row]] == -1).all()


def texts() -> Pairs:
    return Pairs(tuple(PromptPair(f"text {at}", tuple(ids.tolist()), tuple(ids.tolist())) for at, ids in enumerate(DOCUMENTS)), "random")


def mean_to_the_first(call: AttentionCall, batch: PairBatch) -> Tensor:
    mass = mass_at(call, torch.zeros(*batch.real.shape, 1, dtype=torch.int64), batch.real)
    return torch.stack([mass.sum(-1) / batch.real.sum(1)[:, None], mass.amax(-1)], -1)


@pytest.mark.parametrize("family", CHOSEN)
@pytest.mark.parametrize("tokens_per_batch", [1, 4096])
def test_probes_come_back_in_order_whatever_the_batches(family: str, tokens_per_batch: int) -> None:
    subject, seen = families.subject(family, torch.float64), []
    found = run_probes(
        subject, texts(), mean_to_the_first, execution=Execution(tokens_per_batch=tokens_per_batch, progress=lambda *at: seen.append(at))
    )
    assert found.shape == (3, families.LAYERS, families.HEADS, 2)
    for row, ids in enumerate(DOCUMENTS):
        for layer, p in enumerate(truth(subject.model, ids).maps):
            np.testing.assert_allclose(found[row, layer, :, 0], p[:, :, 0].mean(-1), rtol=0, atol=1e-5)
    assert seen == ([("attention", done, 3) for done in (1, 2, 3)] if tokens_per_batch == 1 else [("attention", 3, 3)])


def test_no_texts_are_refused() -> None:
    with pytest.raises(SettingsError, match="no pairs"):
        run_probes(families.subject("gpt2"), Pairs((), "nothing"), mean_to_the_first)
