"""Batches fit into memory: their size is chosen from what is free, and one that does not fit is halved once, with nothing lost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pandas.testing import assert_frame_equal

from mechscope.data.prompt import Batch, Padding, collate
from mechscope.difference import one_pass
from mechscope.difference.lockstep import Pending, launch
from mechscope.errors import RunError
from mechscope.instrument.execution import Execution
from mechscope.instrument.memory import FEWEST, MOST_ON_CPU, Halving, each, free_memory, tokens_that_fit
from mechscope.subject import Pair
from tests import families
from tests.causal.pairs import random_pairs
from tests.difference import oracle


def work(most: int, error: Callable[[], Exception] | None = None) -> Callable[[Batch], list[str]]:
    """Return work for which more texts than `most` are too many."""

    def names(batch: Batch) -> list[str]:
        if len(batch) > most:
            raise error() if error is not None else RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")
        return [example.id for example in batch.examples]

    return names


def batch(*lengths: int) -> Batch:
    return collate(oracle.examples(lengths=lengths), pad_id=0)


ERRORS: dict[str, Callable[[], Exception]] = {
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."),
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB."),
    "python": MemoryError,
}


@pytest.mark.parametrize("kind", ERRORS)
def test_a_batch_that_does_not_fit_is_run_as_two_halves_and_so_are_those_after_it(kind: str, caplog: pytest.LogCaptureFixture):
    halving, five, two = Halving(), batch(23, 12, 17, 9, 20), batch(9, 8)
    with caplog.at_level(logging.WARNING, "mechscope"):
        assert list(halving.run(work(5), five)) == [[f"doc{index}" for index in range(5)]]
        assert not halving.halved
        assert list(halving.run(work(3, ERRORS[kind]), five)) == [["doc0", "doc1", "doc2"], ["doc3", "doc4"]]
        assert list(halving.run(work(3), two)) == [["doc0"], ["doc1"]]
    assert [record.message for record in caplog.records] == ["out of memory with a batch of 5 texts: going on with half of it"]


def test_each_batch_is_worked_on_in_turn_and_halved_from_the_first_that_does_not_fit():
    given = [batch(9, 8), batch(23, 12, 17), batch(9, 8)]
    assert list(each(work(2), given)) == [["doc0", "doc1"], ["doc0", "doc1"], ["doc2"], ["doc0"], ["doc1"]]
    assert len(list(each(work(3), given))) == 3, "every call begins with whole batches"


def test_it_is_halved_once_and_not_again():
    with pytest.raises(RunError, match=r"out of memory even with 3 texts at a time: lower tokens_per_batch or max_tokens"):
        list(Halving().run(work(2), batch(23, 12, 17, 9, 20)))


def test_a_single_text_cannot_be_halved():
    with pytest.raises(RunError, match="out of memory even with 1 text at a time"):
        list(Halving().run(work(0), batch(9)))


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(Halving().run(work(0, lambda: RuntimeError("shapes do not match")), batch(9, 8)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_halves_hold_every_text_once_and_are_padded_no_further_than_they_need(side: Padding):
    whole = collate(oracle.examples(lengths=(23, 12, 9)), pad_id=7, padding=side)
    first, second = whole.halves()
    assert [example.id for part in (first, second) for example in part.examples] == ["doc0", "doc1", "doc2"]
    assert (first.input_ids.shape, second.input_ids.shape) == ((2, 23), (1, 9))
    assert (first.padding, second.padding) == (side, side)
    assert first.input_ids[~first.attention_mask].tolist() == [7] * 11, "what stands at padding is what the batch had there"
    pairs = next(random_pairs(3).batches(tokens_per_batch=1000))
    assert [pair.id for part in pairs.halves() for pair in part.pairs] == [pair.id for pair in pairs.pairs]


def test_a_difference_that_runs_out_of_memory_ends_with_the_same_tables(monkeypatch: pytest.MonkeyPatch):
    both, documents = oracle.models("gpt2", torch.float64), oracle.encoded(lengths=(23, 12, 17, 9, 20, 16))
    options: dict[str, Any] = {"execution": Execution(tokens_per_batch=80), "replicates": 20}
    expected = one_pass.difference(both, documents, **options)
    calls: list[int] = []

    def narrow(pairs: Sequence[Pair], batch: Batch, **rest: Any) -> list[Pending]:
        calls.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        return launch(pairs, batch, **rest)

    monkeypatch.setattr(one_pass, "launch", narrow)
    found = one_pass.difference(both, documents, **options)
    assert calls == [3, 2, 1, 2, 1], "one batch of three failed, everything after it ran as halves"
    for name in ("heads", "layers", "outputs"):
        assert_frame_equal(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-12)


def test_the_number_of_tokens_grows_with_free_memory_in_powers_of_two():
    subject = families.subject("gpt2")
    chosen = [tokens_that_fit(subject, free=2**29 + 2**exponent) for exponent in range(20, 40)]
    assert chosen == sorted(chosen)
    assert {value & (value - 1) for value in chosen} == {0}
    assert (chosen[0], chosen[-1]) == (FEWEST, MOST_ON_CPU)
    assert tokens_that_fit(subject, free=0) == FEWEST


def test_a_wider_model_gets_fewer_tokens():
    free = 2**29 + 2**24
    assert tokens_that_fit(families.subject("qwen3"), free=free) < tokens_that_fit(families.subject("gpt2"), free=free)


def test_ranks_on_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 8_000_000})())
    assert free_memory(torch.device("cpu")) == 8_000_000
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_memory(torch.device("cpu")) == 4_000_000


def test_more_models_in_lock_step_get_fewer_tokens():
    subject, free = families.subject("gpt2"), 2**29 + 2**24
    assert tokens_that_fit(subject, models=4, free=free) == tokens_that_fit(subject, free=free) // 2
