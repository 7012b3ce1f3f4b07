"""Tuned edges in the base model: what they carry equals a pass written out by hand, and the edges that carry the gain come first."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from mechscope.circuits import gain
from mechscope.circuits.attribution import attribute_edges
from mechscope.circuits.evaluation import Evaluated, evaluate
from mechscope.circuits.forward import CircuitRuns
from mechscope.circuits.gain import Gain, tuned_edges
from mechscope.circuits.graph import Circuit, Graph
from mechscope.data.pairs import Pairs, PromptPair, collate_pairs
from mechscope.errors import DataError, SettingsError
from mechscope.instrument import record
from mechscope.instrument.execution import Execution
from mechscope.subject import Pair, pair
from mechscope.subject.load import Subject, load
from tests import families
from tests.causal.pairs import random_pairs
from tests.circuits.brute import TOLERANCE, brute_metric, brute_written, read_metric

FOUR = ("gpt2", "llama", "gpt_neox", "gemma2")
TEXTS = random_pairs(6)  # 9, 12 and 7 tokens
RISES = {"logit-diff": True, "loss": False}


def metric_of(model: Any, text: PromptPair, metric: str) -> float:
    """Return a model's metric by Hugging Face alone."""
    with torch.no_grad():
        return read_metric(model(input_ids=torch.tensor([text.clean]), use_cache=False).logits[0], text, metric)


@lru_cache
def trained(family: str, metric: str) -> Pair:
    """Return a random model and the same one after a few steps that make the metric better, a real fine-tuning."""
    base, tuned = families.build(family, torch.float64), families.build(family, torch.float64)
    steps = torch.optim.Adam(tuned.parameters(), lr=1e-3)
    for _ in range(6):
        steps.zero_grad()
        for text in TEXTS:
            logits = tuned(input_ids=torch.tensor([text.clean]), use_cache=False).logits[0]
            if metric == "logit-diff":
                worse = logits[-1, list(text.wrong_answers)].mean() - logits[-1, list(text.answers)].mean()
            else:
                assert text.target is not None
                at = slice(*text.target)
                worse = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(text.clean[1:]), reduction="none")[
                    at.start - 1 : at.stop - 1
                ].mean()
            worse.backward()
        steps.step()
    return pair(load(base), load(tuned))


@lru_cache
def found_in(family: str, metric: str, tokens_per_batch: int = 512) -> Gain:
    return tuned_edges(
        trained(family, metric),
        TEXTS,
        fractions=(0.02, 0.3, 1.0),
        random=4,
        metric=metric,
        execution=Execution(tokens_per_batch=tokens_per_batch),
    )


def close(found: Any, expected: Any, family: str, message: str = "") -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=TOLERANCE[family], err_msg=message)


@torch.no_grad()
def all_tuned(both: Pair, text: PromptPair) -> Tensor:
    """Return the base model's logits of what the tuned senders wrote, with the base's own projection biases."""
    base, tuned = both.base, both.tuned
    with record(tuned, "embedding", "attention_output", "mlp_output") as seen:
        tuned.plain(torch.tensor([text.clean]), use_cache=False)
    stream = seen["embedding"][0]
    for layer in range(families.LAYERS):
        own, given = (cast(Any, subject.anatomy.blocks[layer].output.module).bias for subject in (base, tuned))
        stream = stream + seen["attention_output", layer][0] + seen["mlp_output", layer][0]
        stream = stream if own is None else stream - given + own
    assert base.anatomy.final_norm is not None
    logits = base.plain.get_output_embeddings()(base.anatomy.final_norm(stream))
    cap = getattr(base.plain.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def by_size(found: Gain, kind: str = "tuned") -> Any:
    return found.table[found.table["kind"] == kind].set_index("fraction")


@pytest.mark.parametrize("metric", RISES)
@pytest.mark.parametrize("family", FOUR)
def test_all_tuned_edges_are_the_bases_readers_on_what_the_tuned_model_wrote(family: str, metric: str) -> None:
    both = trained(family, metric)
    expected = [read_metric(all_tuned(both, text), text, metric) for text in TEXTS]
    for padding in ("right", "left"):
        runs = CircuitRuns(both.base, collate_pairs(TEXTS.pairs, padding=padding), metric, source=both.tuned)
        close(runs.run(torch.zeros(1, len(runs.graph)))[0], expected, family, padding)
        # and none are the base
        close(runs.run(torch.ones(1, len(runs.graph)))[0], [metric_of(both.base.model, text, metric) for text in TEXTS], family, padding)
    for tokens_per_batch in (1, 512):
        close(by_size(found_in(family, metric, tokens_per_batch)).loc[1.0, "value"], np.mean(expected), family)


@pytest.mark.parametrize("metric", RISES)
@pytest.mark.parametrize("family", FOUR)
def test_a_share_is_the_part_of_the_way_from_base_to_tuned(family: str, metric: str) -> None:
    both, found = trained(family, metric), found_in(family, metric)
    base, tuned = (float(np.mean([metric_of(subject.model, text, metric) for text in TEXTS])) for subject in (both.base, both.tuned))
    assert (tuned > base) == RISES[metric]
    close([found.base, found.tuned], [base, tuned], family)
    np.testing.assert_allclose(found.table["share"], (found.table["value"] - base) / (tuned - base), rtol=0, atol=100 * TOLERANCE[family])
    chosen = by_size(found)
    assert (chosen["low"] <= chosen["share"]).all()
    assert (chosen["share"] <= chosen["high"]).all()
    assert found.note is None


@pytest.mark.parametrize("family", FOUR)
def test_a_batch_of_unequal_texts_gives_what_single_texts_give(family: str) -> None:
    alone, together = found_in(family, "loss", 1), found_in(family, "loss", 512)
    numbers = ["edges", "value", "share", "low", "high", "n"]
    np.testing.assert_allclose(alone.table[numbers], together.table[numbers], rtol=0, atol=100 * TOLERANCE[family])
    assert alone.scores.per_text is not None
    assert together.scores.per_text is not None
    close(alone.scores.per_text, together.scores.per_text, family)


@pytest.mark.parametrize("metric", RISES)
@pytest.mark.parametrize("family", FOUR)
def test_a_score_is_the_slope_of_the_metric_as_an_edge_turns_tuned(family: str, metric: str) -> None:
    both, scores = trained(family, metric), found_in(family, metric).scores
    assert scores.per_text is not None
    for place, text in enumerate(TEXTS):
        runs = CircuitRuns(both.base, collate_pairs([text]), metric, source=both.tuned)
        # 1 is the base's value, 0 the tuned one: less of the base is more of the tuned
        mixture = torch.ones(1, len(runs.graph), dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(runs.run(mixture).sum(), mixture)
        close(scores.per_text[place], -slope[0], family, text.id)


def test_the_slope_is_that_of_a_pass_by_hand() -> None:
    both, scores = trained("gpt2", "logit-diff"), found_in("gpt2", "logit-diff").scores
    text, graph, step = TEXTS.pairs[1], scores.graph, 1e-4
    rest = brute_written(both.tuned.model, "gpt2", text.clean)
    strongest = np.argsort(-np.abs(scores.mean))
    assert scores.per_text is not None
    for edge in [*strongest[:4], *strongest[len(strongest) // 2 :: 40]]:
        more, less = (
            brute_metric(both.base.model, "gpt2", text, {name: 1.0 - (name == graph.names[edge]) * by for name in graph.names}, rest=rest)
            for by in (step, -step)
        )
        assert (more - less) / (2 * step) == pytest.approx(scores.per_text[1, edge], abs=1e-7)


@pytest.mark.parametrize("metric", RISES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_edges_that_take_the_metric_to_the_tuned_models_come_first(family: str, metric: str) -> None:
    both, found = trained(family, metric), found_in(family, metric)
    graph, scores = found.scores.graph, found.scores.mean
    number = round(0.02 * len(graph))
    order = np.argsort(scores)
    first = order[-number:] if RISES[metric] else order[:number]
    kept = [name for place, name in enumerate(graph.names) if place not in first]
    rest = {text.id: brute_written(both.tuned.model, family, text.clean) for text in TEXTS}
    expected = [brute_metric(both.base.model, family, text, kept, rest=rest[text.id], metric=metric) for text in TEXTS]
    chosen, by_chance = by_size(found), by_size(found, "random")
    assert chosen.loc[0.02, "edges"] == number
    close(chosen.loc[0.02, "value"], np.mean(expected), family)
    # 2 % of the edges carry more than their part, and more than random ones
    assert chosen.loc[0.02, "share"] > 0.1
    assert chosen.loc[0.02, "share"] > by_chance.loc[0.02, "high"]
    assert chosen.loc[0.3, "share"] > chosen.loc[0.02, "share"]


def cells_of(circuit: Circuit) -> dict[tuple[str, str], int]:
    """Count edges by sender layer and by the layer's queries, keys, values, MLP or the logits that they go to."""
    counts: dict[tuple[str, str], int] = {}
    for name in circuit.names:
        sender, receiver = name.split("->")
        into = receiver.split(".")[0] + (receiver[-3:] if "<" in receiver else "")
        cell = (sender if sender == "embed" else sender[1], into)
        counts[cell] = counts.get(cell, 0) + 1
    return counts


def test_random_sets_have_as_many_edges_between_the_same_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    both = trained("gpt2", "logit-diff")
    calls: list[tuple[list[Circuit], Evaluated]] = []

    def watched(subject: Subject, texts: Any, circuits: list[Circuit], **options: Any) -> Evaluated:
        found = evaluate(subject, texts, circuits, **options)
        calls.append((circuits, found))
        return found

    monkeypatch.setattr(gain, "evaluate", watched)
    found = tuned_edges(both, TEXTS, fractions=(0.02, 0.3), random=7)
    circuits, values = calls[-1]
    full = Circuit.full(found.scores.graph)
    tuned = [full - circuit for circuit in circuits]
    assert len(tuned) == 2 + 2 * 7
    for place, fraction in enumerate((0.02, 0.3)):
        drawn = slice(2 + 7 * place, 2 + 7 * place + 7)
        for one in tuned[drawn]:
            assert cells_of(one) == cells_of(tuned[place])
            assert one != tuned[place]
        assert len({one.names for one in tuned[drawn]}) == 7
        row = by_size(found, "random").loc[fraction]
        shares = (values.values[drawn].mean(1) - found.base) / (found.tuned - found.base)
        assert row["edges"] == len(tuned[place])
        assert row["value"] == pytest.approx(values.values[drawn].mean(), abs=1e-12)
        np.testing.assert_allclose(
            row[["share", "low", "high"]].astype(float), [shares.mean(), *np.quantile(shares, [0.025, 0.975])], atol=1e-9
        )


def test_edges_can_be_ranked_along_the_way_from_base_to_tuned() -> None:
    both = trained("llama", "loss")
    found = tuned_edges(both, TEXTS, fractions=(0.02, 0.3), random=0, metric="loss", method="eap-ig-activations", steps=3)
    assert set(found.table["kind"]) == {"tuned"}
    expected = attribute_edges(both.base, TEXTS, method="eap-ig-activations", steps=3, metric="loss", source=both.tuned)
    np.testing.assert_array_equal(found.scores.mean, expected.mean)
    assert found.table["share"].iloc[1] > found.table["share"].iloc[0] > 0.1


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_an_adapter_and_its_model_without_it_are_two_models(family: str) -> None:
    targets = {"gpt2": ["c_attn", "c_proj", "c_fc"], "llama": ["q_proj", "o_proj", "up_proj"], "gemma2": ["v_proj", "o_proj", "down_proj"]}
    config = LoraConfig(r=4, target_modules=targets[family], init_lora_weights=False, fan_in_fan_out=family == "gpt2")
    torch.manual_seed(0)  # PEFT draws the adapter from torch's own generator
    adapted = get_peft_model(families.build(family, torch.float64), config).double()
    tuned = load(adapted)
    merged = copy.deepcopy(adapted).merge_and_unload()
    options: dict[str, Any] = {"fractions": (0.05, 1.0), "random": 2, "metric": "loss"}
    found = tuned_edges(pair(tuned.without_adapter(), tuned), TEXTS, **options)
    expected = tuned_edges(pair(load(families.build(family, torch.float64)), load(merged)), TEXTS, **options)
    close([found.base, found.tuned], [expected.base, expected.tuned], family)
    close(found.scores.mean, expected.scores.mean, family)
    close(found.table["value"], expected.table["value"], family)
    assert (found.table["value"] - found.base).abs().min() > 1e-3
    # and afterwards the adapter acts as it did
    assert metric_of(tuned.model, TEXTS.pairs[0], "loss") == pytest.approx(metric_of(merged, TEXTS.pairs[0], "loss"), abs=TOLERANCE[family])


def test_between_equal_models_there_is_no_gain_to_share() -> None:
    base, same = (load(families.build("gpt2", torch.float64)) for _ in range(2))
    found = tuned_edges(pair(base, same), TEXTS, fractions=(0.1, 1.0), random=2)
    # zero up to rounding, which differs where arrays lie differently in memory
    np.testing.assert_allclose(found.scores.mean, 0.0, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.table["value"], found.base, rtol=0, atol=1e-12)
    assert found.table["share"].isna().all()
    assert found.note is not None
    assert found.note.startswith("fine-tuning did not raise the logit-diff on these texts")


def test_edges_are_ranked_on_the_texts_that_are_given_for_it_and_judged_on_the_others() -> None:
    both, apart = trained("gpt2", "loss"), random_pairs(5, seed=1)
    assert not {text.clean for text in apart} & {text.clean for text in TEXTS}
    found = tuned_edges(both, TEXTS, scored_on=apart, fractions=(0.05, 1.0), random=0, metric="loss")
    expected = attribute_edges(both.base, apart, method="eap", metric="loss", source=both.tuned)
    np.testing.assert_array_equal(found.scores.mean, expected.mean)
    own, tuned = (float(np.mean([metric_of(subject.model, text, "loss") for text in apart])) for subject in (both.base, both.tuned))
    graph, number = expected.graph, round(0.05 * len(expected.graph))
    edges = np.zeros(len(graph), dtype=bool)
    edges[np.argsort(expected.mean if tuned < own else -expected.mean, kind="stable")[:number]] = True
    direct = evaluate(both.base, TEXTS, [Circuit.full(graph) - Circuit(graph, edges)], source=both.tuned, metric="loss")
    close(by_size(found).loc[0.05, "value"], direct.values[0].mean(), "gpt2")
    # the texts that judge are those of the trained model's own gain
    close([found.base, found.tuned], [found_in("gpt2", "loss").base, found_in("gpt2", "loss").tuned], "gpt2")
    assert (found.table["n"] == len(TEXTS)).all()


def test_which_way_the_metric_goes_is_asked_of_the_texts_that_rank() -> None:
    both = trained("gpt2", "logit-diff")
    turned = Pairs(tuple(replace(text, answers=text.wrong_answers, wrong_answers=text.answers) for text in TEXTS), "turned")
    found = tuned_edges(both, TEXTS, scored_on=turned, fractions=(0.02,), random=0)
    # with answers exchanged the metric falls there; its edges are those that raise it here
    assert found.table["value"].iloc[0] == pytest.approx(by_size(found_in("gpt2", "logit-diff")).loc[0.02, "value"], abs=1e-9)


def by_coin(n: int, *, seed: int) -> Pairs:
    """Return random texts; of two words a coin says which is the right answer."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(n):
        text = tuple(torch.randint(3, families.VOCABULARY, (7,), generator=generator).tolist())
        right = int(torch.randint(2, (1,), generator=generator))
        found.append(PromptPair(str(index), text, text[::-1], answers=(5 + right,), wrong_answers=(6 - right,)))
    return Pairs(tuple(found), "by coin")


def test_edges_that_fit_the_noise_of_some_texts_carry_nothing_on_others() -> None:
    """Right and wrong answers are drawn by chance, so no edge raises the metric but on the texts at hand."""
    base, moved = families.build("gpt2", torch.float64), families.build("gpt2", torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in moved.parameters():
            weight.add_(0.3 * weight.std() * torch.randn(weight.shape, generator=generator, dtype=weight.dtype) if weight.ndim == 2 else 0)
    both, few, fresh = pair(load(base), load(moved)), by_coin(8, seed=2), by_coin(400, seed=3)
    options: dict[str, Any] = {"fractions": (0.02,), "random": 0}
    seen, unseen = tuned_edges(both, few, **options), tuned_edges(both, fresh, scored_on=few, **options)
    towards = 1 if seen.tuned >= seen.base else -1
    fitted, carried = (towards * (one.table["value"].iloc[0] - one.base) for one in (seen, unseen))
    assert fitted > 0
    assert abs(carried) < fitted / 4
    assert unseen.table["share"].isna().all()


def test_what_has_no_gain_is_refused() -> None:
    both = trained("gpt2", "logit-diff")
    with pytest.raises(SettingsError, match="metric 'kl' compares with one model's own clean run, so it has no gain"):
        tuned_edges(both, TEXTS, fractions=(0.1,), metric="kl")
    with pytest.raises(SettingsError, match="use eap or eap-ig-activations"):
        tuned_edges(both, TEXTS, fractions=(0.1,), method="eap-ig")
    for fraction in (0.0, 1.5):
        with pytest.raises(SettingsError, match="give shares above 0 and up to 1"):
            tuned_edges(both, TEXTS, fractions=(0.1, fraction))


def test_texts_that_only_the_base_can_read_are_refused() -> None:
    base, small = families.subject("llama", torch.float64), load(families.build("llama", torch.float64, vocab_size=40))
    with pytest.raises(DataError, match="the model's vocabulary has 40"):
        tuned_edges(pair(base, small, resize="truncate"), TEXTS, fractions=(0.1,))


def test_edges_belong_to_the_models_graph() -> None:
    for family in ("gpt2", "gpt_neox"):
        assert found_in(family, "loss").scores.graph == Graph.of(trained(family, "loss").base)
