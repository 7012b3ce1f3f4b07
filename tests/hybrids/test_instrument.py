"""What mixes tokens other than by attention is recorded, changed and resumed as plain Hugging Face has it, and heads are only where layers attend."""

from __future__ import annotations

import pytest
import torch

from mechscope.errors import ModelError, SettingsError
from mechscope.instrument import CachedRun, Edit, Knockout, Reading, intervene, load, record, unembed
from mechscope.instrument.edits import EditSite
from mechscope.instrument.trust import check_subject
from mechscope.instrument.walk import model_inputs
from mechscope.instrument.wiring import Wiring
from mechscope.subject import Components
from mechscope.subject.components import chosen_heads
from tests import families
from tests.hybrids.plain import ATTENDS, FACTORS, FAMILIES, MIXES, assert_close, giving, logits, mixer, model, outputs, shifted, subject
from tests.matrix.configs import VOCABULARY
from tests.matrix.plain import build

TEXTS = families.documents(VOCABULARY, seed=1, lengths=(12, 7))
SIDES = ("left", "right")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_anatomy_says_which_layers_attend(family: str) -> None:
    anatomy = subject(family).anatomy
    assert (anatomy.attending, anatomy.mixing) == ((ATTENDS,), MIXES)
    assert list(anatomy.heads()) == [(ATTENDS, head) for head in range(anatomy.n_heads)]
    plain = subject(family).plain
    for layer in MIXES:
        assert anatomy.blocks[layer].mixing.module is mixer(plain, family, layer)
    assert all(check.passed for check in check_subject(subject(family)) if check.required)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_mixer_adds_is_recorded_wherever_the_padding_stands(family: str, side: str) -> None:
    here, batch = subject(family), families.padded(TEXTS, side)
    with record(here, "embedding", "attention_output", "mixer_output", "mlp_output", "residual", "z") as recording:
        here.model(**model_inputs(batch.ids, batch.real), use_cache=False)
    for row, text in enumerate(TEXTS):
        for layer in MIXES:
            expected = outputs(model(family), mixer(model(family), family, layer), tuple(text.tolist())) * FACTORS.get(family, 1.0)
            assert_close(batch.rows(recording["mixer_output", layer], row), expected)
    assert {layer for site, layer in recording.values if site in ("z", "attention_output")} == {ATTENDS}
    assert {layer for site, layer in recording.values if site == "mixer_output"} == set(MIXES)
    total = recording["embedding"] + sum(recording.mixed(layer) + recording["mlp_output", layer] for layer in range(3))
    assert_close(total[batch.real], recording["residual", 2][batch.real])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("layer", MIXES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_mixer_is_the_plain_model_with_a_hook_in_one_pass_and_resumed(family: str, layer: int, side: str) -> None:
    here, plain, batch = subject(family), model(family), families.padded(TEXTS, side)
    shift = torch.randn(here.anatomy.d_model, generator=torch.Generator().manual_seed(3)).double()
    for scale, added in ((0.0, 0.0), (1.0, 1.0), (-0.5, 0.0)):
        edit = Edit("mixer_output", layer, shifted(shift * added, scale))
        # what is edited is what is added: with the family's factor on it
        with giving(mixer(plain, family, layer), shifted(shift * added / FACTORS.get(family, 1.0), scale)):
            expected = torch.cat([logits(plain, tuple(text.tolist())) for text in TEXTS])
        with intervene(here, edit):
            found = here.model(**model_inputs(batch.ids, batch.real), use_cache=False).logits
        assert_close(found[batch.real], expected)
        run = CachedRun(here, batch.ids, batch.real, sites=("mixer_output",))
        ((_, rows),) = run.rerun([[edit]], Reading.of(batch.real))
        assert_close(unembed(here, rows[0]), expected)


def test_a_pair_that_a_block_unpacks_is_handed_on_by_the_walk() -> None:
    # Bamba's code unpacks what its blocks return, for any number of texts
    plain = build("bamba", 0, torch.float64)
    here = load(plain)
    for lengths in ((9,), (9, 6), (9, 6, 5)):
        batch = families.padded(families.documents(VOCABULARY, seed=2, lengths=lengths), "left")
        run = CachedRun(here, batch.ids, batch.real)
        expected = plain(**model_inputs(batch.ids, batch.real), use_cache=False).logits[batch.real]
        assert_close(unembed(here, run.read(Reading.of(batch.real))), expected)


@pytest.mark.parametrize("family", ["qwen3_next", "bitnet"])
def test_heads_are_rerun_through_what_stands_between_them_and_their_projection(family: str) -> None:
    here = load(build(family, 0, torch.float64))
    assert not here.heads_write
    batch, edit = families.padded(TEXTS, "left"), Edit("z", 1, 0.0, heads=(2,))
    with intervene(here, edit):
        expected = here.model(**model_inputs(batch.ids, batch.real), use_cache=False).logits[batch.real]
    run = CachedRun(here, batch.ids, batch.real, sites=("z",))
    units = [[edit], [Edit("query", 1, 0.0, heads=(0,))], [edit, Edit("mlp_output", 2, 0.0)]]
    for members, rows in run.rerun(units, Reading.of(batch.real)):
        for number, row in zip(members, rows, strict=True):
            with intervene(here, *units[number]):
                expected = here.model(**model_inputs(batch.ids, batch.real), use_cache=False).logits[batch.real]
            assert_close(unembed(here, row), expected)
    with (
        pytest.raises(ModelError, match=rf"{family}: something \(a gate, a norm\) stands between its heads and their output projection"),
        record(here, "head_output"),
    ):
        here.model(**model_inputs(batch.ids, batch.real), use_cache=False)


def test_a_gate_belongs_to_its_head() -> None:
    anatomy = subject("qwen3_next").anatomy
    heads = anatomy.blocks[ATTENDS].own_heads
    assert heads.gate is not None
    rows = [row for part in (heads.query, heads.gate) for head in range(anatomy.n_heads) for row in part.features(head).tolist()]
    assert sorted(rows) == list(range(2 * anatomy.n_heads * anatomy.d_query))


@pytest.mark.parametrize("site", ["query", "z", "pattern", "attention_output"])
def test_a_layer_without_heads_says_what_it_has_instead(site: EditSite) -> None:
    here, message = subject("lfm2"), "layers 0, 2 do not attend, so they have no heads; what mixes tokens there adds mixer_output"
    with pytest.raises(SettingsError, match=f"layer 2 has no {site} to change: {message}"), intervene(here, Edit(site, 2, 0.0)):
        pass
    with pytest.raises(SettingsError, match=f"layer 2 has no {site}: {message}"), record(here, site, layers=[1, 2]):
        pass
    seen = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(SettingsError, match=f"layer 0 has no mask to change: {message}"), intervene(here, Knockout(0, seen, seen)):
        pass
    with (
        pytest.raises(SettingsError, match="layer 1 has no mixer_output to change: it attends"),
        intervene(here, Edit("mixer_output", 1, 0.0)),
    ):
        pass
    with pytest.raises(SettingsError, match="all its layers attend"), record(families.subject("gpt2"), "mixer_output"):
        pass


def test_mixers_are_components_in_the_text_form() -> None:
    anatomy = subject("jamba").anatomy
    chosen = Components.parse("mixer2, a1.h3, mixer0")
    assert (chosen, str(chosen)) == (Components(heads=((1, 3),), mixers=(0, 2)), "a1.h3,mixer0,mixer2")
    assert Components.parse(str(chosen)) == chosen == chosen.validate(anatomy)
    assert Components.parse("layers:0-1").expand(2, anatomy.mixing) == Components.parse("mixer0,m0,a1.h0,a1.h1,m1")
    for text, why in (
        ("a0.h1", "component a0.h1 does not exist: layers 0, 2 do not attend; what mixes tokens there is written mixer0"),
        ("mixer1", "component mixer1 does not exist: layer 1 attends"),
        ("mixer3", "component mixer3 does not exist: the model has layers 0-2"),
    ):
        with pytest.raises(SettingsError, match=why):
            Components.parse(text).validate(anatomy)
    with pytest.raises(SettingsError, match="component mixer0 does not exist: layer 0 attends, as all layers do"):
        Components.parse("mixer0").validate(families.subject("gpt2").anatomy)
    assert chosen_heads(anatomy, None) == tuple((1, head) for head in range(anatomy.n_heads))


@pytest.mark.parametrize("family", ["lfm2", "jamba", "granitemoehybrid"])
def test_norms_are_found_in_layers_that_attend_and_in_those_that_do_not(family: str) -> None:
    wiring = Wiring(subject(family))
    assert [wiring.attention_norm(layer) is not None for layer in range(3)] == [False, True, False]
    assert all(wiring.mlp_norm(layer) is not None for layer in range(3))


@pytest.mark.parametrize(("family", "holds"), [("gemma2", True), ("granitemoe", True), ("afmoe", False), ("beam", False)])
def test_what_stands_between_heads_and_their_projection_is_seen_beside_norms_and_factors_behind_it(family: str, holds: bool) -> None:
    plain = build(family, 0, torch.float64)
    if family == "granitemoe":
        plain.config.residual_multiplier = 0.5
        for block in plain.model.layers:
            block.residual_multiplier = 0.5
    here, batch, edit = load(plain), families.padded(TEXTS, "left"), Edit("z", 1, 0.0, heads=(2,))
    assert here.heads_write is holds
    with intervene(here, edit):
        expected = here.model(**model_inputs(batch.ids, batch.real), use_cache=False).logits[batch.real]
    run = CachedRun(here, batch.ids, batch.real, sites=("z",))
    ((_, rows),) = run.rerun([[edit]], Reading.of(batch.real))
    assert_close(unembed(here, rows[0]), expected)
