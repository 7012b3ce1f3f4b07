"""`mechscope features explain` does what the functions do, keeps what was sent, goes on where an endpoint left it, and refuses what does not go together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mechscope.errors import DataError, MechscopeError, SettingsError
from mechscope.features import ExplainSettings, top_examples
from mechscope.features.explain import Baseline, EndpointError, explain, gather, halves
from mechscope.features.observed import Heads, Latents, Neurons
from mechscope.instrument import Execution
from mechscope.store.run import verify
from mechscope.studies.jobs.features_explain import JOB
from tests import families
from tests.features.test_explain_backends import completion, endpoint
from tests.features.test_harvest import texts
from tests.report.measured import random_dictionary
from tests.studies.jobs.running import findings, refuses, run, shown, subject

PAIRS = texts((24,) * 80)
QUICK: dict[str, Any] = {"pairs": PAIRS, "examples": 6, "windows": 6, "window": 6, "active_share": 0.05, "documents": 80}
UNITS = "m1.n3,m1.n4,a1.h2,a0.h0"


def test_tables_are_those_of_the_functions(tmp_path: Path) -> None:
    random_dictionary().save(tmp_path / "random.safetensors")
    settings = {**QUICK, "dictionary": str(tmp_path / "random.safetensors"), "components": f"resid1.f22,{UNITS},resid1.f8", "seed": 3}
    result = run(JOB, tmp_path / "run", **settings)
    execution, windows = Execution(2048, seed=3), ExplainSettings(examples=6, windows=6, window=6, active_share=0.05)
    evidence = [
        each
        for observed in (
            Latents(subject(), random_dictionary(), PAIRS, latents=[22, 8]),
            Neurons(subject(), ["m1.n3", "m1.n4"], PAIRS, share=0.05),
            Heads(subject(), ["a1.h2", "a0.h0"], PAIRS, share=0.05),
        )
        for each in gather(
            observed,
            PAIRS,
            settings=windows,
            dictionary="random" if isinstance(observed, Latents) else "",
            execution=execution,
        )
    ]
    found = explain(evidence, Baseline(subject().tokenizer), execution=execution)
    assert result.explanations["component"].tolist() == ["resid1.f22", "resid1.f8", "m1.n3", "m1.n4", "a1.h2", "a0.h0"]
    pd.testing.assert_frame_equal(result.explanations.drop(columns=["texts", "strongest"]), found.explanations.drop(columns="strongest"))
    for spelled, tokens, each in zip(result.explanations["strongest"], found.explanations["strongest"], evidence, strict=True):
        assert list(spelled) == [subject().tokenizer.decode([token]) for token in tokens]
        # the first is the token of the largest activation of all that explain it
        assert any(window.ids[at] == tokens[0] and value == each.largest for window in each.train for at, value in enumerate(window.values))
    assert result.explanations["dictionary"].tolist() == ["random"] * 2 + [""] * 4
    pd.testing.assert_frame_equal(result.explanation_scores, found.scores)
    pd.testing.assert_frame_equal(result.explanation_summary, found.summary)
    assert set(result.explanations["kind"]) == {"latents", "neurons", "heads"}
    shown(result, "explanations")
    assert "explanation_questions" not in result.tables
    assert set(verify(result.path)["status"]) == {"ok"}


def test_by_default_the_strongest_latents_are_explained(tmp_path: Path) -> None:
    random_dictionary().save(tmp_path / "random.safetensors")
    result = run(JOB, None, **QUICK, dictionary=str(tmp_path / "random.safetensors"), latents_explained=3, scorers="detection")
    assert len(result.explanations) == 3
    assert result.explanations["component"].str.startswith("resid1.f").all()
    assert set(result.explanation_scores["scorer"]) == {"detection"}


def test_dictionaries_of_one_place_are_explained_apart(tmp_path: Path) -> None:
    one = random_dictionary()
    # the same latents under other names, and nothing else: what was latent 3 of one is latent 5 of the other
    other = replace(one, tensors={name: tensor.roll(2, 0) if tensor.shape[:1] == (40,) else tensor for name, tensor in one.tensors.items()})
    quick = {**QUICK, "latents_explained": 3, "scorers": "detection"}
    alone = []
    for name, dictionary in (("one", one), ("an other", other)):
        dictionary.save(tmp_path / f"{name}.safetensors")
        alone.append(run(JOB, None, **quick, dictionary=str(tmp_path / f"{name}.safetensors")))
    both = run(JOB, tmp_path / "run", **quick, dictionary=f"{tmp_path / 'one.safetensors'},{tmp_path / 'an other.safetensors'}")
    assert both.explanations["dictionary"].tolist() == ["one"] * 3 + ["an other"] * 3
    # that of one is judged beside explanations of its own latents, whatever is explained with it
    for name in ("explanations", "explanation_scores", "explanation_summary"):
        for result in alone:
            own = both.tables[name][both.tables[name]["dictionary"] == result.explanations["dictionary"][0]].reset_index(drop=True)
            assert len(own) == len(result.tables[name]) > 0
            if name == "explanations":
                pd.testing.assert_frame_equal(own, result.tables[name])
    moved = [f"resid1.f{(int(component.removeprefix('resid1.f')) + 2) % 40}" for component in both.explanations["component"][:3]]
    assert both.explanations["component"][3:].tolist() == moved
    assert both.explanations["explanation"][:3].tolist() == both.explanations["explanation"][3:].tolist()
    page = shown(both, "explanations")
    assert page.count("an other") > 3
    said = findings("explanations", **both.tables)
    assert [sentence.partition(" by ")[0] for sentence in said[:2]] == [
        "Explanations of latents of one",
        "Explanations of latents of an other",
    ]


def test_the_half_that_explanations_are_made_of_decides_which_latents_are_explained(tmp_path: Path) -> None:
    random_dictionary().save(tmp_path / "random.safetensors")
    doubled = replace(PAIRS, pairs=tuple(pair for pair in PAIRS for _ in range(2)))
    quick = {**QUICK, "pairs": doubled, "documents": 160, "dictionary": str(tmp_path / "random.safetensors"), "seed": 5}
    result = run(JOB, None, **quick, latents_explained=20, scorers="detection")
    first, second, whole = (
        [f"resid1.f{latent}" for latent in top_examples(subject(), random_dictionary(), texts, count=1).strongest(20)]
        for texts in (*halves(doubled, 5), doubled)
    )
    assert result.explanations["component"].tolist() == first
    assert first not in (second, whole)


def test_an_endpoint_that_goes_down_loses_nothing_and_the_same_command_goes_on(tmp_path: Path) -> None:
    answered, asked = 0, list[str]()

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        nonlocal answered
        answered += 1
        asked.append(body["messages"][1]["content"])
        return completion("w3 <b>w4</b> secret answer [1, 0, 1, 0, 1]") if answered <= 6 else (400, b"gone")

    with endpoint(answer) as (url, _):
        told = {**QUICK, "components": UNITS, "explainer": "endpoint", "explainer_model": "small", "endpoint": url, "scorers": "detection"}
        with pytest.raises(EndpointError, match="does not answer: it says 400 Bad Request gone; what was finished is kept"):
            run(JOB, tmp_path / "run", **told)
        before = list(asked)
        # all that was sent is in the log, the question without an answer too
        log = (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8")
        logged = [
            line["data"]["messages"][1]["content"] for line in map(json.loads, log.splitlines()) if "messages" in line.get("data", {})
        ]
        assert logged == before
        answered = -1000
        result = run(JOB, tmp_path / "run", **told)
    # there were explanations of four units, and three questions on the first, the last of them without an answer: it is begun again
    again = asked[len(before) :]
    assert not any("have in common" in each for each in again)
    assert again[:3] == before[4:]
    questions = result.explanation_questions
    assert len(questions) == 4 + 2 * 4 * 3
    assert set(questions["purpose"]) == {"explanation", "detection"}
    page = shown(result, "explanations")
    assert "&lt;b&gt;w4&lt;/b&gt;" in page
    assert "<b>w4" not in page
    scores = result.explanation_scores
    # twelve questions in threes of five, five and two: the last list is too long to be read
    assert scores["unreadable"].tolist() == pytest.approx([2 / 12] * 8)
    assert any("17\u202f% of the answers unreadable" in sentence for sentence in findings("explanations", **result.tables))


def test_a_local_model_is_asked_and_its_questions_are_kept(tmp_path: Path) -> None:
    # a model that reads the longest of the questions
    families.build("llama", max_position_embeddings=2048).save_pretrained(tmp_path / "judge")
    families.tokenizer().save_pretrained(tmp_path / "judge")
    local = {"explainer": "local", "explainer_model": str(tmp_path / "judge"), "scorers": "detection"}
    result = run(JOB, tmp_path / "run", **QUICK, components="m1.n3,m1.n4", **local)
    assert result.explanations["explainer"].tolist() == [f"local:{tmp_path / 'judge'}"] * 2
    # random weights write no lists: nothing can be read, and all of it counts as wrong
    assert (result.explanation_scores["unreadable"] == 1).all()
    assert (result.explanation_scores["score"] == 0).all()
    assert len(result.explanation_questions) == 2 + 2 * 2 * 3
    assert result.manifest["explainer"]["source"] == str(tmp_path / "judge")


def test_what_does_not_go_together_is_refused_before_the_model_runs(tmp_path: Path) -> None:
    random_dictionary().save(tmp_path / "random.safetensors")
    random_dictionary().save(tmp_path / "other.safetensors")
    file = str(tmp_path / "random.safetensors")
    url = "http://127.0.0.1:9/v1"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "nothing is named to explain"),
        ({"components": UNITS, "explainer": "endpoint", "explainer_model": "x"}, "'endpoint' is the address"),
        ({"components": UNITS, "endpoint": url}, "'endpoint' is the address"),
        ({"components": UNITS, "explainer": "local"}, "'explainer_model' names the model"),
        ({"components": UNITS, "explainer_model": "x"}, "'explainer_model' names the model"),
        ({"components": UNITS, "scorers": "guess"}, "scorer 'guess' is not known"),
        ({"components": "m1"}, "component 'm1' cannot be explained"),
        ({"components": "m9.n1"}, "neuron m9.n1 does not exist"),
        ({"components": "a0.h9"}, "component a0.h9 does not exist"),
        ({"components": "a0.h1,a0.h1"}, "named twice"),
        (
            {"components": "resid1.f3"},
            r"'resid1\.f3' is a latent of none of the dictionaries that are named: name the one that writes resid1",
        ),
        ({"components": "resid1.f99", "dictionary": file}, "dictionary random has latents 0-39"),
        (
            {"components": "resid1.f3", "dictionary": f"{file},{tmp_path / 'other.safetensors'}"},
            r"'resid1\.f3' could be a latent of random or other, which both write resid1: name one of them alone",
        ),
        ({"components": UNITS, "explainer": "endpoint", "explainer_model": "x", "endpoint": "http://h:x"}, "no address of http"),
    ]
    for settings, message in wrong:
        refuses(JOB, tmp_path / "run", SettingsError, message, **{**QUICK, **settings})
    twice = replace(PAIRS, pairs=PAIRS.pairs[:1] * 2)
    refuses(JOB, tmp_path / "run", DataError, "give at least two different", **{**QUICK, "pairs": twice}, components=UNITS)
    refuses(
        JOB,
        tmp_path / "run",
        MechscopeError,
        "absent",
        **QUICK,
        components=UNITS,
        explainer="local",
        explainer_model=str(tmp_path / "absent"),
    )
    families.build("llama").save_pretrained(tmp_path / "mute")
    mute = {"explainer": "local", "explainer_model": str(tmp_path / "mute")}
    refuses(JOB, tmp_path / "run", MechscopeError, "tokenizer", **QUICK, components=UNITS, **mute)
    refuses(JOB, tmp_path / "run", MechscopeError, "no such file", **QUICK, dictionary=str(tmp_path / "absent.safetensors"))


def test_the_sentence_gives_the_score_beside_shuffled_explanations() -> None:
    row = {"kind": "latents", "explainer": "baseline", "scorer": "detection", "n": 30, "chance": 0.5, "unreadable": 0.0, "withheld": ""}
    own = {**row, "control": "", "score": 0.81, "low": 0.77, "high": 0.85}
    shuffled = {**row, "control": "shuffled explanations", "score": 0.52, "low": 0.49, "high": 0.55}
    summary = pd.DataFrame([own, shuffled])
    (sentence,) = findings("explanations", explanation_summary=summary)
    assert sentence == (
        "Explanations of latents by baseline score 0.810 [0.770, 0.850] in detection on held-out windows (chance 0.500); shuffled among the latents, "
        "0.520 [0.490, 0.550] (n = 30 latents)."
    )
    summary.loc[0, ["score", "low", "high", "withheld", "n"]] = [float("nan")] * 3 + ["too few held-out windows", 0]
    (sentence,) = findings("explanations", explanation_summary=summary)
    assert sentence == "How well explanations of latents by baseline do in detection: withheld, as too few held-out windows."


def test_of_a_language_model_the_intruder_score_is_of_windows_and_not_of_explanations() -> None:
    row = {
        "kind": "latents",
        "explainer": "local:judge",
        "scorer": "intruder",
        "n": 30,
        "chance": 0.2,
        "unreadable": 0.0,
        "withheld": "",
        "control": "",
    }
    scores = {"score": 0.81, "low": 0.77, "high": 0.85}
    (sentence,) = findings("explanations", explanation_summary=pd.DataFrame([row | scores]))
    assert "tells windows of latents from an intruder, no explanation shown, with a score of 0.810 [0.770, 0.850] (chance 0.200" in sentence
    (sentence,) = findings(
        "explanations", explanation_summary=pd.DataFrame([row | dict.fromkeys(scores, float("nan")) | {"withheld": "few"}])
    )
    assert "explanations" not in sentence.lower()
    (sentence,) = findings("explanations", explanation_summary=pd.DataFrame([row | scores | {"explainer": "baseline"}]))
    assert sentence.startswith("Explanations of latents by baseline score")
