"""`difference` as a whole: its tables, its equality with two separate models, its survival."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from peft import LoraConfig, get_peft_model
from scipy.stats import poisson

from mechscope.data.prompt import Encoded, collate, packs
from mechscope.difference import Difference, difference, differences, lockstep, one_pass
from mechscope.difference.accumulate import Accumulated
from mechscope.errors import DataError
from mechscope.instrument import Walk, memory
from mechscope.instrument.execution import Execution
from mechscope.stats.geometry import BottomK, cka, rsa
from mechscope.subject import Pair, Subject, pair
from mechscope.subject.load import load
from tests import families
from tests.difference import oracle

FAMILIES = ("gpt2", "llama", "gpt_neox", "gemma3", "qwen3")
# batches of one to three documents of different length, so that there is padding and more than one batch
SMALL = Execution(tokens_per_batch=46)
TABLES = ("heads", "layers", "weights", "outputs")


def run(both: Pair, documents: Encoded | None = None, *, execution: Execution = SMALL, replicates: int = 20, **options: Any) -> Difference:
    return difference(both, documents or oracle.encoded(), replicates=replicates, execution=execution, **options)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def found(family: str) -> Difference:
    return run(oracle.models(family))


def assert_equal_tables(one: Difference, other: Difference, **tolerance: Any) -> None:
    for name in TABLES:
        assert_frame_equal(getattr(one, name), getattr(other, name), obj=name, **(tolerance or {"check_exact": True}))


def assert_spread(table: pd.DataFrame, name: str, values: np.ndarray, *, ends: tuple[str, ...]) -> None:
    """Compare a measure's column and its statistics, row by row, with those of `values` (document, row)."""
    expected = oracle.spread(values)
    np.testing.assert_allclose(table[name], expected.mean, rtol=1e-9, atol=1e-11, err_msg=name)
    for end in ends:
        np.testing.assert_allclose(table[f"{name}_{end}"], getattr(expected, end), rtol=1e-6, atol=1e-11, err_msg=f"{name}_{end}")


def test_the_heads_table_is_that_of_plain_hugging_face(family: str, found: Difference):
    truth = oracle.truth(family).heads
    for index, rows in enumerate(oracle.KINDS):
        table = found.heads[found.heads["rows"] == rows]
        assert table["component"].tolist() == [f"a{layer}.h{head}" for layer in range(families.LAYERS) for head in range(families.HEADS)]
        assert set(table["n"]) == {len(oracle.examples())}
        for measure, name in enumerate(oracle.HEAD_NAMES):
            ends = {"entropy_change": ("se", "low", "high", "p"), "kl_base_tuned": ("se",), "kl_tuned_base": ("se",)}.get(name, ())
            assert_spread(table, name, truth[:, index, measure].reshape(len(truth), -1), ends=ends)
        p = table["entropy_change_p"].tolist()
        np.testing.assert_allclose(table["entropy_change_q"], oracle.benjamini_hochberg(p), rtol=1e-12)


def test_the_layers_table_is_that_of_plain_hugging_face(family: str, found: Difference):
    truth = oracle.truth(family)
    for index, rows in enumerate(oracle.KINDS):
        table = found.layers[found.layers["rows"] == rows]
        for measure, name in enumerate(oracle.LAYER_NAMES):
            assert_spread(table, name, truth.layers[:, index, measure], ends=("se", "low", "high"))
        changes = truth.heads[:, index, oracle.HEAD_NAMES.index("entropy_change")].mean(0)
        assert table["share_focused"].tolist() == [sum(row < 0) / len(row) for row in changes]
        base, tuned = truth.pooled[:, 0, index], truth.pooled[:, 1, index]
        for similarity in (cka, rsa):
            expected = [similarity(base[:, layer], tuned[:, layer]) for layer in range(families.LAYERS)]
            np.testing.assert_allclose(table[similarity.__name__], expected, rtol=1e-3)  # the pooled states are kept in float32


def test_the_outputs_table_is_that_of_plain_hugging_face(family: str, found: Difference):
    assert found.outputs["rows"].tolist() == list(oracle.KINDS)
    truth = oracle.truth(family).outputs
    for measure, name in enumerate(oracle.OUTPUT_NAMES):
        ends = {"loss_base": (), "loss_tuned": (), "loss_change": ("se", "low", "high", "p")}.get(name, ("se", "low", "high"))
        assert_spread(found.outputs, name, truth[:, :, measure], ends=ends)


def test_batching_changes_nothing_but_rounding(family: str, found: Difference):
    for tokens in (1, 10_000):
        assert_equal_tables(run(oracle.models(family), execution=Execution(tokens_per_batch=tokens)), found, rtol=1e-6, atol=1e-9)


def test_states_are_pooled_of_the_sampled_documents_alone(family: str, monkeypatch: pytest.MonkeyPatch):
    both, documents = oracle.models(family), oracle.examples()
    everything = Accumulated(n_layers=families.LAYERS, n_heads=families.HEADS, geometry_documents=3, seed=7)
    everything.update(lockstep.measure(both, collate(documents, pad_id=0)))
    pooled: list[str] = []
    keep = BottomK.update

    def update(sample: BottomK, name: str, array: np.ndarray) -> None:
        pooled.append(name)
        keep(sample, name, array)

    monkeypatch.setattr(BottomK, "update", update)
    found = run(both, geometry_documents=3, execution=replace(SMALL, seed=7))
    assert len(pooled) == 3 < len(documents)
    np.testing.assert_allclose(found.accumulated.pooled.arrays(), everything.pooled.arrays(), rtol=1e-6)


def test_a_model_against_itself_shows_no_change(family: str):
    base = families.build(family)
    found = run(oracle.two(base, oracle.perturbed(base, size=0.0)))
    zero = ["entropy_change", "kl_base_tuned", "kl_tuned_base"]
    assert found.heads[[*zero, "z_cosine_distance", "weight_change"]].abs().to_numpy().max() < 1e-6
    assert found.layers[[*zero, "cosine_distance", "weight_change"]].abs().to_numpy().max() < 1e-6
    assert found.outputs[["kl_base_tuned", "kl_tuned_base", "loss_change"]].abs().to_numpy().max() < 1e-6
    np.testing.assert_allclose(found.layers[["cka", "rsa"]], 1.0, atol=1e-6)
    assert (found.heads["entropy_change_q"] == 1).all()
    assert (found.layers["share_focused"] == 0).all()
    assert (found.weights["change"] == 0).all()


# of each family: what a block writes to the residual stream with, and what its patterns are made of
QUERIES = {"gpt2": "h.{}.attn.c_attn", "gpt_neox": "layers.{}.attention.query_key_value", "llama": "layers.{}.self_attn.q_proj"}
WRITERS = ("c_proj", "dense.", "dense_4h_to_h", "o_proj", "down_proj")


@pytest.mark.parametrize("layer", range(families.LAYERS))
@pytest.mark.parametrize("family_name", QUERIES)
def test_the_one_layer_that_was_tuned_ranks_first(family_name: str, layer: int):
    # blocks write little compared with the embedding, as in real models; in random ones a change grows from layer to layer
    base = families.build(family_name, torch.float64)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if any(writer in name for writer in WRITERS):
                parameter.mul_(0.01)
    found = run(oracle.two(base, oracle.perturbed(base, 0.3, only=QUERIES[family_name].format(layer))))
    for rows in oracle.KINDS:
        table = found.layers[found.layers["rows"] == rows].set_index("layer")
        assert table["kl_base_tuned"].idxmax() == layer
        assert table["score"].idxmax() == layer
        assert (table["kl_base_tuned"][:layer] < 1e-12).all()
        assert (table["weight_change"] > 0).tolist() == [index == layer for index in range(families.LAYERS)]


def adapted(family_name: str, seed: int = 0) -> Any:
    """Wrap a tiny model in a LoRA adapter that does something."""
    targets = {"gpt2": ["c_attn", "c_proj", "c_fc"], "gpt_neox": ["query_key_value", "dense_h_to_4h"]}.get(
        family_name, ["q_proj", "v_proj", "up_proj"]
    )
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, fan_in_fan_out=family_name == "gpt2")
    model = get_peft_model(families.build(family_name, torch.float64), config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("family_name", ["gpt2", "gpt_neox", "llama"])
def test_an_adapter_differs_from_its_base_as_the_merged_model_does(family_name: str):
    tuned = load(adapted(family_name), device="cpu")
    as_adapter = run(pair(tuned.without_adapter(), tuned))
    merged = adapted(family_name).merge_and_unload()
    as_models = run(oracle.two(families.build(family_name, torch.float64), merged))
    assert as_adapter.heads["kl_base_tuned"].mean() > 1e-3
    assert_equal_tables(as_adapter, as_models, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family_name", ["gpt2", "gpt_neox", "llama", "gemma3"])
def test_several_pairs_at_once_give_what_each_gives_alone_and_run_a_shared_model_once(family_name: str, monkeypatch: pytest.MonkeyPatch):
    base, tuned, adapter = (
        load(model, device="cpu")
        for model in (families.build(family_name, torch.float64), oracle.models(family_name).tuned.model, adapted(family_name))
    )
    pairs = {
        "base–tuned": pair(base, tuned),
        "base–LoRA": pair(base, adapter),
        "tuned–LoRA": pair(tuned, adapter),
        "LoRA off–on": pair(adapter.without_adapter(), adapter),
    }
    expected = {name: run(each) for name, each in pairs.items()}
    walked: list[Subject] = []

    class Counted(Walk):
        def __init__(self, subject: Subject, *args: Any) -> None:
            walked.append(subject)
            super().__init__(subject, *args)

    monkeypatch.setattr(lockstep, "Walk", Counted)
    found = differences(pairs, oracle.encoded(), replicates=20, execution=SMALL)
    batches = len(list(packs([len(example) for example in oracle.examples()], tokens_per_batch=46)))
    # the adapter's two views are two models, the others one each
    assert [walked.count(subject) for subject in (base, tuned, adapter)] == [batches] * 3
    assert len(walked) == 4 * batches
    assert list(found) == list(expected)
    for name, each in expected.items():
        assert_equal_tables(found[name], each)


def test_pairs_whose_vocabularies_differ_are_compared_over_what_each_shares():
    base, tuned = oracle.models("llama").base, oracle.models("llama").tuned
    wide = copy.deepcopy(base.model)
    torch.manual_seed(0)
    wide.resize_token_embeddings(families.VOCABULARY + 5)
    larger = load(wide, device="cpu")
    pairs = {"same": pair(base, tuned), "cut": pair(larger, tuned, resize="truncate")}
    found = differences(pairs, oracle.encoded(), replicates=20, execution=SMALL)
    for name, each in pairs.items():
        assert_equal_tables(found[name], run(each))
    # the copy's own words beyond the shared ones count for nothing, and its first ones are the base's
    assert_frame_equal(found["same"].outputs, found["cut"].outputs, rtol=1e-9, atol=1e-12)


def test_pairs_of_which_less_is_asked_have_the_same_layers_without_gini_and_replicates():
    base, tuned = oracle.models("llama").base, oracle.models("llama").tuned
    found = differences(
        {"one": pair(base, tuned), "other": pair(tuned, base)}, oracle.encoded(), in_full=["one"], gini=True, replicates=20, execution=SMALL
    )
    assert_equal_tables(found["one"], run(pair(base, tuned), gini=True))
    alone = run(pair(tuned, base)).layers
    # of the other pair nothing is run on the same input
    same = [name for name in map(str, alone) if "write_change" in name and "own" not in name and not name.endswith(("_n", "_verdict"))]
    counts = [f"{name}_n" for name in ("write_change", "mlp_write_change")]
    assert len(same) == 8
    assert found["other"].layers[same].isna().all(axis=None)
    assert (found["other"].layers[counts] == 0).all(axis=None)
    assert_frame_equal(found["other"].layers.drop(columns=[*same, *counts]), alone.drop(columns=[*same, *counts]))
    assert "gini_base" not in found["other"].heads
    assert len(found["other"].replicates("kl_base_tuned")) == 0


def test_the_adapter_is_left_on():
    model = adapted("gpt2")
    ids = torch.tensor([oracle.examples()[0].input_ids])
    with torch.no_grad():
        before = model(ids).logits
        tuned = load(model, device="cpu")
        run(pair(tuned.without_adapter(), tuned))
        assert torch.equal(model(ids).logits, before)


def test_a_document_longer_than_the_models_can_read_is_an_error():
    with pytest.raises(DataError, match=r"a document has 65 tokens, the models read at most 64: lower max_tokens"):
        run(oracle.models("gpt2"), oracle.encoded(lengths=(65, 10)))


def test_documents_without_a_summary_leave_the_summary_rows_empty():
    bare = tuple(replace(example, summary=(len(example), len(example))) for example in oracle.examples())
    found = run(oracle.models("gpt2"), Encoded(bare, {"odd": 2}))
    for table in (found.heads, found.layers, found.outputs):
        summary = table[table["rows"] == "summary"]
        assert (summary["n"] == 0).all()
        described = ("rows", "layer", "head", "component", "n", "weight_change")
        measured = [name for name in summary.columns if name not in described and not name.endswith(("_n", "_verdict"))]
        assert summary[measured].isna().all(axis=None)
        assert (summary[[name for name in summary.columns if name.endswith("_verdict")]] == "not measured").all(axis=None)
        assert table[table["rows"] == "document"]["kl_base_tuned"].notna().all()
    assert found.problems == {"odd": 2}


def test_a_document_without_a_summary_lowers_n_and_nothing_else():
    first, *others = oracle.examples(lengths=(23, 12, 17, 9, 20, 14, 11))
    bare = replace(first, summary=(len(first), len(first)))
    found, without = run(oracle.models("gpt2"), Encoded((bare, *others), {})), run(oracle.models("gpt2"), Encoded(tuple(others), {}))
    for name in ("heads", "outputs"):
        one, other = (getattr(result, name).query("rows == 'summary'") for result in (found, without))
        assert set(one["n"]) == {len(others)}
        assert_frame_equal(one, other, rtol=1e-9)


def test_replicates_resample_documents():
    found = run(oracle.models("gpt2"), replicates=400)
    replicates = found.replicates("kl_base_tuned", "document")
    table = found.heads[found.heads["rows"] == "document"]
    assert replicates.shape == (400, families.LAYERS, families.HEADS)
    # the spread of bootstrap means estimates the standard error: (n − 1)/n of its variance, and more as a replicate has Poisson(n) documents, not n
    n = len(oracle.examples())
    documents = np.arange(1, 100)
    inverse = (poisson.pmf(documents, n) / documents).sum() / poisson.sf(0, n)
    ratio = np.nanstd(replicates, axis=0).ravel() / table["kl_base_tuned_se"].to_numpy()
    assert np.median(ratio) == pytest.approx(np.sqrt((n - 1) * inverse), rel=0.05)


def test_left_to_itself_it_makes_batches_that_fit_into_memory_and_enough_of_them_to_share(monkeypatch: pytest.MonkeyPatch):
    both = oracle.models("gpt2", torch.float32)
    documents = oracle.encoded(lengths=[30] * 2400)

    def tokens(free: int) -> int:
        monkeypatch.setattr(memory, "free_memory", lambda device: free)
        return one_pass.chosen({"pair": both}, documents)

    assert tokens(2**40) == 2048, "72,000 tokens make 32 batches of 2,250"
    assert tokens(2**29 + 2**24) == 1024, "what fits is less"
    assert tokens(0) == memory.FEWEST
    assert one_pass.chosen({"pair": both}, oracle.encoded()) == memory.FEWEST, "few documents are one batch"
    assert_equal_tables(difference(both, oracle.encoded(), replicates=20), run(both, execution=Execution(tokens_per_batch=512)))


def test_progress_ends_with_everything_done():
    seen: list[tuple[str, int, int]] = []
    run(oracle.models("gpt2"), execution=replace(SMALL, progress=lambda *at: seen.append(at)))
    documents = [at for at in seen if at[0] == "comparing documents"]
    assert [done for _, done, _ in documents] == sorted({done for _, done, _ in documents})
    assert documents[-1] == ("comparing documents", 6, 6)
    assert seen[-1][0] == "comparing weights"
    assert seen[-1][1] == seen[-1][2]
