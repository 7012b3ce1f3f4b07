"""Written models: they compute what the program says, and exactly the written edges matter."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechscope.circuits import Circuit, Graph, auroc, discover, evaluate, exact_effects
from mechscope.errors import DataError, SettingsError
from mechscope.groundtruth import PROGRAMS, GroundTruth, ground_truth
from mechscope.heads.pattern_roles import pattern_roles
from mechscope.instrument import load, record
from mechscope.subject import Subject

every_program = pytest.mark.parametrize("name", PROGRAMS)


@cache
def written(name: str, sharpness: float = 60.0) -> tuple[GroundTruth, Subject]:
    truth = ground_truth(name, sharpness=sharpness)
    return truth, load(truth.program.model(), tokenizer=truth.tokenizer())


@every_program
def test_weights_compute_what_the_program_says_at_every_position(name: str) -> None:
    truth, subject = written(name)
    for number in range(60):
        text, answer = truth.draw(random.Random(number))
        expected = truth.answers(text)
        with torch.no_grad():
            logits = subject.model(torch.tensor([truth.ids(text)])).logits[0].numpy()
        # float32 beside logits of 10
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-6)
        assert truth.program.words[expected[-1].argmax()] == answer


@every_program
def test_exactly_the_edges_of_the_circuit_have_an_effect(name: str) -> None:
    truth, subject = written(name)
    assert Graph.of(subject) == truth.program.graph
    effects = np.abs(exact_effects(subject, truth.pairs(24), metric="logit-diff").mean)
    told = truth.program.circuit.edges
    assert effects[told].min() > 0.1
    assert effects[~told].max() < 1e-5


@every_program
def test_the_circuit_alone_does_what_the_model_does_and_none_of_its_edges_can_go(name: str) -> None:
    truth, subject = written(name)
    circuit = truth.program.circuit
    less = [Circuit.of(circuit.graph, [other for other in circuit.names if other != edge]) for edge in circuit.names]
    found = evaluate(subject, truth.pairs(24), [circuit, *less])
    np.testing.assert_allclose(found.values[0], found.clean, rtol=0, atol=1e-5)
    assert (np.abs(found.values[1:] - found.clean).mean(1) > 0.1).all()


def test_edges_say_what_they_carry_and_the_circuit_leaves_out_what_is_the_same_in_all_texts() -> None:
    program = ground_truth("induction").program
    assert program.edges == {
        "embed->a0.h0<q>": ("position",),
        "embed->a0.h0<k>": ("position",),
        "embed->a0.h0<v>": ("token",),
        "embed->a1.h0<q>": ("token", "one"),
        "embed->a1.h0<k>": ("position",),
        "embed->a1.h0<v>": ("token",),
        "a0.h0->a1.h0<k>": ("before",),
        "a1.h0->logits": ("next",),
    }
    assert set(program.edges) - {*program.circuit.names} == {"embed->a0.h0<q>", "embed->a0.h0<k>", "embed->a1.h0<k>"}


def test_distractors_compute_something_and_change_nothing() -> None:
    truth, subject = written("induction")
    alone = PROGRAMS["induction"]()
    text = torch.tensor([truth.ids(truth.draw(random.Random(3))[0])])
    with torch.no_grad():
        torch.testing.assert_close(alone.program.model()(text).logits, subject.model(text).logits, rtol=0, atol=2e-6)
    with record(subject, "head_output", "mlp_output") as recording:
        subject.model(text)
    for layer in range(2):
        assert (recording["head_output", layer].norm(dim=-1).amax(dim=(0, 1)) > 1e-2).all()
        assert recording["mlp_output", layer].norm() > 1e-2
    other = ground_truth("induction", seed=1).program.model()
    assert not torch.equal(other.transformer.h[0].attn.c_attn.weight, subject.model.transformer.h[0].attn.c_attn.weight)


def test_heads_have_the_roles_that_they_were_written_for() -> None:
    _, subject = written("induction")
    scores = {one.role.name: one.score.mean(0) for one in pattern_roles(subject, n=8)}
    assert scores["previous-token"][0, 0] > 0.99
    assert scores["induction"][1, 0] > 0.99
    assert scores["induction"][1, 1:].max() < 0.6


def test_a_written_model_is_an_ordinary_folder(tmp_path: Path) -> None:
    truth, subject = written("names")
    truth.program.model().save_pretrained(tmp_path)
    truth.tokenizer().save_pretrained(tmp_path)
    tokenizer, again = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    text, _ = truth.draw(random.Random(0))
    ids = tokenizer(" ".join(text[1:]), return_tensors="pt")["input_ids"]
    assert tuple(ids[0].tolist()) == truth.ids(text)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, subject.model(ids).logits)


def test_pairs_are_of_equal_length_with_other_answers() -> None:
    truth = ground_truth("names")
    pairs = truth.pairs(30, seed=2)
    assert len({pair.clean for pair in pairs}) > 20
    assert pairs.hash == truth.pairs(30, seed=2).hash != truth.pairs(30, seed=3).hash
    for pair in pairs:
        (right,), (wrong,) = pair.answers, pair.wrong_answers
        for ids, answer in ((pair.clean, right), (pair.corrupt, wrong)):
            said = [truth.program.words[token] for token in ids if truth.program.words[token][0].isupper()]
            assert sorted(said.count(name) for name in set(said)) == [1, 2]
            assert said.count(truth.program.words[answer]) == 1


def test_gradients_at_the_clean_run_see_no_query_of_a_sharp_head() -> None:
    """Softmax that is all but certain has no slope; points on the way from the other run do, and a softer head does."""
    found = {}
    for sharpness in (60.0, 8.0):
        truth, subject = written("induction", sharpness)
        for method in ("eap", "eap-ig"):
            found[method, sharpness] = auroc(discover(subject, truth.pairs(24), method=method), truth.program.circuit)
    assert found["eap", 60.0] < 0.8
    assert found["eap-ig", 60.0] == found["eap", 8.0] == found["eap-ig", 8.0] == 1


def test_what_cannot_be_written_is_said() -> None:
    with pytest.raises(SettingsError, match="ground truth 'ravens' is not known: choose induction, names, brackets, counting"):
        ground_truth("ravens")
    with pytest.raises(SettingsError, match="heads is 0: the program has 1 in a layer"):
        ground_truth("names", heads=0)
    with pytest.raises(SettingsError, match="sharpness is -1: it must be above 0"):
        ground_truth("names", sharpness=-1)
    with pytest.raises(DataError, match="counting was asked for 0 pairs"):
        ground_truth("counting").pairs(0)
    always_alike = replace(ground_truth("brackets"), draw=lambda rng: (["<s>", "(", ")", "."], "yes"))
    with pytest.raises(DataError, match="brackets: only 0 different pairs turned up, 2 were asked for: ask for fewer"):
        always_alike.pairs(2)
