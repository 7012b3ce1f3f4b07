"""Routing is what plain Hugging Face routers say, token by token; padding does not matter; and only the experts that moved are said to have."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from mechscope.data.pairs import Pairs
from mechscope.errors import ModelError
from mechscope.instrument import Execution, load
from mechscope.instrument.routers import Routers
from mechscope.subject import Subject, pair
from mechscope.weights import routing, routing_change
from tests import families
from tests.causal.pairs import random_pairs
from tests.matrix.plain import build

EXPERTS, SLOTS = 4, 2
TEXTS = random_pairs(8, lengths=(9, 5, 7))
# how the gate weights of a family come from the logits of its router: a softmax of all, of all and then shared out, of the chosen, or sigmoids
WEIGHED = {
    "mixtral": "shared out",
    "qwen2_moe": "of all",
    "qwen3_moe": "of all",
    "olmoe": "of all",
    "gpt_oss": "of chosen",
    "granitemoe": "of chosen",
    "deepseek_v2": "of all",
    "deepseek_v3": "sigmoid",
}


@cache
def model(family: str, seed: int = 0) -> Any:
    """Return a plain model of a family."""
    made = build(family, seed, torch.float32)
    if family == "deepseek_v3":  # experts are chosen by more than their probabilities
        for name, bias in made.named_buffers():
            if name.endswith("e_score_correction_bias"):
                bias.copy_(torch.linspace(-0.4, 0.4, EXPERTS))
    return made


@cache
def subject(family: str, seed: int = 0) -> Subject:
    """Load that model."""
    return load(model(family, seed))


def routed(family: str, seed: int, text: tuple[int, ...]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return of each layer with experts, for a text alone: every token's probabilities, chosen experts and their weights, from plain router logits."""
    with torch.no_grad():
        logits = model(family, seed)(input_ids=torch.tensor([text]), use_cache=False, output_router_logits=True).router_logits
    layers = []
    for one in logits:
        scores = torch.as_tensor(one).double()
        if WEIGHED[family] == "sigmoid":
            score = 1 / (1 + (-scores).exp())
            p = score / score.sum(-1, keepdim=True)
            chosen = (score + torch.linspace(-0.4, 0.4, EXPERTS)).topk(SLOTS).indices
        else:
            p = scores.exp() / scores.exp().sum(-1, keepdim=True)
            chosen = scores.topk(SLOTS).indices
        weights = p.gather(-1, chosen)
        if WEIGHED[family] != "of all":
            weights = weights / weights.sum(-1, keepdim=True)
        layers.append((p, chosen, weights))
    return layers


def layers_of(family: str) -> list[int]:
    """Return the layers that have experts."""
    return [1, 2] if family.startswith("deepseek") else [0, 1, 2]


@pytest.mark.parametrize("family", WEIGHED)
@pytest.mark.parametrize("tokens", [1, 10_000], ids=["alone", "padded"])
def test_entropy_and_loads_are_those_of_plain_routers(family: str, tokens: int) -> None:
    result = routing(subject(family), TEXTS, execution=Execution(tokens_per_batch=tokens))
    entropy = np.zeros((len(TEXTS), len(layers_of(family))))
    load_, gate = (np.zeros((len(TEXTS), len(layers_of(family)), EXPERTS)) for _ in range(2))
    for row, text in enumerate(TEXTS):
        for at, (p, chosen, weights) in enumerate(routed(family, 0, text.clean)):
            entropy[row, at] = np.mean([-sum(q * math.log(q) for q in token.tolist() if q > 0) for token in p])
            for expert in range(EXPERTS):
                load_[row, at, expert] = EXPERTS * (chosen == expert).double().mean()
                gate[row, at, expert] = EXPERTS * weights[chosen == expert].sum() / weights.sum()
    assert list(result.layers["layer"]) == layers_of(family)
    assert set(result.layers["router"]) == {"sigmoid" if WEIGHED[family] == "sigmoid" else "softmax"}
    np.testing.assert_allclose(result.layers["entropy"], entropy.mean(0), atol=1e-5)
    np.testing.assert_allclose(result.layers["entropy_se"], entropy.std(0, ddof=1) / len(TEXTS) ** 0.5, atol=1e-5)
    np.testing.assert_allclose(result.experts["load"], load_.mean(0).ravel(), atol=1e-12)
    np.testing.assert_allclose(result.experts["gate_load"], gate.mean(0).ravel(), atol=1e-5)
    assert list(result.experts["unused"]) == [value == 0 for value in load_.sum(0).ravel()]
    assert (result.layers[["experts", "slots", "n"]].to_numpy() == [EXPERTS, SLOTS, len(TEXTS)]).all()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "olmoe", "deepseek_v3"])
def test_two_models_are_compared_on_the_same_tokens(family: str) -> None:
    result = routing_change(pair(subject(family), subject(family, 1)), TEXTS)
    rows: dict[str, list[list[float]]] = {"kl": [], "top1_agreement": [], "overlap": []}
    for text in TEXTS:
        both = list(zip(routed(family, 0, text.clean), routed(family, 1, text.clean), strict=True))
        for values in rows.values():
            values.append([])
        for (p, one, first), (q, two, second) in both:
            rows["kl"][-1].append(float((p * (p / q).log()).sum(-1).mean()))
            best = [(chosen[at, weights[at].argmax()]) for at in range(len(p)) for chosen, weights in ((one, first), (two, second))]
            rows["top1_agreement"][-1].append(float(np.mean([a == b for a, b in zip(best[::2], best[1::2], strict=True)])))
            rows["overlap"][-1].append(
                float(np.mean([len(set(a) & set(b)) / SLOTS for a, b in zip(one.tolist(), two.tolist(), strict=True)]))
            )
    for name, values in rows.items():
        np.testing.assert_allclose(result.layers[name], np.mean(values, 0), atol=1e-4, err_msg=name)
    own, other = (routing(subject(family, seed), TEXTS) for seed in (0, 1))
    np.testing.assert_allclose(result.layers["entropy_change"], other.layers["entropy"] - own.layers["entropy"], atol=1e-9)
    np.testing.assert_allclose(result.experts["load_change"], other.experts["load"] - own.experts["load"], atol=1e-9)


def moved(family: str, layer: int, expert: int, by: float) -> Subject:
    """Return a model one of whose experts writes `by` times more."""
    changed = build(family, 0, torch.float32)
    with torch.no_grad():
        changed.model.layers[layer].mlp.experts.down_proj[expert] *= 1 + by
    return load(changed)


def test_the_expert_that_moved_is_named_and_no_other() -> None:
    result = routing_change(pair(subject("qwen3_moe"), moved("qwen3_moe", 1, 2, by=0.5)), TEXTS)
    experts = model("qwen3_moe").model.layers[1].mlp.experts
    own, all_of_it = (
        float(torch.cat([each[2].detach().flatten() for each in parts]).norm())
        for parts in ((experts.down_proj,), (experts.down_proj, experts.gate_up_proj))
    )
    changes = result.experts.set_index("component")
    np.testing.assert_allclose(changes["weight_change"]["m1.e2"], 0.5 * own / all_of_it, rtol=1e-6)
    assert (changes["weight_change"].drop("m1.e2") == 0).all()
    assert (changes["router_change"] == 0).all()
    # what its router reads is the same, what the next one reads is not
    assert list(result.layers["kl"] > 1e-4) == [False, False, True]
    assert list(result.layers["top1_agreement"][:2]) == [1.0, 1.0]


def test_a_router_that_moved_is_told_from_its_experts() -> None:
    changed = build("gpt_oss", 0, torch.float32)
    router = changed.model.layers[2].mlp.router
    with torch.no_grad():
        router.bias[3] += 2.0
    result = routing_change(pair(subject("gpt_oss"), load(changed)), TEXTS)
    changes = result.experts.set_index("component")
    before = model("gpt_oss").model.layers[2].mlp.router
    norm = float((before.weight.detach()[3].square().sum() + before.bias.detach()[3].square()).sqrt())
    np.testing.assert_allclose(changes["router_change"]["m2.e3"], 2.0 / norm, rtol=1e-5)
    assert (changes["router_change"].drop("m2.e3") == 0).all()
    assert (changes["weight_change"] == 0).all()
    assert changes["load_change"]["m2.e3"] > 0


def test_a_router_that_tells_no_expert_apart_has_the_entropy_of_their_number() -> None:
    blind = build("qwen2_moe", 0, torch.float32)
    with torch.no_grad():
        blind.model.layers[1].mlp.gate.weight.zero_()
    layers = routing(load(blind), TEXTS).layers
    assert layers["entropy"][1] == pytest.approx(math.log(EXPERTS), abs=1e-12)
    assert (layers["uniform"] == math.log(EXPERTS)).all()
    assert (layers["entropy"].drop(1) < math.log(EXPERTS) - 0.1).all()


def test_an_adapter_on_experts_and_router_is_compared_with_its_base() -> None:
    torch.manual_seed(0)
    targets = ["mlp.experts.down_proj", "mlp.gate.weight"]
    settings = LoraConfig(r=2, target_parameters=targets, target_modules=[], init_lora_weights=False)
    adapted = load(get_peft_model(build("mixtral", 0, torch.float32), settings))
    result = routing_change(pair(adapted.without_adapter(), adapted), TEXTS)
    merged = load(get_peft_model(build("mixtral", 0, torch.float32), settings))
    merged.model.load_state_dict(adapted.model.state_dict())
    expected = routing_change(pair(subject("mixtral"), load(merged.model.merge_and_unload())), TEXTS)
    for name in ("weight_change", "router_change", "load_change"):
        np.testing.assert_allclose(result.experts[name], expected.experts[name], atol=1e-5)
        assert result.experts[name].abs().max() > 0.01
    np.testing.assert_allclose(result.layers["kl"], expected.layers["kl"], atol=1e-4)


def test_what_has_no_experts_or_a_router_that_cannot_be_read_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"\(llama\) has no experts: all its MLPs are dense"):
        routing(families.subject("llama"), TEXTS)
    with pytest.raises(
        ModelError, match=r"phimoe: the experts of layer 0 .*: the gate weights of .*router are neither a softmax nor a sigmoid"
    ):
        routing(load(build("phimoe", 0, torch.float32)), TEXTS)


def test_one_expert_of_weight_one_tells_nothing_of_probabilities() -> None:
    single = build("mixtral", 0, torch.float32)
    for layer in single.model.layers:
        layer.mlp.gate.top_k = 1
    with pytest.raises(ModelError, match="neither a softmax nor a sigmoid"):
        Routers(load(single))
    weighed = build("olmoe", 0, torch.float32)
    for layer in weighed.model.layers:
        layer.mlp.gate.top_k = 1
    assert {router.kind for router in Routers(load(weighed)).layers.values()} == {"softmax"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
def test_routers_are_read_in_every_type(dtype: torch.dtype) -> None:
    for family, kind in (("mixtral", "softmax"), ("granitemoe", "softmax"), ("deepseek_v3", "sigmoid")):
        assert {router.kind for router in Routers(load(build(family, 0, dtype))).layers.values()} == {kind}


def test_a_text_twice_counts_twice() -> None:
    once = routing(subject("mixtral"), Pairs(TEXTS.pairs[:6], "some"))
    twice = routing(subject("mixtral"), Pairs((*TEXTS.pairs[:6], *TEXTS.pairs[:6]), "each twice"))
    np.testing.assert_allclose(twice.experts["load"], once.experts["load"], atol=1e-12)
    assert (twice.layers["n"] == 12).all()
