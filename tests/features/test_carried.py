"""What latents carry equals what hooks written by hand give: their part added to the base and taken from the tuned model, all else left as it is."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from mechscope.errors import MechscopeError, ModelError, SettingsError
from mechscope.features import crosscoder
from mechscope.features.affine import Affine
from mechscope.features.dictionary import Dictionary
from mechscope.features.diffing import LatentSet, alike, carried, contributed, latent_scaling
from mechscope.features.layout import Layout, autoencoder
from mechscope.features.rules import Rule
from mechscope.instrument import Execution
from mechscope.settings.features import TokenSettings
from mechscope.subject import Pair, Subject, pair
from mechscope.subject.load import load
from tests import families
from tests.causal.pairs import random_pairs
from tests.difference.oracle import models
from tests.features import oracle

W = families.WIDTH
FAMILIES = ("gpt2", "llama", "gpt_neox", "gemma2")
TOKENS = TokenSettings(first=2, outlier=None)
TEXTS = random_pairs(5)
SETS = {
    "some": LatentSet((3, 17, 4)),
    "all": LatentSet(),
    "none": LatentSet(()),
    "whole": LatentSet(instead="whole"),
    "drawn": LatentSet((3, 17, 4), draw=1),
    "mean": LatentSet(instead="mean"),
}


def given(where: str) -> Dictionary:
    """Return a random comparison whose places have maps of their own."""
    count = len(where.split(","))
    layout = crosscoder(where, (W,) * count, 30, Rule("topk", 8))
    made = oracle.dictionary(layout)
    maps = tuple(Affine(0.5 + at, torch.linspace(-1, 1 + at, W, dtype=torch.float64)) for at in range(count))
    return Dictionary(layout, {name: tensor * 0.3 for name, tensor in made.tensors.items()}, maps, maps)


@torch.no_grad()
def run(subject: Subject, ids: list[int], layers: list[int], added: list[Tensor] | None = None) -> tuple[list[Tensor], Tensor]:
    """Return the residual streams behind blocks and the losses of all tokens but the first, with something put in place of the streams."""
    seen: list[Tensor] = []

    def hook(number: int) -> Any:
        def put(module: Any, args: Any, output: Any) -> Any:
            stream = output[0] if isinstance(output, tuple) else output
            seen.append(stream[0].clone())
            if added is None:
                return None
            changed = stream.clone()
            changed[0, 2:] = added[number][2:]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return put

    handles = [subject.anatomy.blocks[layer].module.register_forward_hook(hook(number)) for number, layer in enumerate(layers)]
    try:
        logits = subject.plain(torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    losses = -logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return seen, losses


def by_hand(both: Pair, dictionary: Dictionary, layers: list[int], latents: list[int] | None, *, how: str = "") -> np.ndarray:
    """Return the losses on targets of base, tuned, base with latents put in, and tuned with them taken out, by text."""
    found = []
    for text in TEXTS:
        ids, count = list(text.clean), len(layers)
        (base, own), (tuned, theirs) = (run(subject, ids, layers) for subject in (both.base, both.tuned))
        differences = [two - one for one, two in zip(base, tuned, strict=True)]
        values = differences if len(dictionary.layout.inputs) == count else [*base, *tuned]
        f = oracle.encode(dictionary, values)
        decoders = [
            part / each.scale for part, each in zip(dictionary.tensors["decoder.0"].split(W, dim=1), dictionary.output_maps, strict=True)
        ]
        rows = decoders if len(decoders) == count else [two - one for one, two in zip(decoders[:count], decoders[count:], strict=True)]
        chosen = list(range(30)) if latents is None else latents
        shifts = differences if how == "whole" else [f[:, chosen] @ each[chosen] for each in rows]
        if how == "mean":
            centres = [each.centre for each in dictionary.output_maps]
            shifts = centres if len(decoders) == count else [two - one for one, two in zip(centres[:count], centres[count:], strict=True)]
        _, into = run(both.base, ids, layers, [x + shift for x, shift in zip(base, shifts, strict=True)])
        _, out = run(both.tuned, ids, layers, [x - shift for x, shift in zip(tuned, shifts, strict=True)])
        assert text.target is not None
        start = text.target[0] - 1
        found.append([each[start:].mean().item() for each in (own, theirs, into, out)])
    return np.array(found).T


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["base:resid1,tuned:resid1", "difference:resid0"])
def test_sets_are_put_in_and_taken_out_as_by_hooks_written_by_hand(family: str, where: str) -> None:
    both, dictionary = models(family), given(where)
    layers = [int(where[-1])]
    # Hugging Face's Gemma rounds to float32 within its attention
    tolerance = 1e-6 if family == "gemma2" else 1e-9
    # one batch of texts that are padded, and one batch each
    for tokens in (100, 1):
        found = carried(both, dictionary, TEXTS, SETS, tokens=TOKENS, execution=Execution(tokens))
        for name, latents in (("some", [3, 17, 4]), ("all", None), ("whole", None), ("mean", None)):
            expected = by_hand(both, dictionary, layers, latents, how=name)
            for value, wanted in zip((found.base, found.tuned, found.into_base[name], found.out_of_tuned[name]), expected, strict=True):
                np.testing.assert_allclose(value, wanted, rtol=tolerance)
            assert not np.allclose(expected[2], expected[0], atol=1e-6)
        # no latents are not all of them: they put nothing in and take nothing out
        assert found.energy["none"] == 0 < found.energy["all"]
        np.testing.assert_allclose(found.into_base["none"], found.base, rtol=tolerance)
        np.testing.assert_allclose(found.out_of_tuned["none"], found.tuned, rtol=tolerance)


def test_latents_of_several_places_stand_in_both_with_the_undisturbed_streams() -> None:
    both, dictionary = models("llama"), given("base:resid0,base:resid2,tuned:resid0,tuned:resid2")
    found = carried(both, dictionary, TEXTS, {"some": LatentSet((3, 4))}, tokens=TOKENS)
    expected = by_hand(both, dictionary, [0, 2], [3, 4])
    np.testing.assert_allclose(found.into_base["some"], expected[2], rtol=1e-9)
    np.testing.assert_allclose(found.out_of_tuned["some"], expected[3], rtol=1e-9)


def test_latents_are_as_large_as_what_they_put_in_alone() -> None:
    both, dictionary = models("gpt2"), given("base:resid0,base:resid2,tuned:resid0,tuned:resid2")
    rows, maps = dictionary.tensors["decoder.0"], dictionary.output_maps
    # one that both models have alike says nothing of the difference, however active it is
    for at in (0, 1):
        rows[5, (at + 2) * W : (at + 3) * W] = rows[5, at * W : (at + 1) * W] * (maps[at + 2].scale / maps[at].scale)
    alone = carried(both, dictionary, TEXTS, {str(latent): LatentSet((latent,)) for latent in range(30)}, tokens=TOKENS).energy
    table = latent_scaling({"base": both.base, "tuned": both.tuned}, dictionary, TEXTS, tokens=TOKENS, other_model=True)
    squares = (table["energy"] / (table["norm_first"] ** 2 + table["norm_second"] ** 2)).to_numpy()
    energy = contributed(dictionary, squares)
    np.testing.assert_allclose(energy, list(alone.values()), rtol=1e-6, atol=1e-12)
    assert squares[5] > 0
    assert energy[5] < 1e-12


def test_random_vectors_are_as_long_as_the_latents_own_and_other_vectors() -> None:
    both, dictionary = models("gpt2"), given("base:resid1,tuned:resid1")
    energy = carried(both, dictionary, TEXTS, {str(latent): LatentSet((latent,)) for latent in range(30)}, tokens=TOKENS).energy
    most = max(energy, key=lambda name: energy[name])
    sets = {"own": LatentSet((int(most),)), **{str(draw): LatentSet((int(most),), draw=draw) for draw in (5, 6)}}
    found = carried(both, dictionary, TEXTS, sets, tokens=TOKENS)
    assert found.energy["5"] == pytest.approx(energy[most], rel=1e-9)
    assert found.energy["6"] == pytest.approx(energy[most], rel=1e-9)
    assert len({tuple(found.into_base[name]) for name in sets}) == 3


def test_random_vectors_of_two_places_are_others() -> None:
    both, dictionary = models("gpt2"), given("base:resid0,base:resid1,tuned:resid0,tuned:resid1")
    read: dict[int, list[Tensor]] = {1: [], 2: []}

    def note(layer: int) -> Any:
        return lambda module, args: read[layer].append(args[0].detach().clone())

    handles = [both.base.anatomy.blocks[layer].module.register_forward_pre_hook(note(layer)) for layer in read]
    try:
        energy = carried(both, dictionary, TEXTS.first(1), {str(j): LatentSet((j,)) for j in range(30)}, tokens=TOKENS).energy
        latent = int(max(energy, key=lambda name: energy[name]))
        for inputs in read.values():
            inputs.clear()
        carried(both, dictionary, TEXTS.first(1), {"drawn": LatentSet((latent,), draw=1)}, tokens=TOKENS)
    finally:
        for handle in handles:
            handle.remove()
    # what the block behind each place reads, first undisturbed, last with the vectors put in: a multiple of one vector
    one, two = (torch.linalg.svd((inputs[-1] - inputs[0])[0, 2:], full_matrices=False) for inputs in read.values())
    assert one.S[1] < 1e-9 * one.S[0]
    assert two.S[1] < 1e-9 * two.S[0]
    assert abs(float(one.Vh[0] @ two.Vh[0])) < 0.9


def test_tokens_above_a_known_norm_are_left_alone() -> None:
    both, dictionary = models("gpt2"), given("base:resid1,tuned:resid1")
    base, tuned = (torch.cat([run(subject, list(text.clean), [1])[0][0][2:] for text in TEXTS]) for subject in (both.base, both.tuned))
    norms = base.norm(dim=1)
    limit = float(norms.median()) + 1e-6
    moved = (tuned - base).square().sum(1)
    whole = {"whole": LatentSet(instead="whole")}
    # of places that are not read nothing is taken
    found = carried(both, dictionary, TEXTS, whole, tokens=TOKENS, limits={"base:resid1": limit, "base:resid2": 0.0})
    assert found.energy["whole"] == pytest.approx(float(moved[norms <= limit].mean()))
    none = carried(both, dictionary, TEXTS, whole, tokens=TOKENS, limits={"tuned:resid1": 0.0})
    assert none.energy["whole"] == 0
    np.testing.assert_allclose(none.into_base["whole"], none.base, rtol=1e-12)


def test_where_heads_and_mlps_write_all_of_the_difference_makes_the_last_block_the_other_models() -> None:
    # what the last block adds, and what it read: nothing else of the tuned model stands behind them
    both = models("gpt2")
    where = "base:resid1,base:a2,base:m2,tuned:resid1,tuned:a2,tuned:m2"
    whole = {"whole": LatentSet(instead="whole")}
    found = carried(both, given(where), TEXTS, whole, tokens=TokenSettings(first=0, outlier=None))
    last = carried(both, given("base:resid2,tuned:resid2"), TEXTS, whole, tokens=TokenSettings(first=0, outlier=None))
    np.testing.assert_allclose(found.into_base["whole"], last.into_base["whole"], rtol=1e-9)
    z = carried(both, given("base:a2.z,tuned:a2.z"), TEXTS, whole, tokens=TokenSettings(first=0, outlier=None))
    assert not np.allclose(z.into_base["whole"], z.base)


def test_an_adapter_is_compared_with_its_base_as_its_merged_model_is() -> None:
    config = LoraConfig(r=3, lora_alpha=30, target_modules=["o_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = load(get_peft_model(families.build("llama", torch.float64), config).to(torch.float64))
    merged = load(copy.deepcopy(adapted.model).merge_and_unload())
    dictionary, sets = given("base:resid1,tuned:resid1"), {"some": LatentSet((3, 17, 4)), "whole": LatentSet(instead="whole")}
    base = load(families.build("llama", torch.float64))
    pairs = [pair(adapted.without_adapter(), adapted), pair(base, merged)]
    one, two = (carried(both, dictionary, TEXTS, sets, tokens=TOKENS) for both in pairs)
    assert not np.allclose(two.base, two.tuned, atol=1e-3)
    for name in ("base", "tuned"):
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), rtol=1e-9)
    for name in sets:
        np.testing.assert_allclose(one.into_base[name], two.into_base[name], rtol=1e-9)
        np.testing.assert_allclose(one.out_of_tuned[name], two.out_of_tuned[name], rtol=1e-9)
    scaled = [
        latent_scaling({"base": both.base, "tuned": both.tuned}, dictionary, TEXTS, tokens=TOKENS, other_model=True)["nu_error"]
        for both in pairs
    ]
    np.testing.assert_allclose(scaled[0], scaled[1], rtol=1e-9)


def test_models_that_are_equal_have_nothing_to_carry() -> None:
    base = models("gpt2").base
    found = carried(Pair(base, base, 97), given("base:resid1,tuned:resid1"), TEXTS, {"whole": LatentSet(instead="whole")}, tokens=TOKENS)
    assert (found.base == found.tuned).all()
    np.testing.assert_allclose(found.into_base["whole"], found.base, rtol=1e-12)
    assert found.energy["whole"] == 0


def test_other_latents_are_those_that_are_about_as_large() -> None:
    energy = np.array([1.0, 1.1, 0.0, 100.0, 90.0, 1.2, 0.9, 110.0, 1e-6])
    for seed in range(20):
        drawn = alike([0, 3], energy, seed=seed, among=2)
        assert len(set(drawn)) == 2
        assert not {0, 3, 2} & set(drawn)
        assert sorted(energy[list(drawn)] > 50) == [False, True]
        assert 8 not in drawn
    assert len({alike([0, 3], energy, seed=seed) for seed in range(20)}) > 3
    # of fewer latents than that, all there are
    assert alike([0, 1, 3, 4], energy, seed=0) == (5, 6, 7, 8)
    # the one that is never active is not among them
    assert alike([0, 1, 3, 4, 5], energy, seed=0) == (6, 7, 8)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (autoencoder("resid1", W, 30, Rule("topk", 8)), "is no comparison of base and tuned"),
        (crosscoder("base:resid1,tuned:resid2", (W, W), 30, Rule("topk", 8)), "is no comparison of base and tuned"),
        (crosscoder("base:m1.in,tuned:m1.in", (W, W), 30, Rule("topk", 8)), "tested where models write"),
    ],
)
def test_dictionaries_that_say_nothing_of_a_difference_are_refused(layout: Layout, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        carried(models("gpt2"), oracle.dictionary(layout), TEXTS, SETS)


def test_latents_and_texts_that_do_not_fit_are_refused() -> None:
    both, dictionary = models("gpt2"), given("base:resid1,tuned:resid1")
    with pytest.raises(SettingsError, match="latent 30 does not exist: the dictionary has 30"):
        carried(both, dictionary, TEXTS, {"wrong": LatentSet((30,))})
    with pytest.raises(SettingsError, match="takes the mean difference instead of what latents say"):
        LatentSet((1,), instead="mean")
    bare = replace(TEXTS, pairs=tuple(replace(pair, target=None) for pair in TEXTS))
    with pytest.raises(MechscopeError, match="target"):
        carried(both, dictionary, bare, SETS)
