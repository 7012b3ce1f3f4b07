"""A dictionary says what its formulas say, whatever its layout and rule; folding changes nothing, or is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mechscope.errors import ModelError, RunError, SettingsError
from mechscope.features.dictionary import Dictionary
from mechscope.features.layout import autoencoder, crosscoder
from mechscope.features.places import Latent, Place, places
from mechscope.features.pre_activations import pre_activations
from mechscope.features.rules import Rule
from tests import families
from tests.features import oracle

KINDS = ("autoencoder", "transcoder", "crosscoder", "cross-layer")
every_rule = pytest.mark.parametrize("rule", oracle.RULES, ids=str)
every_kind = pytest.mark.parametrize("kind", KINDS)


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@every_kind
@every_rule
def test_codes_and_reconstruction_are_those_of_the_dense_formulas(rule: Rule, kind: str) -> None:
    layout = oracle.layouts(rule)[kind]
    given, values = oracle.dictionary(layout), oracle.inputs(layout)
    f = oracle.encode(given, values)
    assert 0 < (f != 0).sum() < f.numel()
    assert_equal(given.encode(values).dense(), f)
    for found, expected in zip(given(values), oracle.reconstruct(given, values), strict=True):
        assert_equal(found, expected)


@every_kind
@every_rule
def test_folding_the_affine_maps_leaves_codes_and_reconstruction_equal(rule: Rule, kind: str) -> None:
    layout = oracle.layouts(rule)[kind]
    # latents compared by norms over several places need one scale: the refusal has a test of its own
    given, values = oracle.dictionary(layout, scale=1.7 if rule.by_norm else None), oracle.inputs(layout)
    folded = given.folded()
    assert all(each.scale == 1 and not each.centre.any() for each in (*folded.input_maps, *folded.output_maps))
    assert_equal(folded.encode(values).dense(), given.encode(values).dense())
    for found, expected in zip(folded(values), given(values), strict=True):
        assert_equal(found, expected)


@every_kind
@pytest.mark.parametrize("rule", [each for each in oracle.RULES if each.by_norm or each.name not in ("topk", "batchtopk")], ids=str)
def test_folding_the_norms_multiplies_codes_by_them_and_leaves_the_reconstruction_equal(rule: Rule, kind: str) -> None:
    layout = oracle.layouts(rule)[kind]
    given, values = oracle.dictionary(layout), oracle.inputs(layout)
    normed = given.normed()
    assert_equal(oracle.sizes(layout, normed.tensors), torch.ones(layout.latents, dtype=torch.float64))
    assert_equal(normed.encode(values).dense(), given.encode(values).dense() * oracle.sizes(layout, given.tensors))
    for found, expected in zip(normed(values), given(values), strict=True):
        assert_equal(found, expected)


@pytest.mark.parametrize("rule", [Rule("topk", 5), Rule("batchtopk", 5)], ids=str)
def test_folding_norms_that_were_not_compared_is_refused(rule: Rule) -> None:
    given = oracle.dictionary(oracle.layouts(rule)["autoencoder"])
    with pytest.raises(SettingsError, match=f"rule {rule.name} was trained to compare latents without .* would change which are chosen"):
        given.normed()


def test_folding_different_scales_under_compared_norms_is_refused() -> None:
    given = oracle.dictionary(oracle.layouts(Rule("topk", 5, by_norm=True))["crosscoder"])
    with pytest.raises(SettingsError, match="would change which are chosen"):
        given.folded()


def test_pre_activations_are_held_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = oracle.layouts(Rule("relu"))["cross-layer"]
    given, values = oracle.dictionary(layout), oracle.inputs(layout)
    (whole,) = pre_activations(layout, given.tensors, given.read(values))
    monkeypatch.setattr("mechscope.features.pre_activations.BLOCK", 7 * layout.latents)
    blocks = [pre.clone() for pre in pre_activations(layout, given.tensors, given.read(values))]
    assert [len(block) for block in blocks] == [7, 7, 7, 7, 2]
    assert_equal(torch.cat(blocks), whole)


def test_directions_are_what_one_latent_adds_to_the_reconstruction() -> None:
    layout = oracle.layouts(Rule("relu"))["cross-layer"]
    given = oracle.dictionary(layout)
    chosen = [3, 25, 59]
    for latent_at, latent in enumerate(chosen):
        f = torch.zeros(2, layout.latents, dtype=torch.float64)
        f[1, latent] = 2.0
        outs = given.decode(type(given.encode(oracle.inputs(layout))).from_dense(f))
        for place, out in zip(layout.outputs, outs, strict=True):
            assert_equal((out[1] - out[0]) / 2, given.directions(chosen, place)[latent_at])


@every_rule
def test_encoders_are_the_gradients_of_active_latents(rule: Rule) -> None:
    for layout in oracle.layouts(rule).values():
        given, values = oracle.dictionary(layout), [each.requires_grad_() for each in oracle.inputs(layout)]
        f, checked = oracle.encode(given, values), 0
        for number, (group, (start, stop)) in enumerate(zip(layout.groups, layout.spans, strict=True)):
            read = values[slice(*group.reads)]
            chosen = torch.arange(start, stop, 3)
            rows = given.encoders(number, chosen - start)
            assert_equal(rows, given.encoders(number)[chosen - start])
            for latent, row in zip(chosen.tolist(), rows, strict=True):
                for token in f[:, latent].nonzero()[:1, 0].tolist():
                    gradients = torch.autograd.grad(f[token, latent], read, retain_graph=True)
                    assert_equal(torch.cat([each[token] for each in gradients]), row)
                    checked += 1
        assert checked > 5


def test_decoders_and_what_stands_there_without_latents_make_the_reconstruction() -> None:
    for kind, layout in oracle.layouts(Rule("gated")).items():
        given = oracle.dictionary(layout)
        empty = given.encode(oracle.inputs(layout)).from_dense(torch.zeros(1, layout.latents, dtype=torch.float64))
        if kind != "transcoder":  # its skip map adds to that what it reads
            for found, expected in zip(given.nothing(), given.decode(empty), strict=True):
                assert_equal(found, expected[0])
        for number, (group, (start, stop)) in enumerate(zip(layout.groups, layout.spans, strict=True)):
            rows = [given.directions(range(start, stop), place) for place in layout.outputs[slice(*group.writes)]]
            assert_equal(given.decoders(number), torch.cat(rows, dim=1))
            in_float32 = given.to(torch.float32)
            assert in_float32.decoders(number, torch.float64).dtype == in_float32.nothing(torch.float64)[0].dtype == torch.float64


def test_it_is_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    for kind, layout in oracle.layouts(Rule("gated")).items():
        given, values = replace(oracle.dictionary(layout), fingerprint="abc", about={"steps": 3}), oracle.inputs(layout)
        given.save(tmp_path / f"{kind}.safetensors")
        again = Dictionary.load(tmp_path / f"{kind}.safetensors")
        assert (again.layout, again.fingerprint, again.about) == (layout, "abc", {"steps": 3})
        assert all(torch.equal(again.tensors[name], tensor) for name, tensor in given.tensors.items())
        for one, two in zip(again(values), given(values), strict=True):
            assert_equal(one, two)
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(RunError, match=r"other\.safetensors"):
        Dictionary.load(tmp_path / "other.safetensors")


def test_another_width_place_or_model_is_refused() -> None:
    subject = families.subject("gpt2")
    fits = Dictionary.plain(autoencoder("resid1", families.WIDTH, 8, Rule("relu")), autoencoder("resid1", 32, 8, Rule("relu")).tensors())
    assert fits.check(subject) is fits
    with pytest.raises(ModelError, match=r"width 12 at resid1, model .* has 32"):
        oracle.dictionary(oracle.layouts(Rule("relu"))["autoencoder"]).check(subject)
    with pytest.raises(ModelError, match="other weights"):
        replace(fits, fingerprint="0" * 64).check(subject)
    assert replace(fits, fingerprint="0" * 64).check(subject, other_model=True)
    far = autoencoder("resid9", families.WIDTH, 8, Rule("relu"))
    with pytest.raises(SettingsError, match="resid9 does not exist"):
        Dictionary.plain(far, far.tensors()).check(subject)
    with pytest.raises(ModelError, match=r"shape \(3, 5\) at resid1, where the dictionary reads \(tokens, 32\)"):
        fits.encode([torch.zeros(3, 5)])
    with pytest.raises(ModelError, match=r"encoder_bias is missing, expected \(8,\)"):
        Dictionary.plain(fits.layout, {name: tensor for name, tensor in fits.tensors.items() if name != "encoder_bias"})


def test_more_active_latents_than_there_are_is_refused() -> None:
    with pytest.raises(SettingsError, match="k=9 of 8 latents"):
        autoencoder("resid1", 4, 8, Rule("topk", 9))
    with pytest.raises(SettingsError, match="need k of at least 1"):
        Rule("topk")


def test_places_and_latents_have_one_text_form() -> None:
    for text in ("resid6", "a0", "m11", "m3.in", "a2.z", "base:resid6"):
        assert Place.parse(text).name == text
    assert [each.layer for each in places("resid1,m2.in")] == [1, 2]
    assert Latent.parse("tuned:resid6.f1024") == Latent(Place("residual", 6, "tuned"), 1024)
    assert Latent.parse("m3.f7").name == "m3.f7"
    for wrong in ("resid", "m3.z", "x4", "resid6.f1024"):
        with pytest.raises(SettingsError, match="is not understood"):
            Place.parse(wrong)


def test_models_start_with_the_same_decoders_or_apart() -> None:
    layout = crosscoder("base:resid1,base:m1,tuned:resid1,tuned:m1", [12, 12, 12, 12], 40, Rule("topk", 4))
    alike, apart = layout.tensors(seed=3), layout.tensors(seed=3, apart=True)
    for tensors in (alike, apart):
        assert tensors["decoder.0"].norm(dim=1).tolist() == pytest.approx([1] * 40)
        assert torch.equal(tensors["encoder.0"], tensors["decoder.0"])
    base, tuned = alike["decoder.0"].split(24, dim=1)
    assert torch.equal(base, tuned)
    base, tuned = apart["decoder.0"].split(24, dim=1)
    # random directions of 24 dimensions
    assert torch.nn.functional.cosine_similarity(base, tuned).square().mean() == pytest.approx(1 / 24, rel=0.6)
    assert torch.equal(apart["decoder.0"], layout.tensors(seed=3, apart=True)["decoder.0"])
    assert not torch.equal(apart["decoder.0"], layout.tensors(seed=4, apart=True)["decoder.0"])
