"""A spliced dictionary records, changes and replaces what it says, in any pass; with errors kept and nothing changed the model is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mechscope.errors import SettingsError
from mechscope.features.affine import Affine
from mechscope.features.dictionary import Dictionary
from mechscope.features.layout import Layout, autoencoder, cross_layer, crosscoder, transcoder
from mechscope.features.places import Place
from mechscope.features.rules import Rule
from mechscope.features.spliced import LatentEdit, ablated, latents, scaled, splice, steered
from mechscope.instrument import model_inputs, record
from mechscope.subject import Subject
from tests import families
from tests.features import oracle

FAMILIES = ("gpt2", "llama", "gpt_neox", "gemma2", "opt")
every_family = pytest.mark.parametrize("family", FAMILIES)
W, M = families.WIDTH, 50
TEXTS = families.documents()


def made(layout: Layout, seed: int = 0) -> Dictionary:
    """Return a random dictionary with maps of its own and several active latents."""
    given = oracle.dictionary(layout, seed=seed)
    maps = tuple(Affine(1.0 + at, torch.linspace(-1, 1, width, dtype=torch.float64)) for at, width in enumerate(layout.input_widths))
    outs = tuple(Affine(2.0 + at, torch.linspace(1, 0, width, dtype=torch.float64)) for at, width in enumerate(layout.output_widths))
    return Dictionary(
        layout, {name: tensor * 0.3 for name, tensor in given.tensors.items()}, maps, maps if layout.inputs == layout.outputs else outs
    )


def dictionaries(subject: Subject) -> dict[str, Dictionary]:
    z = subject.anatomy.n_heads * subject.anatomy.d_head
    return {
        "resid0": made(autoencoder("resid0", W, M, Rule("topk", 6))),
        "a1": made(autoencoder("a1", W, M, Rule("relu"))),
        "a2.z": made(autoencoder("a2.z", z, M, Rule("batchtopk", 6))),
        "m1": made(transcoder(1, W, M, Rule("gated"), skip=True)),
    }


@torch.no_grad()
def logits(subject: Subject, texts: families.Texts) -> Tensor:
    return subject.plain(**model_inputs(texts.ids, texts.real), use_cache=False).logits


def real(texts: families.Texts, value: Tensor) -> Tensor:
    return torch.cat([texts.rows(value, row) for row in range(len(texts.ids))])


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@every_family
def test_with_errors_kept_and_nothing_changed_logits_are_equal(family: str, padding: str) -> None:
    subject, texts = families.subject(family, torch.float32), families.padded(TEXTS, padding)
    plain = logits(subject, texts)
    given = {place: dictionary.to(torch.float32) for place, dictionary in dictionaries(subject).items()}
    with splice(subject, given):
        torch.testing.assert_close(real(texts, logits(subject, texts)), real(texts, plain), rtol=1e-5, atol=1e-5)
    # where nothing is recorded the model's own attention runs, and nothing differs by a bit
    with splice(subject, {place: given[place] for place in ("resid0", "a1")}):
        assert torch.equal(logits(subject, texts), plain)
    # changes that come to nothing go through the sums
    nothing = [scaled(f"{place}.f{latent}", 1.0) for place in given for latent in range(M)]
    with splice(subject, given, *nothing):
        torch.testing.assert_close(real(texts, logits(subject, texts)), real(texts, plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@every_family
def test_latents_are_those_of_the_recorded_activations(family: str, padding: str) -> None:
    subject, texts = families.subject(family, torch.float64), families.padded(TEXTS, padding)
    given = dictionaries(subject)
    with record(subject, "residual", "attention_output", "mlp_output", "mlp_input", "z") as recording:
        logits(subject, texts)
    with splice(subject, given) as spliced:
        logits(subject, texts)
    for place, dictionary in given.items():
        at = Place.parse(place)
        values = [each.of(recording).flatten(0, 1) for each in dictionary.layout.inputs]
        expected = oracle.encode(dictionary, values).unflatten(0, texts.ids.shape)
        found = spliced[place].dense().unflatten(0, texts.ids.shape)
        assert 0 < (expected != 0).sum() < expected.numel()
        torch.testing.assert_close(real(texts, found), real(texts, expected), rtol=1e-6, atol=1e-6)
        chosen = spliced.values([f"{place}.f3", f"{place}.f7"])
        torch.testing.assert_close(real(texts, chosen), real(texts, expected[..., [3, 7]]), rtol=1e-6, atol=1e-6)
        (rebuilt,) = oracle.reconstruct(dictionary, values)
        error = at.of(recording) - rebuilt.unflatten(0, texts.ids.shape)
        torch.testing.assert_close(real(texts, spliced.error(place)), real(texts, error), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def by_hand(subject: Subject, texts: families.Texts, layer: int, change: Any) -> Tensor:
    """Run with a function of the residual stream behind a block, by a plain hook."""

    def hook(_: Any, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = subject.anatomy.blocks[layer].module.register_forward_hook(hook)
    try:
        return logits(subject, texts)
    finally:
        handle.remove()


@pytest.mark.parametrize("errors", [True, False])
@every_family
def test_changed_latents_move_the_model_by_what_they_add(family: str, errors: bool) -> None:
    subject, texts = families.subject(family, torch.float64), families.padded(TEXTS, "right")
    dictionary = made(autoencoder("resid1", W, M, Rule("relu")))
    edits = {
        "silenced": (ablated("resid1.f4,resid1.f9"), lambda f: f * torch.tensor([0.0 if j in (4, 9) else 1.0 for j in range(M)])),
        "steered": (steered("resid1.f4", 2.5), lambda f: f + 2.5 * torch.eye(M, dtype=f.dtype)[4]),
        "scaled": (scaled("resid1.f4", 3.0), lambda f: f * (1 + 2 * torch.eye(M, dtype=f.dtype)[4])),
    }
    for edit, change in edits.values():

        def changed(x: Tensor, change: Any = change) -> Tensor:
            flat = x.flatten(0, 1)
            f = oracle.encode(dictionary, [flat])
            scale = dictionary.output_maps[0].scale
            decoder = oracle.decoder(dictionary.layout, dictionary.tensors) / scale
            (rebuilt,) = oracle.reconstruct(dictionary, [flat])
            return ((flat if errors else rebuilt) + (change(f) - f) @ decoder).view_as(x)

        expected = by_hand(subject, texts, 1, changed)
        with splice(subject, {"resid1": dictionary}, edit, errors=errors):
            found = logits(subject, texts)
        # Gemma takes norms and softmax in float32 whatever the type
        tolerance = 1e-4 if family == "gemma2" else 1e-9
        torch.testing.assert_close(real(texts, found), real(texts, expected), rtol=tolerance, atol=tolerance)
        assert (real(texts, found) - real(texts, logits(subject, texts))).abs().max() > 1e-3


def test_changes_act_in_order_and_only_where_they_are_asked_for() -> None:
    subject, texts = families.subject("llama", torch.float64), families.padded(TEXTS, "none")
    dictionary = made(autoencoder("resid1", W, M, Rule("relu")))
    where = torch.zeros_like(texts.real)
    where[0, 5] = True
    with (
        splice(subject, {"resid1": dictionary}, steered("resid1.f4", 1.0, where), scaled("resid1.f4", 3.0)),
        record(subject, "residual") as after,
    ):
        logits(subject, texts)
    with splice(subject, {"resid1": dictionary}) as before, record(subject, "residual") as plain:
        logits(subject, texts)
    old = before.values("resid1.f4")[0, :, 0]
    moved = (old + where[0]) * 3 - old
    expected = plain["residual", 1][0] + moved[:, None] * dictionary.directions([4], Place("residual", 1))
    torch.testing.assert_close(after["residual", 1][0], expected, rtol=1e-9, atol=1e-9)


def test_latents_and_errors_of_another_run_can_be_put_in() -> None:
    subject = families.subject("gpt2", torch.float64)
    dictionary = made(autoencoder("resid1", W, M, Rule("topk", 8)))
    texts = [families.padded(families.documents(seed=seed), "none") for seed in (0, 5)]
    names = [f"resid1.f{latent}" for latent in range(M)]
    with splice(subject, {"resid1": dictionary}) as other:
        logits(subject, texts[1])
    patch = LatentEdit(latents(names), other.values(names))
    with splice(subject, {"resid1": dictionary}, patch, errors={"resid1": other.error("resid1")}), record(subject, "residual") as found:
        logits(subject, texts[0])
    with record(subject, "residual") as expected:
        logits(subject, texts[1])
    # all latents and the error are the whole of it
    torch.testing.assert_close(found["residual", 1], expected["residual", 1], rtol=1e-9, atol=1e-9)


def test_a_cross_layer_transcoder_replaces_the_mlps_it_writes() -> None:
    subject, texts = families.subject("llama", torch.float64), families.padded(TEXTS, "left")
    dictionary = made(cross_layer((0, 1, 2), W, 20, Rule("jumprelu")))
    with splice(subject, {"m0": dictionary}, errors=False) as spliced, record(subject, "mlp_input", "mlp_output") as run:
        logits(subject, texts)
    rebuilt = oracle.reconstruct(dictionary, [run["mlp_input", layer].flatten(0, 1) for layer in range(3)])
    for layer in range(3):
        found, expected = run["mlp_output", layer], rebuilt[layer].unflatten(0, texts.ids.shape)
        torch.testing.assert_close(real(texts, found), real(texts, expected), rtol=1e-9, atol=1e-9)
    assert spliced["m2"].width == 20
    with (
        pytest.raises(SettingsError, match="rule topk chooses among the latents of all layers"),
        splice(subject, {"m0": made(cross_layer((0, 1, 2), W, 20, Rule("topk", 4)))}),
    ):
        pass


@every_family
def test_it_holds_in_generate(family: str) -> None:
    subject = families.subject(family, torch.float64)
    dictionary = made(autoencoder("resid1", W, M, Rule("relu")))
    ids, options = TEXTS[0][None], {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    plain = subject.plain.generate(ids, **options)
    with splice(subject, {"resid1": dictionary}) as spliced:
        assert torch.equal(subject.plain.generate(ids, **options), plain)
        assert spliced.shape == (1, 1)
    edit = steered("resid1.f4,resid1.f9", -40.0)
    with splice(subject, {"resid1": dictionary}, edit):
        generated = subject.plain.generate(ids, **options)
    # the words are those that passes without a cache give
    text = ids
    for _ in range(6):
        with splice(subject, {"resid1": dictionary}, edit), torch.no_grad():
            last = subject.plain(text, use_cache=False).logits[:, -1]
        last[:, subject.plain.config.eos_token_id] = -torch.inf
        text = torch.cat([text, last.argmax(-1)[:, None]], dim=1)
    assert torch.equal(generated, text)
    assert not torch.equal(generated, plain)
    assert torch.equal(subject.plain.generate(ids, **options), plain)


def test_what_cannot_be_spliced_is_refused_by_name() -> None:
    subject = families.subject("llama", torch.float64)
    one = made(autoencoder("resid1", W, M, Rule("relu")))
    cases: list[tuple[Any, tuple[LatentEdit, ...], str]] = [
        ({"resid0": one}, (), "given for resid0 writes at resid1"),
        ({"resid1": one}, (ablated("resid0.f3"),), "latent resid0.f3 belongs to no spliced dictionary: they write resid1"),
        ({"resid1": one}, (ablated("resid1.f50"),), "latent resid1.f50 does not exist: the dictionary has 50"),
        ({"m0.in": made(autoencoder("m0.in", W, M, Rule("relu")))}, (), "m0.in is read by the MLP and written by no one"),
        ({"resid0": made(crosscoder("resid0,resid2", (W, W), M, Rule("relu")))}, (), "cannot write at resid0, which comes first"),
    ]
    for given, edits, words in cases:
        with pytest.raises(SettingsError, match=words), splice(subject, given, *edits):
            pass
