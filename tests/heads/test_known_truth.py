"""Known truth: heads written by hand score their extremes, and heads of untrained models score at the null as often as intervals promise."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from mechscope.heads import RoleScores, copying_roles, head_roles, pattern_roles, roles_table
from mechscope.heads.pattern_roles import repeated_texts
from mechscope.instrument.execution import Execution
from mechscope.subject.load import load
from tests import families
from tests.heads import planted

FAMILIES = ("gpt2", "llama", "gpt_neox", "qwen3", "gemma2")
HEAD = planted.HEAD


@lru_cache(maxsize=1)
def exact() -> dict[str, RoleScores]:
    return {scores.role.name: scores for scores in head_roles(planted.exact(), probes=24)}


def of(role: str, head: str) -> np.ndarray:
    """Return a planted head's scores, one per text."""
    layer, at = HEAD[head][1:].split(".h")
    return exact()[role].score[:, int(layer), int(at)]


@pytest.mark.parametrize(
    ("role", "head", "extreme"),
    [
        ("previous-token", "previous", 1.0),
        ("previous-token", "far", 0.0),
        ("previous-token", "sink", 0.0),
        ("duplicate-token", "duplicate", 1.0),
        ("duplicate-token", "previous", 0.0),
        ("duplicate-token", "induction", 0.0),
        ("induction", "induction", 1.0),
        ("induction", "duplicate", 0.0),
        ("induction", "previous", 0.0),
        ("attention-sink", "sink", 1.0),
        ("attention-sink", "previous", None),
        ("broad", "uniform", 1.0),
        ("broad", "copy", 1.0),
        ("broad", "previous", 0.0),
        ("broad", "sink", 0.0),
        ("copying", "copy", 1.0),
        ("copying", "induction", 1.0),
        ("copying", "suppress", 0.0),
        ("copying", "uniform", 0.5),
        ("negative-ov", "suppress", 1.0),
        ("negative-ov", "copy", 0.0),
        ("negative-ov", "uniform", 0.5),
    ],
)
def test_a_head_that_does_one_thing_scores_the_extreme(role: str, head: str, extreme: float | None) -> None:
    if extreme is None:  # of all rows only the second looks at the first token when every row looks one back
        extreme_of_text = [1 / (len(pair.clean) - 1) for pair in repeated_texts(planted.exact(), 24)]
        np.testing.assert_allclose(of(role, head), extreme_of_text, rtol=0, atol=1e-6)
    else:
        np.testing.assert_allclose(of(role, head), extreme, rtol=0, atol=1e-6)


def test_a_head_that_writes_the_next_token_copies_less_than_one_that_copies() -> None:
    """On a circle its own token stands behind the next, and level with the one after: rounding decides which of the two comes first."""
    others = planted.WORDS - 1
    np.testing.assert_allclose(of("copying", "next"), (others - 1.5) / others, rtol=0, atol=0.51 / others)


def test_a_head_of_uniform_attention_is_at_the_null_to_the_last_digit() -> None:
    for name in ("previous-token", "duplicate-token", "induction", "induction-offset", "attention-sink", "broad"):
        np.testing.assert_allclose(exact()[name].excess[:, 0, 4], 0, rtol=0, atol=1e-12, err_msg=name)


def test_each_role_is_given_to_the_heads_written_for_it() -> None:
    table = roles_table(tuple(exact().values()))
    given = {role: set(rows["component"]) for role, rows in table[table["has_role"]].groupby("role")}
    assert given == {
        "previous-token": {HEAD["previous"]},
        "duplicate-token": {HEAD["duplicate"]},
        "induction": {HEAD["induction"]},
        # one that writes the neighbour on a circle raises the token itself more than most others
        "copying": {HEAD[name] for name in ("induction", "copy", "next")},
        "negative-ov": {HEAD["suppress"]},
    }


def test_a_head_of_a_fixed_distance_is_told_from_induction_by_its_twin() -> None:
    """It scores 1 on texts of its distance, repeated or not: nothing is left above the null."""
    halves = [len(pair.clean) // 2 for pair in repeated_texts(planted.exact(), 24)]
    expected = [float(half - 1 == planted.FAR) for half in halves]
    assert 0 < sum(expected) < 24
    for role in ("induction", "induction-offset"):
        np.testing.assert_allclose(of(role, "far"), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(exact()["induction"].excess[:, 0, 2], 0, rtol=0, atol=1e-6)
    twin = exact()["induction-offset"]
    assert twin.excess[:, 0, 2].mean() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_no_head_of_an_untrained_model_has_a_role(family: str) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        subject = load(AutoModelForCausalLM.from_config(families.config(family)).eval())
        table = roles_table(head_roles(subject, probes=12, execution=Execution(seed=seed)))
        assert not table["has_role"].any()
        # one head's OV circuit lies off chance by its trace: for where heads look nothing does
        looks = ~table["role"].isin(["copying", "negative-ov", "broad"])
        assert table.loc[looks, "excess"].abs().max() < 0.05


MODELS = 40


@lru_cache(maxsize=4)
def over_models(family: str) -> pd.DataFrame:
    """Return the roles of 40 random models as if they were texts: every model is drawn anew, so their heads are alike only in having no role."""
    found: dict[str, list[RoleScores]] = {}
    for seed in range(MODELS):
        subject = load(families.build(family, torch.float64, seed))
        for scores in (
            *pattern_roles(subject, n=1, execution=Execution(seed=seed)),
            *copying_roles(subject, execution=Execution(seed=seed)),
        ):
            found.setdefault(scores.role.name, []).append(scores)
    stacked = []
    for models in found.values():
        score, null = (np.stack([getattr(scores, part).mean(0) for scores in models]) for part in ("score", "null"))
        stacked.append(RoleScores(models[0].role, tuple(f"model {at}" for at in range(MODELS)), score, null))
    return roles_table(stacked)


@pytest.mark.parametrize("family", ["gpt2", *(pytest.param(family, marks=pytest.mark.slow) for family in ("llama", "gemma2"))])
def test_over_random_models_the_interval_of_the_excess_covers_zero_as_often_as_it_says(family: str) -> None:
    """Patterns of these models are far from uniform, so the score varies as much as it can; only breadth has no null that random heads reach."""
    table = over_models(family)
    table = table[(table["role"] != "broad") & table["excess_low"].notna() & (table["excess"] != 0)]
    covered = (table["excess_low"] <= 0) & (table["excess_high"] >= 0)
    assert covered.mean() == pytest.approx(0.95, abs=0.06)
