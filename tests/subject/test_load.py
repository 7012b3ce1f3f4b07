"""Models load from what people have, and what cannot be trusted is refused with the thing, what was found, and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mechscope.errors import ModelError
from mechscope.subject.load import devices_of, load
from tests import families
from tests.subject.saved import IDS, logits, save, truncate

# what people have


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_a_saved_model_loads_with_its_weights_its_tokenizer_and_its_family(tmp_path: Path, family: str) -> None:
    subject = load(save(tmp_path, family))
    assert torch.equal(logits(subject), families.build(family)(input_ids=IDS).logits.detach())
    assert subject.tokenizer.decode(subject.tokenizer.encode("w5 w7")) == "w5 w7"
    assert subject.source == str(tmp_path)
    assert not subject.plain.training
    assert family in repr(subject)


def test_a_model_in_memory_loads_without_a_copy() -> None:
    model = families.build("llama")
    subject = load(model, tokenizer=families.tokenizer())
    assert subject.model is model
    assert not subject.is_adapter


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", torch.bfloat16])
def test_weights_come_in_the_type_asked_for(tmp_path: Path, dtype: str | torch.dtype) -> None:
    subject = load(save(tmp_path), dtype=dtype)
    assert subject.dtype == (dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype))


def test_equal_weights_have_equal_fingerprints_and_one_changed_value_another() -> None:
    one, two, other = (load(families.build("gpt2", seed=seed)) for seed in (0, 0, 1))
    assert one.fingerprint == two.fingerprint != other.fingerprint
    changed = families.build("gpt2")
    with torch.no_grad():
        changed.transformer.h[1].mlp.c_fc.weight[0, 0] += 1e-3
    assert load(changed).fingerprint != one.fingerprint


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_weights_of_a_plain_model_are_its_named_parameters(family: str) -> None:
    subject = families.subject(family)
    assert {name: value.data_ptr() for name, value in subject.weights()} == {
        name: value.data_ptr() for name, value in subject.plain.named_parameters()
    }


# what is refused


def test_a_directory_that_is_not_a_model_is_named_with_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(
        ModelError, match=r"is not a model: it has no config.json \(it holds notes.txt\); give a directory written by save_pr"
    ):
        load(tmp_path)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    with pytest.raises(ModelError, match=r"model.safetensors' is a file: give the directory that holds config.json"):
        load(path)


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model '.*nowhere': no such folder$"):
        load(tmp_path / "nowhere")


def test_a_configuration_that_is_not_json_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot be loaded: .*config\.json"):
        load(tmp_path)


@pytest.mark.parametrize(("content", "message"), [(b"{", "cannot be read"), (b"\xff\xfe", "cannot be read"), (b"[]", "holds a list")])
def test_a_damaged_configuration_of_an_adapter_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(ModelError, match=rf"adapter_config\.json {message}.*: download or save it again"):
        load(tmp_path)


def test_truncated_safetensors_are_refused_with_what_to_do(tmp_path: Path) -> None:
    save(tmp_path)
    truncate(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated or corrupt .*: download or save it again"):
        load(tmp_path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    save(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["transformer.h.1.mlp.c_fc.weight"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lacks 1 weights \(transformer.h.1.mlp.c_fc.weight.*would be random; the checkpoint is incomplete"
    ):
        load(tmp_path)


def test_weights_of_another_shape_than_configured_are_refused(tmp_path: Path) -> None:
    save(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["n_inner"] = 96
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"mlp.c_fc|shape contradicts|size mismatch|mismatch"):
        load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_and_counted(tmp_path: Path, value: float) -> None:
    model = families.build("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[:2, 0] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"parameter transformer.h.1.mlp.c_fc.weight holds 2 values that are NaN or infinite: the checkpoint"
    ):
        load(tmp_path, tokenizer=families.tokenizer())


def test_a_pickled_checkpoint_is_refused_unless_the_user_says_unsafe(tmp_path: Path) -> None:
    save(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has only pickled weights \(.bin\): save it as safetensors, or pass unsafe=True"):
        load(tmp_path)
    assert torch.equal(logits(load(tmp_path, unsafe=True)), families.build("gpt2")(input_ids=IDS).logits.detach())


def test_a_pickle_that_runs_code_is_refused_even_when_unsafe(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Bomb(tmp_path / "went off")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds more than weights"):
        load(tmp_path, unsafe=True)
    assert not (tmp_path / "went off").exists()


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_a_model_without_a_tokenizer_asks_for_one(tmp_path: Path) -> None:
    families.build("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no tokenizer beside it: name one with tokenizer="):
        load(tmp_path)
    assert load(tmp_path, tokenizer=families.tokenizer()).tokenizer is not None


def test_an_unknown_type_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"dtype 'int8' is not known: use one of float64, float32, bfloat16, float16 or auto"):
        load("anything", dtype="int8")


def test_an_unknown_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"device 'abacus' is not known: use auto, cpu, cuda"):
        load(save(tmp_path), device="abacus")


def test_cuda_asked_for_on_a_machine_without_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ModelError, match=r"device 'cuda:0' was asked for, but this machine has no usable CUDA device: use device='cpu' or 'auto'"
    ):
        load(save(tmp_path), device="cuda:0")


def test_a_module_that_is_not_from_transformers_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear is not a Hugging Face PreTrainedModel"):
        load(nn.Linear(2, 2))


def test_spread_gives_the_same_model_where_there_is_one_device(tmp_path: Path):
    folder = save(tmp_path, "llama")
    plain, spread = load(folder, device="cpu"), load(folder, device="spread")
    assert spread.fingerprint == plain.fingerprint


@pytest.mark.parametrize(("ranks", "devices", "shares"), [(1, 3, [[0, 1, 2]]), (2, 5, [[0, 1], [2, 3]]), (3, 3, [[0], [1], [2]])])
def test_ranks_divide_a_machines_devices(ranks: int, devices: int, shares: list[list[int]]):
    assert [list(devices_of(rank, ranks, devices)) for rank in range(ranks)] == shares


def test_a_model_cannot_be_spread_over_fewer_devices_than_ranks():
    with pytest.raises(ModelError, match="3 ranks cannot spread a model over 2 devices"):
        devices_of(0, 3, 2)
