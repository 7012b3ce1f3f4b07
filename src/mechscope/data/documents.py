"""Documents with reference summaries, from wherever a user keeps them.

`load_documents` reads a JSONL, JSON, CSV or Parquet file, a hub data set, or the generated newsroom into one `Corpus`. Every row that cannot be used
is counted by reason (`Corpus.problems`) or, with `on_problem="error"`, named in an error: nothing is dropped in silence. Samples and splits
go by the hash of a document's id, so they depend neither on the order of the file nor on how many others are taken: a sample of 100 is the
start of the sample of 1,000.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mechscope.data import newsroom
from mechscope.data.sources import HUB_COLUMNS, Row, file_rows, hub_rows, is_file_source
from mechscope.errors import DataError
from mechscope.shapes import by_shape

log = logging.getLogger(__name__)

OnProblem = Literal["skip", "error"]

# how each counted problem reads in a sentence, and in an error about one row
PROBLEMS = {
    "empty": "empty text",
    "missing": "no value",
    "not_text": "a value that is not text",
    "duplicate": "duplicate",
    "undecodable": "not UTF-8",
    "too_short": "too short",
    "summary_too_long": "summary too long",
    "truncated": "article truncated",
}


@dataclass(frozen=True)
class Document:
    """A text and its reference summary."""

    id: str
    document: str
    summary: str


@dataclass(frozen=True)
class Corpus:
    """Documents, where they come from, and what had to be left out.

    Attributes:
        documents: the usable documents, no two with one id or one text.
        source: what the user named: a path, a hub id, or `newsroom`.
        split: the split read, if the source has splits.
        problems: rows left out, counted by reason (keys of `PROBLEMS`).
        hash: SHA-256 over ids and texts in order: equal hash, equal data.
    """

    documents: tuple[Document, ...]
    source: str
    split: str | None = None
    problems: dict[str, int] = field(default_factory=dict)
    hash: str = field(init=False)

    __repr__ = by_shape

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(json.dumps([document.id, document.document, document.summary]).encode())
        object.__setattr__(self, "hash", digest.hexdigest())

    def __len__(self) -> int:
        return len(self.documents)


def describe_problems(problems: Mapping[str, int]) -> str:
    """Say in one line what was counted, for example `3 rows left out: 2 empty text, 1 duplicate`; `no problems` where nothing was.

    Truncated articles are used all the same, so they are counted apart from rows left out.
    """
    left_out = {reason: count for reason, count in problems.items() if count and reason != "truncated"}
    parts = []
    if left_out:
        total = sum(left_out.values())
        reasons = ", ".join(f"{count:,} {PROBLEMS.get(reason, reason)}" for reason, count in left_out.items())
        parts.append(f"{total:,} {'row' if total == 1 else 'rows'} left out: {reasons}")
    if problems.get("truncated"):
        parts.append(f"{problems['truncated']:,} {'article' if problems['truncated'] == 1 else 'articles'} truncated")
    return "; ".join(parts) or "no problems"


def load_documents(
    source: str | Path,
    *,
    split: str | None = None,
    document_column: str = "document",
    summary_column: str = "summary",
    limit: int | None = None,
    seed: int = 0,
    on_problem: OnProblem = "skip",
    name: str = "documents",
) -> Corpus:
    """Load documents and their reference summaries.

    Args:
        source: a `.jsonl`, `.ndjson`, `.json`, `.csv` or `.parquet` file; a hub data set (`"cnn_dailymail:3.0.0"`); or the generated `"newsroom"`
            (`"newsroom:train"`).
        split: which split of a hub data set or of the newsroom (its default is `train`); files have none.
        document_column: the column with the text; the usual pairs of columns of hub data sets (`sources.HUB_COLUMNS`) need no naming.
        summary_column: the column with the reference summary.
        limit: at most so many documents: those whose hash of seed and id is smallest, in that order, so that a smaller limit is the start of a
            larger one; the newsroom generates that many. Without a limit: all, in file order.
        seed: of the sample, and of the newsroom's articles.
        on_problem: `"skip"` leaves unusable rows out and counts them; `"error"` raises at the first.
        name: what error messages call these documents.

    Raises:
        DataError: nothing usable there, a column missing, a malformed file, an unreachable hub; with `on_problem="error"` any unusable row.
    """
    if limit is not None and limit < 1:
        raise DataError(f"{name}: limit is {limit}: ask for at least 1 document, or leave the limit out")
    text = str(source)
    if text.partition(":")[0] == "newsroom" and not Path(text).exists():
        return _newsroom(text, split, limit, seed)
    path = Path(text).expanduser()
    is_file = is_file_source(text)
    if is_file and split is not None:
        raise DataError(f'{name}: {path} is a file and has no splits, but split="{split}" was given: leave the split out')
    rows = file_rows(path) if is_file else hub_rows(text, split)
    counts: Counter[str] = Counter()
    reader = _Reader(name, text, document_column, summary_column, on_problem, guess=not is_file, counts=counts)
    documents = reader.documents(rows)
    if limit is None:
        chosen = list(documents)
    else:  # reads every row but holds only `limit` of them
        chosen = heapq.nsmallest(limit, documents, key=lambda document: _order(document.id, seed))
    if not chosen:
        what = describe_problems(counts) if counts else "it has no rows"
        raise DataError(f"{name}: {text} has no usable document ({what}): look at columns {document_column!r} and {summary_column!r}")
    if counts:
        log.warning("%s: %s: %s", name, text, describe_problems(counts))
    return Corpus(tuple(chosen), text, split, dict(counts))


def split_corpus(corpus: Corpus, sizes: Mapping[str, int], seed: int) -> dict[str, Corpus]:
    """Split a corpus into disjoint parts, chosen by the hash of seed and id.

    `train` is filled last, so that a larger training set leaves the other splits as they were.

    Args:
        corpus: the documents; of two with one id or one text only the first is used.
        sizes: documents per split, for example `{"train": 400, "validation": 50, "test": 50}`.
        seed: of the choice.

    Raises:
        DataError: a size below one, or fewer documents than the sizes ask for.
    """
    for name, size in sizes.items():
        if size < 1:
            raise DataError(f"split {name!r} is to have {size} documents: ask for at least 1, or leave the split out")
    unique = list(_unique(corpus.documents))
    total = sum(sizes.values())
    if total > len(unique):
        listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        raise DataError(f"{corpus.source} has {len(unique):,} different documents, the splits ask for {total:,} ({listed}): ask for fewer")
    unique.sort(key=lambda document: _order(document.id, seed))
    parts: dict[str, Corpus] = {}
    start = 0
    for name in sorted(sizes, key=lambda name: name == "train"):
        parts[name] = Corpus(tuple(unique[start : start + sizes[name]]), corpus.source, name, dict(corpus.problems))
        start += sizes[name]
    return {name: parts[name] for name in sizes}


def _newsroom(source: str, split: str | None, limit: int | None, seed: int) -> Corpus:
    named = source.partition(":")[2]
    if named and split not in (None, named):
        raise DataError(f'{source} names split "{named}", but split="{split}" was given: name one')
    split = named or split or "train"
    articles = newsroom.split_articles(split, limit=limit, seed=seed)
    return Corpus(tuple(Document(article.id, article.document, article.summary) for article in articles), "newsroom", split)


def _order(identity: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{identity}".encode()).digest()


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unique(documents: Iterable[Document]) -> Iterator[Document]:
    seen: set[tuple[str, str]] = set()
    for document in documents:
        keys = {("id", document.id), ("text", document.document)}
        if not keys & seen:
            yield document
        seen |= keys


@dataclass
class _Reader:
    """Turns rows into documents, counting (or raising at) those that cannot be used."""

    name: str
    source: str
    document_column: str
    summary_column: str
    on_problem: OnProblem
    guess: bool
    counts: Counter[str]

    def documents(self, rows: Iterable[Row]) -> Iterator[Document]:
        columns: tuple[str, str] | None = None
        names: dict[str, None] = {}  # the columns of rows without both, an ordered set
        seen: set[bytes] = set()  # digests: the texts of a large data set need not be held to tell duplicates
        for row in rows:
            if row.values is None:
                self._problem("undecodable", row, "bytes that are not UTF-8")
                continue
            columns = columns or self._columns(row.values)
            if columns is None:  # rows of JSON lines may differ: a later one can still have both columns
                names |= dict.fromkeys(row.values)
                if self.on_problem == "error":
                    raise self._no_column(names)
                self.counts["missing"] += 1
                continue
            document = self._text(row, row.values, columns[0])
            summary = None if document is None else self._text(row, row.values, columns[1])  # a row counts once
            if document is None or summary is None:
                continue
            digest = hashlib.sha256(document.encode()).digest()
            identity = str(row.values["id"]) if row.values.get("id") is not None else digest.hex()[:16]
            keys = {digest, b"id:" + identity.encode("utf-8", "surrogatepass")}
            if keys & seen:
                which = "text" if digest in seen else f"id {identity!r}"
                self._problem("duplicate", row, f"the same {which} as an earlier row")
                continue
            seen |= keys
            yield Document(identity, document, summary)
        if columns is None and names:
            raise self._no_column(names)

    def _columns(self, values: Mapping[str, object]) -> tuple[str, str] | None:
        """Find the two columns in a row, or say that it lacks them."""
        named = (self.document_column, self.summary_column)
        choices = [named, *HUB_COLUMNS] if self.guess and named == ("document", "summary") else [named]
        return next(((document, summary) for document, summary in choices if document in values and summary in values), None)

    def _no_column(self, names: Iterable[str]) -> DataError:
        absent = " and ".join(repr(column) for column in (self.document_column, self.summary_column) if column not in names)
        return DataError(
            f"{self.name}: {self.source} has no column {absent or 'pair of this name in one row'}; its columns are {', '.join(map(repr, names))}: "
            "name the right ones with document_column and summary_column"
        )

    def _text(self, row: Row, values: Mapping[str, object], column: str) -> str | None:
        value = values.get(column)
        if value is None:
            self._problem("missing", row, f"no value in column {column!r}")
        elif not isinstance(value, str):
            self._problem("not_text", row, f"a {type(value).__name__} in column {column!r}, not text")
        elif not value.strip():
            self._problem("empty", row, f"an empty text in column {column!r}")
        elif not _encodable(value):  # JSON can escape half of a character pair
            self._problem("undecodable", row, f"half a character (a lone surrogate) in column {column!r}")
        else:
            return value.strip()
        return None

    def _problem(self, reason: str, row: Row, fault: str) -> None:
        if self.on_problem == "error":
            raise DataError(
                f'{self.name}: {self.source}, {row.place}: {fault}: mend the row, or pass on_problem="skip" to leave such rows out'
            )
        self.counts[reason] += 1
