"""A harvest holds what Hugging Face's modules put out, of ordinary tokens only, and is continued, described and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechscope.data.pairs import Pairs, PromptPair, collate_pairs, from_tokens
from mechscope.errors import DataError, RunError, SettingsError
from mechscope.features import activations as harvesting
from mechscope.features.activations import Harvest, Live, harvest
from mechscope.features.batches import Position, batches
from mechscope.features.places import Place, places
from mechscope.features.rows import Reader
from mechscope.instrument import Execution
from mechscope.settings.features import HarvestSettings, TokenSettings
from mechscope.store import tables
from mechscope.subject import Subject
from mechscope.subject.load import load
from tests import families

FAMILIES = ("gpt2", "llama", "gpt_neox", "gemma2", "opt")
WHERE = places("resid0,a1,m1,m1.in,a0.z")
LENGTHS = (14, 9, 11, 6, 12)
# names of the modules in each family: block, attention's projection, MLP (what it reads)
MODULES = {
    "gpt2": ("transformer.h.{}", "attn.c_proj", "mlp"),
    "llama": ("model.layers.{}", "self_attn.o_proj", "mlp"),
    "gpt_neox": ("gpt_neox.layers.{}", "attention.dense", "mlp"),
    "gemma2": ("model.layers.{}", "self_attn.o_proj", "mlp"),
    "opt": ("model.decoder.layers.{}", "self_attn.out_proj", "fc1"),
}
WRITES = {"opt": ("self_attn", "fc2"), "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm")}


def texts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Pairs:
    rows = families.documents(lengths=lengths, seed=seed)
    return Pairs(tuple(from_tokens(row[None]).pairs[0] for row in rows), "made for tests")


def truth(subject: Subject, family: str, ids: tuple[int, ...]) -> dict[str, Tensor]:
    """Return what stands at the places for one text, by hooks on the family's own modules."""
    held: dict[str, Tensor] = {}
    block, projection, reads = MODULES[family]
    attention, mlp = WRITES.get(family, (projection.split(".")[0], "mlp"))

    def hook(name: str, module: str, *, of_input: bool = False) -> Any:
        def keep(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            value = (args[0] if args else kwargs["hidden_states"]) if of_input else output
            value = value[0] if isinstance(value, tuple) else value
            held[name] = value.reshape(len(ids), -1)

        return subject.plain.get_submodule(module).register_forward_hook(keep, with_kwargs=True)

    first, second = (block.format(layer) for layer in (0, 1))
    hooks = [
        hook("resid0", first),
        hook("a1", f"{second}.{attention}"),
        hook("m1", f"{second}.{mlp}"),
        hook("m1.in", f"{second}.{reads}", of_input=True),
        hook("a0.z", f"{first}.{projection}", of_input=True),
    ]
    with torch.no_grad():
        subject.plain(torch.tensor([ids]), use_cache=False)
    for each in hooks:
        each.remove()
    return held


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_those_of_the_models_own_modules(family: str) -> None:
    subject, given = families.subject(family, torch.float64), texts()
    # Gemma takes its norms and its softmax in float32, whatever the type
    settings, tolerance = HarvestSettings(outlier=None), 1e-5 if family == "gemma2" else 1e-9
    rows = Live(subject, given, WHERE, settings=settings, execution=Execution(tokens_per_batch=30)).rows(0)
    assert len(rows) == sum(LENGTHS) - len(LENGTHS)
    for index, pair in enumerate(given):
        expected = truth(subject, family, pair.clean)
        own = rows.text == index
        # the first token of each text is an attention sink
        assert rows.position[own].tolist() == list(range(1, len(pair.clean)))
        for place in WHERE:
            torch.testing.assert_close(rows.values[place][own], expected[place.name][1:], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str, padding: Any) -> None:
    subject, given = families.subject(family, torch.float64), texts()
    reader = Reader(subject, WHERE, TokenSettings(outlier=None))
    together = reader.rows(collate_pairs(given.pairs, padding=padding))
    for index, pair in enumerate(given):
        alone = reader.rows(collate_pairs([pair]))
        own = together.text == index
        assert torch.equal(together.position[own], alone.position)
        for place in WHERE:
            torch.testing.assert_close(together.values[place][own], alone.values[place], rtol=1e-9, atol=1e-9)


def test_blocks_behind_the_last_place_are_not_run() -> None:
    subject = families.subject("llama")
    run = []
    hooks = [
        block.module.register_forward_pre_hook(lambda *_, layer=layer: run.append(layer))
        for layer, block in enumerate(subject.anatomy.blocks)
    ]
    try:
        Reader(subject, places("a1"), TokenSettings()).rows(collate_pairs(texts().pairs))
    finally:
        for hook in hooks:
            hook.remove()
    assert run == [0, 1]


def test_tokens_with_an_outlying_norm_are_left_out_at_all_places() -> None:
    subject, given = families.subject("gpt2", torch.float64), texts()
    plain = Live(subject, given, "resid0,m1", settings=HarvestSettings(outlier=None)).rows(0)
    norms = plain.values[Place("residual", 0)].norm(dim=1)
    bound = 1.2
    live = Live(subject, given, "resid0,m1", settings=HarvestSettings(outlier=bound))
    others = plain.values[Place("mlp_output", 1)].norm(dim=1)
    keep = (norms <= bound * norms.median()) & (others <= bound * others.median())
    rows = live.rows(0)
    assert 0 < keep.sum() < len(keep)
    assert rows.left_out == {"first": len(given), "outlier": int((~keep).sum())}
    torch.testing.assert_close(rows.values[Place("residual", 0)], plain.values[Place("residual", 0)][keep])


def test_two_models_are_read_token_by_token() -> None:
    models = {"base": families.subject("llama", torch.float64), "tuned": families.subject("llama", torch.float64, seed=1)}
    live = Live(models, texts(), "base:resid1,tuned:resid1", settings=HarvestSettings(outlier=None))
    rows = live.rows(0)
    for name, subject in models.items():
        alone = Live(subject, texts(), "resid1", settings=HarvestSettings(outlier=None)).rows(0)
        torch.testing.assert_close(rows.values[Place("residual", 1, name)], alone.values[Place("residual", 1)])
        assert torch.equal(rows.text, alone.text)
    with pytest.raises(SettingsError, match="is of a model 'tuned', given are 'base'"):
        Live({"base": models["base"]}, texts(), "base:resid1,tuned:resid1")


SMALL = HarvestSettings(rows=12)


def test_a_folder_describes_itself_and_holds_what_the_model_gives(tmp_path: Path) -> None:
    subject, given = families.subject("gpt2"), texts()
    found = harvest(subject, given, "resid0,m1", tmp_path / "h", settings=SMALL)
    live = Live(subject, given, "resid0,m1", settings=SMALL)
    assert found.blocks == live.blocks >= 3
    assert found.about["models"] == {"": subject.fingerprint}
    assert (found.about["texts"], found.about["widths"]) == (given.hash, {"resid0": 32, "m1": 32})
    assert len(found) == sum(LENGTHS) - len(LENGTHS) - found.about["left_out"]["outlier"]
    every = []
    for number in range(found.blocks):
        one, other = found.rows(number), live.rows(number)
        assert torch.equal(one.text, other.text)
        for place in live.places:
            assert torch.equal(one.values[place], other.values[place].half())
        every.append(one.values[Place("residual", 0)].float())
    whole = torch.cat(every).double()
    moments = found.moments(Place("residual", 0))
    np.testing.assert_allclose(moments.mean, whole.mean(0), rtol=1e-9)
    np.testing.assert_allclose(moments.variance, whole.var(0), rtol=1e-9)
    u = found.affine(Place("residual", 0))(whole.float())
    assert u.mean(0).abs().max() < 1e-5
    assert float(u.square().sum(1).mean()) == pytest.approx(1, abs=1e-5)


def test_a_killed_harvest_goes_on_behind_its_last_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, given = families.subject("gpt2"), texts()
    done = harvest(subject, given, "resid0", tmp_path / "whole", settings=SMALL)
    write, written, ran = tables.write_tensors, list[str](), list[str]()

    def fails(tensors: Any, path: Path, **options: Any) -> None:
        if len(written) == done.blocks - 1:
            raise RunError("cannot write: no space left on device")
        written.append(path.name)
        write(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(harvesting, "write_tensors", fails)
        with pytest.raises(RunError, match="no space left"):
            harvest(subject, given, "resid0", tmp_path / "h", settings=SMALL)
    assert not (tmp_path / "h").exists()

    def noted(tensors: Any, path: Path, **options: Any) -> None:
        ran.append(path.name)
        write(tensors, path, **options)

    monkeypatch.setattr(harvesting, "write_tensors", noted)
    again = harvest(subject, given, "resid0", tmp_path / "h", settings=SMALL)
    assert ran == [f"block-{done.blocks - 1:05}.safetensors"]
    for number in range(again.blocks):
        assert torch.equal(again.block(number)[again.places[0]], done.block(number)[again.places[0]])
    ran.clear()
    harvest(subject, given, "resid0", tmp_path / "h", settings=SMALL)
    assert ran == []
    with pytest.raises(RunError, match="other settings or data"):
        harvest(subject, given, "resid1", tmp_path / "h", settings=SMALL)


def test_a_changed_folder_is_found_out(tmp_path: Path) -> None:
    found = harvest(families.subject("gpt2"), texts(), "resid0", tmp_path / "h", settings=SMALL)
    found.verify()
    file = tmp_path / "h" / "block-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match=r"changed after it was finished \(block-00001"):
        found.verify()
    with pytest.raises(RunError, match="cannot read"):
        Harvest(tmp_path)


def test_batches_hold_every_row_once_and_go_on_from_any_position(tmp_path: Path) -> None:
    given = texts(lengths=(14, 9, 11, 6, 12, 15, 8))
    source = harvest(families.subject("gpt2"), given, "resid0,m1", tmp_path / "h", settings=HarvestSettings(rows=20, outlier=None))
    place = source.places[0]
    stream = batches(source, 4, seed=3)
    taken = [next(stream) for _ in range(60)]
    whole = torch.cat([source.block(number)[place] for number in range(source.blocks)]).float()
    first = [rows[place] for at, rows in taken if at.round == 0]
    seen = (torch.cat(first)[:, None] == whole).all(-1).sum(0)
    assert seen.max() == 1
    # at most the rest of each block is left out
    assert int((seen == 0).sum()) == sum(count % 4 for count in source.about["rows"])
    second = [rows[place] for at, rows in taken if at.round == 1]
    assert not torch.equal(first[0], second[0])
    for position in (0, 7, 23, len(first) - 1):
        again = batches(source, 4, 3, taken[position][0])
        for at, rows in taken[position + 1 : position + 4]:
            there, found = next(again)
            assert there == at
            assert all(torch.equal(found[each], rows[each]) for each in source.places)
    assert taken[0][0] == Position(0, 0, 1)


def test_texts_of_which_nothing_is_left_and_values_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    subject = families.subject("gpt2")
    with pytest.raises(DataError, match=r"no token of the 2 texts .* set first=0"):
        harvest(subject, Pairs((PromptPair("a", (5,), (5,)), PromptPair("b", (6,), (6,))), "made"), "resid0", tmp_path / "h")
    source = Live(subject, texts(), "resid0")
    with pytest.raises(DataError, match="no block of activations holds the 500 rows"):
        next(batches(source, 500, 0))
    large = families.build("gpt2")
    with torch.no_grad():
        large.transformer.h[0].mlp.c_proj.weight *= 1e6
    with pytest.raises(DataError, match="more than float16 holds"):
        harvest(load(large), texts(), "m0", tmp_path / "h2", settings=HarvestSettings(outlier=None))
