"""What is measured of edits is what a plain forward pass says of every prompt, and an edit that is undone leaves nothing behind."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import torch

from mechscope.data.pairs import Pairs, PromptPair
from mechscope.edit import (
    Delta,
    Request,
    Requests,
    Search,
    Setting,
    applied,
    edit_alone,
    edit_in_sequence,
    key_moments,
    rome,
    standing,
    summary,
    text_loss,
)
from mechscope.errors import SettingsError
from mechscope.instrument import Execution
from mechscope.subject.load import Subject, load
from tests import families

REQUESTS = Requests(
    (
        Request("a", "w9 w30", "w5 {} w12", "w44 w45", "w20", ("w9 w30 w8", "w7 w9 w30"), ("w5 w6 w12 w50", "w4 w6")),
        Request("b", "w8 w31", "w6 {} w12", "w50", "w21", (), ("w5 w77",)),
        Request("c", "w70", "{} w13 w14", "w33"),
    ),
    "made",
)


def made() -> tuple[Subject, Pairs]:
    subject = load(families.build("llama", torch.float64), tokenizer=families.tokenizer())
    documents = [tuple(text.tolist()) for text in families.documents(seed=3, lengths=(20, 25, 30) * 4)]
    return subject, Pairs(tuple(PromptPair(str(at), ids, ids, target=(1, len(ids))) for at, ids in enumerate(documents)), "")


def plain(subject: Subject, prompt: str, target: str) -> tuple[float, bool]:
    """Return −log p of a target, the mean over its tokens, and whether it is what greedy decoding says; word by word, by plain forward passes."""
    ids, total, greedy = [int(word[1:]) for word in prompt.split()], 0.0, True
    for word in target.split():
        with torch.no_grad():
            logits = subject.plain(torch.tensor([ids])).logits[0, -1].double()
        token = int(word[1:])
        total, greedy = total - float(logits.log_softmax(-1)[token]), greedy and int(logits.argmax()) == token
        ids.append(token)
    return total / len(target.split()), greedy


def by_hand(subject: Subject, request: Request) -> dict[str, float]:
    """Return what `standing` says of a fact."""

    def preferred(text: str) -> bool:
        return plain(subject, text, request.new)[0] < plain(subject, text, request.true)[0]

    if not request.true:
        return {
            "efficacy": math.nan,
            "top": plain(subject, request.text, request.new)[1],
            "paraphrase": math.nan,
            "neighbourhood": math.nan,
        }
    new, true = (math.exp(-plain(subject, request.text, target)[0]) for target in (request.new, request.true))
    return {
        "efficacy": preferred(request.text),
        "top": plain(subject, request.text, request.new)[1],
        "paraphrase": float(np.mean([preferred(text) for text in request.paraphrases])) if request.paraphrases else math.nan,
        "neighbourhood": float(np.mean([not preferred(text) for text in request.neighbours])),
        "difference": new - true,
    }


def test_facts_stand_as_plain_forward_passes_say() -> None:
    subject, _ = made()
    table = standing(subject, REQUESTS, execution=Execution(tokens_per_batch=20))
    for (_, row), request in zip(table.iterrows(), REQUESTS.requests, strict=True):
        for name, value in by_hand(subject, request).items():
            assert float(row[name]) == pytest.approx(float(value), nan_ok=True, rel=1e-6), (request.id, name)


@pytest.fixture(scope="module")
def world() -> tuple[Subject, Pairs, Setting]:
    subject, texts = made()
    setting = Setting.of(subject, key_moments(subject, texts, layers=[1]), texts, number=2, search=Search(steps=15))
    return subject, texts, setting


def test_edits_alone_are_measured_in_the_edited_model_and_undone(world: tuple[Subject, Pairs, Setting]) -> None:
    subject, texts, setting = world
    before = {name: value.clone() for name, value in subject.plain.state_dict().items()}

    def make(model: Subject, request: Request, earlier: Sequence[Request]) -> Delta:
        assert not earlier
        return rome(model, request, setting, layer=1)

    table, deltas = edit_alone(subject, REQUESTS, make, texts=texts.first(3))
    assert all(torch.equal(value, before[name]) for name, value in subject.plain.state_dict().items())
    ordinary = text_loss(subject, texts.first(3))
    for (_, row), request, delta in zip(table.iterrows(), REQUESTS.requests, deltas, strict=True):
        was = by_hand(subject, request)
        assert float(row["efficacy_before"]) == pytest.approx(float(was["efficacy"]), nan_ok=True)
        with applied(subject, delta) as edited:
            assert float(row["efficacy"]) == pytest.approx(float(by_hand(edited, request)["efficacy"]), nan_ok=True)
            assert row["loss"] == pytest.approx(float((text_loss(edited, texts.first(3)) - ordinary).mean()))
        assert row["edited"] == (row["efficacy"] == 1 if request.true else row["top"] == 1)
    assert table["kl"].isna().tolist() == [False, False, True]
    assert (table["kl"][:2] > 0).all()

    # the KL by plain forward passes
    def said() -> torch.Tensor:
        with torch.no_grad():
            return subject.plain(torch.tensor([[5, 77]])).logits[0, -1].double().log_softmax(-1)

    old = said()
    with applied(subject, deltas[1]):
        assert table["kl"][1] == pytest.approx(float((old.exp() * (old - said())).sum()), rel=1e-5)


def test_edits_in_sequence_are_made_upon_each_other(world: tuple[Subject, Pairs, Setting]) -> None:
    subject, texts, setting = world
    seen: list[int] = []

    def make(model: Subject, request: Request, earlier: Sequence[Request]) -> Delta:
        seen.append(len(earlier))
        return rome(model, request, setting, layer=1)

    table, deltas = edit_in_sequence(subject, REQUESTS, make, counts=[1, 2, 50], texts=texts.first(2))
    assert (seen, table["edits"].tolist()) == ([0, 1], [1, 2])
    assert all(first.gives == second.fits for first, second in itertools.pairwise(deltas))
    with applied(subject, *deltas) as edited:
        own = [by_hand(edited, request)["efficacy"] for request in REQUESTS.requests[:2]]
    assert table["first"][1] == own[0]
    assert table["efficacy"][1] == pytest.approx(np.mean(own))
    with pytest.raises(SettingsError, match="after none of 1 to 3 edits"):
        edit_in_sequence(subject, REQUESTS, make, counts=[7], texts=texts.first(2))


def test_the_score_is_the_harmonic_mean_and_is_withheld_where_nothing_compares() -> None:
    random = np.random.default_rng(0)
    names = ["efficacy", "top", "paraphrase", "neighbourhood", "difference", "neighbour_difference"]
    edits = pd.DataFrame({name: random.random(30) for name in (*names, *(f"{own}_before" for own in names), "kl", "loss", "size")})
    rows = {str(row["measure"]): dict(row) for _, row in summary(edits).iterrows()}
    parts = [float(edits[name].mean()) for name in ("efficacy", "paraphrase", "neighbourhood")]
    assert rows["score"]["value"] == pytest.approx(3 / sum(1 / part for part in parts))
    assert rows["score"]["low"] < rows["score"]["value"] < rows["score"]["high"]
    assert rows["efficacy"]["low"] < parts[0] < rows["efficacy"]["high"]
    few = {str(row["measure"]): dict(row) for _, row in summary(edits.assign(paraphrase=math.nan)[:3]).iterrows()}
    assert few["score"]["withheld"] == "no edit has paraphrases and neighbours with targets to compare"
    assert "edits" in few["efficacy"]["withheld"]
    assert math.isnan(few["efficacy"]["low"])
