"""Adapters load on their base, act only where they are active, and are refused where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechscope.errors import ModelError
from mechscope.subject.load import is_adapter, load
from tests import families
from tests.subject.saved import IDS, LORA, logits, save, save_adapter, truncate


@pytest.fixture(scope="module", params=sorted(LORA))
def adapter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the directories of a base and of a LoRA adapter on it."""
    base = save(tmp_path_factory.mktemp("base"), request.param)
    return base, save_adapter(tmp_path_factory.mktemp("adapter"), base, request.param)


def test_an_adapter_acts_and_without_it_the_base_acts_exactly(adapter: tuple[Path, Path]) -> None:
    base, tuned = load(adapter[0]), load(adapter[1])
    assert is_adapter(adapter[1])
    assert tuned.is_adapter
    assert tuned.adapted
    assert (logits(tuned) - logits(base)).abs().max() > 1e-2
    assert torch.equal(logits(tuned.without_adapter()), logits(base))
    assert (logits(tuned) - logits(base)).abs().max() > 1e-2, "the adapter acts again"


def test_an_adapter_merged_into_its_base_is_refused(adapter: tuple[Path, Path]) -> None:
    merged = load(adapter[1]).model
    merged.merge_adapter()
    with pytest.raises(ModelError, match=r"merged into the base weights.*unmerge_adapter"):
        load(merged)


def test_the_base_view_nests_in_the_adapters_state_and_gives_it_back_after_an_exception(adapter: tuple[Path, Path]) -> None:
    tuned = load(adapter[1])
    expected, base = logits(tuned), logits(tuned.without_adapter())

    @torch.no_grad()
    def found() -> Tensor:
        return tuned.model(input_ids=IDS).logits

    with tuned.active():
        with tuned.without_adapter().active():
            assert torch.equal(found(), base)
        assert torch.equal(found(), expected)
        with pytest.raises(RuntimeError, match="inside"), tuned.without_adapter().active():
            raise RuntimeError("inside")
        assert torch.equal(found(), expected)


def test_what_is_trained_stays_what_is_trained(adapter: tuple[Path, Path]) -> None:
    tuned = load(adapter[1])
    parameters = dict(tuned.model.named_parameters())
    for number, name in enumerate(name for name in parameters if "lora_" in name):
        parameters[name].requires_grad = number % 2 == 0
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    logits(tuned.without_adapter())
    with tuned.without_adapter().active(), tuned.active():
        assert {name: parameter.requires_grad for name, parameter in parameters.items()} == before
    assert {name: parameter.requires_grad for name, parameter in parameters.items()} == before


def test_an_adapters_weights_are_those_of_the_merged_model(adapter: tuple[Path, Path]) -> None:
    found = dict(load(adapter[1]).weights())
    merged = dict(load(adapter[1]).model.merge_and_unload().named_parameters())
    assert found.keys() == merged.keys()
    for name, value in merged.items():
        torch.testing.assert_close(found[name], value.detach())


def test_the_weights_without_the_adapter_are_the_bases(adapter: tuple[Path, Path]) -> None:
    expected = dict(load(adapter[0]).weights())
    tuned = load(adapter[1])
    found = dict(tuned.without_adapter().weights())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert tuned.without_adapter().fingerprint == load(adapter[0]).fingerprint != tuned.fingerprint


def test_an_adapter_takes_the_tokenizer_of_its_base(adapter: tuple[Path, Path]) -> None:
    assert load(adapter[1]).tokenizer.get_vocab() == families.tokenizer().get_vocab()


def test_modules_saved_whole_with_an_adapter_count_as_its_weights(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "llama")
    folder = save_adapter(tmp_path / "adapter", base, "llama", modules_to_save=["lm_head"])
    stored = load_file(folder / "adapter_model.safetensors")
    name = next(key for key in stored if "lm_head" in key)
    stored[name] = stored[name] * 2
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    tuned = load(folder)
    torch.testing.assert_close(dict(tuned.weights())["lm_head.weight"], stored[name])
    assert torch.equal(dict(tuned.without_adapter().weights())["lm_head.weight"], dict(load(base).weights())["lm_head.weight"])
    assert torch.equal(logits(tuned.without_adapter()), logits(load(base)))


def test_an_adapter_can_be_put_on_a_base_that_has_moved(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", save(tmp_path / "old"), "gpt2")
    expected = logits(load(folder))
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(ModelError, match="old"):
        load(folder)
    assert torch.equal(logits(load(folder, base=tmp_path / "new")), expected)


def test_an_adapter_on_a_model_of_another_kind_is_refused_with_both_names(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", save(tmp_path / "gpt2"), "gpt2")
    other = save(tmp_path / "llama", "llama")
    with pytest.raises(ModelError, match=r"adapter .*adapter' does not fit base model .*llama'"):
        load(folder, base=other)


def test_an_adapter_on_a_model_of_another_width_is_refused(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", save(tmp_path / "base"), "gpt2")
    with pytest.raises(ModelError, match=r"does not fit base model .*size mismatch"):
        load(folder, base=save(tmp_path / "wide", n_embd=64))


def test_an_adapter_whose_file_lacks_a_matrix_is_refused(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", save(tmp_path / "base"), "gpt2")
    stored = load_file(folder / "adapter_model.safetensors")
    del stored[next(name for name in stored if "lora_B" in name)]
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"adapter .* is incomplete, its configuration asks for weights it lacks: .*lora_B"):
        load(folder)


def test_an_adapter_with_a_damaged_file_is_refused(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", save(tmp_path / "base"), "gpt2")
    truncate(folder / "adapter_model.safetensors")
    with pytest.raises(
        ModelError, match=r"^adapter '.*adapter': adapter_model\.safetensors is truncated or corrupt \(.+\): train or save it again$"
    ):
        load(folder)


def test_an_adapter_that_names_no_base_is_refused(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", save(tmp_path / "base"), "gpt2")
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = None
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="does not name its base model: pass the base"):
        load(folder, tokenizer=families.tokenizer())


def test_a_plain_model_has_no_adapter_to_disable() -> None:
    with pytest.raises(ModelError, match="carries no adapter to disable"):
        families.subject("gpt2").without_adapter()
