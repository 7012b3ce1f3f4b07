"""`compare_weights` equals arithmetic on the checkpoint's own arrays, whatever the family's storage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from mechscope.difference import compare_weights
from mechscope.difference.weights import compare_weights_of
from mechscope.errors import ModelError
from mechscope.instrument.execution import Execution
from mechscope.subject import Pair, pair
from mechscope.subject.load import load
from tests import families
from tests.difference import oracle

HEADS, WIDTH, LAYER = families.HEADS, families.WIDTH, 1
D = WIDTH // HEADS


def matrices(family: str, model: Any) -> dict[str, Tensor]:
    """Cut layer 1's query, key, value and output maps out of the family's storage by hand, (out, in), heads in order."""
    state = {name: value.double() for name, value in model.state_dict().items()}
    match family:
        case "gpt2":  # (in, out), q k v side by side
            fused = state["transformer.h.1.attn.c_attn.weight"].T
            return {
                **dict(zip(("query", "key", "value"), fused.split(WIDTH), strict=True)),
                "output": state["transformer.h.1.attn.c_proj.weight"].T,
            }
        case "gpt_neox":  # (head, qkv, d_head) rows
            fused = state["gpt_neox.layers.1.attention.query_key_value.weight"].reshape(HEADS, 3, D, WIDTH)
            parts = {part: fused[:, index].reshape(WIDTH, WIDTH) for index, part in enumerate(("query", "key", "value"))}
            return {**parts, "output": state["gpt_neox.layers.1.attention.dense.weight"]}
        case "phi3":  # side by side, two key/value heads
            fused = state["model.layers.1.self_attn.qkv_proj.weight"]
            parts = dict(zip(("query", "key", "value"), fused.split([WIDTH, WIDTH // 2, WIDTH // 2]), strict=True))
            return {**parts, "output": state["model.layers.1.self_attn.o_proj.weight"]}
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj" if family == "opt" else "o_proj"}
    prefix = "model.decoder.layers.1" if family == "opt" else "model.layers.1"
    return {part: state[f"{prefix}.self_attn.{name}.weight"] for part, name in names.items()}


def rows_of(table: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    return table[np.logical_and.reduce([table[name] == value for name, value in wanted.items()])]


def compared(base: Any, tuned: Any) -> Any:
    return compare_weights(oracle.two(base, tuned))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "phi3", "opt", "qwen3", "gemma2"])
def test_query_key_value_and_output_are_one_row_each_as_if_stored_apart(family: str):
    base = families.build(family)
    tuned = oracle.perturbed(base, 0.1)
    table = compared(base, tuned).table
    before, after = matrices(family, base), matrices(family, tuned)
    for kind, matrix in before.items():
        (row,) = rows_of(table, layer=LAYER, kind=kind).to_dict("records")
        change = after[kind] - matrix
        values = torch.linalg.svdvals(change)
        shares = (values / values.sum()).numpy()
        expected = {
            "rows": matrix.shape[0],
            "columns": matrix.shape[1],
            "norm_base": float(matrix.norm()),
            "change": float(change.norm()),
            "relative_change": float(change.norm() / matrix.norm()),
            "effective_rank": np.exp(-np.sum(shares * np.log(shares))),
            "stable_rank": float((change.norm() / values[0]) ** 2),
            **{f"sv{index + 1}": float(values[index]) for index in range(8)},
        }
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-7), f"{kind} {name}"


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_parameter_is_counted_once(family: str):
    base = families.build(family)
    tuned = oracle.perturbed(base, 0.1)
    table = compared(base, tuned).table
    with torch.no_grad():
        pairs = zip(base.parameters(), tuned.parameters(), strict=True)
        squares = sum(float((new.double() - old.double()).square().sum()) for old, new in pairs)
    assert (table["change"] ** 2).sum() == pytest.approx(squares, rel=1e-9)
    assert (table["rows"] * table["columns"]).sum() == sum(parameter.numel() for parameter in base.parameters())
    assert table["name"].is_unique


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_linear_map_has_its_kind(family: str):
    base = families.build(family)
    table = compared(base, base).table
    for layer in range(families.LAYERS):
        kinds = rows_of(table, layer=layer)["kind"]
        assert {"query", "key", "value", "output", "mlp"} <= set(kinds)
        assert (kinds == "mlp").sum() == sum(
            "mlp" in name or ".fc" in name for name, p in base.named_parameters() if p.ndim == 2 and f".{layer}." in name
        )
    assert rows_of(table, kind="embedding")["rows"].tolist() == [families.VOCABULARY]


@torch.no_grad()
def test_layer_change_is_that_of_all_its_parameters():
    base = families.build("llama")
    tuned = oracle.perturbed(base, 0.1, only="layers.2")
    found = compared(base, tuned)
    both = zip(base.named_parameters(), tuned.parameters(), strict=True)
    inside = [(old.double(), new.double()) for (name, old), new in both if ".layers.2." in name]
    squares = [sum(float(x.square().sum()) for x in part) for part in ([new - old for old, new in inside], [old for old, _ in inside])]
    np.testing.assert_allclose(found.layers, [0, 0, (squares[0] / squares[1]) ** 0.5], rtol=1e-9)
    assert (rows_of(found.table, layer=-1)["change"] == 0).all()


def change_gpt2(part: int) -> Callable[[Any, int], None]:
    def change(model: Any, head: int) -> None:
        model.transformer.h[LAYER].attn.c_attn.weight[:, part * WIDTH + head * D : part * WIDTH + (head + 1) * D] += 0.5

    return change


def change_neox(part: int) -> Callable[[Any, int], None]:
    def change(model: Any, head: int) -> None:
        model.gpt_neox.layers[LAYER].attention.query_key_value.weight.view(HEADS, 3, D, WIDTH)[head, part] += 0.5

    return change


def change_output(path: str, *, columns: bool) -> Callable[[Any, int], None]:
    def change(model: Any, head: int) -> None:
        weight, own = model.get_submodule(path).weight, slice(head * D, (head + 1) * D)
        weight[:, own] += 0.5 if columns else 0
        weight[own] += 0 if columns else 0.5

    return change


def change_rows(path: str) -> Callable[[Any, int], None]:
    return change_output(path, columns=False)


OWN_SLICES = {
    **{f"gpt2 {part}": ("gpt2", change_gpt2(index)) for index, part in enumerate(("query", "key", "value"))},
    **{f"gpt_neox {part}": ("gpt_neox", change_neox(index)) for index, part in enumerate(("query", "key", "value"))},
    "gpt2 output": ("gpt2", change_rows("transformer.h.1.attn.c_proj")),
    "gpt_neox output": ("gpt_neox", change_output("gpt_neox.layers.1.attention.dense", columns=True)),
    "llama query": ("llama", change_rows("model.layers.1.self_attn.q_proj")),
    "llama output": ("llama", change_output("model.layers.1.self_attn.o_proj", columns=True)),
    "phi3 query": ("phi3", change_rows("model.layers.1.self_attn.qkv_proj")),
}


@pytest.mark.parametrize("case", OWN_SLICES)
def test_changing_a_head_s_own_slice_changes_this_head_alone(case: str):
    family, change = OWN_SLICES[case]
    base = families.build(family)
    tuned = oracle.perturbed(base, 0.0)
    with torch.no_grad():
        change(tuned, 2)
    found = compared(base, tuned).heads
    own = matrices(family, base)
    shared = HEADS // (own["key"].shape[0] // D)
    squares = sum(
        float(own[part][head * D : (head + 1) * D].square().sum())
        for part, head in (("query", 2), ("key", 2 // shared), ("value", 2 // shared))
    )
    squares += float(own["output"][:, 2 * D : 3 * D].square().sum())
    expected = np.zeros((families.LAYERS, HEADS))
    expected[LAYER, 2] = (0.25 * D * WIDTH / squares) ** 0.5
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(("family", "path", "offset"), [("llama", "k_proj", 0), ("llama", "v_proj", 0), ("phi3", "qkv_proj", WIDTH)])
def test_changing_a_shared_key_or_value_slice_changes_its_whole_group(family: str, path: str, offset: int):
    base = families.build(family)
    tuned = oracle.perturbed(base, 0.0)
    with torch.no_grad():
        tuned.model.layers[LAYER].self_attn.get_submodule(path).weight[offset + D : offset + 2 * D] += (
            0.5  # the second of two key/value heads
        )
    changed = compared(base, tuned).heads > 0
    assert np.argwhere(changed).tolist() == [[LAYER, 2], [LAYER, 3]]


def lora(family: str, targets: list[str], **options: Any) -> Any:
    model = get_peft_model(families.build(family), LoraConfig(r=3, lora_alpha=6, target_modules=targets, **options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


ADAPTERS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "dense"],
    "llama": ["q_proj", "k_proj", "o_proj", "down_proj"],
}


@pytest.mark.parametrize("family", ADAPTERS)
def test_an_adapter_changes_weights_as_the_merged_model_does(family: str):
    options = {"fan_in_fan_out": True} if family == "gpt2" else {}
    tuned = load(lora(family, ADAPTERS[family], **options), device="cpu")
    as_adapter = compare_weights(pair(tuned.without_adapter(), tuned))
    as_models = compared(families.build(family), lora(family, ADAPTERS[family], **options).merge_and_unload())
    assert as_adapter.heads.min() > 0.01
    pd.testing.assert_frame_equal(as_adapter.table, as_models.table, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(as_adapter.heads, as_models.heads, rtol=1e-5)
    np.testing.assert_allclose(as_adapter.layers, as_models.layers, rtol=1e-5)


def test_the_change_of_a_lora_of_rank_three_has_rank_three():
    tuned = load(lora("llama", ADAPTERS["llama"]), device="cpu")
    table = compare_weights(pair(tuned.without_adapter(), tuned)).table
    adapted = table[table["kind"].isin(["query", "key", "output"])]
    assert (adapted["sv3"] > 0).all()
    # W + ΔW is rounded to float32, which leaves noise of W's last place in ΔW
    assert (adapted["sv4"] < 1e-5 * adapted["sv1"]).all()
    assert adapted["effective_rank"].between(1, 3.01).all()
    assert (table.loc[table["kind"] == "value", "change"] == 0).all()


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"lora_bias": True}])
def test_an_adapter_that_is_not_a_sum_of_weights_is_compared_as_it_is_merged(variant: dict[str, bool]):
    tuned = load(lora("gpt_neox", ["query_key_value"], **variant), device="cpu")
    table = compare_weights(pair(tuned.without_adapter(), tuned)).table
    merged = load(lora("gpt_neox", ["query_key_value"], **variant).merge_and_unload(), device="cpu")
    pd.testing.assert_frame_equal(table, compare_weights(pair(load(families.build("gpt_neox")), merged)).table)
    assert (table.loc[table["kind"] == "query", "change"] > 0).all()


def test_modules_trained_whole_beside_an_adapter_are_compared():
    tuned = load(lora("llama", ["q_proj"], modules_to_save=["lm_head"]), device="cpu")
    with torch.no_grad():
        tuned.model.base_model.model.lm_head.modules_to_save["default"].weight += 0.1
    table = compare_weights(pair(tuned.without_adapter(), tuned)).table
    (head,) = rows_of(table, kind="unembedding").to_dict("records")
    assert head["change"] == pytest.approx(0.1 * (families.VOCABULARY * WIDTH) ** 0.5, rel=1e-5)


def test_tied_embeddings_appear_once():
    base = families.build("gpt2")
    table = compared(base, oracle.perturbed(base, 0.1)).table
    assert (table["rows"] == families.VOCABULARY).sum() == 1
    assert rows_of(table, rows=families.VOCABULARY)["kind"].item() == "embedding"


def test_untied_embeddings_are_two_rows():
    base = families.build("llama")
    table = compared(base, oracle.perturbed(base, 0.1)).table
    assert table.loc[table["rows"] == families.VOCABULARY, "kind"].tolist() == ["embedding", "unembedding"]


def test_a_resized_vocabulary_is_compared_on_its_shared_tokens():
    base, tuned = families.build("llama"), families.build("llama")
    tuned.resize_token_embeddings(families.VOCABULARY + 3, mean_resizing=False)
    with torch.no_grad():
        tuned.model.embed_tokens.weight[5] += 1.0
    table = compare_weights(oracle.two(base, tuned, resize="truncate")).table
    (row,) = rows_of(table, kind="embedding").to_dict("records")
    assert row["rows"] == families.VOCABULARY
    assert row["change"] == pytest.approx(WIDTH**0.5)
    assert (rows_of(table, kind="unembedding")["change"] == 0).all()


def test_another_shape_is_an_error_that_names_the_parameter():
    base, tuned = families.build("gpt2", n_positions=64), families.build("gpt2", n_positions=128)
    with pytest.raises(ModelError, match=r"parameter transformer\.wpe\.weight has shape \(128, 32\) in the tuned model and \(64, 32\)"):
        compared(base, tuned)


def test_positions_are_not_cut_like_a_vocabulary():
    base, tuned = (families.build("gpt2", n_positions=positions, vocab_size=40) for positions in (64, 128))
    with pytest.raises(ModelError, match=r"parameter transformer\.wpe\.weight has shape \(128, 32\) in the tuned model and \(64, 32\)"):
        compared(base, tuned)


def test_a_parameter_in_one_model_only_is_an_error_that_names_it():
    base, tuned = families.build("llama", tie_word_embeddings=True), families.build("llama")
    with pytest.raises(ModelError, match=r"do not have the same parameters: lm_head\.weight \(1 in all\) are in one only; .* untied\?"):
        compare_weights(Pair(load(base), load(tuned), families.VOCABULARY))


def test_progress_counts_parameters():
    seen: list[tuple[str, int, int]] = []
    compare_weights(oracle.models("gpt2"), execution=Execution(progress=lambda *at: seen.append(at)))
    total = len(list(oracle.models("gpt2").base.plain.parameters()))
    assert seen == [("comparing weights", done, total) for done in range(total + 1)]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_a_model_of_several_pairs_is_decomposed_once_and_gives_what_each_pair_gives_alone(family: str, monkeypatch: pytest.MonkeyPatch):
    base = families.build(family)
    one, two, three = (load(model, device="cpu") for model in (base, oracle.perturbed(base, 0.1), oracle.perturbed(base, 0.3)))
    pairs = [pair(one, two), pair(one, three), pair(two, three)]
    alone = [compare_weights(each) for each in pairs]
    decompose = MagicMock(wraps=torch.linalg.eigh)
    monkeypatch.setattr(torch.linalg, "eigh", decompose)
    found = compare_weights_of(pairs)
    matrices = alone[0].table["intruders"].notna().sum()
    assert decompose.call_count == 3 * matrices
    for together, each in zip(found, alone, strict=True):
        pd.testing.assert_frame_equal(together.table, each.table, check_exact=True)
        np.testing.assert_array_equal(together.heads, each.heads)
        np.testing.assert_array_equal(together.layers, each.layers)


def test_models_that_share_fewer_words_with_one_than_with_another_are_decomposed_for_each():
    base = families.build("llama")
    tuned, wide = oracle.perturbed(base, 0.1), families.build("llama", seed=5)
    wide.resize_token_embeddings(families.VOCABULARY + 3, mean_resizing=False)
    one, two, larger = (load(model, device="cpu") for model in (base, tuned, wide))
    wider = load(oracle.perturbed(wide, 0.1), device="cpu")
    pairs = [pair(larger, wider), pair(larger, one, resize="truncate"), pair(one, two)]
    for together, each in zip(compare_weights_of(pairs), pairs, strict=True):
        pd.testing.assert_frame_equal(together.table, compare_weights(each).table, check_exact=True)
