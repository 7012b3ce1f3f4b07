"""Batches of a sweep: each text once and in its place, halved where they do not fit, and told of as they are done."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mechscope import ranks
from mechscope.causal import patch
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import PerText
from mechscope.errors import RunError, SettingsError
from mechscope.instrument import Execution, edits
from tests import families
from tests.causal.pairs import random_pairs

Told = list[tuple[str, int, int]]

# batches of three, three and one text
SEVEN, THIRTY = random_pairs(7, lengths=(9, 10)), 30


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")


class Work:
    """Says of each text what its first token is and what twice its length is, unless there are more than `most` texts."""

    def __init__(self, most: int, error: Callable[[], Exception] = out_of_memory) -> None:
        self.most, self.error = most, error
        self.sizes: list[int] = []

    def __call__(self, batch: PairBatch) -> dict[str, np.ndarray]:
        self.sizes.append(len(batch))
        if len(batch) > self.most:
            raise self.error()
        return {
            "first": batch.clean[:, 0].double().numpy(),
            "lengths": np.stack([batch.real.sum(1).numpy(), 2 * batch.real.sum(1).numpy()]),
        }


def assert_right(gathered: PerText, pairs: Pairs) -> None:
    np.testing.assert_array_equal(gathered["first"], [pair.clean[0] for pair in pairs])
    np.testing.assert_array_equal(gathered["lengths"], np.array([[1], [2]]) * [len(pair.clean) for pair in pairs])


def test_values_stand_in_the_order_of_the_pairs_whatever_the_batches():
    for tokens in (1, THIRTY, 10_000):
        gathered, work = PerText(SEVEN), Work(7)
        gathered.run(work, Execution(), tokens=tokens)
        assert sum(work.sizes) == len(SEVEN)
        assert_right(gathered, SEVEN)
    with pytest.raises(SettingsError, match="no pairs"):
        PerText(Pairs((), "nothing")).run(Work(7), Execution(), tokens=THIRTY)


def test_from_the_first_batch_that_does_not_fit_on_all_are_halved(caplog: pytest.LogCaptureFixture):
    gathered, work = PerText(SEVEN), Work(2)
    with caplog.at_level(logging.WARNING, "mechscope"):
        gathered.run(work, Execution(), tokens=THIRTY)
    assert work.sizes == [3, 2, 1, 2, 1, 1], "one batch of three failed, what it held and all after it was run as halves"
    assert_right(gathered, SEVEN)
    assert [record.message for record in caplog.records] == ["out of memory with a batch of 3 texts: going on with half of it"]


def test_what_an_attempt_found_before_it_failed_is_forgotten():
    gathered, fits = PerText(SEVEN), Work(7)

    def work(batch: PairBatch) -> dict[str, np.ndarray]:
        found = fits(batch)
        if len(batch) > 2:
            raise out_of_memory()
        return found

    gathered.run(work, Execution(), tokens=THIRTY)
    assert_right(gathered, SEVEN)


def test_what_does_not_fit_by_halves_ends_with_advice():
    with pytest.raises(RunError, match="out of memory even with 2 texts at a time"):
        PerText(SEVEN).run(Work(1), Execution(), tokens=THIRTY)


def test_other_errors_are_raised_as_they_are():
    work = Work(2, lambda: RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        PerText(SEVEN).run(work, Execution(), tokens=THIRTY)
    assert work.sizes == [3], "it was not tried again"


def told_of(work: Callable[[PairBatch], dict[str, np.ndarray]], gathered: PerText, **options: Any) -> Told:
    told: Told = []
    gathered.run(work, Execution(progress=lambda *at: told.append(at)), tokens=THIRTY, label="counting", **options)
    return told


def test_progress_is_told_batch_by_batch():
    assert told_of(Work(7), PerText(SEVEN)) == [("counting", done, 7) for done in (3, 6, 7)]
    assert told_of(Work(7), PerText(SEVEN), units=4) == [("counting", done, 28) for done in (12, 24, 28)]
    assert told_of(Work(2), PerText(SEVEN)) == [("counting", done, 7) for done in (2, 3, 5, 6, 7)]


@pytest.mark.parametrize(("most", "expected"), [(7, (3, 9, 12, 18, 19, 21)), (2, (3, 6, 7, 9, 11, 15, 16, 18, 19, 21))])
def test_work_may_tell_of_its_steps_and_what_failed_counts_once(most: int, expected: tuple[int, ...]):
    gathered = PerText(SEVEN)

    def work(batch: PairBatch) -> dict[str, np.ndarray]:
        gathered.step(1)
        if len(batch) > most:
            raise out_of_memory()
        gathered.step(2)
        return {}

    assert told_of(work, gathered, units=3) == [("counting", done, 21) for done in expected]


def test_among_ranks_the_others_count_as_far_as_this_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks, "size", lambda: 2)
    for rank, expected in ((0, (6, 7)), (1, (6, 7))):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        work = Work(7)
        assert told_of(work, PerText(SEVEN)) == [("counting", done, 7) for done in expected]
        assert sum(work.sizes) == (4, 3)[rank]


def test_what_was_found_in_halves_reaches_the_other_ranks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks, "size", lambda: 2)
    brought: list[Any] = []

    def of_rank(rank: int) -> PerText:
        monkeypatch.setattr(ranks, "rank", lambda: rank)
        gathered = PerText(SEVEN)
        gathered.run(Work(2), Execution(), tokens=THIRTY)
        return gathered

    def note(own: Any) -> list[Any]:
        brought.append(own)
        return [own]

    monkeypatch.setattr(ranks, "exchange", note)
    for rank in (0, 1):
        alone = of_rank(rank)["lengths"]
        assert np.isnan(alone[0]).sum() == (3, 4)[rank]
    monkeypatch.setattr(ranks, "exchange", lambda own: brought)
    np.testing.assert_array_equal(of_rank(0)["lengths"], np.array([[1], [2]]) * [len(pair.clean) for pair in SEVEN])


CPU_ALLOCATOR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
)


@pytest.mark.parametrize("error", [out_of_memory(), CPU_ALLOCATOR], ids=["GPU", "CPU"])
def test_memory_that_runs_out_within_an_edit_halves_the_batch(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    class Allocating:
        """PyTorch, whose `where` runs out of memory the tenth time."""

        calls = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def where(self, *args: Any) -> torch.Tensor:
            self.calls += 1
            if self.calls == 10:
                raise error
            return torch.where(*args)

    subject, pairs = families.subject("gpt2", torch.float64), random_pairs(6, lengths=(9, 10))
    two_texts = Execution(tokens_per_batch=20)
    expected = patch(subject, pairs, positions="each", execution=two_texts)
    monkeypatch.setattr(edits, "torch", Allocating())
    caplog.clear()  # of what transformers warns of once
    with caplog.at_level(logging.WARNING, "mechscope"):
        result = patch(subject, pairs, positions="each", execution=two_texts)
    assert [record.message for record in caplog.records] == ["out of memory with a batch of 2 texts: going on with half of it"]
    for name in ("values", "unchanged", "clean", "corrupt"):
        np.testing.assert_allclose(getattr(result, name), getattr(expected, name), rtol=1e-9, atol=1e-9, err_msg=name)
