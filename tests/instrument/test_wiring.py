"""Heads and MLPs read and write as the wiring says, in every family, with an adapter and without."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from mechscope.instrument import CachedRun, observed
from mechscope.instrument.parts import PARTS, attention_inputs, mlp_of
from mechscope.instrument.walk import Walk
from mechscope.instrument.wiring import Wiring
from mechscope.subject.load import Subject, load
from tests import families

SITES = ("query", "key", "value", "z", "attention_output", "mlp_output")
# LayerNorms follow the model's type; RMS norms compute in float32 (rounding 6e-8) inside transformers
EXACT = ("gpt2", "gpt_neox", "opt", "phi")
CASES = [(family, torch.float64) for family in families.FAMILIES] + [
    ("gpt2", torch.float32),
    ("qwen3", torch.float32),
    ("gemma2", torch.float32),
]


def tolerance(family: str, dtype: torch.dtype) -> float:
    return 2e-5 if dtype == torch.float32 else 1e-9 if family in EXACT else 1e-6


def close(found: Tensor, expected: Tensor, allowed: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=allowed * max(1.0, float(expected.abs().max())))


class Seen:
    """One run of two texts of different length, and what the wiring makes of its residual streams."""

    def __init__(self, subject: Subject) -> None:
        texts = families.padded(families.documents()[:2], "left")
        self.subject, self.wiring = subject, Wiring(subject)
        self.prefix = CachedRun(subject, texts.ids, texts.real, sites=SITES)
        self.walk = Walk(subject, texts.ids, texts.real)
        self.real = texts.real

    def projections(self, layer: int) -> dict[str, Tensor]:
        """Return norm(x) times each head's weights plus its bias, one key and value for every query head."""
        stream, norm, found = self.prefix.input_of(layer), self.wiring.attention_norm(layer), {}
        # the formula, not the module
        read = stream if norm is None else norm.normalised(stream)[0] * norm.gain + (0 if norm.shift is None else norm.shift)
        for part in PARTS:
            reader = self.wiring.reader(layer, part)
            projected = torch.einsum("btd,hed->bthe", read, reader.weight) + (0 if reader.bias is None else reader.bias)
            found[part] = projected.repeat_interleave(self.subject.anatomy.n_heads // len(reader.weight), dim=2)
        return found

    def __getitem__(self, at: tuple[str, int]) -> Tensor:
        return self.prefix.recording[at]


@lru_cache
def seen(family: str, dtype: torch.dtype) -> Seen:
    return Seen(families.subject(family, dtype))


# reading and writing


@torch.no_grad()
@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_what_the_heads_read_times_their_weights_is_what_attention_computes_with(family: str, dtype: torch.dtype) -> None:
    run = seen(family, dtype)
    for layer in range(families.LAYERS):
        inputs = attention_inputs(run.walk, layer, **run.projections(layer))
        for part in PARTS:
            expected = run[part, layer].transpose(1, 2)
            expected = expected.repeat_interleave(families.HEADS // expected.shape[1], dim=1)
            for text, real in enumerate(run.real):
                close(getattr(inputs, part)[text][:, real], expected[text][:, real], tolerance(family, dtype))


@torch.no_grad()
@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_weights_with_the_norm_folded_in_give_the_same_projections_from_what_is_only_scaled(family: str, dtype: torch.dtype) -> None:
    run = seen(family, dtype)
    for layer in range(families.LAYERS):
        stream, norm, plain = run.prefix.input_of(layer), run.wiring.attention_norm(layer), run.projections(layer)
        assert norm is not None
        # without the mean taken off: that is in the weights
        scaled = stream * norm.normalised(stream)[1]
        for part in PARTS:
            weight, constant = run.wiring.folded(layer, part), run.wiring.constant(layer, part)
            found = torch.einsum("btd,hed->bthe", scaled, weight) + (0 if constant is None else constant)
            close(found.repeat_interleave(families.HEADS // len(weight), dim=2), plain[part], tolerance(family, dtype))
            assert (constant is not None) == (family in EXACT or family == "qwen2")


@torch.no_grad()
@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_z_times_the_weights_of_all_heads_and_the_bias_is_what_attention_writes(family: str, dtype: torch.dtype) -> None:
    run = seen(family, dtype)
    for layer in range(families.LAYERS):
        weight, bias = run.wiring.writer(layer)
        z, scale = run["z", layer], run.wiring.written_scale(layer, run["z", layer])
        written = torch.einsum("bthe,hed->btd", z if scale is None else z * scale, weight)
        written = written if bias is None else written + bias
        close(written[run.real], run["attention_output", layer][run.real], tolerance(family, dtype))


@torch.no_grad()
@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_an_mlp_run_by_itself_writes_what_it_writes_in_the_model(family: str, dtype: torch.dtype) -> None:
    run = seen(family, dtype)
    for layer in range(families.LAYERS):
        read = run.prefix.input_of(layer)
        read = read if run.wiring.parallel else read + run["attention_output", layer]
        with observed(run.subject):
            close(mlp_of(run.walk, layer, read)[run.real], run["mlp_output", layer][run.real], tolerance(family, dtype))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
@pytest.mark.parametrize("part", ["key", "value"])
def test_a_query_head_can_have_a_key_and_value_of_its_own_though_the_weights_are_shared(family: str, part: str) -> None:
    run = seen(family, torch.float64)
    plain = run.projections(1)
    for head in range(families.HEADS):
        changed = {name: value.clone() for name, value in plain.items()}
        changed[part][:, :, head] += 0.7 * torch.randn(
            plain[part].shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(head)
        )
        before, after = (getattr(attention_inputs(run.walk, 1, **given), part) for given in (plain, changed))
        differs = (before != after).flatten(2).any(2).any(0)
        assert differs.tolist() == [other == head for other in range(families.HEADS)]


@pytest.mark.parametrize(
    ("family", "changes", "parallel"),
    [
        ("gpt_neox", {"use_parallel_residual": True}, True),
        ("gpt_neox", {"use_parallel_residual": False}, False),
        ("phi", {}, True),
        ("gpt2", {}, False),
        ("gemma2", {}, False),
    ],
)
def test_blocks_are_parallel_where_the_mlp_does_not_read_its_heads(family: str, changes: dict[str, Any], parallel: bool) -> None:
    assert Wiring(load(families.build(family, **changes))).parallel is parallel


def test_phi_reads_heads_and_mlp_through_one_norm_and_gemma_has_one_behind_attention() -> None:
    phi, gemma, llama = (Wiring(families.subject(family)) for family in ("phi", "gemma2", "llama"))
    one, two, behind = phi.attention_norm(1), phi.mlp_norm(1), gemma.written_norm(1)
    assert one is not None
    assert two is not None
    assert behind is not None
    assert one.module is two.module
    assert behind.module is gemma.subject.anatomy.blocks[1].attention_write
    assert llama.written_norm(1) is None


# adapters

TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "gpt_neox": ["query_key_value", "dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gemma2": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
NORMS = {"gpt2": "ln_1", "gpt_neox": "input_layernorm", "llama": "input_layernorm", "gemma2": "post_attention_layernorm"}


def adapted(family: str, **options: Any) -> Any:
    """Wrap a tiny model in an adapter that changes what heads read and write."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS[family], fan_in_fan_out=family == "gpt2", **options)
    model = get_peft_model(families.build(family, torch.float64), config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            if "lora_" in name:
                parameter.copy_(noise)
            elif "modules_to_save" in name:
                parameter.add_(noise)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("norms_too", [False, True], ids=["maps", "maps and norms"])
def test_an_active_adapter_is_part_of_the_weights_and_a_disabled_one_is_not(family: str, norms_too: bool) -> None:
    options = {"modules_to_save": [NORMS[family]]} if norms_too else {}
    tuned = load(adapted(family, **options))
    merged, base = load(adapted(family, **options).merge_and_unload()), families.subject(family, torch.float64)
    for found, plain in ((tuned, merged), (tuned.without_adapter(), base), (tuned, merged)):
        one, two = Seen(found), Seen(plain)
        for layer in range(families.LAYERS):
            for part in PARTS:
                close(one.wiring.reader(layer, part).weight, two.wiring.reader(layer, part).weight, 1e-9)
                close(one.projections(layer)[part][one.real], two.projections(layer)[part][one.real], tolerance(family, torch.float64))
            close(one.wiring.writer(layer)[0], two.wiring.writer(layer)[0], 1e-9)
            scales = [run.wiring.written_scale(layer, two["z", layer]) for run in (one, two)]
            assert (scales[0] is None) == (scales[1] is None) == (family != "gemma2")
            if scales[0] is not None and scales[1] is not None:
                close(scales[0], scales[1], 1e-9)
    changed, before = (Wiring(subject).reader(1, "value").weight for subject in (tuned, base))
    assert (changed - before).abs().max() > 0.1
