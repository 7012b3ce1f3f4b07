"""Bands are the singular vectors of the unembedding, shares are squared norms, and what is suppressed is really gone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechscope.data.pairs import Pairs, PromptPair, from_tokens
from mechscope.errors import DataError, SettingsError
from mechscope.instrument.execution import Execution
from mechscope.lens import spectroscopy
from mechscope.lens.spectroscopy import Bands, bands, logit_spectrum, suppress_bands
from mechscope.subject.linear import oriented_weight
from tests import families
from tests.slips import slip
from tests.stats.skewed import mean_test

SOME = ("gpt2", "llama", "gpt_neox", "gemma2", "opt")
LAYERS = range(-1, families.LAYERS)
# as many texts as an interval takes
SIX = (*families.LENGTHS, 8, 10, 9)


def texts(lengths: tuple[int, ...] = families.LENGTHS) -> Pairs:
    ids = (tuple(text.tolist()) for text in families.documents(lengths=lengths))
    return Pairs(tuple(PromptPair(f"text {at}", one, one, target=(4, 7)) for at, one in enumerate(ids)), "random")


def close(family: str) -> dict[str, Any]:
    return {"rtol": 1e-7, "atol": 1e-9} if family in ("gpt2", "gpt_neox", "opt", "phi") else {"rtol": 1e-5, "atol": 1e-5}


def dense(family: str) -> tuple[Tensor, Tensor]:
    """Return singular values and right singular vectors (as rows) of the whole map from x̂ to logits, by a plain decomposition."""
    subject = families.subject(family, torch.float64)
    norm: Any = subject.anatomy.final_norm
    gain = norm.weight + (1.0 if family.startswith("gemma") else 0.0)
    whole = oriented_weight(subject.anatomy.unembedding) * gain
    if hasattr(norm, "bias"):  # a LayerNorm, which takes off the mean
        whole = whole - whole.mean(1, keepdim=True)
    _, values, vectors = torch.linalg.svd(whole.detach(), full_matrices=False)
    return values, vectors


@pytest.mark.parametrize("family", SOME)
def test_bands_are_those_of_the_singular_value_decomposition(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectroscopy, "_WORDS", 40)
    found, (values, vectors) = bands(families.subject(family, torch.float64), n=8), dense(family)
    torch.testing.assert_close(found.singular_values, values, rtol=1e-9, atol=1e-6)
    assert found.edges == (0, 4, 8, 12, 16, 20, 24, 28, 32)
    for start, end in zip(found.edges, found.edges[1:], strict=False):
        own, expected = found.vectors[:, start:end], vectors[start:end].T
        torch.testing.assert_close(own @ own.T, expected @ expected.T, rtol=0, atol=1e-6)


def test_bands_that_do_not_divide_the_width_differ_by_one() -> None:
    found = bands(families.subject("gpt2", torch.float64), n=5)
    assert found.n == 5
    assert sorted(set(np.diff(found.edges).tolist())) == [6, 7]
    assert found.edges[-1] == families.WIDTH


@pytest.mark.parametrize("family", SOME)
@torch.no_grad()
def test_shares_are_those_of_the_hidden_states_of_hugging_face(family: str) -> None:
    subject, pairs = families.subject(family, torch.float64), texts(SIX)
    using, (_, vectors) = bands(subject, n=8), dense(family)
    table = logit_spectrum(subject, pairs, using=using, execution=Execution(tokens_per_batch=30))
    assert table.band.tolist() == [*range(8)] * 4
    for layer in range(-1, families.LAYERS - 1):
        per_text = []
        for pair in pairs:
            hidden = subject.plain(torch.tensor([pair.clean]), output_hidden_states=True).hidden_states[layer + 1][0]
            squares = (hidden @ vectors.T).square().reshape(len(hidden), 8, 4).sum(-1)
            per_text.append((squares / hidden.square().sum(-1, keepdim=True)).mean(0).numpy())
        own = table[table.layer == layer]
        np.testing.assert_allclose(own.share_of_norm, np.mean(per_text, axis=0), rtol=1e-5, atol=1e-6)
        low, high, _ = mean_test(np.array(per_text))
        np.testing.assert_allclose(own[["share_of_norm_low", "share_of_norm_high"]], np.stack([low, high], axis=1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(table.groupby("layer").share_of_norm.sum(), 1.0)
    np.testing.assert_allclose(table.share_of_directions, 1 / 8)


def test_heads_and_parts_have_spectra_too() -> None:
    table = logit_spectrum(families.subject("gemma2"), texts(), sites=("head_output", "mlp_output"), layers=[1])
    assert table.component.unique().tolist() == ["m1", "a1.h0", "a1.h1", "a1.h2", "a1.h3"]
    np.testing.assert_allclose(table.groupby("component").share_of_norm.sum(), 1.0, rtol=1e-5)


def test_a_vector_of_one_band_has_its_whole_norm_there() -> None:
    using = bands(families.subject("llama", torch.float64), n=8)
    values = using.vectors[:, 9] * 3 + using.vectors[:, 11]
    np.testing.assert_allclose(using.shares(values[None])[0], np.eye(8)[2], atol=1e-12)
    assert using.filtered(values, [2]).norm() < 1e-12
    torch.testing.assert_close(using.filtered(values, [0, 1, 3]), values)
    assert using.shares(torch.zeros(1, families.WIDTH)).isnan().all()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox", "qwen3"])
@torch.no_grad()
def test_losses_are_those_of_the_model_with_a_hook_that_projects(family: str) -> None:
    subject, pairs = families.subject(family, torch.float64), texts(SIX)
    using = bands(subject, n=8)
    gone = torch.cat([using.vectors[:, 4:8], using.vectors[:, 28:]], dim=1)
    table = suppress_bands(subject, pairs, [7, 1], using=using, rows="target", execution=Execution(tokens_per_batch=30))
    assert table.layer.tolist() == list(LAYERS)

    def losses(layer: int | None) -> np.ndarray:
        def projected(value: Tensor) -> Tensor:
            return value - value @ gone @ gone.T

        def before(_: Any, args: Any) -> Any:
            return (projected(args[0]), *args[1:])

        def after(_: Any, args: Any, output: Any) -> Any:
            return (projected(output[0]), *output[1:]) if isinstance(output, tuple) else projected(output)

        blocks = subject.anatomy.blocks
        handle = None
        if layer is not None:
            handle = blocks[0].module.register_forward_pre_hook(before) if layer < 0 else blocks[layer].module.register_forward_hook(after)
        try:
            every = [subject.plain(torch.tensor([pair.clean])).logits[0] for pair in pairs]
        finally:
            if handle is not None:
                handle.remove()
        return np.array(
            [
                float(torch.nn.functional.cross_entropy(one[3:6], torch.tensor(pair.clean[4:7])))
                for one, pair in zip(every, pairs, strict=True)
            ]
        )

    plain = losses(None)
    for at, layer in enumerate(LAYERS):
        row = {name: float(table[name].iloc[at]) for name in ("loss", "loss_suppressed", "loss_change", "loss_change_p", "n")}
        changed = losses(layer)
        np.testing.assert_allclose(row["loss"], plain.mean(), **close(family))
        np.testing.assert_allclose(row["loss_suppressed"], changed.mean(), **close(family))
        np.testing.assert_allclose(row["loss_change"], (changed - plain).mean(), **close(family))
        *_, p = mean_test(changed - plain)
        np.testing.assert_allclose(row["loss_change_p"], p, rtol=1e-3)
        assert row["n"] == 6


def test_what_every_norm_takes_off_can_be_suppressed_without_any_effect() -> None:
    subject = families.subject("gpt2", torch.float64)
    using = bands(subject, n=families.WIDTH)
    assert using.singular_values[-1] < 1e-6
    ones = torch.ones(families.WIDTH, dtype=torch.float64) / families.WIDTH**0.5
    assert abs(float(using.vectors[:, -1] @ ones)) == pytest.approx(1.0, abs=1e-9), "the darkest direction is the mean"
    table = suppress_bands(subject, texts(), [families.WIDTH - 1], using=using)
    np.testing.assert_allclose(table.loss_change, 0.0, atol=1e-9)
    assert (suppress_bands(subject, texts(), [0], using=using).loss_change.abs() > 1e-3).all()


def test_without_any_direction_only_the_constant_is_said() -> None:
    subject, pairs = families.subject("llama", torch.float64), texts()
    table = suppress_bands(subject, pairs, range(20), layers=[families.LAYERS - 1])
    assert table.loss_suppressed.item() == pytest.approx(np.log(families.VOCABULARY), abs=1e-9)  # a zero stream, no biases: all words alike
    assert suppress_bands(subject, pairs, []).loss_change.abs().max() < 1e-12


@pytest.mark.parametrize("family", ["gemma3"])
def test_padding_and_batches_never_matter(family: str) -> None:
    subject, pairs = families.subject(family, torch.float64), texts()
    one, other = (suppress_bands(subject, pairs, [3], execution=Execution(tokens_per_batch=size)) for size in (1, 10_000))
    np.testing.assert_allclose(one.loss_suppressed, other.loss_suppressed, **close(family))
    alone = [suppress_bands(subject, Pairs((pair,), "alone"), [3]).loss_suppressed for pair in pairs]
    np.testing.assert_allclose(other.loss_suppressed, np.mean(alone, axis=0), **close(family))
    one, other = (logit_spectrum(subject, pairs, execution=Execution(tokens_per_batch=size)) for size in (1, 10_000))
    np.testing.assert_allclose(one.share_of_norm, other.share_of_norm, **close(family))


def test_progress_counts_texts() -> None:
    calls: list[tuple[str, int, int]] = []
    subject, pairs = families.subject("gpt2"), from_tokens(torch.full((2, 6), 5))
    logit_spectrum(subject, pairs, execution=Execution(tokens_per_batch=6, progress=lambda *call: calls.append(call)))
    suppress_bands(subject, pairs, [0], execution=Execution(tokens_per_batch=6, progress=lambda *call: calls.append(call)))
    assert calls == [("spectroscopy", 1, 2), ("spectroscopy", 2, 2)] * 2


def test_what_does_not_exist_is_refused() -> None:
    subject, pairs = families.subject("gpt2"), texts()
    for n in (0, 33):
        with pytest.raises(SettingsError, match="ask for 1 to 32"):
            bands(subject, n=n)
    with pytest.raises(SettingsError, match="bands 0-19"):
        suppress_bands(subject, pairs, [20])
    with pytest.raises(SettingsError, match="use all or target"):
        suppress_bands(subject, pairs, [0], rows=slip("some"))
    with pytest.raises(DataError, match="target"):
        suppress_bands(subject, Pairs((PromptPair("plain", (5, 6), (5, 6)),), "by hand"), [0], rows="target")
    narrow = Bands(torch.eye(8), torch.ones(8), (0, 8))
    with pytest.raises(SettingsError, match="8 directions"):
        logit_spectrum(subject, pairs, using=narrow)
