"""What fine-tuning changed in heads' circuits: equal to the dense difference, for models and adapters, and nothing where nothing changed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from mechscope.subject.load import load
from mechscope.subject.pair import Pair, pair
from mechscope.weights import ChangedForms, head_changes, ov_tokens, qk_tokens, singular_tokens
from tests import families
from tests.weights import oracle


def tuned(family: str) -> Any:
    """Change a model's embeddings, norms and attention of layers 1 and 2."""
    model = families.build(family, torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not any(f".{part}." in name for part in ("h.0", "layers.0")):
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def pair_of(family: str) -> Pair:
    return pair(families.subject(family, torch.float64), load(tuned(family)))


def change(models: Pair, family: str, layer: int, head: int, matrix: str) -> tuple[Tensor, Tensor]:
    """Return the base's and the tuned model's dense circuit."""
    one, two = (getattr(oracle.head(subject.plain, family, layer, head), matrix) for subject in (models.base, models.tuned))
    return one, two


@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_sizes_of_change_are_those_of_the_dense_circuits(family: str) -> None:
    models = pair_of(family)
    table = head_changes(models)
    assert table["ov_relative"].is_monotonic_decreasing
    assert table["ov_place"].tolist() == list(range(1, 13))
    rows = table.set_index("component").drop(columns=["ov_place", "qk_place"]).to_dict("index")
    for layer, head in models.base.anatomy.heads():
        for matrix in ("ov", "qk"):
            row = rows[f"a{layer}.h{head}"]
            if matrix == "qk" and family == "qwen3":
                assert math.isnan(row["qk_relative"])
                continue
            base, new = change(models, family, layer, head, matrix)
            expected = float(torch.linalg.norm(new - base))
            assert row[f"{matrix}_change"] == pytest.approx(expected, rel=1e-6, abs=1e-9)
            assert row[f"{matrix}_relative"] == pytest.approx(expected / float(torch.linalg.norm(base)), rel=1e-6, abs=1e-9)
            assert (row[f"{matrix}_change"] == 0) == (layer == 0)
    if family == "qwen3":
        assert table["qk_place"].isna().all()
    else:
        assert table.sort_values("qk_place")["qk_relative"].is_monotonic_decreasing


@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_tokens_of_the_change_are_entries_of_the_dense_change_seen_by_the_base(family: str) -> None:
    models = pair_of(family)
    table = ov_tokens(models, k=6)
    assert set(table["layer"]) == {1, 2}, "layer 0 stayed as it was"
    model = models.base.plain
    for layer, head in ((1, 3), (2, 0)):
        base, new = change(models, family, layer, head, "ov")
        read = oracle.head(model, family, layer, head).norm.standard(oracle.tokens(model, family))
        dense = (read @ (new - base) @ oracle.directions(model, family).T).numpy()
        rows = table[(table["layer"] == layer) & (table["head"] == head)]
        for sign, largest in (("promoted", True), ("suppressed", False)):
            found = rows[rows["sign"] == sign]
            expected = torch.from_numpy(dense).flatten().topk(6, largest=largest).values
            torch.testing.assert_close(torch.tensor(found["value"].to_numpy()), expected, rtol=1e-6, atol=1e-9)
            assert found["value"].tolist() == pytest.approx(
                dense[found["source_id"].to_numpy(), found["target_id"].to_numpy()].tolist(), rel=1e-6
            )


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gemma2"])
@pytest.mark.parametrize("offset", [0, 3])
def test_scores_of_the_change_are_tuned_less_base_constants_included(family: str, offset: int) -> None:
    """With embeddings and norms' scales alike, the change is the plain difference of both models' scores."""
    base, model = families.subject(family, torch.float64), tuned(family)
    model.get_input_embeddings().weight.data.copy_(base.plain.get_input_embeddings().weight)
    models = pair(base, load(model))
    every, queries = families.VOCABULARY, [5, 60]
    options: dict[str, Any] = {"heads": "a1.h1,a2.h2", "queries": queries, "offset": offset, "k": every}
    difference, one, two = (
        qk_tokens(given, **options).query("sign == 'attended'").set_index(["component", "query_id", "key_id"])["value"].sort_index()
        for given in (models, models.base, models.tuned)
    )
    assert len(difference) == 2 * 2 * every
    assert (difference - (two - one)).abs().max() < 1e-9
    assert difference.abs().max() > 1e-3


def test_singular_vectors_of_the_change_are_those_of_the_dense_change() -> None:
    models = pair_of("llama")
    table = singular_tokens(models, n=2, k=3)
    assert set(table["layer"]) == {1, 2}
    base, new = change(models, "llama", 2, 1, "ov")
    values = torch.linalg.svdvals(new - base)
    found = table[(table["component"] == "a2.h1") & (table["side"] == "out") & (table["sign"] == "positive")]
    assert found["value"].tolist() == pytest.approx(values[:2].tolist(), rel=1e-9)


TARGETS = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "k_proj", "v_proj", "o_proj"], "gpt_neox": ["query_key_value", "dense"]}


def adapted(family: str) -> Any:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS[family], layers_to_transform=[1], fan_in_fan_out=family == "gpt2")
    model = get_peft_model(families.build(family, torch.float64), config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("family", TARGETS)
def test_an_adapter_changes_what_the_merged_model_changes(family: str) -> None:
    subject = load(adapted(family))
    merged = pair(families.subject(family, torch.float64), load(adapted(family).merge_and_unload()))
    own = pair(subject.without_adapter(), subject)
    found, expected = (head_changes(models, offset=2).drop(columns=["ov_place", "qk_place"]) for models in (own, merged))
    found, expected = (table.sort_values("component").set_index("component") for table in (found, expected))
    assert (found - expected).abs().max().max() < 1e-9
    assert (found["ov_change"] > 0).tolist() == [False] * 4 + [True] * 4 + [False] * 4
    one, two = (ov_tokens(models, heads="a1.h2", k=5)["value"] for models in (own, merged))
    assert (one - two).abs().max() < 1e-9


def test_a_change_of_values_alone_has_the_adapters_rank() -> None:
    config = LoraConfig(r=2, target_modules=["v_proj"])
    model = get_peft_model(families.build("llama", torch.float64), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    subject = load(model.eval())
    forms = ChangedForms(pair(subject.without_adapter(), subject))
    assert forms.ov(1, 2).rank == 2
    assert forms.qk(1, 2).rank == 0
