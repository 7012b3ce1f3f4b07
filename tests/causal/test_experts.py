"""Experts as components: ablated, patched and taken from other runs as plain models whose experts are rewritten by hand; elsewhere refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechscope.causal import ablate, ablate_together, attribution_patch, mean_of, patch, path_patch, run_counterfactuals, scrub
from mechscope.causal.sources import Resample
from mechscope.data.metrics import pair_metric
from mechscope.data.pairs import PromptPair, collate_pairs
from mechscope.errors import SettingsError
from mechscope.instrument import Execution, load
from mechscope.subject import Components, Subject
from tests import families
from tests.causal.pairs import random_pairs
from tests.matrix.plain import build

MIXTURES = ("mixtral", "gpt_oss", "granitemoe", "deepseek_v3")
PAIRS = random_pairs(6)
LAYER = 1


@cache
def subject(family: str) -> Subject:
    """Return a mixture of experts."""
    return load(build(family, 0, torch.float64))


def parts(family: str, ids: tuple[int, ...]) -> Tensor:
    """Return what every expert of a layer gives for a text alone, ``(token, expert, d_model)``: that of a model with all other gate weights zero."""
    given: list[Tensor] = []
    experts = subject(family).anatomy.blocks[LAYER].experts
    assert experts is not None
    hook = experts.module.register_forward_hook(lambda _, args, output: given.extend(args))
    with torch.no_grad():
        subject(family).plain(input_ids=torch.tensor([ids]), use_cache=False)
    hook.remove()
    tokens, chosen, weights = given
    with torch.no_grad():
        return torch.stack([experts.module(tokens, chosen, weights.masked_fill(chosen != expert, 0.0)) for expert in range(4)], 1)


def score(family: str, pair: PromptPair, ids: tuple[int, ...], added: Tensor | None, metric: str) -> float:
    """Return the metric of a plain model that reads a text alone while something is added to what a layer's experts give."""
    experts = subject(family).anatomy.blocks[LAYER].experts
    assert experts is not None
    hook = experts.module.register_forward_hook(lambda _, args, output: output if added is None else output + added)
    with torch.no_grad():
        logits = subject(family).plain(input_ids=torch.tensor([ids]), use_cache=False).logits
    hook.remove()
    return float(pair_metric(metric, collate_pairs([pair]))(logits))


@pytest.mark.parametrize("tokens", [1, 10_000], ids=["alone", "padded"])
@pytest.mark.parametrize("family", MIXTURES)
def test_ablating_an_expert_takes_away_what_it_adds(family: str, tokens: int) -> None:
    effects = ablate(subject(family), PAIRS, sites=("expert",), metric="logit-diff", execution=Execution(tokens_per_batch=tokens))
    own = effects.table[effects.table["layer"] == LAYER]
    assert list(own["component"]) == [f"m{LAYER}.e{expert}" for expert in range(4)]
    assert set(own["site"]) == {"expert_output"}
    for at, expert in zip(own.index, own["feature"], strict=True):
        for number, pair in enumerate(PAIRS):
            taken = -parts(family, pair.clean)[:, expert]
            np.testing.assert_allclose(effects.values[at, number], score(family, pair, pair.clean, taken, "logit-diff"), atol=1e-8)


def test_the_mean_of_an_expert_is_over_all_tokens() -> None:
    source = mean_of(subject("mixtral"), PAIRS, ["expert_output"])
    mean = torch.cat([parts("mixtral", pair.clean) for pair in PAIRS]).mean(0)
    torch.testing.assert_close(source.values["expert_output", LAYER], mean, rtol=0, atol=1e-12)
    effects = ablate(subject("mixtral"), PAIRS, sites=("expert",), components="m1.e2", source=source, metric="loss")
    expected = [score("mixtral", pair, pair.clean, mean[2] - parts("mixtral", pair.clean)[:, 2], "loss") for pair in PAIRS]
    np.testing.assert_allclose(effects.values[0], expected, atol=1e-8)
    level = random_pairs(4, lengths=(8,))
    by_position = mean_of(subject("mixtral"), level, ["expert_output"], per_position=True)
    torch.testing.assert_close(
        by_position.values["expert_output", LAYER],
        torch.stack([parts("mixtral", pair.clean) for pair in level]).mean(0),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_patching_an_expert_puts_in_what_it_adds_in_the_other_run(family: str, direction: Any) -> None:
    effects = patch(subject(family), PAIRS, site="expert", components="m1.e0,m1.e3", direction=direction, positions="changed")
    assert list(effects.table["component"]) == ["m1.e0", "m1.e3"]
    for at, expert in enumerate((0, 3)):
        for number, pair in enumerate(PAIRS):
            base, other = (pair.corrupt, pair.clean) if direction == "denoise" else (pair.clean, pair.corrupt)
            added = (parts(family, other) - parts(family, base))[:, expert]
            unchanged = torch.tensor(pair.clean) == torch.tensor(pair.corrupt)
            added[unchanged] = 0.0
            np.testing.assert_allclose(effects.values[at, number], score(family, pair, base, added, "logit-diff"), atol=1e-8)


def test_sets_and_counterfactual_runs_hold_experts() -> None:
    together = ablate_together(subject("mixtral"), PAIRS, ["m1.e0,m1.e1,m1.e2,m1.e3", "m1"], metric="loss")
    np.testing.assert_allclose(together.values[0], together.values[1], atol=1e-9)
    assert list(together.table["component"]) == ["m1.e0,m1.e1,m1.e2,m1.e3", "m1"]
    runs = run_counterfactuals(
        subject("mixtral"), PAIRS, {"one": {"m1.e2": "corrupt"}, "all": {"m1.e0,m1.e1,m1.e2,m1.e3": "corrupt"}, "m": {"m1": "corrupt"}}
    )
    expected = [
        score("mixtral", pair, pair.clean, (parts("mixtral", pair.corrupt) - parts("mixtral", pair.clean))[:, 2], "logit-diff")
        for pair in PAIRS
    ]
    np.testing.assert_allclose(runs.values[0], expected, atol=1e-8)
    np.testing.assert_allclose(runs.values[1], runs.values[2], atol=1e-9)


def test_an_expert_is_resampled_from_another_text_of_the_batch() -> None:
    pairs = random_pairs(2, lengths=(7,))  # each can only be given the other's
    effects = ablate(subject("mixtral"), pairs, sites=("expert",), components="m1.e1", source=Resample(), metric="loss")
    one, two = pairs.pairs
    for number, (pair, other) in enumerate(((one, two), (two, one))):
        added = (parts("mixtral", other.clean) - parts("mixtral", pair.clean))[:, 1]
        np.testing.assert_allclose(effects.values[0, number], score("mixtral", pair, pair.clean, added, "loss"), atol=1e-8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("m1.e4", r"component m1\.e4 does not exist: layer 1 has experts 0-3"),
        ("m3.e0", r"component m3\.e0 does not exist: the model has layers 0-2"),
        ("m0.e1", r"component m0\.e1 does not exist: the MLP of layer 0 is dense, it has no experts"),
    ],
)
def test_an_expert_that_does_not_exist_is_named(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        ablate(subject("deepseek_v3"), PAIRS, sites=("expert",), components=text)


def test_where_experts_are_of_no_use_they_are_refused_by_name() -> None:
    model, needed = subject("mixtral"), r"component m1\.e2 is an expert, and heads, MLPs or layers are needed here"
    with pytest.raises(SettingsError, match=needed):
        Components.parse("m1.e2").validate(model.anatomy)
    with pytest.raises(SettingsError, match=needed):
        path_patch(model, PAIRS, receivers=["logits"], senders="m1.e2")
    with pytest.raises(SettingsError, match=needed):
        scrub(model, random_pairs(4, lengths=(8,)), {"m1.e2": None})
    with pytest.raises(SettingsError, match="single experts are patched exactly, not estimated"):
        attribution_patch(model, PAIRS, site="expert", components="m1.e2")
    with pytest.raises(SettingsError, match=r"components 'm1\.e2' name nothing that has site 'head': single experts have site expert"):
        ablate(model, PAIRS, sites=("head",), components="m1.e2")
    with pytest.raises(SettingsError, match=r"components 'a0\.h1' name nothing that has site 'expert_output'"):
        ablate(model, PAIRS, sites=("expert",), components="a0.h1")
    with pytest.raises(SettingsError, match="the model has no experts: all its MLPs are dense"):
        ablate(families.subject("llama"), PAIRS, sites=("expert",))
