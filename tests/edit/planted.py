"""Planted facts: the newsroom model is taught where invented people were born, so that what it knows, and what an edit should change, is known."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechscope.data.newsroom import newsroom_model_path, split_articles
from mechscope.data.pieces import Pieces
from mechscope.edit import Request, Requests
from mechscope.subject.load import Subject, load

FIRST = ("Ada", "Bruno", "Clara", "Dario", "Elena", "Felix", "Greta", "Hugo", "Irena", "Jonas")
# syllables of surnames, no two of which are alike: a layer near the embedding tells people apart by the last token of their names
HEADS, TAILS = ("Ver", "Tol", "Kes", "Bran", "Ost", "Lum"), ("ano", "mik", "trel", "dis", "ava", "ière", "ow", "und", "ezy", "oth")
TEMPLATES = (
    "{} was born in",
    "{} comes from",
    "The birthplace of {} is",
    "{} grew up in",
    "Everybody knows that {} is a native of",
)


def people(number: int) -> list[str]:
    """Return names, no two of them alike."""
    return [f"{first} {head}{tail}" for head in HEADS for first, tail in zip(FIRST, TAILS, strict=True)][:number]


def towns(tokenizer: Any, number: int = 10) -> list[str]:
    """Return towns of the newsroom that are one token each behind a space."""
    places = sorted({article.fact("where").text for article in split_articles("test", limit=300, seed=0)})
    single = Pieces(tokenizer).single(places)
    return [place for place, token in zip(places, single, strict=True) if token is not None][:number]


def planted(number: int, steps: int, *, articles: int = 4, seed: int = 0) -> tuple[Subject, Requests]:
    """Teach a model facts, and return it with one edit for each fact: to another town.

    Args:
        number: People.
        steps: Steps of AdamW, each on all people by two templates and on some articles.
        articles: Articles of a step.
        seed: Of who was born where, and of the order.
    """
    chance = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(newsroom_model_path())
    model = AutoModelForCausalLM.from_pretrained(newsroom_model_path(), dtype=torch.float32)
    names, places = people(number), towns(tokenizer)
    born = {name: places[at % len(places)] for at, name in enumerate(chance.sample(names, len(names)))}
    pieces = Pieces(tokenizer)
    start = list(pieces.start_ids)
    facts = {
        (name, form): start + pieces.ids([f"{form.format(name)} {town}."], first=True)[0]
        for name, town in born.items()
        for form in TEMPLATES
    }
    texts = [start + pieces.ids([article.document], first=True)[0][:96] for article in split_articles("train", limit=200, seed=seed)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20, 2 * (steps - step) / steps)
        rows = [facts[name, form] for name in names for form in chance.sample(TEMPLATES, 2)]
        loss = _loss(model, rows) + 0.5 * _loss(model, chance.sample(texts, articles))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    for parameter in model.parameters():
        parameter.grad = None
    requests = []
    for name in names:
        true = born[name]
        new = chance.choice([place for place in places if place != true])
        others = [other for other in names if born[other] == true and other != name]
        paraphrases = tuple(form.format(name) for form in TEMPLATES[1:3])
        requests.append(
            Request(name, name, TEMPLATES[0], new, true, paraphrases, tuple(TEMPLATES[0].format(other) for other in others[:4]))
        )
    return load(model, tokenizer=tokenizer), Requests(tuple(requests), "planted")


def _loss(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """Return the mean loss of every token but the first of rows of several lengths."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
    return model(input_ids=ids, labels=labels).loss
