"""Scrubbing is an exchange made by hand, and exchanges only what its hypothesis allows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mechscope.causal.scrubbing import Scrubbed, scrub
from mechscope.data.pairs import Pairs, PromptPair
from mechscope.errors import DataError, SettingsError
from mechscope.instrument import observed, record
from mechscope.instrument.execution import Execution
from mechscope.instrument.walk import model_inputs
from mechscope.subject.load import Subject
from tests import families
from tests.causal.pairs import random_pairs
from tests.stats.fieller import by_inverting_t_tests

FOUR = pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3"])
TEXTS = random_pairs(6, lengths=(9,))
EVERYTHING = "layers:0-2"
PARITY = [at % 2 for at in range(6)]


def logit_difference(out: torch.Tensor, text: PromptPair) -> float:
    return (out[-1, list(text.answers)].mean() - out[-1, list(text.wrong_answers)].mean()).item()


@torch.no_grad()
def whole(subject: Subject) -> np.ndarray:
    """Return each text's metric in the model itself."""
    found = []
    for text in TEXTS:
        out = subject.plain(**model_inputs(torch.tensor([text.clean]), None), use_cache=False).logits[0]
        found.append(logit_difference(out, text))
    return np.array(found)


@torch.no_grad()
def by_hand(subject: Subject, partners: dict[str, np.ndarray], sample: int) -> np.ndarray:
    """Exchange values text by text, with hooks of the test's own on the modules that write to the residual stream."""
    anatomy = subject.anatomy
    clean = []
    for text in TEXTS:
        with record(subject, "z", "mlp_output") as recording:
            subject.plain(**model_inputs(torch.tensor([text.clean]), None), use_cache=False)
        clean.append(dict(recording.values))
    found = []
    for row, text in enumerate(TEXTS):
        handles: list[Any] = []
        for layer, block in enumerate(anatomy.blocks):

            def heads(_: Any, args: Any, row: int = row, layer: int = layer) -> Any:
                z = args[0].unflatten(-1, (anatomy.n_heads, -1)).clone()
                for head in range(anatomy.n_heads):
                    if (name := f"a{layer}.h{head}") in partners:
                        z[:, :, head] = clean[partners[name][sample, row]]["z", layer][:, :, head]
                return (z.flatten(2),)

            def mlp(_: Any, args: Any, output: Any, row: int = row, layer: int = layer) -> Any:
                return clean[partners[f"m{layer}"][sample, row]]["mlp_output", layer] if f"m{layer}" in partners else output

            handles += [block.output.module.register_forward_pre_hook(heads), block.mlp_write.register_forward_hook(mlp)]
        with observed(subject):
            out = subject.plain(**model_inputs(torch.tensor([text.clean]), None), use_cache=False).logits[0]
        found.append(logit_difference(out, text))
        for handle in handles:
            handle.remove()
    return np.array(found)


@FOUR
def test_the_empty_hypothesis_is_the_model_itself(family: str) -> None:
    subject = families.subject(family, torch.float64)
    found = scrub(subject, TEXTS, {}, samples=2)
    np.testing.assert_allclose(found.full, whole(subject), rtol=1e-9)
    np.testing.assert_allclose(found.scrubbed, np.stack([found.full] * 2), rtol=1e-12)
    assert abs(found.everything - found.full).max() > 0.1


@FOUR
def test_values_are_those_of_the_partners(family: str) -> None:
    subject = families.subject(family, torch.float64)
    for hypothesis in ({EVERYTHING: None}, {"a0.h1,a0.h3,m0": PARITY, "a2.h0": None, "m1": None}):
        found = scrub(subject, TEXTS, hypothesis, samples=2, execution=Execution(seed=3))
        for sample in range(2):
            np.testing.assert_allclose(found.scrubbed[sample], by_hand(subject, found.partners, sample), rtol=1e-9)
        assert abs(found.scrubbed - found.full).max() > 1e-3


def test_a_text_takes_another_texts_value_and_each_component_draws_by_itself() -> None:
    found = scrub(families.subject("gpt2", torch.float64), TEXTS, {EVERYTHING: None}, samples=40)
    assert len(found.partners) == 3 * 4 + 3
    own = np.arange(6)
    counts = np.zeros((6, 6))
    for partners in found.partners.values():
        assert (partners != own).all()
        for row in partners:
            counts[own, row] += 1
    # 15 components × 40 samples, five partners each: 120 expected, about ±10
    assert counts[~np.eye(6, dtype=bool)].min() > 70
    assert counts.max() < 170
    one, two = found.partners["a0.h0"], found.partners["a0.h1"]
    assert 0.05 < (one == two).mean() < 0.4


@pytest.mark.parametrize("how", ["sequence", "function"])
def test_labels_never_mix(how: str) -> None:
    # texts 0, 2, 4 and texts 1, 3; text 5 is alone
    labels = ["x", "y", "x", "y", "x", "z"]
    freedom: Any = labels if how == "sequence" else lambda pair: labels[int(pair.id.split()[1])]
    found = scrub(families.subject("gpt2", torch.float64), TEXTS, {"a1.h0,a1.h2,m2": freedom}, samples=30)
    assert set(found.partners) == {"a1.h0", "a1.h2", "m2"}
    for partners in found.partners.values():
        for text, label in enumerate(labels):
            expected = {other for other, its in enumerate(labels) if its == label and other != text} or {text}
            assert set(partners[:, text]) == expected
    assert found.notes["alone"] == {"a1.h0": 1, "a1.h2": 1, "m2": 1}


def test_labels_that_are_all_different_change_nothing() -> None:
    found = scrub(families.subject("llama", torch.float64), TEXTS, {EVERYTHING: list(range(6))}, samples=1)
    np.testing.assert_allclose(found.scrubbed[0], found.full, rtol=1e-9)


def test_recovered_is_a_ratio_of_means_with_an_interval() -> None:
    subject = families.subject("gpt2", torch.float64)
    texts = []
    for text in random_pairs(12, lengths=(9,)):  # with the model's own favourite as answer, so that there is something to lose
        out = subject.plain(torch.tensor([text.clean])).logits[0, -1]
        texts.append(replace(text, answers=(int(out.argmax()),), wrong_answers=(int(out.argmin()),)))
    found = scrub(subject, Pairs(tuple(texts), "favourites"), {"layers:1": None}, samples=3)
    below = found.everything.mean()
    expected = (found.scrubbed.mean() - below) / (found.full.mean() - below)
    assert found.recovered == pytest.approx(expected)
    summary = found.summary.set_index("run")
    assert summary.loc["full", "recovered"] == pytest.approx(1.0)
    assert summary.loc["everything", "recovered"] == pytest.approx(0.0)
    row: Any = summary.loc["scrubbed"]
    assert row.value == pytest.approx(found.scrubbed.mean())
    assert row.effect == pytest.approx((found.scrubbed.mean(0) - found.full).mean())
    assert row.n == 12
    everything = found.everything.mean(0)
    low, high = by_inverting_t_tests(found.scrubbed.mean(0) - everything, found.full - everything)
    assert [row.recovered_low, row.recovered_high] == pytest.approx([low, high], rel=1e-6)
    assert low < found.recovered < high
    for sample, each in found.table.set_index("sample").iterrows():
        assert each["value"] == pytest.approx(found.scrubbed[int(str(sample))].mean())
        assert each["recovered"] == pytest.approx((found.scrubbed[int(str(sample))].mean() - below) / (found.full.mean() - below))


def test_equal_seeds_give_equal_draws() -> None:
    subject = families.subject("gpt2", torch.float64)

    def drawn(seed: int) -> Scrubbed:
        return scrub(subject, TEXTS, {"layers:0": PARITY}, samples=2, execution=Execution(seed=seed))

    np.testing.assert_array_equal(drawn(1).scrubbed, drawn(1).scrubbed)
    assert not np.array_equal(drawn(1).scrubbed, drawn(2).scrubbed)


def test_what_does_not_fit_is_named() -> None:
    subject = families.subject("gpt2", torch.float64)
    with pytest.raises(DataError, match=r"pair 'pair 2' has 7 tokens, pair 'pair 1' has 12: .* lengthen the shorter one"):
        scrub(subject, random_pairs(6), {})
    with pytest.raises(DataError, match="there is 1: give at least two"):
        scrub(subject, TEXTS.first(1), {})
    with pytest.raises(SettingsError, match="component 'm0' has 2 labels for 6 texts"):
        scrub(subject, TEXTS, {"m0": [1, 2]})
    with pytest.raises(SettingsError, match=r"names a1\.h0 twice, the second time in 'layers:1'"):
        scrub(subject, TEXTS, {"a1.h0": None, "layers:1": None})
    with pytest.raises(SettingsError, match=r"component a7\.h0 does not exist"):
        scrub(subject, TEXTS, {"a7.h0": None})
    with pytest.raises(SettingsError, match="component 'embedding' is not understood"):
        scrub(subject, TEXTS, {"embedding": None})
    with pytest.raises(SettingsError, match="samples is 0"):
        scrub(subject, TEXTS, {}, samples=0)
    with pytest.raises(DataError, match="there is 0: give at least two"):
        scrub(subject, Pairs((), "none"), {})
