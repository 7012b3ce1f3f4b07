"""Parts of the residual stream add up to the model's logits, each by what it wrote and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats
from transformers import AutoModelForCausalLM, GraniteConfig

from mechscope.errors import DataError, SettingsError
from mechscope.instrument.execution import Execution
from mechscope.lens.attribution import LogitAttribution, attribute_logits, compare_attributions
from mechscope.lens.decomposition import Decomposition, Part
from mechscope.lens.question import METRICS, Question
from mechscope.lens.token_attribution import attribute_sources
from mechscope.subject.load import load
from tests import families
from tests.lens.residual_oracle import CLOSE, Slow, attributed, in_float64, make_pairs, metric_by_hand, subject_of
from tests.stats.skewed import mean_test

POSITIONS = ("gpt2", "opt")


@pytest.fixture(params=families.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=METRICS)
def metric(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# the sum


def test_parts_sum_to_the_logits_that_hugging_face_gives(family: str, metric: str) -> None:
    found = attributed(family, metric)
    expected = [metric_by_hand(subject_of(family), pair, metric) for pair in make_pairs()]
    assert found.parts[-1].kind == "residual"
    np.testing.assert_allclose(found.effects[:, :-1].sum(1), expected, **CLOSE)
    np.testing.assert_allclose(found.values, expected, **CLOSE)
    assert np.abs(found.effects[:, -1]).max() < 1e-9


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt_neox", {"use_parallel_residual": False}),
        ("phi", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("gpt2", {"tie_word_embeddings": False}),
    ],
)
def test_the_sum_holds_for_other_forms_of_a_family(family: str, changes: dict[str, Any], metric: str) -> None:
    subject = load(in_float64(families.build(family, torch.float64, **changes)))
    found = attribute_logits(subject, make_pairs(), metric=metric)
    expected = [metric_by_hand(subject, pair, metric) for pair in make_pairs()]
    np.testing.assert_allclose(found.effects[:, :-1].sum(1), expected, **CLOSE)
    kinds = {part.kind for part in found.parts}
    assert ("mlp bias" in kinds) == (family != "llama" or "mlp_bias" in changes)


def test_scaled_embeddings_and_scaled_logits_are_part_of_the_sum(metric: str) -> None:
    sizes = {"vocab_size": 97, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
    config = GraniteConfig(**sizes, embedding_multiplier=3.0, logits_scaling=2.0, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    families.randomize(model)
    subject = load(in_float64(model.double().eval()))
    found = attribute_logits(subject, make_pairs(), metric=metric)
    expected = [metric_by_hand(subject, pair, metric) for pair in make_pairs()]
    np.testing.assert_allclose(found.effects[:, :-1].sum(1), expected, **CLOSE)


@torch.no_grad()
def test_attribution_speaks_of_logits_before_the_cap_and_reports_what_the_cap_changes(metric: str) -> None:
    subject = load(in_float64(families.build("gemma2", torch.float64, final_logit_softcapping=0.7)))
    found = attribute_logits(subject, make_pairs(), metric=metric)
    capped = np.array([metric_by_hand(subject, pair, metric) for pair in make_pairs()])
    subject.plain.config.final_logit_softcapping = None
    plain = np.array([metric_by_hand(subject, pair, metric) for pair in make_pairs()])
    assert [part.kind for part in found.parts[-2:]] == ["cap", "residual"]
    np.testing.assert_allclose(found.effects[:, -2], capped - plain, **CLOSE)
    np.testing.assert_allclose(found.effects[:, :-2].sum(1), plain, **CLOSE)
    assert np.abs(capped - plain).min() > 1e-3


# what each part wrote


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "llama", "qwen3", "gemma2", "gemma3", "phi"])
def test_a_head_contributes_what_the_metric_loses_without_its_write_and_the_scale_kept(family: str, metric: str) -> None:
    found, subject = attributed(family, metric), subject_of(family)
    place = {part.component: index for index, part in enumerate(found.parts)}
    for row, pair in enumerate(make_pairs()):
        slow = Slow(subject, pair)
        for layer, head in subject.anatomy.heads():
            expected = slow.without(slow.head(layer, head), metric)
            assert found.effects[row, place[f"a{layer}.h{head}"]] == pytest.approx(expected, rel=1e-9, abs=1e-9)


@torch.no_grad()
def test_a_neuron_contributes_what_the_metric_loses_without_its_write(family: str, metric: str) -> None:
    found, subject, pair = attributed(family, metric), subject_of(family), make_pairs().pairs[1]
    slow = Slow(subject, pair)
    for layer in (0, 2):
        for neuron in (0, 7, 47):
            expected = slow.without(slow.neuron(layer, neuron), metric)
            assert found.neurons[layer][1, neuron] == pytest.approx(expected, rel=1e-9, abs=1e-9)


@torch.no_grad()
def test_heads_and_bias_sum_to_attention_and_neurons_and_bias_to_the_mlp(family: str, metric: str) -> None:
    found, subject = attributed(family, metric), subject_of(family)
    for row, pair in enumerate(make_pairs()):
        slow = Slow(subject, pair)
        for layer, block in enumerate(subject.anatomy.blocks):
            own = {kind: [i for i, part in enumerate(found.parts) if (part.layer, part.kind) == (layer, kind)] for kind in KINDS}
            of = {kind: found.effects[row, where].sum() for kind, where in own.items()}
            attention = slow.without(slow.wrote(block.attention_write), metric)
            mlp = slow.without(slow.wrote(block.mlp_write), metric)
            assert of["head"] + of["attention bias"] == pytest.approx(attention, rel=1e-9, abs=1e-9)
            assert of["mlp"] + of["mlp bias"] == pytest.approx(mlp, rel=1e-9, abs=1e-9)
            if layer in found.neurons:
                assert found.neurons[layer][row].sum() == pytest.approx(of["mlp"], rel=1e-9, abs=1e-9)


KINDS = ("head", "attention bias", "mlp", "mlp bias")


@torch.no_grad()
def test_biases_contribute_what_the_weights_say(metric: str) -> None:
    subject, pairs = subject_of("gpt2"), make_pairs()
    found, model = attributed("gpt2", metric), subject.plain
    place = {part.component: index for index, part in enumerate(found.parts)}
    slow = Slow(subject, pairs.pairs[2])
    block: Any = model.transformer.h[1]
    for name, bias in (("a1 bias", block.attn.c_proj.bias), ("m1 bias", block.mlp.c_proj.bias)):
        assert found.effects[2, place[name]] == pytest.approx(slow.without(bias.expand_as(slow.last), metric), rel=1e-9)
    nothing = float(slow.metric_of(torch.zeros_like(slow.last), metric))
    assert found.effects[2, place["constant"]] == pytest.approx(nothing, rel=1e-9)
    assert abs(nothing) > 1e-3


@torch.no_grad()
def test_the_embedding_splits_into_token_and_position_where_positions_are_learned(family: str, metric: str) -> None:
    found, subject = attributed(family, metric), subject_of(family)
    names = [part.component for part in found.parts]
    assert ("position" in names) == (family in POSITIONS)
    pair = make_pairs().pairs[0]
    slow, ids = Slow(subject, pair), torch.tensor(pair.clean)
    token = subject.plain.get_input_embeddings()(ids)
    assert found.effects[0, names.index("embed")] == pytest.approx(slow.without(token, metric), rel=1e-9)
    if family in POSITIONS:
        table = subject.plain.transformer.wpe.weight if family == "gpt2" else subject.plain.model.decoder.embed_positions.weight[2:]
        assert found.effects[0, names.index("position")] == pytest.approx(slow.without(table[: len(ids)], metric), rel=1e-9)


# padding


def test_padding_does_not_matter(family: str, metric: str) -> None:
    apart, pairs = Decomposition(subject_of(family)), make_pairs()
    found = {}
    for side in ("left", "right"):
        (batch,) = pairs.batches(padding=side)
        question = Question.of(metric, batch)
        assert question.texts == 3
        result = apart.of(batch, question, neurons=(1,))
        for row, pair in enumerate(batch.pairs):
            values = (result.parts, result.neurons[1], result.cap, result.metric)
            found[side, pair.id] = [question.per_text(value)[row] for value in values]
    alone = attribute_logits(subject_of(family), pairs, metric=metric, neurons=(1,), execution=Execution(tokens_per_batch=1))
    together = attribute_logits(subject_of(family), pairs, metric=metric, neurons=(1,))
    np.testing.assert_allclose(alone.effects, together.effects, **CLOSE)
    for row, pair in enumerate(pairs):
        for one, two in zip(found["left", pair.id], found["right", pair.id], strict=True):
            torch.testing.assert_close(one, two, **CLOSE)
        np.testing.assert_allclose(found["left", pair.id][0], alone.effects[row, : len(apart.parts)], **CLOSE)
        np.testing.assert_allclose(found["left", pair.id][1], alone.neurons[1][row], **CLOSE)


# adapters

TARGETS = {"gpt2": ["c_attn", "c_proj"], "llama": ["o_proj", "down_proj", "lm_head"], "gemma2": ["o_proj", "v_proj", "down_proj"]}
NORMS = {"gpt2": ["ln_f"], "llama": ["model.norm"], "gemma2": ["post_feedforward_layernorm", "post_attention_layernorm"]}


def adapted(family: str, **options: Any) -> Any:
    """Wrap a tiny model in an adapter that changes what its parts write."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS[family], fan_in_fan_out=family == "gpt2", **options)
    model = get_peft_model(in_float64(families.build(family, torch.float64)), config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            if "lora_" in name:
                parameter.copy_(noise)
            elif "modules_to_save" in name:
                parameter.add_(noise)
    return model.eval()


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("norms_too", [False, True], ids=["maps", "maps and norms"])
def test_an_active_adapter_is_part_of_the_model_and_a_disabled_one_is_not(family: str, norms_too: bool) -> None:
    options = {"modules_to_save": NORMS[family]} if norms_too else {}
    tuned, merged = load(adapted(family, **options)), load(in_float64(adapted(family, **options).merge_and_unload()))
    results = []
    for one, two in ((tuned, merged), (tuned.without_adapter(), subject_of(family)), (tuned, merged)):
        first, second = (attribute_logits(subject, make_pairs(), neurons=(1,)) for subject in (one, two))
        np.testing.assert_allclose(first.effects, second.effects, **CLOSE)
        np.testing.assert_allclose(first.neurons[1], second.neurons[1], **CLOSE)
        assert np.abs(first.effects[:, -1]).max() < 1e-9
        mine, its = (attribute_sources(subject, make_pairs(), "a1.h2")["effect"] for subject in (one, two))
        np.testing.assert_allclose(mine, its, **CLOSE)
        results.append(first.effects)
    assert np.abs(results[0] - results[1]).max() > 0.01


# tables


def attribution_of(effects: Any, **changes: Any) -> LogitAttribution:
    """Return an attribution of given effects over texts, (text, part)."""
    parts = (Part("a0.h0", "head", 0, 0), Part("a0.h1", "head", 0, 1), Part("m0", "mlp", 0), Part("residual", "residual"))
    effects = np.asarray(effects, dtype=float)
    plain = LogitAttribution("logit-diff", tuple("uvwxyz"), "hash", parts, effects, {}, effects.sum(1))
    return replace(plain, **changes)


BASE = [
    [1.0, 0.5, -1.0, 0.0],
    [2.0, 0.5, -2.0, 0.0],
    [3.0, 0.0, -1.5, 0.0],
    [2.0, 0.3, -1.5, 0.0],
    [1.5, 0.4, -1.0, 0.0],
    [2.5, 0.3, -2.0, 0.0],
]
TUNED = [
    [2.0, 0.4, -1.0, 0.0],
    [3.5, 0.6, -2.0, 0.0],
    [4.0, 0.1, -1.5, 0.0],
    [2.2, 0.2, -1.5, 0.0],
    [2.9, 0.6, -1.0, 0.0],
    [3.0, 0.9, -2.0, 0.0],
]


def test_a_table_tests_the_models_parts_and_no_others() -> None:
    table = attribution_of(BASE).table().set_index("component")
    low, high, p = mean_test(np.array(BASE)[:, :3])
    np.testing.assert_allclose(table["effect"], [2.0, 1 / 3, -1.5, 0.0], rtol=1e-12)
    np.testing.assert_allclose(table["p"].iloc[:3], p, rtol=1e-9)
    np.testing.assert_allclose(table["q"].iloc[:3], stats.false_discovery_control(p), rtol=1e-9)
    np.testing.assert_allclose(table[["low", "high"]].iloc[:3], np.stack([low, high], axis=1), rtol=1e-9)
    assert np.isnan(table.loc["residual", ["p", "q"]].astype(float)).all()
    assert (table["n"] == 6).all()
    assert list(table["head"]) == [0, 1, -1, -1]


def test_changes_are_paired_by_text() -> None:
    table = compare_attributions(attribution_of(BASE), attribution_of(TUNED)).set_index("component")
    *_, p = mean_test((np.array(TUNED) - np.array(BASE))[:, :2])
    np.testing.assert_allclose(table["change"], np.mean(TUNED, axis=0) - np.mean(BASE, axis=0), atol=1e-12)
    np.testing.assert_allclose(table["tuned"] - table["base"], table["change"], atol=1e-12)
    np.testing.assert_allclose(table["p"].iloc[:2], p, rtol=1e-9)
    assert table.loc["m0", "p"] == 1.0  # the same in every text
    assert np.isnan(table["q"].iloc[-1])


def test_what_does_not_belong_together_is_not_compared() -> None:
    with pytest.raises(DataError, match="same pairs"):
        compare_attributions(attribution_of(BASE), attribution_of(TUNED, source="other"))
    with pytest.raises(DataError, match="target-logit"):
        compare_attributions(attribution_of(BASE), attribution_of(TUNED, metric="target-logit"))
    other = (Part("a1.h0", "head", 1, 0), *attribution_of(BASE).parts[1:])
    with pytest.raises(SettingsError, match=r"a1\.h0"):
        compare_attributions(attribution_of(BASE), attribution_of(TUNED, parts=other))


def test_a_real_comparison_adds_up_to_the_change_of_the_metric() -> None:
    base, tuned = (attribute_logits(load(in_float64(families.build("llama", torch.float64, seed))), make_pairs()) for seed in (0, 1))
    table = compare_attributions(base, tuned)
    assert table["change"].sum() == pytest.approx((tuned.values - base.values).mean(), rel=1e-9)


def test_neurons_stand_largest_first() -> None:
    found = attributed("gpt2", "logit-diff")
    table = found.neuron_table()
    assert len(table) == 2 * 128
    assert (table["effect"].abs().diff().iloc[1:] <= 0).all()
    top = table.iloc[0]
    assert top["component"] == f"m{top['layer']}.n{top['neuron']}"
    assert top["effect"] == pytest.approx(found.neurons[top["layer"]][:, top["neuron"]].mean())
    with pytest.raises(SettingsError, match="neurons="):
        attribution_of(BASE).neuron_table()


# questions


def test_the_target_logit_of_a_text_without_a_target_is_that_of_its_answers() -> None:
    pairs = make_pairs(target=False)
    found = attribute_logits(subject_of("llama"), pairs, metric="target-logit")
    expected = [metric_by_hand(subject_of("llama"), pair, "target-logit") for pair in pairs]
    np.testing.assert_allclose(found.effects[:, :-1].sum(1), expected, **CLOSE)


def test_texts_keep_their_order_and_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    found = attribute_logits(
        subject_of("gpt2"), make_pairs(), execution=Execution(tokens_per_batch=20, progress=lambda *seen: told.append(seen))
    )
    assert found.texts == ("text 0", "text 1", "text 2")
    assert told[-1] == ("logit attribution", 3, 3)
    assert len(told) > 1
    np.testing.assert_allclose(found.values, attributed("gpt2", "logit-diff").values, **CLOSE)


def test_half_precision_leaves_a_small_residual() -> None:
    found = attribute_logits(load(families.build("gpt2", torch.bfloat16)), make_pairs())
    assert np.abs(found.effects[:, -1]).max() < 0.05 * np.abs(found.effects[:, :-1]).max()


def test_what_cannot_be_asked_is_refused_by_name() -> None:
    subject, pairs = subject_of("gpt2"), make_pairs()
    with pytest.raises(SettingsError, match="loss"):
        attribute_logits(subject, pairs, metric="loss")
    with pytest.raises(SettingsError, match="layer 3"):
        attribute_logits(subject, pairs, neurons=(3,))
    with pytest.raises(DataError, match="no right answer"):
        attribute_logits(subject, make_pairs(answers=False))
    with pytest.raises(DataError, match="neither a target"):
        attribute_logits(subject, make_pairs(answers=False, target=False), metric="target-logit")


def test_tables_are_tidy() -> None:
    columns = ["component", "kind", "layer", "head", "effect", "low", "high", "p", "q", "n"]
    table = attributed("gpt2", "logit-diff").table()
    assert list(table.columns) == columns
    assert table["component"].is_unique
