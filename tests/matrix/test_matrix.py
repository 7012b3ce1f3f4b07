"""Every causal language model that transformers knows gives right numbers or one sentence that says why not; docs/models.md says which."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.matrix.checks import CHECKS
from tests.matrix.configs import families
from tests.matrix.outcome import HALF, Outcome, outcome
from tests.matrix.page import page

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
# one family of each kind that the tiny models of `tests.families` do not have
FAST = {
    "gpt_oss": set[str](),  # experts, learned sinks, windows
    "mixtral": set[str](),
    "qwen3_moe": set[str](),
    "qwen2_moe": set[str](),  # shared experts beside the chosen ones
    "granitemoe": set[str](),  # factors on what is added
    "glm4": set[str](),  # norms behind and in front
    "hyperclovax": set[str](),
    "nanochat": set[str](),  # norms without weights
    "llama4_text": set[str](),
    "deepseek_v3": {"edge attribution"},  # keys and values from a latent
    "olmoe": {"edge attribution"},
    "bitnet": {"edge attribution"},
    "afmoe": {"edge attribution"},  # gated heads before a norm,
    "beam": {"edge attribution"},
    "lfm2": {"edge attribution"},  # hybrids: short convolutions,
    "jamba": {"edge attribution"},  # state-space models,
    "bamba": {"edge attribution"},  # whose code unpacks what its blocks return,
    "granitemoehybrid": {"edge attribution"},
    "olmo_hybrid": {"edge attribution"},  # linear attention,
    "qwen3_next": {"edge attribution"},  # beside gated heads,
    "minimax": {"edge attribution"},  # called as attention is called
}
REFUSED = {
    "mamba": "has no attention heads",
    "bloom": "0 of 3 layers went through transformers' attention interface",
    "recurrent_gemma": "block model.layers.0 has no attention module as known here, and of what else may mix tokens",
    "granitemoeshared": "adds what block_sparse_moe and shared_mlp write together",
    "moshi": r"q_proj (MoshiLinear) is no linear map with one weight",
    "falcon": "interleaves 1 key/value heads with 4 query heads",
    "bert": "0 hold attention modules as known here",
}


@pytest.mark.parametrize("family", FAST)
def test_a_kind_of_family_is_measured_rightly(family: str) -> None:
    found = outcome(family)
    assert (found.faults, found.unbuilt) == ([], "")
    assert set(found.refusals) == FAST[family]
    # each was compared: plain Hugging Face gives all that these families are held against
    assert set(found.errors) == {*CHECKS, HALF} - FAST[family]


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_not_measured_is_refused_in_one_sentence_with_its_reason(family: str) -> None:
    found = outcome(family)
    assert (found.faults, found.unbuilt) == ([], "")
    assert REFUSED[family] in found.refusals["load"]
    assert family.split("_")[0] in found.refusals["load"].lower()


@pytest.fixture(scope="module")
def every() -> list[Outcome]:
    return [outcome(family) for family in families()]


@pytest.mark.slow
def test_no_family_gives_a_wrong_number_or_ends_in_another_error(every: list[Outcome]) -> None:
    assert [f"{one.family}: {fault}" for one in every for fault in one.faults] == []
    assert sum(one.right for one in every) >= 65


@pytest.mark.slow
def test_the_page_says_what_is_found(every: list[Outcome]) -> None:
    assert PAGE.read_text(encoding="utf-8") == page(every), "run: python -m tests.matrix > docs/models.md"
