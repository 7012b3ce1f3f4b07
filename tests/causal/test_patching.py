"""Patching tables say what Hugging Face alone would: a head's effect equals a hand-written forward pass with that head replaced."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechscope.causal import Text, Vector, mean_of, patch
from mechscope.data.pairs import Pairs, PromptPair
from mechscope.errors import DataError, SettingsError
from mechscope.subject.load import Subject
from tests import families
from tests.causal.pairs import random_pairs, telling_pairs

PAIRS = random_pairs(4)
FOUR = ("gpt2", "llama", "gpt_neox", "qwen3")


@torch.no_grad()
def by_hand(subject: Subject, pair: PromptPair, *, base: str, layer: int, head: int, metric: str = "logit-diff") -> tuple[float, float]:
    """Return the metric without and with one head's slice of W_O's input taken from the other text, by plain hooks on the model."""
    writer = subject.anatomy.blocks[layer].output.module
    width = subject.anatomy.d_head
    own, other = (pair.corrupt, pair.clean) if base == "corrupt" else (pair.clean, pair.corrupt)
    seen: dict[str, Tensor] = {}

    def logits(ids: tuple[int, ...], hook: Any) -> Tensor:
        handle = writer.register_forward_pre_hook(hook)
        try:
            return subject.plain(torch.tensor([ids]), use_cache=False).logits[0, -1]
        finally:
            handle.remove()

    def look(_: Any, args: Any) -> None:
        seen["z"] = args[0].clone()

    def swap(_: Any, args: Any) -> Any:
        z = args[0].clone()
        z[..., head * width : (head + 1) * width] = seen["z"][..., head * width : (head + 1) * width]
        return (z, *args[1:])

    def read(values: Tensor) -> float:
        values = values.softmax(-1) if metric == "probability" else values
        right, wrong = values[list(pair.answers)], values[list(pair.wrong_answers)]
        return float(right.sum() - wrong.sum()) if metric == "probability" else float(right.mean() - wrong.mean())

    logits(other, look)
    return read(logits(own, lambda *_: None)), read(logits(own, swap))


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("family", FOUR)
def test_a_head_patch_equals_a_hand_written_pass_with_that_head_replaced(family: str, direction: Any) -> None:
    subject = families.subject(family, torch.float64)
    base = "corrupt" if direction == "denoise" else "clean"
    for metric in ("logit-diff", "probability"):
        found = patch(subject, PAIRS, direction=direction, metric=metric)
        for row, (layer, head) in enumerate(subject.anatomy.heads()):
            expected = [by_hand(subject, pair, base=base, layer=layer, head=head, metric=metric) for pair in PAIRS]
            np.testing.assert_allclose(found.unchanged, [one for one, _ in expected], rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(found.values[row], [two for _, two in expected], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", FOUR)
def test_patching_the_whole_residual_stream_is_one_and_nothing_is_zero(family: str) -> None:
    subject = families.subject(family, torch.float64)
    pairs = telling_pairs(subject, 8)
    table = patch(subject, pairs, site="residual").table
    np.testing.assert_allclose(table["normalised"], 1.0, rtol=1e-9)
    noise = patch(subject, pairs, site="residual", direction="noise").table
    np.testing.assert_allclose(noise["normalised"], 0.0, atol=1e-9)
    own = patch(subject, PAIRS, site="head", source=Text("corrupt")).table
    np.testing.assert_allclose(own["effect"], 0.0, atol=1e-12)


def test_the_table_holds_means_errors_and_intervals_over_texts() -> None:
    subject = families.subject("gpt2", torch.float64)
    found = patch(subject, telling_pairs(subject, 9), components="a1.h2")
    effect = found.values[0] - found.unchanged
    assert found.clean is not None
    assert found.corrupt is not None
    row = found.table.iloc[0]
    assert (row["component"], row["n"]) == ("a1.h2", 9)
    assert row["effect"] == pytest.approx(effect.mean())
    assert row["se"] == pytest.approx(effect.std(ddof=1) / 3)
    assert row["high"] == pytest.approx(effect.mean() + 2.3060041 * effect.std(ddof=1) / 3)
    assert row["normalised"] == pytest.approx((found.values[0] - found.corrupt).mean() / (found.clean - found.corrupt).mean())
    assert row["normalised_low"] <= row["normalised"] <= row["normalised_high"]
    assert row["withheld"] == ""


def test_each_position_is_a_row_and_texts_that_end_before_it_are_left_out() -> None:
    subject = families.subject("llama", torch.float64)
    each = patch(subject, PAIRS, site="residual", positions="each", components="layers:1")
    assert list(each.table["positions"]) == [str(at) for at in range(12)]
    assert each.table["n"].tolist() == [4] * 7 + [3, 3, 1, 1, 1]  # texts of 9, 12, 7 and 9 tokens
    third = patch(subject, PAIRS, site="residual", positions=2, components="layers:1")
    np.testing.assert_allclose(each.values[2], third.values[0], rtol=1e-12)


def test_named_positions_are_rows_in_the_order_asked_for() -> None:
    subject = families.subject("llama", torch.float64)
    names = ["beginning", "changed fact", "last"]
    found = patch(subject, PAIRS, site="mlp", positions=names, components="m1")
    assert list(found.table["positions"]) == names
    # nothing differs before the first changed token
    assert found.table["effect"][0] == pytest.approx(0.0, abs=1e-12)
    alone = patch(subject, PAIRS, site="mlp", positions="changed", components="m1")
    np.testing.assert_allclose(found.values[1], alone.values[0], rtol=1e-12)


def test_a_vector_or_a_mean_can_be_the_source() -> None:
    subject = families.subject("gpt2", torch.float64)
    zero = patch(subject, PAIRS, site="mlp", source="zero", components="m1")
    vector = patch(subject, PAIRS, site="mlp", source=Vector(torch.zeros(families.WIDTH)), components="m1")
    np.testing.assert_allclose(zero.values, vector.values)
    mean = mean_of(subject, PAIRS, ["mlp_output"])
    given = patch(subject, PAIRS, site="mlp", source=Vector(mean.values["mlp_output", 1]), components="m1")
    np.testing.assert_allclose(patch(subject, PAIRS, site="mlp", source=mean, components="m1").values, given.values, rtol=1e-12)


def test_kl_to_the_clean_run_is_zero_where_everything_is_restored() -> None:
    subject = families.subject("gpt_neox", torch.float64)
    found = patch(subject, PAIRS, site="residual", metric="kl")
    np.testing.assert_allclose(found.values, 0.0, atol=1e-12)
    assert (found.unchanged > 1e-4).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"site": "heads"}, SettingsError, "site 'heads' is not known: use one of attention"),
        ({"direction": "up"}, SettingsError, "direction 'up' is not known"),
        ({"metric": "accuracy"}, DataError, "metric 'accuracy' is not known: use one of logit-diff"),
        ({"components": "a9.h0"}, SettingsError, "component a9.h0 does not exist: the model has layers 0-2 with heads 0-3"),
        ({"components": "m1"}, SettingsError, "components 'm1' name nothing that has site 'z'"),
        ({"positions": 30}, DataError, "position 30 lies outside pair 'pair 1', which has 12 tokens"),
        ({"positions": "subject"}, DataError, "positions 'subject' are not known in pair 'pair 1'"),
        ({"source": "dream"}, SettingsError, "source 'dream' is not known: use one of clean, corrupt, zero, resample"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        patch(families.subject("gpt2"), PAIRS, **options)


def test_pairs_that_do_not_fit_the_model_are_named() -> None:
    subject = families.subject("gpt2")
    with pytest.raises(DataError, match="clean has 3 tokens, corrupt has 2: patching compares them token by token"):
        PromptPair("unequal", (3, 4, 5), (3, 4))
    outside = Pairs((PromptPair("foreign", (3, 4), (3, 5), answers=(600,), wrong_answers=(4,)),), "x")
    with pytest.raises(
        DataError, match="pair 'foreign' holds token 600, the model's vocabulary has 97: was it made with another tokenizer"
    ):
        patch(subject, outside)
    long = Pairs((PromptPair("long", (3,) * 65, (3,) * 64 + (4,), answers=(5,), wrong_answers=(6,)),), "x")
    with pytest.raises(DataError, match="pair 'long' has 65 tokens, the model reads 64"):
        patch(subject, long)
    no_wrong = Pairs((PromptPair("half", (3, 4), (3, 5), answers=(5,)),), "x")
    with pytest.raises(DataError, match="pair 'half' names no wrong answer, which metric 'logit-diff' needs"):
        patch(subject, no_wrong)
    with pytest.raises(DataError, match="has no target span, which metric 'loss' scores"):
        patch(subject, random_pairs(2, with_target=False), metric="loss")
    with pytest.raises(SettingsError, match="there are no pairs to run"):
        patch(subject, Pairs((), "x"))
