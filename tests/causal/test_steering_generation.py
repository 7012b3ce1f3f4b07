"""Steering and removal change what they say at every token that is generated, with a cache and without, and with beams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mechscope.causal.steering import Direction, remove, steer
from mechscope.instrument import observed
from mechscope.instrument.walk import model_inputs
from mechscope.subject.load import Subject
from tests import families
from tests.causal.directions import FOUR, TEXTS, direction, recorded


class Steps:
    """What a block hands on in every pass of a generation."""

    def __init__(self, subject: Subject, layer: int) -> None:
        self.module, self.seen = subject.anatomy.blocks[layer].module, list[Tensor]()

    def __enter__(self) -> Steps:
        def hook(_: Any, args: Any, output: Any) -> None:
            self.seen.append((output[0] if isinstance(output, tuple) else output).detach().clone())

        self.handle = self.module.register_forward_hook(hook)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def generated(subject: Subject, texts: families.Texts, **options: Any) -> Tensor:
    # with mechscope's attention: Gemma 2's own takes its softmax in float32, where a mask of float64 overflows
    inputs = {"attention_mask": texts.real.long(), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with observed(subject):
        return subject.plain.generate(texts.ids, **{**inputs, **options})


def continued(subject: Subject, ids: Tensor, real: Tensor, where: Tensor | None, given: Direction, n: int = 5) -> Tensor:
    """Generate greedily without a cache, adding the vector by a hook of the test's own."""

    def hook(_: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        marked = torch.ones(hidden.shape[:2], dtype=torch.bool)
        if where is not None:
            marked = torch.cat([where, torch.zeros(len(where), hidden.shape[1] - where.shape[1], dtype=torch.bool)], dim=1)
        new = hidden + 4.0 * given.vector * marked[..., None]
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = subject.anatomy.blocks[given.layer].module.register_forward_hook(hook)
    for _ in range(n):
        with observed(subject):
            last = subject.plain(**model_inputs(ids, real), use_cache=False).logits[:, -1]
        last[:, 2] = -torch.inf  # as min_new_tokens does
        ids, real = torch.cat([ids, last.argmax(-1)[:, None]], dim=1), torch.cat([real, real[:, :1] | True], dim=1)
    handle.remove()
    return ids


@pytest.mark.parametrize("marked", [False, True])
@FOUR
@torch.no_grad()
def test_generation_steers_every_new_token_or_only_marked_ones_of_the_prompt(family: str, marked: bool) -> None:
    subject = families.subject(family, torch.float64)
    texts = families.padded(TEXTS, "left")
    where = texts.real & (torch.arange(texts.ids.shape[1]) > 7) if marked else None
    given = direction(subject)
    with steer(subject, given, 4.0, positions=where):
        found = generated(subject, texts)
    assert torch.equal(found, continued(subject, texts.ids, texts.real, where, given))
    assert not torch.equal(found, generated(subject, texts))


def whole_texts(subject: Subject, texts: families.Texts, where: Tensor, change: Callable[[Tensor], Tensor], beams: int) -> Tensor:
    """Generate without a cache, changing the marked tokens of the prompt by a hook of the test's own."""
    marked = where.repeat_interleave(beams, dim=0)

    def hook(_: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        new = hidden.clone()
        new[:, : marked.shape[1]][marked] = change(hidden[:, : marked.shape[1]][marked])
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = subject.anatomy.blocks[1].module.register_forward_hook(hook)
    try:
        return generated(subject, texts, use_cache=False, num_beams=beams)
    finally:
        handle.remove()


@pytest.mark.parametrize("change", ["steer", "remove"])
@pytest.mark.parametrize(("cache", "beams"), [(False, 1), (False, 3), (True, 3)])
@FOUR
@torch.no_grad()
def test_the_same_tokens_of_the_prompt_are_changed_without_a_cache_and_with_beams(
    family: str, cache: bool, beams: int, change: str
) -> None:
    subject = families.subject(family, torch.float64)
    texts = families.padded(TEXTS, "left")
    where = texts.real & (torch.arange(texts.ids.shape[1]) > 7)
    given = direction(subject)
    unit = given.vector / given.vector.norm()
    if change == "steer":
        context, by_hand = steer(subject, given, 4.0, positions=where), lambda hidden: hidden + 4.0 * given.vector
    else:
        context, by_hand = remove(subject, given, positions=where), lambda hidden: hidden - (hidden @ unit)[:, None] * unit
    with context:
        found = generated(subject, texts, use_cache=cache, num_beams=beams)
    assert torch.equal(found, whole_texts(subject, texts, where, by_hand, beams))


@FOUR
@torch.no_grad()
def test_the_vector_is_added_at_every_generated_token(family: str) -> None:
    subject = families.subject(family, torch.float64)
    texts = families.padded(TEXTS, "left")
    given = direction(subject)
    with steer(subject, given, 4.0), Steps(subject, 1) as steered:
        ids = generated(subject, texts)
    assert [step.shape[1] for step in steered.seen] == [texts.ids.shape[1], 1, 1, 1, 1]
    # the last block's input up to layer 1 does not depend on what was added behind it: one plain pass over the whole text
    whole = families.Texts(ids, torch.cat([texts.real, torch.ones(3, 5, dtype=torch.bool)], dim=1))
    plain = recorded(subject, whole, "residual", 1)
    for at, step in enumerate(steered.seen[1:]):
        torch.testing.assert_close(step[:, 0] - plain[:, texts.ids.shape[1] + at], (4.0 * given.vector).expand(3, -1), rtol=1e-8, atol=1e-9)


@torch.no_grad()
def test_one_marked_token_of_a_prompt_of_one_token_is_not_taken_for_those_that_follow() -> None:
    subject = families.subject("llama", torch.float64)
    ids, real = torch.tensor([[7]]), torch.ones(1, 1, dtype=torch.bool)
    given = direction(subject)
    with steer(subject, given, 4.0, positions=real):
        found = generated(subject, families.Texts(ids, real))
    assert torch.equal(found, continued(subject, ids, real, real, given))


@torch.no_grad()
def test_removal_holds_for_every_generated_token() -> None:
    subject = families.subject("qwen3", torch.float64)
    given = direction(subject)
    with remove(subject, given), Steps(subject, 1) as steps:
        generated(subject, families.padded(TEXTS, "left"))
    assert len(steps.seen) == 5
    assert all((step[:, -1] @ given.unit().vector).abs().max() < 1e-12 for step in steps.seen)
