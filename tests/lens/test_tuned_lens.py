"""The tuned lens: zero maps are the logit lens, affine layers are recovered, and maps belong to their model."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from mechscope.data.pairs import Pairs, from_tokens
from mechscope.errors import ModelError, RunError, SettingsError
from mechscope.instrument import Walk
from mechscope.instrument.execution import Execution
from mechscope.lens.logit_lens import logit_lens
from mechscope.lens.places import LensPlace
from mechscope.lens.projection import Projection
from mechscope.lens.training import _backward, evaluate_lens, train_tuned_lens, with_training
from mechscope.lens.translators import Translator, Translators
from mechscope.settings.lens import TunedLensSettings
from mechscope.store.tables import write_tensors
from mechscope.subject.load import Subject, load
from tests import families

SHORT = TunedLensSettings(steps=3, tokens_per_step=40)


def texts(n: int = 6, length: int = 10, seed: int = 0) -> Pairs:
    return from_tokens(torch.stack(families.documents(seed=seed, lengths=(length,) * n)))


def random_maps(subject: Subject, seed: int = 0) -> Translators:
    generator = torch.Generator().manual_seed(seed)
    width = subject.anatomy.d_model

    def drawn(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    places = [LensPlace("residual", layer) for layer in range(-1, families.LAYERS - 1)]
    maps = {place: Translator(drawn(width, width) / width**0.5, drawn(width)) for place in places}
    return Translators(maps, subject.fingerprint, families.LAYERS)


def affine(width: int = 16) -> Subject:
    """Return a GPT-2 whose blocks are affine: attention writes a constant, and the MLP, which reads without a norm, turns the stream around."""
    model = families.build("gpt2", torch.float64, activation_function="linear", n_embd=width)
    generator = torch.Generator().manual_seed(3)
    for block in model.transformer.h:
        block.attn.c_proj.weight.data.zero_()
        for bias in (block.attn.c_proj.bias, block.mlp.c_fc.bias, block.mlp.c_proj.bias):
            bias.data *= 0.3
        block.ln_2 = nn.Identity()
        turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
        block.mlp.c_fc.weight.data = torch.eye(width, 4 * width, dtype=torch.float64)
        block.mlp.c_proj.weight.data = torch.cat([turn - torch.eye(width), torch.zeros(3 * width, width)]).double()
    return load(model)


def whole_map(subject: Subject, layer: int) -> tuple[Tensor, Tensor]:
    """Return the affine map from after a block to the end, by applying the blocks to the unit vectors."""
    width = subject.anatomy.d_model
    probes = torch.cat([torch.zeros(1, width), torch.eye(width)])[:, None].double()
    walk = Walk(subject, torch.zeros(len(probes), 1, dtype=torch.int64))
    with torch.no_grad():
        ends = walk.run(probes, start=layer + 1)[:, 0]
    return (ends[1:] - ends[0]).T, ends[0]


def test_affine_layers_are_recovered() -> None:
    subject = affine()
    trained = train_tuned_lens(
        subject,
        texts(64, 16),
        settings=TunedLensSettings(steps=250, tokens_per_step=256, learning_rate=5e-2, weight_decay=0.0),
    )
    judged = evaluate_lens(subject, texts(16, 16, seed=1), trained.translators)
    assert judged.component.tolist() == ["embed", "resid0", "resid1"]
    assert (judged.kl_logit_lens > 0.5).all()
    assert (judged.kl_tuned < 1e-6).all()
    assert set(judged.verdict) == {"nearer"}
    assert trained.curve.converged.all()
    # on vectors that are no text's: the norm hides the mean and the size of what it reads, so the maps agree up to those
    fresh = 2 * torch.randn(200, subject.anatomy.d_model, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for layer in (-1, 0, 1):
        place, (weight, bias) = LensPlace("residual", layer), whole_map(subject, layer)
        found, expected = trained.translators.translated(place, fresh), fresh @ weight.T + bias
        found, expected, untouched = (rows - rows.mean(-1, keepdim=True) for rows in (found, expected, fresh))
        assert torch.cosine_similarity(found, expected).min() > 1 - 1e-4
        assert torch.cosine_similarity(untouched, expected).mean() < 0.9
        size = found.norm(dim=-1) / expected.norm(dim=-1)
        assert size.std() / size.mean() < 1e-2, "one factor for all: an affine map cannot rescale vector by vector"


def test_maps_of_zero_are_the_logit_lens() -> None:
    subject = families.subject("gpt2", torch.float64)
    zero = {place: Translator.identity(torch.zeros(1, 32, dtype=torch.float64)) for place in random_maps(subject).maps}
    tuned = logit_lens(subject, texts(), translators=Translators(zero, subject.fingerprint, families.LAYERS))
    pd.testing.assert_frame_equal(tuned.table(), logit_lens(subject, texts()).table())


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@torch.no_grad()
def test_a_map_stands_between_the_stream_and_the_norm(family: str) -> None:
    subject, pairs = families.subject(family, torch.float64), texts(1)
    maps, anatomy = random_maps(subject), subject.anatomy
    norm = anatomy.final_norm
    assert norm is not None
    reading = logit_lens(subject, pairs, translators=maps)
    output = subject.plain(torch.tensor([pairs.pairs[0].clean]), output_hidden_states=True)
    for at, layer in enumerate(range(-1, families.LAYERS - 1)):
        own = maps.maps[LensPlace("residual", layer)]
        hidden = output.hidden_states[layer + 1][0]
        logits = anatomy.unembedding(norm(hidden + hidden @ own.weight.T + own.bias))
        if anatomy.logit_softcap is not None:
            logits = torch.tanh(logits / anatomy.logit_softcap) * anatomy.logit_softcap
        expected = logits.log_softmax(-1).topk(5).values
        np.testing.assert_allclose(reading.texts[0].top_log_probability[at], expected, rtol=1e-5, atol=1e-5)
    expected = output.logits[0].log_softmax(-1).topk(5).values
    np.testing.assert_allclose(reading.texts[0].top_log_probability[-1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "phi"])
def test_the_first_step_follows_the_gradient_of_the_mean_divergence(family: str) -> None:
    subject, pairs = families.subject(family, torch.float64), texts(2)
    rate = 1e-3
    trained = train_tuned_lens(subject, pairs, layers=[0], settings=TunedLensSettings(steps=1, learning_rate=rate, weight_decay=0.0))
    # the same by autograd through Hugging Face's modules; Adam's first step is the learning rate times the sign
    anatomy = subject.anatomy
    output = subject.plain(torch.tensor([pair.clean for pair in pairs]), output_hidden_states=True)
    hidden, final = output.hidden_states[1].detach().flatten(0, 1), output.logits.detach().flatten(0, 1).log_softmax(-1)
    weight = torch.zeros(32, 32, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(32, dtype=torch.float64, requires_grad=True)
    assert anatomy.final_norm is not None
    logits = anatomy.unembedding(anatomy.final_norm(hidden + hidden @ weight.T + bias))
    if anatomy.logit_softcap is not None:
        logits = torch.tanh(logits / anatomy.logit_softcap) * anatomy.logit_softcap
    kl = (final.exp() * (final - logits.log_softmax(-1))).sum(-1).mean()
    gradients = torch.autograd.grad(kl, (weight, bias))
    own = trained.translators.maps[LensPlace("residual", 0)]
    np.testing.assert_allclose(trained.curve.kl, float(kl.detach()), rtol=1e-5)
    for found, gradient in zip((own.weight, own.bias), gradients, strict=True):
        clear = gradient.abs() > 1e-4
        assert clear.double().mean() > 0.5
        torch.testing.assert_close(found[clear], -rate * gradient.sign()[clear], rtol=1e-3, atol=0)


def test_training_lowers_the_divergence_on_other_texts_and_says_so_with_intervals() -> None:
    subject = families.subject("llama")
    calls: list[tuple[str, int, int]] = []
    settings = TunedLensSettings(steps=80, tokens_per_step=80, learning_rate=2e-2)
    trained = train_tuned_lens(subject, texts(64), settings=settings, execution=Execution(progress=lambda *call: calls.append(call)))
    assert calls[0] == ("lens training", 1, 80)
    assert len(calls) == 80
    judged = evaluate_lens(subject, texts(12, seed=1), trained.translators)
    assert (judged.kl_change_high < 0).all()
    np.testing.assert_allclose(judged.kl_change, judged.kl_tuned - judged.kl_logit_lens)
    assert (judged.kl_tuned_low < judged.kl_tuned).all()
    assert (judged.kl_tuned < judged.kl_tuned_high).all()
    assert judged.n.tolist() == [12] * 3
    curve = trained.curve.pivot(index="step", columns="component", values="kl")
    assert curve.shape == (80, 3)
    assert (curve.tail(10).mean() < curve.head(1).mean()).all()


def test_two_steps_have_not_converged() -> None:
    trained = train_tuned_lens(families.subject("llama"), texts(8), settings=replace(SHORT, steps=2))
    assert not trained.curve.converged.any()
    assert trained.curve.unconverged.str.contains("too few to tell").all()


def test_a_loss_that_still_falls_has_not_converged() -> None:
    settings = TunedLensSettings(steps=30, tokens_per_step=2048, learning_rate=1e-4)
    trained = train_tuned_lens(families.subject("llama"), texts(16), settings=settings)
    assert not trained.curve.converged.any()
    assert (trained.curve.late_share > 0.1).all()


def test_a_map_that_is_worse_than_none_is_said_to_be() -> None:
    subject = families.subject("gpt2", torch.float64)
    maps = random_maps(subject)
    wild = {place: replace(translator, weight=100 * translator.weight) for place, translator in maps.maps.items()}
    judged = evaluate_lens(subject, texts(12), replace(maps, maps=wild))
    expected = np.where(judged.kl_change_q >= 0.05, "undecided", np.where(judged.kl_tuned > judged.kl_logit_lens, "farther", "nearer"))
    assert judged.verdict.tolist() == expected.tolist()
    assert "farther" in set(expected)


def test_what_training_said_stands_beside_what_the_maps_are_worth() -> None:
    subject = families.subject("llama")
    trained = train_tuned_lens(subject, texts(8), settings=replace(SHORT, steps=2))
    table = with_training(evaluate_lens(subject, texts(4, seed=1), trained.translators), trained.curve)
    assert len(table) == 3
    assert not table.converged.any()


def test_evaluation_is_the_mean_over_texts_of_the_mean_over_tokens() -> None:
    subject, pairs = families.subject("gpt2", torch.float64), texts()
    maps = random_maps(subject)
    judged = evaluate_lens(subject, pairs, maps)
    for name, chosen in (("kl_logit_lens", None), ("kl_tuned", maps)):
        table = logit_lens(subject, pairs, translators=chosen, layers=[-1, 0, 1]).table()
        expected = table.groupby(["component", "text"]).kl.mean().groupby("component").mean()
        np.testing.assert_allclose(judged.set_index("component")[name], expected.loc[judged.component])


def test_equal_seeds_give_equal_maps_and_others_do_not() -> None:
    subject = families.subject("gpt2")
    one, same = (train_tuned_lens(subject, texts(), settings=SHORT).translators for _ in range(2))
    other = train_tuned_lens(subject, texts(), settings=SHORT, execution=Execution(seed=1)).translators
    for place in one.maps:
        assert torch.equal(one.maps[place].weight, same.maps[place].weight)
        assert not torch.equal(one.maps[place].weight, other.maps[place].weight)
    assert one.settings["seed"] == 0
    assert one.settings["texts"] == texts().hash


def test_training_leaves_the_model_as_it_was() -> None:
    subject = load(families.build("llama"))
    before = {name: value.clone() for name, value in subject.plain.state_dict().items()}
    train_tuned_lens(subject, texts(), settings=SHORT)
    assert all(torch.equal(before[name], value) for name, value in subject.plain.state_dict().items())
    assert all(parameter.grad is None for parameter in subject.plain.parameters())


def test_weight_decay_pulls_towards_the_logit_lens() -> None:
    subject = families.subject("gpt2")
    norms = []
    for decay in (0.0, 10.0):
        settings = TunedLensSettings(steps=40, tokens_per_step=60, learning_rate=1e-2, weight_decay=decay)
        norms.append(
            train_tuned_lens(subject, texts(), layers=[0], settings=settings).translators.maps[LensPlace("residual", 0)].weight.norm()
        )
    assert norms[1] < 0.8 * norms[0]


def test_gradients_are_clipped_at_norm_one_and_smaller_ones_are_left() -> None:
    subject = families.subject("gpt2", torch.float64)
    projection, generator = Projection(subject), torch.Generator().manual_seed(0)
    far, end = (torch.randn(20, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        ends = projection.applied(end)
    norms = {}
    for name, values in (("far", 5 * far + 9), ("near", ends + 1e-3 * far)):
        zero = Translator.identity(values)
        parameters = [zero.weight.requires_grad_(), zero.bias.requires_grad_()]
        _backward(projection, zero, values, projection.final(projection.applied(ends.detach())))
        norms[name] = float(torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]).norm())
    assert norms["far"] == pytest.approx(1.0, abs=1e-9)
    assert 0 < norms["near"] < 0.5


def test_half_precision_models_get_maps_in_float32() -> None:
    subject = load(families.build("llama", torch.bfloat16))
    trained = train_tuned_lens(subject, texts(), settings=replace(SHORT, steps=30, learning_rate=1e-2))
    assert {found.weight.dtype for found in trained.translators.maps.values()} == {torch.float32}
    curve = trained.curve.groupby("step").kl.mean()
    assert curve.iloc[-5:].mean() < curve.iloc[:5].mean()


def test_maps_are_saved_as_safetensors_with_their_models_hash(tmp_path: Path) -> None:
    subject = families.subject("gpt2")
    trained, path = train_tuned_lens(subject, texts(), settings=SHORT).translators, tmp_path / "lens.safetensors"
    trained.save(path)
    loaded = Translators.load(path, subject)
    pd.testing.assert_frame_equal(
        logit_lens(subject, texts(), translators=loaded).table(), logit_lens(subject, texts(), translators=trained).table()
    )
    assert loaded == Translators(loaded.maps, subject.fingerprint, families.LAYERS, trained.settings)
    with safe_open(path, framework="pt") as file:
        meta: dict[str, Any] = json.loads(file.metadata()["meta"])
        assert sorted(file.keys()) == sorted(f"{name}.{part}" for name in ("embed", "resid0", "resid1") for part in ("weight", "bias"))
    assert (meta["fingerprint"], meta["layers"], meta["width"]) == (subject.fingerprint, 3, 32)
    assert meta["settings"]["steps"] == 3


def test_another_models_maps_are_refused_unless_that_is_meant(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    subject, other, path = families.subject("gpt2"), families.subject("gpt2", seed=1), tmp_path / "lens.safetensors"
    maps = train_tuned_lens(subject, texts(), settings=SHORT).translators
    maps.save(path)
    for attempt in (lambda: Translators.load(path, other), lambda: logit_lens(other, texts(), translators=maps)):
        with pytest.raises(ModelError, match=f"fingerprint {subject.fingerprint[:12]}.*other_model=True"):
            attempt()
    with caplog.at_level(logging.WARNING):
        meant = Translators.load(path, other, other_model=True)
    assert "used on it as asked" in caplog.text
    assert len(logit_lens(other, texts(), translators=meant).texts) == len(texts())
    with pytest.raises(ModelError, match="3 layers of width 32"):
        Translators.load(path, load(families.build("gpt2", n_layer=2)), other_model=True)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    subject = families.subject("gpt2")
    write_tensors({"a": torch.zeros(1)}, tmp_path / "other.safetensors", meta={"kind": "else"})
    with pytest.raises(RunError, match="holds no translators"):
        Translators.load(tmp_path / "other.safetensors", subject)
    with pytest.raises(RunError, match="cannot read"):
        Translators.load(tmp_path / "absent.safetensors", subject)


def test_what_cannot_be_read_or_trained_is_refused() -> None:
    subject = families.subject("gpt2", torch.float64)
    maps = random_maps(subject)
    with pytest.raises(SettingsError, match="no translator for m0: the trained ones are embed, resid0, resid1"):
        logit_lens(subject, texts(), sites=("mlp_output",), translators=maps)
    with pytest.raises(SettingsError, match="no translator for m0"):
        maps.translated(LensPlace("mlp_output", 0), torch.zeros(1, 32))
    with pytest.raises(SettingsError, match="leave norm='applied'"):
        logit_lens(subject, texts(), norm="frozen", translators=maps)
    with pytest.raises(SettingsError, match="no map behind the last block"):
        train_tuned_lens(subject, texts(), layers=[2])
    with pytest.raises(SettingsError, match="'steps' is 0: should be greater than or equal to 1"):
        TunedLensSettings(steps=0)
    with pytest.raises(SettingsError, match=r"'learning_rate' is .*: should be greater than 0"):
        TunedLensSettings(learning_rate=0.0)


def test_the_projection_of_the_final_stream_is_the_model() -> None:
    """The loss that is trained on is zero where the map leads exactly to the end."""
    subject = affine()
    projection, walk = Projection(subject), Walk(subject, torch.tensor([texts().pairs[0].clean]))
    with torch.no_grad():
        end = walk.run()[0]
        weight, bias = whole_map(subject, -1)
        rows = projection.applied(walk.hidden[0] @ weight.T + bias)
        kl, gradient = projection.loss(rows, projection.final(projection.applied(end)))
    assert kl.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-9
