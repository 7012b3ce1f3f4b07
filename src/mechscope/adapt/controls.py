"""Controls of a fine-tuning: the same training with another seed, or on documents that have each other's summaries.

What a fine-tuning did because it learned to summarize is what it did and its control did not, so the two must differ in that alone: same documents, same
order of drawing, same schedule, and as many steps as the training whose weights were kept had. The control's own validation loss chooses nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mechscope.adapt.targets import Placement
from mechscope.adapt.training import Tuned, digest
from mechscope.choices import TuningMethod
from mechscope.data.documents import Corpus
from mechscope.data.prompt import Example
from mechscope.errors import DataError, SettingsError
from mechscope.settings.training import TrainSettings
from mechscope.store.artifact import REQUEST
from mechscope.store.differences import describe, differences
from mechscope.store.files import plain, read_json
from mechscope.store.hashing import hash_json, short


@dataclass(frozen=True)
class Match:
    """What a control has in common with a training.

    Attributes:
        settings: How to train: the same, with the number of steps of its schedule fixed.
        step: The step whose weights the training kept: the control's last.
        seed: The training's seed.
        name: The training, as short text that other trainings do not have.
    """

    settings: TrainSettings
    step: int
    seed: int
    name: str


def matched(
    like: Path,
    subject: Any,
    train: Sequence[Example],
    validation: Sequence[Example],
    *,
    method: TuningMethod,
    placed: Placement | None,
    scaling: float,
    dropout: float,
    settings: TrainSettings,
) -> Match:
    """Read a finished training and see that a control would be of the same base, documents and settings.

    Args:
        like: Its folder.
        subject: The base `Subject`.
        train: The examples it learned, before any shuffling.
        validation: Its validation examples.
        method: As for `tune`; so are `placed`, `scaling`, `dropout` and `settings`.
        placed: Where LoRA learns.
        scaling: LoRA's α/r.
        dropout: LoRA's dropout.
        settings: How it was trained.

    Raises:
        RunError: The folder holds no finished training.
        SettingsError: It is a control itself, or base, documents or settings differ; the message names them.
    """
    tuned = Tuned.read(like)
    request: Mapping[str, Any] = read_json(like / REQUEST)["request"]
    if tuned.control is not None:
        raise SettingsError(f"{like} is itself a control ({tuned.control['kind']}): match with the fine-tuning that it is a control of")
    wanted = {
        "fingerprint": subject.fingerprint,
        "method": method,
        "placement": None if placed is None else asdict(placed),
        "scaling": scaling,
        "dropout": dropout,
        "settings": asdict(settings),
        "examples": [digest(train), digest(validation)],
    }
    changes = differences({name: request[name] for name in wanted}, plain(wanted))
    if changes:
        raise SettingsError(
            f"the training in {like} was another than this control would be ({describe(changes)}): give the same base, data and settings"
        )
    # shuffling may leave out a document whose new summary is too long: the schedule must not hang on their number
    fixed = dataclasses.replace(settings, max_steps=settings.steps(len(train)), epochs=settings.epochs + 1)
    return Match(fixed, tuned.best_step, int(request["seed"]), short(hash_json(request)))


def shuffled_summaries(corpus: Corpus, *, seed: int) -> Corpus:
    """Return the documents in their order, each with the summary of another.

    The documents are put into a random circle, and each takes the summary of its neighbour: none keeps its own.

    Args:
        corpus: The documents.
        seed: Seed of the circle.

    Raises:
        DataError: There is but one document.
    """
    documents = corpus.documents
    if len(documents) < 2:
        raise DataError(f"{corpus.source} holds {len(documents)} document to train on: summaries can be shuffled among two or more")
    circle = np.random.default_rng(seed).permutation(len(documents))
    giver = np.empty_like(circle)
    giver[circle] = np.roll(circle, 1)
    mixed = tuple(dataclasses.replace(own, summary=documents[other].summary) for own, other in zip(documents, giver, strict=True))
    return dataclasses.replace(corpus, documents=mixed)
