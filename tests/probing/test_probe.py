"""Probes of a model's activations against loops over Hugging Face's own, what was planted, and what was not."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Literal

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats as distributions

from mechscope.data.labels import Labelled
from mechscope.data.pairs import Pairs, PromptPair
from mechscope.data.splits import folds
from mechscope.errors import DataError, SettingsError
from mechscope.instrument import Execution, load, record
from mechscope.probing import (
    Activations,
    Method,
    chosen_penalties,
    components_of,
    document_task,
    logistic,
    mlp,
    probe,
    task_of,
    token_task,
    untrained,
)
from mechscope.probing.activations import ProbeSite
from mechscope.probing.held import HeldRows
from mechscope.probing.passes import Folded, Probe, co_moments, fitted, together
from mechscope.probing.tasks import CONTROL, LABELS, SHUFFLED, Reading
from mechscope.stats.co_moments import CoMoments
from tests import families
from tests.slips import slip

FAMILIES = ("gpt2", "llama", "gemma2", "gpt_neox")
# the words that tell a text's class, and two that tell nothing
WORDS, PLACE = (10, 11), 3


@cache
def labelled(count: int = 60) -> Labelled:
    """Return texts of several lengths with a word that tells the class `topic`, and a class `coin` that nothing tells."""
    random = np.random.default_rng(0)
    pairs, topics, coins = [], [], []
    for number in range(count):
        ids = random.integers(20, families.VOCABULARY, size=int(random.integers(8, 13)))
        topic = number % 2
        ids[PLACE] = WORDS[topic]
        pairs.append(PromptPair(str(number), tuple(map(int, ids)), tuple(map(int, ids))))
        topics.append("ab"[topic])
        coins.append("xy"[int(random.integers(2))])
    words = {
        "word a": tuple(tuple(at for at, token in enumerate(pair.clean) if token == WORDS[0]) for pair in pairs),
        "word b": tuple(tuple(at for at, token in enumerate(pair.clean) if token == WORDS[1]) for pair in pairs),
    }
    return Labelled(Pairs(tuple(pairs), "planted"), {"topic": tuple(topics), "coin": tuple(coins)}, words)


@torch.no_grad()
def slow(family: str, site: ProbeSite, reading: Reading, texts: Pairs) -> list[list[np.ndarray]]:
    """Return the rows of each text by component, one text at a time and without padding."""
    subject, rows = families.subject(family, torch.float64), []
    for pair in texts:
        with record(subject, "attention_output", "mlp_output", "z") as recording:
            output = subject.model(torch.tensor([pair.clean]), output_hidden_states=True)
        values = {
            "residual": list(output.hidden_states),
            "attention_output": [recording["attention_output", layer] for layer in range(families.LAYERS)],
            "mlp_output": [recording["mlp_output", layer] for layer in range(families.LAYERS)],
            "head": [recording["z", layer][:, :, head] for layer in range(families.LAYERS) for head in range(families.HEADS)],
        }[site]
        own = [value[0].numpy() for value in values]
        rows.append([{"last": each[-1:], "mean": each.mean(0, keepdims=True), "tokens": each[1:]}[reading] for each in own])
    return rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("site", "reading"),
    [
        ("residual", "last"),
        ("residual", "mean"),
        ("residual", "tokens"),
        ("head", "mean"),
        ("attention_output", "last"),
        ("mlp_output", "tokens"),
    ],
)
def test_statistics_of_padded_batches_are_those_of_texts_run_one_by_one(family: str, site: ProbeSite, reading: Reading) -> None:
    texts = labelled().texts.first(11)
    task = token_task(labelled(), "word") if reading == "tokens" else document_task(labelled(), "topic", reading=reading)
    task = replace(task, texts=texts, labels=task.labels[:11])
    subject = families.subject(family, torch.float64)
    activations = Activations(subject, site, reading)
    folded = Folded(task, [task.labels], np.arange(11) % 3)
    moments = co_moments(activations, folded, Execution(tokens_per_batch=40))
    rows = slow(family, site, reading, texts)
    names = components_of(subject, site)
    for at in range(len(names)):
        # Hugging Face's last hidden state is behind the final norm, no stream between blocks
        if site == "residual" and at == families.LAYERS:
            continue
        for fold, each in enumerate(moments):
            own = np.concatenate([row[at] for number, row in enumerate(rows) if number % 3 == fold])
            assert each.n == len(own)
            np.testing.assert_allclose(each.mean[at], own.mean(0), rtol=0, atol=1e-9)
            np.testing.assert_allclose(each.covariance[at], np.cov(own.T, bias=True), rtol=0, atol=1e-9)
        every, kind = np.concatenate([row[at] for row in rows]), np.concatenate(task.labels)
        means = together(moments).class_means(0)[at].numpy()
        for number in range(len(task.classes)):
            np.testing.assert_allclose(means[number], every[kind == number].mean(0), rtol=0, atol=1e-9)


def test_accuracies_are_those_of_a_loop_over_folds_with_the_nearest_mean() -> None:
    task = document_task(labelled(), "coin")
    found = probe(families.subject("gpt2", torch.float64), task, method="means", folds=4, execution=Execution(tokens_per_batch=50)).accuracy
    rows = slow("gpt2", "residual", "mean", task.texts)
    kind = np.concatenate(task.labels)
    fold = folds([pair.clean for pair in task.texts], 4, 0, strata=kind.tolist(), source="")
    for at, component in enumerate(("embed", "resid0", "resid1")):
        x = np.stack([row[at][0] for row in rows])
        right = np.zeros(len(x), dtype=bool)
        for each in range(4):
            means = np.stack([x[(fold != each) & (kind == number)].mean(0) for number in (0, 1)])
            nearest = ((x[fold == each][:, None] - means) ** 2).sum(-1).argmin(1)
            right[fold == each] = nearest == kind[fold == each]
        row = found[(found["component"] == component) & (found["labels"] == LABELS)].iloc[0]
        assert row["balanced"] == pytest.approx(np.mean([right[kind == number].mean() for number in (0, 1)]))
        assert row["accuracy"] == pytest.approx(right.mean())
        assert row["majority"] == pytest.approx(max(kind.mean(), 1 - kind.mean()))


@pytest.mark.parametrize("method", ["logistic", "mlp"])
def test_probes_learned_from_held_rows_are_those_of_rows_run_one_by_one(method: Literal["logistic", "mlp"]) -> None:
    task = document_task(labelled(), "topic")
    subject = families.subject("llama", torch.float64)
    folded = Folded(task, [task.labels], np.arange(60) % 3)
    held = folded.held(seed=0)
    moments = co_moments(Activations(subject, "residual", "mean"), folded, Execution(tokens_per_batch=50), held)
    rows = np.stack([[row[at][0] for row in slow("llama", "residual", "mean", task.texts)] for at in (0, 1)])
    np.testing.assert_allclose(held.x[:2], rows, atol=1e-5)
    kind = np.concatenate(task.labels)
    found = fitted(moments, method, folded, held)
    for fold in range(3):
        own = np.arange(60) % 3 != fold
        x, y = torch.from_numpy(rows[:, own]), torch.from_numpy(kind[own])[:, None]
        chooses = np.arange(60) % 3 == (fold + 1) % 3
        parts = [
            CoMoments.of(torch.from_numpy(rows[:, each]), torch.from_numpy(kind[each])[:, None], (2,)) for each in (own & ~chooses, chooses)
        ]
        penalty = chosen_penalties(*parts)
        if method == "logistic":
            variance = torch.from_numpy(rows[:, own].var(1).mean(-1))
            again: Probe = logistic(x, y, 2, penalty=penalty * variance / 4)[0]
        else:
            again = mlp(x, y, 2, shrinkage=penalty[0])[0]
        told = found[fold][0].scores(held.x.double())[:2].softmax(-1)
        np.testing.assert_allclose(told, again.scores(torch.from_numpy(rows)).softmax(-1), atol=0.02)


def test_of_many_rows_the_same_are_held_whatever_the_batches() -> None:
    task = token_task(labelled(), "word")
    folded = Folded(task, [task.labels], np.arange(60) % 3)
    text, labels = np.repeat(np.arange(60), [len(own) for own in task.labels]), np.concatenate(task.labels)[:, None]
    made = []
    for tokens in (30, 400):
        held = HeldRows(labels, text, most=50, seed=1)
        with pytest.raises(ValueError, match="once all were read"):
            _ = held.x
        co_moments(
            Activations(families.subject("gpt2", torch.float64), "residual", "tokens"), folded, Execution(tokens_per_batch=tokens), held
        )
        made.append(held)
    assert made[0].x.shape == (families.LAYERS + 1, 50, 32)
    torch.testing.assert_close(made[0].x, made[1].x)
    rows = slow("gpt2", "residual", "tokens", task.texts)
    at = [int(each) for each in np.sort(np.random.default_rng(1).permutation(len(text))[:50])]
    np.testing.assert_allclose(made[0].x[0], np.concatenate([row[0] for row in rows])[at], atol=1e-5)
    assert made[0].text.tolist() == text[at].tolist()
    assert made[0].labels.tolist() == labels[at].tolist()


def of(table: pd.DataFrame, **values: str) -> pd.DataFrame:
    """Return the rows that have these values, by component."""
    for name, value in values.items():
        table = table[table[name] == value]
    return table.set_index("component")


@pytest.mark.parametrize("method", ["lda", "ridge", "means", "logistic"])
def test_a_class_that_a_word_tells_is_told_and_one_that_nothing_tells_is_not(method: Method) -> None:
    subject = families.subject("llama")
    told = probe(subject, document_task(labelled(200), "topic"), method=method)
    labels = of(told.accuracy, labels=LABELS)
    assert labels["balanced"].iloc[0] > 0.8, "the mean over a text holds the word's embedding"
    over = of(told.contrasts, contrast="over shuffled labels")
    assert over["difference_low"]["embed"] > 0.2
    assert over["difference_q"]["embed"] < 1e-4
    nothing = probe(subject, document_task(labelled(200), "coin"), method=method)
    assert (of(nothing.accuracy, labels=LABELS)["balanced"].sub(0.5).abs() < 0.1).all()
    assert (of(nothing.contrasts, contrast="over shuffled labels")["difference_q"] > 0.05).all()


def test_what_is_a_tokens_identity_is_told_of_the_control_task_too() -> None:
    found = probe(families.subject("gpt2"), token_task(labelled(200), "word"), site="residual")
    kinds = {name: of(found.accuracy, labels=name)["balanced"] for name in (LABELS, SHUFFLED, CONTROL)}
    # 79 kinds of tokens in 32 dimensions are told apart in part; the two words wholly
    assert kinds[LABELS]["embed"] > 0.99
    assert kinds[CONTROL]["embed"] > 0.55
    assert abs(kinds[SHUFFLED]["embed"] - 1 / 3) < 0.1
    over = of(found.contrasts, contrast="over the control task")
    assert over["difference"]["embed"] == pytest.approx(kinds[LABELS]["embed"] - kinds[CONTROL]["embed"])


def test_a_model_beside_itself_is_the_same_and_its_direction_has_not_moved() -> None:
    subject = families.subject("gpt_neox", torch.float64)
    found = probe({"base": subject, "tuned": subject}, document_task(labelled(), "topic"))
    for contrast in ("over the base", "the base's probe over its own"):
        assert (of(found.contrasts, contrast=contrast)["difference"] == 0).all()
    assert found.directions is not None
    assert (found.directions["angle"] < 1e-4).all()
    # halves of the texts differ by noise, in one model as between both
    np.testing.assert_allclose(found.directions["alike"], found.directions["apart"], atol=1e-4)


def test_a_direction_that_fine_tuning_turned_round_is_seen_to_have_moved() -> None:
    base = families.subject("gpt2", torch.float64)
    tuned = copy.deepcopy(base.model)
    with torch.no_grad():
        embedding = tuned.get_input_embeddings().weight
        embedding[list(WORDS)] = embedding[list(WORDS[::-1])].clone()
    task = document_task(labelled(), "topic")
    found = probe({"base": base, "tuned": load(tuned, check=False)}, task, folds=6)
    own, bases = (of(found.accuracy, model="tuned", labels=LABELS, probe=whose)["balanced"]["embed"] for whose in ("its own", "the base's"))
    assert own > 0.9
    assert bases < 0.2
    assert of(found.contrasts, contrast="the base's probe over its own")["difference_high"]["embed"] < -0.5
    assert found.directions is not None
    row = found.directions.set_index("component").loc["embed"]
    # the words differ by the opposite of what they did; all other tokens keep what they had
    assert row["angle_low"] <= row["angle"] <= row["angle_high"]
    assert row["angle"] > 90
    assert row["apart"] > 90 > row["alike"]


def test_random_weights_are_a_control_of_every_other_model() -> None:
    subject = families.subject("llama")
    found = probe({"model": subject, "random weights": untrained(subject)}, document_task(labelled(), "topic"))
    contrast = of(found.contrasts, contrast="over random weights")
    assert set(contrast["model"]) == {"model"}
    accuracy = {name: of(found.accuracy, model=name, labels=LABELS)["balanced"] for name in ("model", "random weights")}
    np.testing.assert_allclose(contrast["difference"], accuracy["model"] - accuracy["random weights"])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_model_has_the_architecture_and_no_weight_of_the_trained_one(family: str) -> None:
    subject = families.subject(family, torch.float64)
    state = torch.random.get_rng_state()
    made, again, other = untrained(subject), untrained(subject), untrained(subject, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (made.dtype, made.anatomy.n_layers) == (subject.dtype, subject.anatomy.n_layers)
    assert made.fingerprint == again.fingerprint != other.fingerprint
    own = dict(subject.weights())
    for name, weight in made.weights():
        assert weight.shape == own[name].shape
        assert not torch.equal(weight, own[name]), name


def test_shuffled_labels_are_those_of_other_texts_and_a_control_label_belongs_to_a_kind_of_token() -> None:
    task = token_task(labelled(), "word")
    assert task.classes == ("none", "a", "b")
    made = task.labelings(shuffles=2, seed=3)
    assert [kind for kind, _ in made] == [LABELS, SHUFFLED, SHUFFLED, CONTROL]
    every = [np.concatenate(labels) for _, labels in made]
    for shuffled in every[1:3]:
        np.testing.assert_allclose(np.bincount(shuffled) / len(shuffled), np.bincount(every[0]) / len(shuffled), atol=0.02)
        assert not np.array_equal(shuffled, every[0])
    assert not np.array_equal(every[1], every[2])
    of_kind: dict[int, set[int]] = {}
    for pair, labels in zip(task.texts, made[3][1], strict=True):
        for token, label in zip(pair.clean[1:], labels, strict=True):
            of_kind.setdefault(token, set()).add(int(label))
    assert max(map(len, of_kind.values())) == 1
    assert [own.tolist() for own in task.labelings(shuffles=2, seed=3)[3][1]] == [own.tolist() for own in made[3][1]]
    (kind, topics), (other, mixed) = document_task(labelled(), "topic").labelings(shuffles=1, seed=0)
    assert (kind, other) == (LABELS, SHUFFLED)
    assert np.bincount(np.concatenate(mixed)).tolist() == np.bincount(np.concatenate(topics)).tolist()


def test_tokens_of_one_text_are_of_one_class_among_shuffled_labels_too_so_that_nothing_is_claimed_of_chance() -> None:
    """Texts of few words of their own, all of one class by a coin: probes learn texts by heart, and accuracies vary as those of 60 coins, not 600."""
    squares, subject = [], families.subject("gpt2")
    for seed in range(10):
        random, pairs, spans = np.random.default_rng(seed), [], []
        for number in range(60):
            ids = tuple(map(int, random.choice(random.integers(0, families.VOCABULARY, size=4), size=int(random.integers(8, 14)))))
            pairs.append(PromptPair(str(number), ids, ids))
            spans.append(tuple(range(len(ids))) if random.random() < 0.5 else ())
        task = token_task(Labelled(Pairs(tuple(pairs), "coins"), {}, {"coin": tuple(spans)}), "coin")
        assert all(len(set(own.tolist())) == 1 for own in task.labelings(shuffles=1, seed=seed)[1][1])
        over = of(probe(subject, task, execution=Execution(seed=seed)).contrasts, contrast="over shuffled labels")
        squares.append(distributions.norm.isf(over["difference_p"] / 2) ** 2)
    # 1 where labels are one more draw of what is shuffled, 3 where tokens are shuffled one by one
    assert 0.4 < np.mean(squares) < 1.8


def test_tasks_are_found_by_name_and_what_cannot_be_told_is_refused_before_anything_runs() -> None:
    assert task_of(labelled(), "topic").reading == "mean"
    assert task_of(labelled(), "word").reading == "tokens"
    assert task_of(labelled(), "word a").classes == ("none", "word a")
    with pytest.raises(
        DataError, match="nothing is known of the texts of planted as 'size': known are topic, coin of texts and word of tokens"
    ):
        task_of(labelled(), "size")
    subject = families.subject("gpt2")
    one = replace(labelled(), attributes={"topic": ("a",) * 60})
    with pytest.raises(DataError, match="'topic' of planted holds only 'a': a probe tells two classes or more apart"):
        probe(subject, document_task(one, "topic"))
    rare = replace(labelled(), attributes={"topic": ("a",) * 4 + ("b",) * 56})
    with pytest.raises(DataError, match="class 'a' of 'topic' stands in 4 different texts of planted, 5 folds need at least 6"):
        probe(subject, document_task(rare, "topic"))
    task = document_task(labelled(), "topic")
    with pytest.raises(SettingsError, match="2 folds are too few"):
        probe(subject, task, folds=2)
    with pytest.raises(SettingsError, match="labels are shuffled 1 times, 5 are the least"):
        probe(subject, task, shuffles=1)
    with pytest.raises(SettingsError, match="site 'query' is not probed: the sites are residual"):
        components_of(subject, slip("query"))
