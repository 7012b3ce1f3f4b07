"""Weights in a few bits are plain numbers or refused by name, and an attention kernel that is not installed is not needed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mechscope.errors import ModelError
from mechscope.instrument import check_subject
from mechscope.subject.load import load
from tests import families
from tests.subject.saved import logits, save, save_adapter

# by what the error must name: the settings, and what is asked for where the library is not installed (or it needs a GPU)
PACKED: dict[str, dict[str, Any]] = {
    r"bitsandbytes \(4 bits\)": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    r"bitsandbytes \(8 bits\)": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    r"gptq \(4 bits\)": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    r"awq \(4 bits\)": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
    "fbgemm_fp8": {"quant_method": "fbgemm_fp8"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
    "torchao": {"quant_method": "torchao", "quant_type": "int8_weight_only"},
    "hqq": {"quant_method": "hqq"},
    r"a method that it does not name \(4 bits\)": {"bits": 4},
}
REMEDY = r"name the model that it was quantized from, or .* call dequantize\(\) and save_pretrained"


def configured(folder: Path, **settings: Any) -> Path:
    """Write settings into a saved model's configuration."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize("method", PACKED)
def test_packed_weights_are_refused_by_their_method_with_what_to_do(method: str, tmp_path: Path) -> None:
    folder = configured(save(tmp_path, "llama"), quantization_config=PACKED[method])
    with pytest.raises(ModelError, match=rf"^model '.*' has weights quantized by {method}, and mechscope .*: {REMEDY}") as raised:
        load(folder)
    assert "\n" not in str(raised.value)


def test_an_adapter_on_a_packed_base_is_refused_with_both_names_and_can_be_put_on_the_plain_one(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base, "llama")
    plain = logits(load(adapter))
    configured(save(tmp_path / "packed", "llama"), quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ModelError, match=r"the base of adapter '.*adapter': model '.*packed' has weights quantized by bitsandbytes"):
        load(adapter, base=tmp_path / "packed")
    assert torch.equal(logits(load(adapter, base=base)), plain)


def test_weights_in_eight_bit_floats_are_read_as_numbers(tmp_path: Path) -> None:
    folder = configured(
        save(tmp_path, "llama"), quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    )
    stored = load_file(folder / "model.safetensors")
    expected = {}
    for name, value in list(stored.items()):
        if "_proj" in name:
            blocks = value.unfold(0, 16, 16).unfold(1, 16, 16)
            scale = blocks.abs().amax((-2, -1)) / 448  # the largest number of the format
            spread = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
            stored[name] = (value / spread).to(torch.float8_e4m3fn)
            stored[name.replace("weight", "weight_scale_inv")] = scale
            expected[name] = stored[name].float() * spread
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    subject = load(folder)
    found = dict(subject.weights())
    assert len(expected) == 21
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert all(check.passed for check in check_subject(subject))


class Params4bit(nn.Parameter):
    """Stands for bitsandbytes' packed parameter."""

    __module__ = "bitsandbytes.nn.modules"


class AffineQuantizedTensor(Tensor):
    """Stands for torchao's packed tensor, which says that it holds float32."""

    __module__ = "torchao.dtypes.affine_quantized_tensor"


def packed(kind: str) -> Any:
    """Return a model in memory with one packed weight."""
    model = families.build("llama")
    projection = model.model.layers[1].self_attn.q_proj
    match kind:
        case "bitsandbytes":
            projection.weight = Params4bit(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)
        case "torchao":
            projection.weight = nn.Parameter(projection.weight.data.as_subclass(AffineQuantizedTensor), requires_grad=False)
        case "float8":
            projection.weight = nn.Parameter(projection.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
        case _:
            del projection.weight
            projection.register_buffer("qweight", torch.zeros(4, 32, dtype=torch.int32))
    return model


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("bitsandbytes", r"quantized by bitsandbytes, .*q_proj\.weight is Params4bit"),
        ("torchao", r"quantized by torchao, .*q_proj\.weight is AffineQuantizedTensor"),
        ("float8", r"quantized by a method that it does not name, .*q_proj\.weight is float8_e4m3fn"),
        ("gptq", r"quantized by a method that it does not name, .*q_proj\.qweight is int32"),
    ],
)
def test_a_packed_model_in_memory_is_refused_by_its_weight(kind: str, message: str) -> None:
    with pytest.raises(ModelError, match=rf"{message}.*: {REMEDY}"):
        load(packed(kind))


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_attention_kernel_that_is_not_installed_is_not_needed(
    kernel: str, family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = configured(save(tmp_path, family), attn_implementation=kernel)
    with caplog.at_level(logging.INFO):
        subject = load(folder)
    assert torch.equal(logits(subject), logits(load(save(tmp_path / "plain", family))))
    assert all(check.passed for check in check_subject(subject))
    assert f"names the attention of {kernel}" in caplog.text


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_what_torch_can_do_itself_stays_as_it_is_named(implementation: str, tmp_path: Path) -> None:
    subject = load(configured(save(tmp_path, "llama"), attn_implementation=implementation))
    assert subject.plain.config._attn_implementation == implementation
