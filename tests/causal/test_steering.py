"""Steering adds exactly what it says, where it says; removal leaves nothing along the direction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechscope.causal.steering import Direction, difference_of_means, remove, steer, sweep_strength
from mechscope.data.pairs import Pairs
from mechscope.errors import DataError, SettingsError
from mechscope.instrument import observed
from mechscope.instrument.execution import Execution
from mechscope.instrument.walk import model_inputs
from mechscope.subject.load import Subject
from tests import families
from tests.causal.directions import FOUR, TEXTS, direction, recorded
from tests.causal.pairs import random_pairs
from tests.stats.skewed import mean_test

every_padding = pytest.mark.parametrize("padding", ["none", "left", "right"])
PLACES: list[tuple[str, int, int | None]] = [
    ("embedding", 0, None),
    ("residual", 1, None),
    ("attention", 1, None),
    ("mlp", 1, None),
    ("neuron", 1, None),
    ("head", 1, 2),
]


@torch.no_grad()
def logits(subject: Subject, texts: families.Texts) -> Tensor:
    with observed(subject):
        return subject.plain(**model_inputs(texts.ids, texts.real), use_cache=False).logits[texts.real]


@every_padding
@pytest.mark.parametrize("place", PLACES, ids=[site for site, *_ in PLACES])
@FOUR
def test_a_forward_pass_has_strength_times_the_vector_more(family: str, place: tuple[str, int, int | None], padding: str) -> None:
    subject = families.subject(family, torch.float64)
    texts = families.padded(TEXTS, padding)
    given = direction(subject, *place)
    before = recorded(subject, texts, given.site, given.layer)
    with steer(subject, given, -1.5):
        after = recorded(subject, texts, given.site, given.layer)
    change = torch.zeros_like(before)
    if given.head is None:
        change += -1.5 * given.vector
    else:
        change[:, :, given.head] = -1.5 * given.vector
    torch.testing.assert_close((after - before)[texts.real], change[texts.real], rtol=1e-9, atol=1e-10)


@every_padding
@FOUR
def test_only_marked_tokens_are_steered(family: str, padding: str) -> None:
    subject = families.subject(family, torch.float64)
    texts = families.padded(TEXTS, padding)
    where = texts.real & (torch.arange(texts.ids.shape[1]) % 2 == 1)
    given = direction(subject)
    before = recorded(subject, texts, "residual", 1)
    with steer(subject, given, 2.0, positions=where):
        after = recorded(subject, texts, "residual", 1)
    torch.testing.assert_close((after - before)[where], (2.0 * given.vector).expand(int(where.sum()), -1), rtol=1e-9, atol=1e-10)
    assert torch.equal(after[~where & texts.real], before[~where & texts.real])


@pytest.mark.parametrize("change", ["steer", "remove"])
@FOUR
def test_padding_does_not_matter(family: str, change: str) -> None:
    subject = families.subject(family, torch.float64)
    given = direction(subject)
    found = []
    for side in ("left", "right"):
        with steer(subject, given, 3.0) if change == "steer" else remove(subject, given):
            found.append(logits(subject, families.padded(TEXTS, side)))
    alone = []
    for text in TEXTS:
        with steer(subject, given, 3.0) if change == "steer" else remove(subject, given):
            alone.append(logits(subject, families.padded([text], "none")))
    for one in found:
        torch.testing.assert_close(one, torch.cat(alone), rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_marks_of_some_texts_are_not_taken_for_those_of_more() -> None:
    subject = families.subject("gpt2", torch.float64)
    texts = families.Texts(torch.arange(4, 16).view(4, 3), torch.ones(4, 3, dtype=torch.bool))
    with (
        steer(subject, direction(subject), 1.0, positions=texts.real[:2]),
        pytest.raises(SettingsError, match=r"positions of shape \(2, 3\) do not fit 4 texts of 3 tokens"),
    ):
        logits(subject, texts)
    with (
        steer(subject, direction(subject), 1.0, positions=texts.real),
        pytest.raises(SettingsError, match=r"positions of shape \(4, 3\) do not fit 4 texts of 4 tokens"),
    ):
        logits(subject, families.Texts(torch.arange(4, 20).view(4, 4), torch.ones(4, 4, dtype=torch.bool)))


@every_padding
@pytest.mark.parametrize("place", PLACES, ids=[site for site, *_ in PLACES])
@FOUR
def test_removal_leaves_no_projection_and_the_rest_as_it_was(family: str, place: tuple[str, int, int | None], padding: str) -> None:
    subject = families.subject(family, torch.float64)
    texts = families.padded(TEXTS, padding)
    given = direction(subject, *place)
    before = recorded(subject, texts, given.site, given.layer)
    with remove(subject, given):
        after = recorded(subject, texts, given.site, given.layer)
    if given.head is not None:
        assert torch.equal(after[:, :, 1][texts.real], before[:, :, 1][texts.real])
        before, after = before[:, :, given.head], after[:, :, given.head]
    unit = given.vector / given.vector.norm()
    assert (after @ unit)[texts.real].abs().max() < 1e-12
    others = torch.linalg.qr(torch.cat([unit[:, None], torch.eye(len(unit), dtype=torch.float64)[:, 1:]], dim=1)).Q[:, 1:]
    torch.testing.assert_close((after @ others)[texts.real], (before @ others)[texts.real], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("positions", [None, torch.ones(1, 14, dtype=torch.bool)])
def test_the_model_is_as_before_also_after_an_exception(positions: Tensor | None) -> None:
    subject = families.subject("gpt2", torch.float64)
    texts = families.padded(TEXTS, "none")
    before = logits(subject, texts)
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in subject.plain.modules()]

    def fail(context: Any) -> None:
        with context:
            assert not torch.equal(logits(subject, texts), before)
            raise RuntimeError("inside")

    for context in (steer(subject, direction(subject), 5.0, positions=positions), remove(subject, direction(subject), positions=positions)):
        with pytest.raises(RuntimeError, match="inside"):
            fail(context)
    assert torch.equal(logits(subject, texts), before)
    assert [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in subject.plain.modules()] == hooks


@pytest.mark.parametrize("place", PLACES, ids=[site for site, *_ in PLACES])
@pytest.mark.parametrize("positions", ["last", "all"])
@FOUR
def test_difference_of_means_is_the_mean_of_each_texts_mean(family: str, place: tuple[str, int, int | None], positions: str) -> None:
    subject = families.subject(family, torch.float64)
    site, layer, head = place
    sets = random_pairs(5, seed=1), random_pairs(4, seed=2)
    found = difference_of_means(
        subject, *sets, site=site, layer=layer, head=head, positions=positions, execution=Execution(tokens_per_batch=20)
    )
    means = []
    for texts in sets:
        rows = []
        for pair in texts:  # one by one, without padding
            value = recorded(subject, families.padded([torch.tensor(pair.clean)], "none"), found.site, layer)[0]
            value = value if head is None else value[:, head]
            rows.append(value[-1] if positions == "last" else value.mean(0))
        means.append(torch.stack(rows).mean(0))
    torch.testing.assert_close(found.vector, means[0] - means[1], rtol=1e-9, atol=1e-10)


def test_a_unit_direction_has_length_one_and_a_control_has_equal_length() -> None:
    given = Direction.from_vector(torch.tensor([3.0, 4.0]), layer=0)
    torch.testing.assert_close(given.unit().vector, torch.tensor([0.6, 0.8]))
    control = given.random_like(3)
    assert control.vector.norm().item() == pytest.approx(5.0)
    assert torch.equal(control.vector, given.random_like(3).vector)
    assert not torch.equal(control.vector, given.random_like(4).vector)


def scores(subject: Subject, texts: Pairs, given: Direction, strength: float, *, loss: bool) -> np.ndarray:
    """Return each text's metric under steering, text by text, by Hugging Face and a hook of the test's own."""

    def hook(_: Any, args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output) + strength * given.vector
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = subject.anatomy.blocks[given.layer].module.register_forward_hook(hook)
    found = []
    for text in texts:
        ids = torch.tensor([text.clean])
        out = subject.plain(**model_inputs(ids, None), use_cache=False).logits[0].detach()
        if loss:
            assert text.target is not None
            first, end = text.target
            found.append(-out.log_softmax(-1)[first - 1 : end - 1].gather(1, ids[0, first:end, None]).mean().item())
        else:
            found.append((out[-1, list(text.answers)].mean() - out[-1, list(text.wrong_answers)].mean()).item())
    handle.remove()
    return np.array(found)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3"])
def test_a_sweep_measures_effect_and_cost_of_each_strength(family: str) -> None:
    subject = families.subject(family, torch.float64)
    given = direction(subject)
    pairs, neutral = random_pairs(7, seed=1), random_pairs(6, seed=2)
    table = sweep_strength(subject, given, pairs, neutral, strengths=(-1.0, 0.0, 2.0), controls=2, execution=Execution(tokens_per_batch=30))
    assert len(table) == 3 * 3 * 2
    for row in table.itertuples():
        each: Any = row
        used = given if each.draw < 0 else given.random_like(each.draw)
        texts, loss = (pairs, False) if each.texts == "pairs" else (neutral, True)
        steered, plain = (scores(subject, texts, used, strength, loss=loss) for strength in (each.strength, 0.0))
        assert (each.metric, each.n) == ("loss" if loss else "logit-diff", len(texts))
        assert each.value == pytest.approx(steered.mean(), rel=1e-9)
        assert each.mean == pytest.approx((steered - plain).mean(), rel=1e-9, abs=1e-10)
        assert each.se == pytest.approx((steered - plain).std(ddof=1) / len(texts) ** 0.5, rel=1e-8, abs=1e-10)
        low, high, _ = mean_test(steered - plain)
        assert (each.low, each.high) == (pytest.approx(low, rel=1e-7, abs=1e-10), pytest.approx(high, rel=1e-7, abs=1e-10))
    assert set(table["direction"]) == {"direction", "random"}


def test_what_does_not_fit_is_named() -> None:
    subject = families.subject("gpt2", torch.float64)
    vector = torch.ones(families.WIDTH, dtype=torch.float64)
    good = Direction.from_vector(vector, layer=1)
    with pytest.raises(SettingsError, match=r"shape \(1, 32\): give one vector"):
        Direction.from_vector(vector[None], layer=0)
    with pytest.raises(SettingsError, match="NaN or infinite"):
        Direction.from_vector(vector * torch.nan, layer=0)
    with pytest.raises(SettingsError, match="site 'pattern' does not hold one vector per token"):
        Direction.from_vector(vector, site="pattern", layer=0)
    with pytest.raises(SettingsError, match=r"say which, e\.g\. head=3"):
        Direction.from_vector(vector, site="head", layer=0)
    with pytest.raises(SettingsError, match="has no heads: leave head out"):
        Direction.from_vector(vector, layer=0, head=1)
    with pytest.raises(SettingsError, match="is zero, so it points nowhere"):
        Direction.from_vector(0 * vector, layer=0).unit()
    with pytest.raises(SettingsError, match="layer 9 does not exist"), steer(subject, Direction.from_vector(vector, layer=9), 1.0):
        pass
    with (
        pytest.raises(SettingsError, match="has 31 features, resid1 of the model has 32"),
        remove(subject, Direction.from_vector(vector[1:], layer=1)),
    ):
        pass
    with (
        pytest.raises(SettingsError, match=r"positions of shape \(1, 3\) do not fit 1 texts of 14 tokens"),
        steer(subject, good, 1.0, positions=torch.ones(1, 3, dtype=torch.bool)),
    ):
        logits(subject, families.padded(TEXTS, "none"))
    with pytest.raises(SettingsError, match="there is no strength"):
        sweep_strength(subject, good, random_pairs(), random_pairs(), strengths=())
    with pytest.raises(DataError, match="no target span"):
        sweep_strength(subject, good, random_pairs(), random_pairs(with_target=False), strengths=(1.0,))
    with pytest.raises(SettingsError, match="there are no pairs"):
        difference_of_means(subject, Pairs((), "none"), random_pairs(), layer=0)
