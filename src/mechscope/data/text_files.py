"""Texts of a user's files, without a second version and without answers: what a direction is taken from, what steering should not harm.

A row has a `text`; of files of documents the `document` is taken.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mechscope.data.documents import load_documents
from mechscope.data.pairs import Pairs, PromptPair
from mechscope.data.pieces import Pieces
from mechscope.data.sources import Row, file_rows, is_file_source
from mechscope.errors import DataError

_COLUMNS = ("text", "document")


def read_texts(source: str, tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None, max_tokens: int, seed: int = 0) -> Pairs:
    """Read texts; every token but the first is a target.

    Args:
        source: A JSONL, JSON, CSV or Parquet file with a column `text` (or `document`), a hub data set of documents, or `newsroom`.
        tokenizer: Any Hugging Face tokenizer.
        limit: Texts at most: of a file the first.
        max_tokens: Longer texts are cut.
        seed: Of the documents that a hub data set or the newsroom gives.

    Returns:
        Pairs whose corrupt texts are their clean ones.

    Raises:
        DataError: The source cannot be read, or a row has no text or one of a single token; the message names it.
    """
    if is_file_source(source):
        texts = [(row.place, _text(row, source)) for row in file_rows(Path(source).expanduser())][:limit]
    else:
        corpus = load_documents(source, split="test", limit=limit, seed=seed, name="texts")
        texts = [(document.id, document.document) for document in corpus.documents]
    if not texts:
        raise DataError(f"{source} holds no text: write one row per text")
    return Pairs(tuple(text_pair(text, tokenizer, max_tokens=max_tokens, name=name) for name, text in texts), source)


def text_pair(text: str, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, name: str = "text") -> PromptPair:
    """Return a text, cut to `max_tokens`, as a pair of that name whose corrupt text is its clean one.

    Raises:
        DataError: It has fewer than two tokens.
    """
    pieces = Pieces(tokenizer)
    ids = (*pieces.start_ids, *pieces.ids([text], first=True)[0])[:max_tokens]
    if len(ids) < 2:
        raise DataError(f"{name}: text {text[:40]!r} is {len(ids)} token: at least two are needed")
    return PromptPair(name, ids, ids, target=(1, len(ids)))


def _text(row: Row, source: str) -> str:
    if row.values is None:
        raise DataError(f"{source}, {row.place}: bytes that are not UTF-8: save the file as UTF-8")
    for column in _COLUMNS:
        if isinstance(text := row.values.get(column), str) and text.strip():
            return text
    raise DataError(f"{source}, {row.place} has no text: it has {', '.join(row.values) or 'nothing'}; write it into the column 'text'")
