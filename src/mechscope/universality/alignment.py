"""The same words in several models: texts cut by each model's tokenizer, and the places where all of them end a token.

Two tokenizers cut one text differently; what can be compared is what a model knows once it has read up to a character. So a row is a character at which
all models end a token, and each model's activations there are those of the token that ends there. With one tokenizer these are all tokens. The first token
of a text is left out: models park attention and norm there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.data.pairs import PairBatch, Pairs, PromptPair
from mechscope.data.pieces import Pieces
from mechscope.errors import DataError
from mechscope.instrument import Execution, record
from mechscope.instrument.record import Site
from mechscope.instrument.texts import over_texts
from mechscope.instrument.walk import run_backbone
from mechscope.shapes import by_shape
from mechscope.subject import Subject


@dataclass(frozen=True)
class Aligned:
    """Texts as every model reads them.

    Attributes:
        texts: By model: the texts as its tokens.
        places: By model, for each text: the tokens that are compared; as many and in the same order in all models.
    """

    texts: Mapping[str, Pairs]
    places: Mapping[str, tuple[tuple[int, ...], ...]]

    @property
    def rows(self) -> int:
        """Tokens that are compared, over all texts."""
        return sum(len(places) for places in next(iter(self.places.values())))

    @property
    def text_of(self) -> np.ndarray:
        """The text of every row."""
        return np.repeat(np.arange(len(next(iter(self.places.values())))), [len(places) for places in next(iter(self.places.values()))])


@dataclass(frozen=True)
class Rows:
    """Activations of one model at the aligned tokens.

    Attributes:
        values: By site and layer ``(row, width)``, in float32 on the processor.
    """

    values: Mapping[tuple[str, int], Float[Tensor, "row width"]]

    __repr__ = by_shape

    def layers(self, site: str) -> list[Tensor]:
        """Return a site's values of all layers, in order."""
        return [value for (name, _), value in sorted(self.values.items()) if name == site]


def align(subjects: Mapping[str, Subject], texts: Sequence[str], *, max_tokens: int = 512, per_text: int = 64, seed: int = 0) -> Aligned:
    """Cut texts by the tokenizers of all models and find where they agree.

    Args:
        subjects: Models by label.
        texts: The texts.
        max_tokens: Most tokens of a text; lowered to what a model can read.
        per_text: Most rows of a text, drawn at random.
        seed: Of that draw.

    Raises:
        DataError: A model has no tokenizer, or one without character offsets; or fewer than two texts have a place where all models end a token.
    """
    rng, read = np.random.default_rng(seed), {label: _Reader(label, subject, max_tokens) for label, subject in subjects.items()}
    ids: dict[str, list[PromptPair]] = {label: [] for label in subjects}
    places: dict[str, list[tuple[int, ...]]] = {label: [] for label in subjects}
    for number, text in enumerate(texts):
        cut = {label: one(text) for label, one in read.items()}
        shared = sorted(set.intersection(*({*ends} for _, ends in cut.values())))
        if not shared:
            continue
        kept = sorted(rng.choice(len(shared), min(per_text, len(shared)), replace=False))
        for label, (tokens, ends) in cut.items():
            ids[label].append(PromptPair(f"text-{number}", tokens, tokens))
            places[label].append(tuple(ends[shared[at]] for at in kept))
    if len(next(iter(places.values()))) < 2:
        raise DataError(
            f"the tokenizers of {', '.join(subjects)} end a token at the same character in {len(next(iter(places.values())))} of {len(texts)} texts: "
            "at least 2 are needed"
        )
    return Aligned(
        {label: Pairs(tuple(each), "aligned texts") for label, each in ids.items()}, {label: tuple(each) for label, each in places.items()}
    )


class _Reader:
    """Cuts texts by one model's tokenizer."""

    def __init__(self, label: str, subject: Subject, max_tokens: int) -> None:
        if subject.tokenizer is None or not subject.tokenizer.is_fast:
            lacks = "no tokenizer" if subject.tokenizer is None else f"{type(subject.tokenizer).__name__}, which gives no character offsets"
            raise DataError(f"model {label!r} has {lacks}: models are compared where their tokenizers end a token at the same character")
        self.tokenizer, self.start = subject.tokenizer, tuple(Pieces(subject.tokenizer).start_ids)
        self.most = min(max_tokens, subject.anatomy.max_positions)

    def __call__(self, text: str) -> tuple[tuple[int, ...], dict[int, int]]:
        """Return a text's tokens, and by character where a token ends the place of that token; of several the last."""
        cut = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
        ids = (*self.start, *cut["input_ids"])[: self.most]
        ends = {end: at for at, (_, end) in enumerate(cut["offset_mapping"], len(self.start)) if 0 < at < len(ids)}
        return ids or (0,), ends


@torch.no_grad()
def read_rows(
    subject: Subject, texts: Pairs, places: Sequence[Sequence[int]], sites: Sequence[Site], *, execution: Execution = Execution()
) -> Rows:
    """Run a model over texts and keep some tokens' activations of every layer.

    Args:
        subject: The model.
        texts: The texts.
        places: For each text the tokens that are kept.
        sites: What to keep, such as `residual` and `neuron`.
        execution: Tokens of a batch (4,096 by default), progress.

    Returns:
        Rows text by text, in the order of the places.
    """
    begins = np.concatenate([[0], np.cumsum([len(each) for each in places])])
    values: dict[tuple[str, int], Tensor] = {}

    def kept(batch: PairBatch) -> dict[tuple[str, int], list[Tensor]]:
        with record(subject, *sites) as recording:
            run_backbone(subject, batch.clean, batch.real)
        wanted = [torch.tensor(places[at]) + batch.shift(row) for row, at in enumerate(batch.indices)]
        return {
            key: [value[row, at.to(value.device)].float().cpu() for row, at in enumerate(wanted)] for key, value in recording.values.items()
        }

    for batch, found in over_texts(texts, kept, execution, tokens=4096, label="reading"):
        for key, parts in found.items():
            if key not in values:
                values[key] = torch.empty(int(begins[-1]), parts[0].shape[-1])
            for at, part in zip(batch.indices, parts, strict=True):
                values[key][begins[at] : begins[at + 1]] = part
    return Rows(values)
