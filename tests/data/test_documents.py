"""What can be read, what is left out and how it is said."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pytest

from mechscope.data import sources
from mechscope.data.documents import Corpus, Document, describe_problems, load_documents, split_corpus
from mechscope.errors import DataError

Write = Callable[[Sequence[object]], Path]
ROWS = [{"id": f"r{number}", "document": f"Text number {number}.", "summary": f"Number {number}."} for number in range(50)]
TEXTS = [(row["id"], row["document"], row["summary"]) for row in ROWS]


def texts(corpus: Corpus) -> list[tuple[str, str, str]]:
    return [(document.id, document.document, document.summary) for document in corpus.documents]


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json", "array.json", "csv", "parquet"])
def test_the_same_rows_read_the_same_from_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    if suffix == "array.json":
        path.write_text(json.dumps(ROWS))
    elif suffix == "csv":
        pd.DataFrame(ROWS).to_csv(path, index=False)
    elif suffix == "parquet":
        pd.DataFrame(ROWS).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, ROWS)))
    corpus = load_documents(path)
    assert texts(corpus) == TEXTS
    assert corpus.problems == {}
    assert corpus.source == str(path)


def test_a_byte_order_mark_and_windows_line_ends_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in ROWS) + b"\r\n\r\n")
    assert texts(load_documents(path)) == TEXTS
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbfdocument,summary\r\nA text.,Short.\r\n")
    assert [(row.document, row.summary) for row in load_documents(path).documents] == [("A text.", "Short.")]


def test_unicode_line_separators_do_not_end_a_line_of_json(tmp_path: Path) -> None:
    odd = "one\u2028two\u2029three\x85four\x0bfive\x1csix"
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"document": odd, "summary": "s"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_documents(path).documents[0].document == odd


def test_csv_fields_hold_line_ends_quotes_and_very_long_texts(tmp_path: Path) -> None:
    long = 'He said: "stop",\nthen left.\r\n' + "word " * 60_000 + "end"
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["summary", "document", "extra"], ["s1", long, "x"], ["s2", "other", "y"]])
    limit = csv.field_size_limit()
    assert [(row.document, row.summary) for row in load_documents(path).documents] == [(long, "s1"), ("other", "s2")]
    assert csv.field_size_limit() == limit


def test_columns_can_have_other_names(jsonl: Write) -> None:
    path = jsonl([{"body": "Text.", "abstract": "Short."}])
    assert load_documents(path, document_column="body", summary_column="abstract").documents[0].summary == "Short."


def test_bad_rows_are_counted_by_reason_once_each_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = [
        b'{"id": 1, "document": "good", "summary": "ok"}',
        b'{"id": 2, "document": "  ", "summary": ""}',
        b'{"id": 3, "document": "x"}',
        b'{"id": 4, "document": null, "summary": null}',
        b'{"id": 5, "document": "good", "summary": "other"}',
        b'{"id": 1, "document": "another text", "summary": "ok"}',
        b'{"id": 6, "document": "caf\xe9", "summary": "ok"}',
        b'{"id": 7, "document": ["a", "b"], "summary": "ok"}',
        b'{"id": 8, "document": "half \\ud83d", "summary": "ok"}',
        b'{"id": 9, "document": "fine too", "summary": "ok"}',
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    corpus = load_documents(path)
    assert [document.id for document in corpus.documents] == ["1", "9"]
    assert corpus.problems == {"empty": 1, "missing": 2, "duplicate": 2, "undecodable": 2, "not_text": 1}
    assert describe_problems(corpus.problems) == (
        "8 rows left out: 1 empty text, 2 no value, 2 duplicate, 2 not UTF-8, 1 a value that is not text"
    )


def test_a_csv_row_that_is_not_utf8_is_counted_and_its_neighbours_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"document,summary\none,s\ncaf\xe9,s\ntwo,s\n")
    corpus = load_documents(path)
    assert [document.document for document in corpus.documents] == ["one", "two"]
    assert corpus.problems == {"undecodable": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"document": "caf\xe9", "summary": "s"}', r"line 2: bytes that are not UTF-8"),
        (b'{"document": "", "summary": "s"}', r"line 2: an empty text in column 'document'"),
        (b'{"document": "new", "summary": null}', r"line 2: no value in column 'summary'"),
        (b'{"document": "good", "summary": "s"}', r"line 2: the same text as an earlier row"),
        (b'{"id": "a", "document": "new", "summary": "s"}', r"line 2: the same id 'a' as an earlier row"),
        (b'{"document": 7, "summary": "s"}', r"line 2: a int in column 'document', not text"),
    ],
)
def test_a_bad_row_is_an_error_that_names_its_line_where_asked(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "a", "document": "good", "summary": "s"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message + r".*skip"):
        load_documents(path, on_problem="error")
    assert len(load_documents(path)) == 1


def test_a_missing_column_names_the_columns_found(jsonl: Write) -> None:
    path = jsonl([{"id": "1", "document": "x", "headline": "y"}])
    with pytest.raises(DataError, match=r"no column 'summary'; its columns are 'id', 'document', 'headline': name the right ones"):
        load_documents(path)


def test_a_row_without_the_column_is_one_missing_value_where_other_rows_have_it(jsonl: Write) -> None:
    corpus = load_documents(jsonl([{"document": "x"}, {"document": "y", "summary": "s"}]))
    assert [document.document for document in corpus.documents] == ["y"]
    assert corpus.problems == {"missing": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, r"absent\.jsonl: no such file"),
        ("empty.jsonl", b"", r"empty\.jsonl is empty \(0 bytes\)"),
        ("blank.jsonl", b"\n\n", r"no usable document \(it has no rows\)"),
        ("header.csv", b"document,summary\n", r"no usable document \(it has no rows\)"),
        ("bad.jsonl", b'{"document": "x", "summary": "y"}\n{"document": \n', r"line 2 is not valid JSON"),
        ("list.jsonl", b"[1, 2]\n", r"line 1 holds a JSON list, not an object"),
        ("bad.json", b'[{"document": "x"', r"bad\.json is not valid JSON"),
        ("numbers.json", b"[1]", r"item 1 is a JSON int"),
        ("text.txt", b"hello", r"extension '\.txt': documents come as \.jsonl"),
        ("bare", b"hello", r"no extension: documents come as"),
        ("rows.parquet", b"not parquet", r"not a readable Parquet file"),
        ("wide.csv", b"document,summary\nx,y,z\n", r"row ending in line 2 has more fields than the header"),
        ("quote.csv", b'document,summary\n"x,y\n', r"not valid CSV near line 2"),
        ("only_bad.jsonl", b'{"document": " ", "summary": "s"}\n', r"no usable document \(1 row left out: 1 empty text\)"),
    ],
)
def test_what_cannot_be_read_is_said_with_the_file_and_the_reason(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        load_documents(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_text_in_utf16_is_named_as_that(tmp_path: Path, encoding: str, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    text = pd.DataFrame(ROWS).to_csv(index=False) if suffix == "csv" else "\n".join(map(json.dumps, ROWS))
    path.write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match=rf"rows\.{suffix} is text in UTF-16: save it as UTF-8"):
        load_documents(path)


def test_lines_that_end_in_lone_carriage_returns_are_named_as_that(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\r".join(json.dumps(row).encode() for row in ROWS))
    with pytest.raises(DataError, match=r"rows\.jsonl: its lines end in lone carriage returns: save it with line feeds"):
        load_documents(path)


def test_a_slip_in_a_corpus_is_said_without_asking_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "load_dataset", lambda *asked, **named: pytest.fail("the hub was asked"))
    with pytest.raises(DataError, match="'newsrom' is neither a file here nor a known corpus: did you mean newsroom"):
        load_documents("newsrom", split="test")


def test_a_data_set_that_the_hub_does_not_have_may_be_a_file_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(*asked: object, **named: object) -> None:
        raise FileNotFoundError("no such data set")

    monkeypatch.setattr(sources, "load_dataset", absent)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "articles.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"no such data set; did you mean the file articles\.jsonl"):
        load_documents("articles", split="test")


def test_a_folder_and_a_split_of_a_file_are_refused(tmp_path: Path, jsonl: Write) -> None:
    (tmp_path / "x.jsonl").mkdir()
    with pytest.raises(DataError, match="is a folder: name one data file"):
        load_documents(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match="is a file and has no splits"):
        load_documents(jsonl(ROWS), split="train")


def test_the_hub_out_of_reach_is_one_line() -> None:
    with pytest.raises(DataError, match=r"cnn_dailymail:3\.0\.0: no file of this name here, and not to be had from the hub") as raised:
        load_documents("cnn_dailymail:3.0.0", split="test")
    assert "\n" not in str(raised.value)


def test_a_hub_data_set_needs_a_split_and_a_plausible_name() -> None:
    with pytest.raises(DataError, match="is read from the hub, where a data set has splits: say which"):
        load_documents("cnn_dailymail:3.0.0")
    with pytest.raises(DataError, match="neither a data file here nor a hub data set"):
        load_documents("what is this?", split="test")


@pytest.mark.parametrize("columns", [("article", "highlights"), ("dialogue", "summary"), ("document", "summary")])
def test_a_hub_data_sets_known_columns_are_found(monkeypatch: pytest.MonkeyPatch, columns: tuple[str, str]) -> None:
    asked = []

    def load_dataset(path: str, config: str | None, *, split: str) -> list[dict[str, str]]:
        asked.append((path, config, split))
        return [{columns[0]: "Text.", columns[1]: "Short.", "id": "7"}]

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    corpus = load_documents("some/set:1.0", split="test")
    assert corpus.documents == (Document("7", "Text.", "Short."),)
    assert asked == [("some/set", "1.0", "test")]


def test_a_limit_is_the_start_of_a_larger_one_whatever_the_files_order(jsonl: Write) -> None:
    large = texts(load_documents(jsonl(ROWS), limit=30, seed=3))
    small = texts(load_documents(jsonl(ROWS[::-1]), limit=10, seed=3))
    assert large[:10] == small
    assert set(large) < set(TEXTS)
    assert large != TEXTS[:30]
    assert texts(load_documents(jsonl(ROWS), limit=30, seed=4)) != large


def test_a_limit_below_one_is_refused(jsonl: Write) -> None:
    with pytest.raises(DataError, match="limit is 0: ask for at least 1"):
        load_documents(jsonl(ROWS), limit=0)


def test_rows_without_an_id_are_named_by_their_text(jsonl: Write) -> None:
    rows = [{"document": row["document"], "summary": row["summary"]} for row in ROWS]
    forwards, backwards = load_documents(jsonl(rows)), load_documents(jsonl(rows[::-1]))
    assert {document.document: document.id for document in forwards.documents} == {d.document: d.id for d in backwards.documents}
    assert len({document.id for document in forwards.documents}) == len(ROWS)


def test_equal_hashes_mean_equal_texts(jsonl: Write) -> None:
    first = load_documents(jsonl(ROWS))
    assert load_documents(jsonl(ROWS)).hash == first.hash
    changed = [*ROWS[:-1], {**ROWS[-1], "summary": "Another."}]
    assert load_documents(jsonl(changed)).hash != first.hash
    moved = Corpus((Document("a", "bc", "d"),), "x")
    assert moved.hash != Corpus((Document("a", "b", "cd"),), "x").hash


def test_splits_are_disjoint_and_a_larger_training_set_leaves_the_others_alone(jsonl: Write) -> None:
    corpus = load_documents(jsonl(ROWS))
    small = split_corpus(corpus, {"train": 20, "validation": 5, "test": 5}, seed=1)
    large = split_corpus(corpus, {"train": 40, "validation": 5, "test": 5}, seed=1)
    assert list(small) == ["train", "validation", "test"]
    ids = [document.id for part in large.values() for document in part.documents]
    assert len(ids) == len(set(ids)) == 50
    assert texts(small["test"]) == texts(large["test"])
    assert texts(small["validation"]) == texts(large["validation"])
    assert texts(large["train"])[:20] == texts(small["train"])
    assert texts(split_corpus(corpus, {"train": 20}, seed=2)["train"]) != texts(split_corpus(corpus, {"train": 20}, seed=1)["train"])


def test_a_repeated_document_goes_into_one_split_once() -> None:
    twice = Corpus((Document("a", "x", "s"), Document("b", "x", "s"), Document("a", "y", "s"), Document("c", "z", "s")), "made")
    parts = split_corpus(twice, {"train": 1, "test": 1}, seed=0)
    assert {document.document for part in parts.values() for document in part.documents} == {"x", "z"}
    with pytest.raises(DataError, match=r"made has 2 different documents, the splits ask for 3 \(train 2, test 1\)"):
        split_corpus(twice, {"train": 2, "test": 1}, seed=0)
    with pytest.raises(DataError, match="split 'test' is to have 0 documents"):
        split_corpus(twice, {"train": 1, "test": 0}, seed=0)


def test_problems_read_as_a_sentence() -> None:
    assert describe_problems({}) == "no problems"
    assert describe_problems({"empty": 1}) == "1 row left out: 1 empty text"
    assert describe_problems({"empty": 1200, "too_short": 1, "truncated": 3}) == (
        "1,201 rows left out: 1,200 empty text, 1 too short; 3 articles truncated"
    )


def test_real_files_read_whole(shared: Path) -> None:
    corpus = load_documents(shared / "data" / "summarization" / "samsum.validation.jsonl")
    assert len(corpus) + sum(corpus.problems.values()) == 768
    assert len(corpus) > 700
