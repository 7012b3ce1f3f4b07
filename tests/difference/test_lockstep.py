"""`measure` says of each document what plain Hugging Face says of it alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mechscope.data.prompt import Example, collate
from mechscope.difference import lockstep
from mechscope.difference.lockstep import HEAD_MEASURES, LAYER_MEASURES, OUTPUT_MEASURES, Measured, launch, measure
from mechscope.errors import ModelError
from tests import families
from tests.difference import oracle

FAMILIES = ("gpt2", "llama", "gpt_neox", "gemma2", "gemma3", "qwen3")
# float32: relative; the floor is a few roundings (1e-7 each) of scores about twenty, of which entropies and divergences are small differences
# what is zero between equal models
NOTHING = ("entropy_change", "kl_base_tuned", "kl_tuned_base", "write_change", "write_change_own")
MLPS = ("mlp_write_change", "mlp_write_change_own")
TOLERANCE: dict[torch.dtype, dict[str, Any]] = {torch.float64: {"rtol": 1e-9, "atol": 1e-11}, torch.float32: {"rtol": 1e-4, "atol": 1e-5}}


def arrange(padding: str) -> list[tuple[Example, ...]]:
    documents = oracle.examples()
    return [(document,) for document in documents] if padding == "alone" else [documents]


def measured(family: str, dtype: torch.dtype, padding: str, method: Any = "auto") -> Measured:
    side: Any = "left" if padding == "left" else "right"
    parts = [
        measure(oracle.models(family, dtype), collate(documents, pad_id=0, padding=side), method=method) for documents in arrange(padding)
    ]
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("heads", "layers", "outputs", "pooled")}
    ids = tuple(name for part in parts for name in part.ids)
    return Measured(ids, **joined, sampled=ids)


def test_measures_have_the_oracle_s_names():
    assert (HEAD_MEASURES, LAYER_MEASURES, OUTPUT_MEASURES) == (oracle.HEAD_NAMES, oracle.LAYER_NAMES, oracle.OUTPUT_NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("padding", ["alone", "right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_measure_equals_plain_hugging_face(family: str, padding: str, dtype: torch.dtype):
    expected, found = oracle.truth(family, dtype), measured(family, dtype, padding)
    for kind, names in (("heads", HEAD_MEASURES), ("layers", LAYER_MEASURES), ("outputs", OUTPUT_MEASURES)):
        for index, name in enumerate(names):
            np.testing.assert_allclose(
                getattr(found, kind)[:, :, index], getattr(expected, kind)[:, :, index], **TOLERANCE[dtype], err_msg=f"{kind} {name}"
            )
            # over documents and all rows, as a table's, such roundings cancel
            ours, theirs = (getattr(values, kind)[:, 0, index].mean(0) for values in (found, expected))
            np.testing.assert_allclose(
                ours, theirs, rtol=TOLERANCE[dtype]["rtol"], atol=TOLERANCE[dtype]["atol"] / 20, err_msg=f"{kind} {name}"
            )
    # pooled states are kept in float32 in any case
    np.testing.assert_allclose(found.pooled, expected.pooled, rtol=1e-4, atol=1e-5, err_msg="pooled states")


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3"])
def test_the_exact_path_gives_the_same_measures(family: str):
    np.testing.assert_allclose(
        measured(family, torch.float64, "right", "exact").heads, oracle.truth(family, torch.float64).heads, rtol=1e-9, atol=1e-11
    )


def test_what_all_keys_share_costs_no_precision():
    # GPT-2's keys have a bias that no pattern sees, but that makes scores of a hundred out of which small divergences would be differences
    base = families.build("gpt2")
    with torch.no_grad():
        for block in base.transformer.h:
            block.attn.c_attn.bias[: 2 * families.WIDTH] += 10
    tuned = oracle.perturbed(base, 0.02, only="c_attn.weight")
    batch = collate(oracle.examples(), pad_id=0)
    found, exact = (measure(oracle.two(base.to(dtype), tuned.to(dtype)), batch).heads for dtype in (torch.float32, torch.float64))
    for name in ("entropy_base", "kl_base_tuned", "kl_tuned_base"):
        index = HEAD_MEASURES.index(name)
        np.testing.assert_allclose(found[:, 0, index].mean(0), exact[:, 0, index].mean(0), rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_gini_rides_along_without_changing_the_rest(family: str):
    batch = collate(oracle.examples(), pad_id=0, padding="left")
    found = measure(oracle.models(family), batch, gini=True)
    np.testing.assert_allclose(found.heads[:, :, : len(HEAD_MEASURES)], oracle.truth(family).heads, rtol=1e-9, atol=1e-11)
    first = oracle.look(oracle.models(family).tuned.plain, family, oracle.examples()[0].input_ids)
    rows = [first.maps[1, 2, t, : t + 1] for t in range(len(oracle.examples()[0]))]
    seen = [np.sort(row[row > 0]) for row in rows]
    expected = np.mean([sum((2 * i - len(w) - 1) * x for i, x in enumerate(w, start=1)) / len(w) for w in seen])
    assert found.heads[0, 0, len(HEAD_MEASURES) + 1, 1, 2] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_does_not_differ_from_itself(family: str):
    base = families.build(family)
    found = measure(oracle.two(base, oracle.perturbed(base, size=0.0)), collate(oracle.examples(), pad_id=0))
    changes = [HEAD_MEASURES.index(name) for name in (*NOTHING, "z_cosine_distance")]
    assert np.abs(found.heads[:, :, changes]).max() < 1e-6
    assert np.abs(found.layers[:, :, [LAYER_MEASURES.index(name) for name in (*NOTHING, "cosine_distance", *MLPS)]]).max() < 1e-6
    assert np.abs(found.outputs[:, :, [0, 1, 4]]).max() == 0
    assert np.array_equal(found.pooled[:, 0], found.pooled[:, 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_is_read_before_the_final_norm(family: str):
    both = oracle.models(family)
    found = measure(both, collate(oracle.examples(), pad_id=0))
    with torch.no_grad():
        normed = both.base.plain(torch.tensor([oracle.examples()[0].input_ids]), output_hidden_states=True).hidden_states[-1][0]
    after_norm = normed.norm(dim=-1).mean().item()
    before_norm = np.linalg.norm(oracle.look(both.base.plain, family, oracle.examples()[0].input_ids).residual[-1], axis=-1).mean()
    assert abs(after_norm / before_norm - 1) > 0.01, "the norm changes nothing, so the test shows nothing"
    assert found.layers[0, 0, LAYER_MEASURES.index("activation_norm_base"), -1] == pytest.approx(before_norm, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_half_precision_says_nearly_the_same(family: str, dtype: torch.dtype):
    # both run the half-precision weights, so that only the arithmetic differs; changes are large against its rounding (3 digits in bfloat16)
    base, tuned = families.build(family), oracle.perturbed(families.build(family), size=0.3)
    half = oracle.two(base.to(dtype), tuned.to(dtype))
    batch = collate(oracle.examples(), pad_id=0)
    found = measure(half, batch)
    wide = measure(oracle.two(oracle.perturbed(base, 0.0).float(), oracle.perturbed(tuned, 0.0).float()), batch)
    for name in ("entropy_tuned", "kl_base_tuned", "z_cosine_distance"):
        index = HEAD_MEASURES.index(name)
        ours, theirs = found.heads[:, 0, index].mean(), wide.heads[:, 0, index].mean()
        assert ours == pytest.approx(theirs, rel=0.05), name
    np.testing.assert_allclose(found.outputs[:, 0, 2:4], wide.outputs[:, 0, 2:4], rtol=0.05)


def uniform_gpt2(vocabulary: int = families.VOCABULARY):
    """Build a GPT-2 whose queries are zero, so that every pattern is uniform, and whose embedding is zero, so that every token is as likely."""
    model = families.build("gpt2", torch.float64, vocab_size=vocabulary)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, : families.WIDTH] = 0
            block.attn.c_attn.bias[: families.WIDTH] = 0
        model.transformer.wte.weight.zero_()
    return model


@pytest.mark.parametrize("padding", ["right", "left"])
def test_document_and_summary_rows_are_just_those_rows(padding: Any):
    # 2 opening tokens, 3 of the article, 1 between, 2 of the summary; a longer neighbour makes padding
    short = Example("short", (5, 6, 7, 8, 9, 10, 11, 12), (2, 5), (6, 8), False)
    long = Example("long", tuple(range(20, 33)), (0, 9), (9, 13), False)
    model = uniform_gpt2()
    batch = collate((short, long), pad_id=0, padding=padding)
    found = measure(oracle.two(model, oracle.perturbed(model, 0.0)), batch)
    rows = {"all": range(8), "document": range(2, 5), "summary": range(6, 8)}
    for index, (kind, positions) in enumerate(rows.items()):
        values = {
            "entropy_base": np.mean([np.log(i + 1) for i in positions]),
            "relative_entropy_tuned": 1.0,
            "distance_base": np.mean([i / 2 for i in positions]),
            "sink_tuned": np.mean([1 / (i + 1) for i in positions]),
            "kl_base_tuned": 0.0,
        }
        for name, value in values.items():
            np.testing.assert_allclose(
                found.heads[0, index, HEAD_MEASURES.index(name)], value, rtol=1e-12, atol=1e-12, err_msg=f"{kind} {name}"
            )
        assert found.outputs[0, index, OUTPUT_MEASURES.index("loss_base")] == pytest.approx(np.log(families.VOCABULARY), rel=1e-12)


def test_loss_on_summary_tokens_is_the_loss_of_predicting_them():
    both, (example, *_) = oracle.models("gpt2"), oracle.examples()
    found = measure(both, collate([example], pad_id=0))
    ids = torch.tensor([example.input_ids])
    labels = ids.clone()
    labels[:, : example.summary[0]] = -100
    with torch.no_grad():
        expected = both.tuned.plain(ids, labels=labels).loss.item()
    assert found.outputs[0, 2, OUTPUT_MEASURES.index("loss_tuned")] == pytest.approx(expected, rel=1e-6)  # the model's own loss is float32


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_document_without_a_summary_has_no_summary_measures(padding: Any):
    example = Example("bare", tuple(range(10, 20)), (2, 10), (10, 10), False)
    found = measure(oracle.models("llama"), collate([example, *oracle.examples()], pad_id=0, padding=padding))
    for values in (found.heads, found.layers, found.outputs, found.pooled[:, 0]):
        assert np.isnan(values[0, 2]).all()
        assert np.isfinite(values[0, :2]).all()


@pytest.mark.parametrize("sample", [(), ("doc3",), ("doc4", "doc1", "another's"), None])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_pooled_states_are_those_of_the_sample_and_the_rest_those_of_all(family: str, sample: tuple[str, ...] | None):
    both, batch = oracle.models(family), collate(oracle.examples(), pad_id=0, padding="left")
    of_all = measure(both, batch)
    found = launch([both], batch, sample=sample)[0].fetch()
    kept = [number for number, name in enumerate(of_all.ids) if sample is None or name in sample]
    assert found.sampled == tuple(of_all.ids[number] for number in kept)
    np.testing.assert_allclose(found.pooled, of_all.pooled[kept], rtol=1e-6)
    for name in ("heads", "layers", "outputs"):
        np.testing.assert_array_equal(getattr(found, name), getattr(of_all, name))


def test_a_document_of_one_token_has_patterns_but_predicts_nothing():
    found = measure(oracle.models("gpt2"), collate([Example("one", (5,), (0, 1), (1, 1), False)], pad_id=0))
    assert (found.heads[0, 0, HEAD_MEASURES.index("entropy_base")] == 0).all()
    assert np.isnan(found.outputs).all()


def test_what_stands_at_padding_does_not_matter():
    both = oracle.models("gpt_neox")
    zero, seven = (measure(both, collate(oracle.examples(), pad_id=token, padding="left")) for token in (0, 7))
    for name in ("heads", "layers", "outputs", "pooled"):
        np.testing.assert_allclose(getattr(zero, name), getattr(seven, name), rtol=1e-12, atol=1e-14)


def test_logits_in_small_pieces_give_the_same_outputs(monkeypatch: pytest.MonkeyPatch):
    both, batch = oracle.models("qwen3"), collate(oracle.examples(), pad_id=0)
    whole = measure(both, batch).outputs
    # the package's name `measure` is the function, so the module is asked for by its path
    monkeypatch.setattr(lockstep, "_LOGITS", 3 * families.VOCABULARY)
    np.testing.assert_allclose(measure(both, batch).outputs, whole, rtol=1e-12)


def test_tokens_outside_the_shared_vocabulary_have_no_loss():
    # the same model, with three tokens added behind the vocabulary of the tuned one: the shared tokens' distributions are equal
    base, tuned = (families.build("llama", torch.float64) for _ in range(2))
    tuned.resize_token_embeddings(families.VOCABULARY + 3, mean_resizing=False)
    both = oracle.two(tuned, base, resize="truncate")
    assert both.vocab_size == families.VOCABULARY
    found = measure(both, collate(oracle.examples(), pad_id=0))
    np.testing.assert_allclose(found.outputs[..., 0], 0.0, atol=1e-12)
    np.testing.assert_allclose(found.outputs[..., 3], measure(oracle.models("llama"), collate(oracle.examples(), pad_id=0)).outputs[..., 2])


def test_activations_that_overflow_are_named():
    model = families.build("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.bias[:] = 3e38
        model.transformer.h[2].mlp.c_proj.bias[:] = 3e38
    with pytest.raises(ModelError, match=r"tuned model .* document 'doc0'.* not finite"):
        measure(oracle.two(families.build("gpt2"), model), collate(oracle.examples(), pad_id=0))
