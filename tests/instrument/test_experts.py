"""Experts one by one: they add up to the MLP, equal an independent sum over stacked weights, and change as plain models without them do."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from mechscope.errors import ModelError, SettingsError
from mechscope.instrument import CachedRun, Edit, Reading, intervene, load, model_inputs, record
from mechscope.subject import Subject
from tests import families
from tests.matrix.plain import build

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "deepseek_v2", "deepseek_v3", "cohere2_moe")
SHARED = ("shared_expert", "shared_experts")
SIDES = ("none", "left", "right")
LAYER = 1


@cache
def subject(family: str, dtype: torch.dtype = torch.float64) -> Subject:
    """Return a mixture of experts; of one family with a factor on what blocks add."""
    model = build(family, 0, dtype)
    if family == "granitemoe":
        model.config.residual_multiplier = 0.3
        for block in model.model.layers:
            block.residual_multiplier = 0.3
    return load(model)


def run(model: Subject, texts: families.Texts, *sites: Any) -> Any:
    with torch.no_grad(), record(model, "residual", "mlp_output", *sites) as recording:
        model.model(**model_inputs(texts.ids, texts.real), use_cache=False)
    return recording


def block_of(model: Subject) -> Any:
    return model.anatomy.blocks[LAYER]


def mlp_of(model: Subject) -> Any:
    block = block_of(model).module
    return block.mlp if hasattr(block, "mlp") else block.block_sparse_moe


def without_shared(mlp: Any) -> list[Any]:
    """Let shared experts write nothing, and return how to undo it."""
    modules = [getattr(mlp, name) for name in SHARED if hasattr(mlp, name)]
    return [module.register_forward_hook(lambda _, args, output: torch.zeros_like(output)) for module in modules]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_add_up_to_the_mlp_beside_shared_ones(family: str, side: str) -> None:
    model, texts = subject(family), families.padded(families.documents(), side)
    shared: list[Tensor] = []
    mlp, factor = mlp_of(model), block_of(model).multiplier
    hooks = [
        getattr(mlp, name).register_forward_hook(lambda _, args, output: shared.append(output)) for name in SHARED if hasattr(mlp, name)
    ]
    gates: list[Tensor] = []
    if hasattr(mlp, "shared_expert_gate"):
        hooks.append(mlp.shared_expert_gate.register_forward_hook(lambda _, args, output: gates.append(output.sigmoid())))
    try:
        recording = run(model, texts, "expert_output")
    finally:
        for hook in hooks:
            hook.remove()
    experts = recording["expert_output", LAYER]
    assert experts.shape == (*texts.ids.shape, 4, families.WIDTH)
    beside = shared[-1].reshape(*texts.ids.shape, -1) * (gates[-1].reshape(*texts.ids.shape, 1) if gates else 1.0) if shared else 0.0
    if family == "cohere2_moe":  # its average of both
        beside = beside / 2
    torch.testing.assert_close(experts.sum(2) + beside * factor, recording["mlp_output", LAYER], rtol=0, atol=1e-9)
    assert ((experts != 0).any(-1).sum(-1)[texts.real] == 2).all(), "a token has two experts, the others add nothing"


def by_hand(experts: Any, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Return every expert's part of gated experts whose weights are stacked, expert by expert and token by token."""
    parts = torch.zeros(len(tokens), len(experts.down_proj), tokens.shape[1], dtype=tokens.dtype)
    for at, token in enumerate(tokens):
        for expert, weight in zip(chosen[at].tolist(), weights[at], strict=True):
            gate, up = (experts.gate_up_proj[expert] @ token).chunk(2)
            parts[at, expert] = weight * (experts.down_proj[expert] @ (nn.functional.silu(gate) * up))
    return parts


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "granitemoe", "deepseek_v3"])
def test_an_expert_adds_what_its_own_weights_make_of_its_tokens(family: str) -> None:
    model, texts, calls = subject(family), families.padded(families.documents(), "right"), []
    experts = block_of(model).experts.module
    hook = experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    try:
        recording = run(model, texts, "expert_output")
    finally:
        hook.remove()
    with torch.no_grad():
        expected = by_hand(experts, *calls[0]) * block_of(model).multiplier
    torch.testing.assert_close(recording["expert_output", LAYER].flatten(0, 1), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", MIXTURES)
def test_without_any_expert_the_mlp_is_its_shared_ones(family: str) -> None:
    model, texts = subject(family), families.padded(families.documents(), "left")
    with intervene(model, Edit("expert_output", LAYER, 0.0)):
        changed = run(model, texts)
    experts, own = block_of(model).experts.module, subject(family)
    silent = experts.register_forward_hook(lambda _, args, output: torch.zeros_like(output))
    try:
        expected = run(own, texts)
    finally:
        silent.remove()
    real = texts.real
    torch.testing.assert_close(changed["residual", 2][real], expected["residual", 2][real], rtol=0, atol=1e-9)
    if family in ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe"):
        with intervene(model, Edit("mlp_output", LAYER, 0.0)):
            whole = run(model, texts)
        torch.testing.assert_close(changed["residual", 2][real], whole["residual", 2][real], rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe", "deepseek_v3"])
def test_an_expert_set_to_zero_is_a_model_whose_gate_weights_for_it_are_zero(family: str, side: str) -> None:
    model, texts = subject(family), families.padded(families.documents(), side)
    experts = block_of(model).experts.module
    with intervene(model, Edit("expert_output", LAYER, 0.0, experts=(2,))):
        changed = run(model, texts)

    def unweighted(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0], args[1], args[2].masked_fill(args[1] == 2, 0.0)

    hook = experts.register_forward_pre_hook(unweighted)
    try:
        expected = run(model, texts)
    finally:
        hook.remove()
    torch.testing.assert_close(changed["residual", 2][texts.real], expected["residual", 2][texts.real], rtol=0, atol=1e-9)
    plain = run(model, texts)
    assert not torch.allclose(changed["residual", 2][texts.real], plain["residual", 2][texts.real], atol=1e-3)


def test_edits_compose_and_a_recording_inside_sees_what_was_changed() -> None:
    model, texts = subject("mixtral"), families.padded(families.documents(), "right")
    before = run(model, texts, "expert_output")["expert_output", LAYER]
    vector = torch.arange(families.WIDTH, dtype=torch.float64)
    late = torch.zeros_like(texts.real)
    late[:, 3:] = True
    edits = (
        Edit("expert_output", LAYER, lambda part: 2 * part, experts=(1, 3)),
        Edit("expert_output", LAYER, vector, experts=(3,), positions=late),
        Edit("expert_output", LAYER, -1.0, experts=(0,), rows=(1,)),
    )
    with intervene(model, *edits):
        recording = run(model, texts, "expert_output")
    expected = before.clone()
    expected[:, :, [1, 3]] *= 2
    expected[:, 3:, 3] = vector
    expected[1, :, 0] = -1.0
    torch.testing.assert_close(recording["expert_output", LAYER], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(recording["mlp_output", LAYER], expected.sum(2), rtol=0, atol=1e-9)
    with intervene(model, edits[0]), intervene(model, edits[1]), intervene(model, edits[2]):  # an inner one keeps what an outer one changed
        nested = run(model, texts, "expert_output")
    torch.testing.assert_close(nested["expert_output", LAYER], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(nested["mlp_output", LAYER], recording["mlp_output", LAYER], rtol=0, atol=1e-12)


def test_experts_are_first_taken_apart_inside_a_change_of_their_mlp() -> None:
    fresh, texts = load(build("mixtral", 0, torch.float64)), families.padded(families.documents(), "none")
    with intervene(fresh, Edit("mlp_output", LAYER, 0.0)):  # how the parts add up is looked at beneath it
        experts = run(fresh, texts, "expert_output")["expert_output", LAYER]
    torch.testing.assert_close(experts, run(subject("mixtral"), texts, "expert_output")["expert_output", LAYER], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "granitemoe", "cohere2_moe"])
def test_a_rerun_is_an_intervention(family: str) -> None:
    model, texts = subject(family), families.padded(families.documents(), "right")
    cached = CachedRun(model, texts.ids, texts.real, sites=("expert_output", "z", "mlp_output"))
    units = [
        [Edit("expert_output", 1, 0.0, experts=(2,))],
        [Edit("expert_output", 1, lambda part: part + 1.0, experts=(0, 3)), Edit("mlp_output", 1, lambda part: 2 * part)],
        [Edit("z", 1, 0.0, heads=(1,)), Edit("expert_output", 1, 0.5, experts=(1,))],
        [Edit("expert_output", 0, 0.0), Edit("expert_output", 2, 0.0, experts=(0, 1))],
    ]
    reading = Reading.of(texts.real)
    for numbers, hidden in cached.rerun(units, reading):
        for number, rows in zip(numbers, hidden, strict=True):
            with intervene(model, *units[number]):
                expected = run(model, texts)["residual", 2]
            torch.testing.assert_close(rows, expected[texts.real], rtol=0, atol=1e-9)


def test_recording_changes_nothing_and_leaves_no_hook() -> None:
    model, texts = subject("gpt_oss"), families.padded(families.documents(), "left")
    hooks = [sum(map(len, (each._forward_hooks, each._forward_pre_hooks))) for each in model.model.modules()]
    plain, recorded = run(model, texts), run(model, texts, "expert_output")
    assert torch.equal(plain["residual", 2], recorded["residual", 2])
    assert hooks == [sum(map(len, (each._forward_hooks, each._forward_pre_hooks))) for each in model.model.modules()]
    assert "expert_output float64 (3, 14, 2, 32) by slot of layers 0,1,2" in repr(recorded)


def test_experts_with_an_adapter_are_taken_apart_as_they_act() -> None:
    torch.manual_seed(0)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = LoraConfig(r=2, target_parameters=targets, target_modules=[], init_lora_weights=False)
    adapted = load(get_peft_model(build("mixtral", 0, torch.float32), settings))
    texts = families.padded(families.documents(), "right")
    on, off = run(adapted, texts, "expert_output"), run(adapted.without_adapter(), texts, "expert_output")
    merged = load(adapted.model.merge_and_unload())
    expected = run(merged, texts, "expert_output")
    torch.testing.assert_close(on["expert_output", LAYER], expected["expert_output", LAYER], rtol=0, atol=1e-4)
    torch.testing.assert_close(
        off["expert_output", 0], run(load(build("mixtral", 0, torch.float32)), texts, "expert_output")["expert_output", 0]
    )
    assert not torch.allclose(on["expert_output", 0], off["expert_output", 0], atol=1e-2)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_every_kernel_gives_the_same_parts(implementation: str) -> None:
    texts = families.padded(families.documents(), "right")
    model = build("mixtral", 0, torch.float32)
    expected = run(load(model), texts, "expert_output")["expert_output", LAYER]
    model.config._experts_implementation = implementation
    torch.testing.assert_close(run(load(model), texts, "expert_output")["expert_output", LAYER], expected, rtol=0, atol=1e-5)


def test_generation_runs_without_an_expert() -> None:
    model = subject("mixtral")
    prompt = families.documents()[0][None]
    with intervene(model, Edit("expert_output", LAYER, 0.0, experts=(1, 2))):
        changed = model.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
        step = prompt
        for _ in range(4):
            logits = model.model(input_ids=step, use_cache=False).logits[:, -1]
            step = torch.cat([step, logits.argmax(-1, keepdim=True)], 1)
            if step[0, -1] == model.model.config.eos_token_id:
                break
    assert torch.equal(changed, step)


def test_what_cannot_be_taken_apart_is_refused_by_name() -> None:
    texts = families.padded(families.documents(), "none")
    with pytest.raises(ModelError, match=r"\(llama\) has no experts"):
        run(families.subject("llama"), texts, "expert_output")
    with pytest.raises(ModelError, match=r"afmoe: the experts of layer 1 .* go through a norm before they are added"):
        run(load(build("afmoe", 0, torch.float32)), texts, "expert_output")
    with (
        pytest.raises(SettingsError, match="the MLP of layer 0 is dense: it has no experts to change"),
        intervene(subject("deepseek_v3"), Edit("expert_output", 0, 0.0)),
    ):
        pass
    with (
        pytest.raises(SettingsError, match=r"expert m1\.e4 does not exist: the layer has experts 0-3"),
        intervene(subject("mixtral"), Edit("expert_output", 1, 0.0, experts=(4,))),
    ):
        pass
    with pytest.raises(SettingsError, match="site 'z' has no experts"), intervene(subject("mixtral"), Edit("z", 1, 0.0, experts=(1,))):
        pass


def test_experts_that_do_not_add_up_are_refused() -> None:
    model = build("mixtral", 0, torch.float32)
    mlp = model.model.layers[LAYER].mlp
    own = mlp.forward
    mlp.forward = lambda hidden: torch.tanh(own(hidden))
    with pytest.raises(ModelError, match=r"mixtral: the experts of layer 1 .* do not add up to what the MLP adds"):
        run(load(model), families.padded(families.documents(), "none"), "expert_output")
