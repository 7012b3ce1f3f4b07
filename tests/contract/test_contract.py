"""Each claim that holds for every technique, once for all: see `entries` for the techniques, `exceptions` for what does not hold, and why."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from mechscope.errors import ModelError, RunError
from mechscope.instrument import Execution, memory
from mechscope.subject import Subject
from tests.contract.exceptions import EVALUATED, NOT_HALVED, NOT_RUN, OF_BATCHES, OF_FAMILY, WITHOUT_BATCHES
from tests.contract.technique import TOKENS, Case, Result, case, techniques
from tests.devices import assert_same
from tests.pretend import pretended
from tests.ranks import jobs
from tests.ranks.launch import Team

TOLERANCE = 1e-9
ONE_BATCH = 10_000
Told = list[tuple[str, int, int]]

every = pytest.mark.parametrize("name", techniques())
on_texts = pytest.mark.parametrize("name", [name for name in techniques() if name not in WITHOUT_BATCHES])
halved = pytest.mark.parametrize("name", [name for name in techniques() if name not in WITHOUT_BATCHES.keys() | NOT_HALVED.keys()])


def families(default: tuple[str, ...], slow: tuple[str, ...]) -> pytest.MarkDecorator:
    """Parametrize a test with families, some of them in slow runs only."""
    return pytest.mark.parametrize("family", [*default, *(pytest.param(family, marks=pytest.mark.slow) for family in slow)])


@dataclass(frozen=True)
class Outcome:
    """What a run gave, what progress was told, and how many calls of MLPs were made while several texts were at work."""

    result: Result
    told: Told
    calls: int


def of(name: str, family: str = "gpt2") -> str:
    """Return the family that a technique is run on where this one is asked for; those with one of their own are run once."""
    if name in OF_FAMILY and family != "gpt2":
        pytest.skip("has a family of its own")
    return OF_FAMILY.get(name, family)


# a technique's claims stand together, so that only its own results need be kept
@lru_cache(maxsize=16)
def outcome(name: str, family: str, tokens: int = TOKENS) -> Outcome:
    """Run a technique undisturbed."""
    if (family, name) in NOT_RUN:
        pytest.skip(NOT_RUN[family, name])
    here, told = case(of(name, family)), []
    with memory_that(here, lambda call, texts: False) as calls:
        result = techniques()[name](here, Execution(tokens_per_batch=tokens, progress=lambda *at: told.append(at)))
    assert result, "an entry gives numbers"
    assert any(np.isfinite(values).any() for values in result.values() if values.dtype.kind == "f") or all(
        values.dtype.kind != "f" for values in result.values()
    ), "nothing but NaN"
    return Outcome(result, told, calls[0])


@contextlib.contextmanager
def memory_that(here: Case, runs_out: Callable[[int, int], bool]) -> Iterator[list[int]]:
    """Let memory run out at some calls of MLPs.

    Args:
        here: What is run.
        runs_out: Given how many calls were made while several texts were at work, and how many texts are.

    Yields:
        The number of those calls.
    """
    calls, at_work = [0], [0]

    def attempt(work: Any, batch: Any) -> Any:
        before, at_work[0] = at_work[0], len(batch)
        try:
            return plain(work, batch)
        finally:
            at_work[0] = before

    def hook(*_: Any) -> None:
        calls[0] += at_work[0] > 1
        if at_work[0] and runs_out(calls[0], at_work[0]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    plain = memory._attempt
    handles = [block.mlp_write.register_forward_hook(hook) for model in models(here) for block in model.anatomy.blocks]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(memory, "_attempt", attempt)
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()


def models(here: Case) -> tuple[Subject, Subject]:
    """Return both models."""
    return here.pair.base, here.pair.tuned


def states(here: Case) -> list[dict[str, Any]]:
    """Return everything of both models that a technique may not change: weights, gradients, modes and hooks."""
    return [
        {
            "weights": {name: value.clone() for name, value in model.model.state_dict().items()},
            "gradients": [(parameter.requires_grad, parameter.grad is None) for parameter in model.model.parameters()],
            "modes": [module.training for module in model.model.modules()],
            "hooks": [
                sum(map(len, (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)))
                for part in model.model.modules()
            ],
            "attention": model.model.config._attn_implementation,
        }
        for model in models(here)
    ]


def assert_unchanged(before: list[dict[str, Any]], here: Case, *, but: str = "") -> None:
    """See that models are as they were, to the last bit."""
    for was, now in zip(before, states(here), strict=True):
        for name, value in was.pop("weights").items():
            torch.testing.assert_close(now["weights"][name], value, rtol=0, atol=0)
        assert {key: value for key, value in now.items() if key not in ("weights", but)} == {
            key: value for key, value in was.items() if key != but
        }


@on_texts
@families(("gpt2", "llama"), ("gpt_neox", "qwen3", "gemma2", "opt"))
def test_texts_padded_in_batches_give_what_each_gives_alone(name: str, family: str) -> None:
    batched = outcome(name, family)
    if name not in OF_BATCHES:
        alone = techniques()[name](case(of(name, family)), Execution(tokens_per_batch=1))
        assert_same(alone, batched.result, tolerance=TOLERANCE)


def parts(told: Told) -> list[Told]:
    """Divide what was told into what belongs to one loop over texts each."""
    loops: list[Told] = []
    for at in told:
        if not loops or at[0::2] != loops[-1][-1][0::2] or loops[-1][-1][1] == at[2]:
            loops.append([])
        loops[-1].append(at)
    return loops


@halved
@pytest.mark.parametrize("when", [0, pytest.param(2, marks=pytest.mark.slow), 7])
def test_a_batch_that_does_not_fit_into_memory_is_halved_and_the_result_is_the_same(
    name: str, when: int, caplog: pytest.LogCaptureFixture
) -> None:
    here, undisturbed, told = case(of(name)), outcome(name, "gpt2"), []
    assert undisturbed.calls, "no loop over texts is seen: is it one of WITHOUT_BATCHES or NOT_HALVED?"
    fails_at = 1 + (undisturbed.calls - 1) * when // 8
    before = states(here)
    caplog.clear()  # of what transformers warns of once
    with caplog.at_level(logging.WARNING, "mechscope"), memory_that(here, lambda call, texts: call == fails_at and texts > 1):
        result = techniques()[name](here, Execution(tokens_per_batch=TOKENS, progress=lambda *at: told.append(at)))
    assert [record.message for record in caplog.records] == ["out of memory with a batch of 2 texts: going on with half of it"]
    assert_same(result, undisturbed.result, tolerance=TOLERANCE)
    assert_unchanged(before, here)
    loops, quiet = parts(told), parts(undisturbed.told)
    assert [loop[-1] for loop in loops] == [loop[-1] for loop in quiet], "each loop ends as it does undisturbed"
    assert all(loop == sorted(set(loop)) for loop in loops), "nothing counts twice"


@halved
def test_where_one_text_does_not_fit_into_memory_the_error_tells_the_remedy(name: str) -> None:
    here = case(of(name))
    before = states(here)
    with memory_that(here, lambda call, texts: True), pytest.raises(RunError, match="out of memory even with 1 text at a time: lower"):
        techniques()[name](here, Execution(tokens_per_batch=TOKENS))
    assert_unchanged(before, here)


@every
@families(("gpt2", "llama"), ("gpt_neox", "gemma2", "qwen3"))
def test_models_over_two_devices_give_what_they_give_on_one(name: str, family: str) -> None:
    expected = outcome(name, family, ONE_BATCH if name in OF_BATCHES else TOKENS).result
    with pretended():
        result = techniques()[name](case(of(name, family), spread=True), Execution(tokens_per_batch=ONE_BATCH))
    assert_same(result, expected, tolerance=TOLERANCE)


@pytest.fixture(scope="session")
def teams() -> Iterator[Callable[[int], Team]]:
    """Start ranks that run one technique after the other."""
    started: dict[int, Team] = {}

    def team(size: int) -> Team:
        if size not in started or started[size].ended:
            started[size] = Team(size)
        return started[size]

    yield team
    for one in started.values():
        one.end()


@every
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_give_what_one_process_gives(name: str, size: int, teams: Callable[[int], Team]) -> None:
    expected = outcome(name, "gpt2").result
    for result in teams(size).run(jobs.contract, name, of(name), TOKENS):
        assert_same(result, expected, tolerance=TOLERANCE)


@on_texts
def test_a_text_that_occurs_twice_is_two_texts(name: str) -> None:
    expected = outcome(name, "gpt2").result
    result = techniques()[name](case(of(name)).with_repetition(), Execution(tokens_per_batch=TOKENS))
    assert result.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_array_equal(result[key], values, err_msg=key)


@every
def test_a_model_in_training_is_left_as_it_was(name: str) -> None:
    here = case(of(name))
    flags = [parameter.requires_grad for model in models(here) for parameter in model.model.parameters()]
    for model in models(here):
        model.model.train().requires_grad_(True)
    before = states(here)
    result = None
    try:
        # dropout in the way of what is read from weights is refused
        with contextlib.suppress(ModelError):
            result = techniques()[name](here, Execution(tokens_per_batch=ONE_BATCH))
        assert_unchanged(before, here, but="modes" if name in EVALUATED else "")
    finally:
        for model in models(here):
            model.model.eval()
        for parameter, flag in zip([each for model in models(here) for each in model.model.parameters()], flags, strict=True):
            parameter.requires_grad_(flag)
    if name in EVALUATED:
        assert_same(result, outcome(name, "gpt2").result, tolerance=TOLERANCE)
