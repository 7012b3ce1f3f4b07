r"""Prompts for summarization: text in, token ids with known spans out, as examples and as padded batches.

A prompt is `Article: {document}\nSummary: {summary}` with an end token. Only the ARTICLE is ever truncated: cutting the finished text from
the right would cut the summary away, the first trap of paper 1's published code. The pieces (opening, article, joint, summary, closing) are
tokenised one by one and joined, for three reasons: spans are exact for any tokenizer, fast or slow; a training prompt and a generation
prompt agree token by token up to and including `Summary:`; and no merge can cross a border. Nothing downstream may depend on padding:
`Batch.rows` marks the real query rows wherever it is.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mechscope.data.documents import Corpus, OnProblem, describe_problems
from mechscope.data.pieces import Pieces
from mechscope.data.template import Frame, Template
from mechscope.errors import DataError
from mechscope.shapes import by_shape

Padding = Literal["right", "left"]
Rows = Literal["all", "document", "summary"]


@dataclass(frozen=True)
class Example:
    """One document and summary as token ids.

    Attributes:
        id: the document's id.
        input_ids: the whole prompt: start token (where the tokenizer sets one), opening, article, joint, summary, closing, end token; of a chat also
            what its template writes behind the assistant's turn.
        document: half-open token span of the article.
        summary: half-open token span of what the model is to write: summary, closing text, and the end token where there is one. The loss on
            "summary tokens" is the loss of predicting `input_ids[summary[0]:summary[1]]`.
        truncated: whether the article was cut to fit.
    """

    id: str
    input_ids: tuple[int, ...]
    document: tuple[int, int]
    summary: tuple[int, int]
    truncated: bool

    __repr__ = by_shape

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Encoded:
    """The examples of a corpus, and what was left out or cut, by reason."""

    examples: tuple[Example, ...]
    problems: dict[str, int]
    hash: str = field(init=False)

    __repr__ = by_shape

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(json.dumps([example.id, example.input_ids, example.document, example.summary]).encode())
        object.__setattr__(self, "hash", digest.hexdigest())

    def __len__(self) -> int:
        return len(self.examples)


def encode(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: Template | None = None,
    max_tokens: int,
    min_document_tokens: int = 8,
    max_summary_tokens: int | None = None,
    on_problem: OnProblem = "skip",
) -> Encoded:
    """Encode documents with their summaries, truncating only articles.

    Args:
        corpus: the documents.
        tokenizer: any Hugging Face tokenizer. Special tokens written out inside a text are ordinary text.
        template: the text around them, paper 1's by default.
        max_tokens: most tokens of an example, all included.
        min_document_tokens: shortest article, after truncation, that is still worth measuring.
        max_summary_tokens: leave out longer summaries (never cut them).
        on_problem: `"skip"` counts what is left out (`too_short`, `summary_too_long`), `"error"` raises at the first. Truncated articles are
            counted in either case.

    Raises:
        DataError: no example is left, or `on_problem="error"` and one cannot be encoded.
    """
    template = template or Template()
    pieces = Pieces(tokenizer, template.controls)
    frame = Frame(pieces, template)
    articles = pieces.ids([template.document(document.document) for document in corpus.documents], first=frame.document_is_first)
    summaries = pieces.ids([template.summary(document.summary) for document in corpus.documents])
    counts: Counter[str] = Counter()
    examples = []
    for document, article, summary in zip(corpus.documents, articles, summaries, strict=True):
        room = max_tokens - frame.around - len(summary)
        if len(article) < min_document_tokens:
            problem, fault = "too_short", f"its article has {len(article)} tokens, fewer than {min_document_tokens}"
        elif max_summary_tokens is not None and len(summary) > max_summary_tokens:
            problem, fault = "summary_too_long", f"its summary has {len(summary)} tokens, more than max_summary_tokens={max_summary_tokens}"
        elif room < min(len(article), min_document_tokens):
            problem = "summary_too_long"
            fault = f"its summary has {len(summary)} tokens, which leaves {max(room, 0)} of max_tokens={max_tokens} for the article"
        else:
            examples.append(_example(frame, document.id, article[:room], summary, truncated=len(article) > room))
            counts["truncated"] += len(article) > room
            continue
        if on_problem == "error":
            raise DataError(f'document {document.id!r}: {fault}: shorten the one or raise the other, or pass on_problem="skip"')
        counts[problem] += 1
    problems = {reason: count for reason, count in counts.items() if count}
    if not examples:
        raise DataError(_nothing_left(corpus, problems, articles, summaries, max_tokens, min_document_tokens))
    return Encoded(tuple(examples), problems)


def encode_prompt(
    document: str, tokenizer: PreTrainedTokenizerBase, *, template: Template | None = None, max_tokens: int, max_new_tokens: int
) -> tuple[int, ...]:
    """Encode the prompt to generate from, up to and including `Summary:`.

    The tokens are those of the training prompt with the same article tokens.

    Args:
        document: the text to summarize.
        tokenizer: any Hugging Face tokenizer.
        template: the text around it, paper 1's by default.
        max_tokens: most tokens of prompt and answer together (the model's positions).
        max_new_tokens: room to leave for the answer; the article is cut to make it.

    Raises:
        DataError: no room is left for the article, or the document has no text.
    """
    template = template or Template()
    if not document.strip():
        raise DataError("a document to summarize is empty: leave it out")
    pieces = Pieces(tokenizer, template.controls)
    frame = Frame(pieces, template)
    article = pieces.ids([template.document(document)], first=frame.document_is_first)[0]
    room = max_tokens - max_new_tokens - len(frame.head) - len(frame.joint)
    if room < 1:
        raise DataError(
            f"max_new_tokens={max_new_tokens} leaves no room for the article in max_tokens={max_tokens}: ask for fewer new tokens"
        )
    return (*frame.head, *article[:room], *frame.joint)


def _example(frame: Frame, identity: str, article: Sequence[int], summary: Sequence[int], *, truncated: bool) -> Example:
    ids = (*frame.head, *article, *frame.joint, *summary, *frame.tail, *frame.after)
    begin = len(frame.head)
    end = begin + len(article)
    return Example(identity, ids, (begin, end), (end + len(frame.joint), len(ids) - len(frame.after)), truncated)


def _nothing_left(
    corpus: Corpus, problems: dict[str, int], articles: Sequence[Sequence[int]], summaries: Sequence[Sequence[int]], most: int, least: int
) -> str:
    if not corpus.documents:
        return f"{corpus.source} holds no documents: nothing to encode"
    if set(problems) == {"too_short"}:
        longest = max(map(len, articles))
        return (
            f"{corpus.source}: all {len(articles):,} documents are too short: the longest has {longest} tokens, at least {least} are needed"
        )
    shortest = min(map(len, summaries))
    return (
        f"{corpus.source}: none of {len(articles):,} documents fits into max_tokens={most} ({describe_problems(problems)}); "
        f"the shortest summary has {shortest} tokens: raise max_tokens"
    )


@dataclass(frozen=True)
class Batch:
    """Examples side by side.

    Attributes:
        input_ids: token ids, and `pad_id` at padding.
        attention_mask: true at real tokens.
        position_ids: 0, 1, 2, … over the real tokens of each example; 0 at padding.
        examples: the examples, row by row.
        padding: on which side the padding stands.
        pad_id: what stands there.
    """

    input_ids: Int[Tensor, "batch tokens"]
    attention_mask: Bool[Tensor, "batch tokens"]
    position_ids: Int[Tensor, "batch tokens"]
    examples: tuple[Example, ...]
    padding: Padding
    pad_id: int

    __repr__ = by_shape

    def __len__(self) -> int:
        return len(self.examples)

    def halves(self) -> tuple[Batch, Batch]:
        """Return the first and the second half of the examples, each padded no further than it needs."""
        middle = (len(self) + 1) // 2
        first, second = self.examples[:middle], self.examples[middle:]
        return collate(first, pad_id=self.pad_id, padding=self.padding), collate(second, pad_id=self.pad_id, padding=self.padding)

    def rows(self, which: Rows) -> Bool[Tensor, "batch tokens"]:
        """Mark query rows: `all` real tokens, those of the `document`, or those of the `summary` (its end token included)."""
        if which == "all":
            return self.attention_mask.clone()
        if which not in ("document", "summary"):
            raise DataError(f'rows {which!r}: choose "all", "document" or "summary"')
        marked = torch.zeros_like(self.attention_mask)
        width = self.input_ids.shape[1]
        for row, example in enumerate(self.examples):
            begin, end = example.document if which == "document" else example.summary
            shift = width - len(example) if self.padding == "left" else 0
            marked[row, begin + shift : end + shift] = True
        return marked


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id to pad with: the tokenizer's pad token, or its end token, or 0 (any id does, as padding is masked)."""
    return next((int(choice) for choice in (tokenizer.pad_token_id, tokenizer.eos_token_id) if choice is not None), 0)


def collate(examples: Sequence[Example], *, pad_id: int, padding: Padding = "right") -> Batch:
    """Put examples side by side in the order given.

    Raises:
        DataError: there are no examples, or the padding is neither `right` nor `left`.
    """
    if not examples:
        raise DataError("a batch needs at least one example")
    if padding not in ("right", "left"):
        raise DataError(f'padding {padding!r}: choose "right" or "left"')
    width = max(map(len, examples))
    input_ids = torch.full((len(examples), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(examples), width), dtype=torch.bool)
    position_ids = torch.zeros((len(examples), width), dtype=torch.int64)
    for row, example in enumerate(examples):
        real = slice(width - len(example), width) if padding == "left" else slice(0, len(example))
        input_ids[row, real] = torch.tensor(example.input_ids)
        attention_mask[row, real] = True
        position_ids[row, real] = torch.arange(len(example))
    return Batch(input_ids, attention_mask, position_ids, tuple(examples), padding, pad_id)


def packs(lengths: Sequence[int], *, tokens_per_batch: int) -> Iterator[list[int]]:
    """Divide texts into what makes a batch each, longest first: what needs most memory comes at once, not after an hour.

    Args:
        lengths: tokens of each text.
        tokens_per_batch: most tokens of a batch, padding included; a text longer than this is a pack by itself.

    Yields:
        Places among the lengths; each stands in exactly one pack, and the order is the same on every call.

    Raises:
        DataError: `tokens_per_batch` is below one.
    """
    if tokens_per_batch < 1:
        raise DataError(f"tokens_per_batch is {tokens_per_batch}: at least 1 is needed")
    waiting: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place], reverse=True):  # stable: equal lengths keep their order
        if waiting and lengths[waiting[0]] * (len(waiting) + 1) > tokens_per_batch:
            yield waiting
            waiting = []
        waiting.append(place)
    if waiting:
        yield waiting


def batches(examples: Sequence[Example], *, tokens_per_batch: int, pad_id: int, padding: Padding = "right") -> Iterator[Batch]:
    """Batch examples by length, longest first.

    Args:
        examples: each goes into exactly one batch.
        tokens_per_batch: most tokens of a batch, padding included; a longer example is a batch by itself.
        pad_id: the id to pad with, which is masked.
        padding: the side to pad on.

    Raises:
        DataError: `tokens_per_batch` is below one, or the padding is unknown.
    """
    for pack in packs([len(example) for example in examples], tokens_per_batch=tokens_per_batch):
        yield collate([examples[place] for place in pack], pad_id=pad_id, padding=padding)


@dataclass(frozen=True)
class Examples:
    """Examples that can be run batch by batch (`mechscope.instrument.texts`), padded on a side with `pad_id`, which is masked."""

    examples: Sequence[Example]
    pad_id: int
    padding: Padding = "right"

    def __len__(self) -> int:
        return len(self.examples)

    def batches(self, *, tokens_per_batch: int) -> Iterator[Batch]:
        """Batch the examples by length, longest first."""
        return batches(self.examples, tokens_per_batch=tokens_per_batch, pad_id=self.pad_id, padding=self.padding)
