r"""Raw rows of a data file or hub data set, before anybody judges what they say.

Each reader yields `Row`s in file order: the place a person can look up (line or row number) and the columns as found, or `None` where the
bytes are not UTF-8. Lines end at `\n` (or `\\r\n`) only: the Unicode separators that `str.splitlines` also splits at are ordinary text inside
JSON. A CSV row may span lines inside quotes. What is not the format it claims to be raises `DataError` with the place.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import load_dataset

from mechscope.choices import CORPORA
from mechscope.errors import DataError
from mechscope.store.paths import absent, data_file_like, is_path, nearest

HUB_COLUMNS = (("article", "highlights"), ("dialogue", "summary"), ("document", "summary"))  # CNN/DailyMail; SAMSum, DialogSum; XSum
HUB_ID = re.compile(r"(?P<path>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.+-]+))?")
LONGEST_FIELD = 2**31 - 1  # csv refuses fields over 131,072 characters by default; long documents are what this is for


@dataclass(frozen=True)
class Row:
    """One row as found: where it stands, and its columns (`None` where its bytes are not UTF-8)."""

    place: str
    values: dict[str, Any] | None


def is_file_source(source: str) -> bool:
    """Tell whether a source names a file (there or not) rather than a hub data set or the newsroom."""
    if source.partition(":")[0] == "newsroom" and not Path(source).exists():
        return False
    return Path(source).expanduser().exists() or is_path(source)


def file_rows(path: Path) -> Iterator[Row]:
    """Read the rows of a JSONL, JSON, CSV or Parquet file, by its extension.

    Raises:
        DataError: the file is absent, unreadable, empty, of another extension, or not what its extension says.
    """
    readers = {".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        ending = f"extension {path.suffix!r}" if path.suffix else "no extension"
        raise DataError(f"{path}: {ending}: documents come as {', '.join(readers)}; convert the file or rename it")
    if path.is_dir():
        raise DataError(f"{path} is a folder: name one data file ({', '.join(readers)})")
    if not path.exists():
        raise DataError(f"{path}: {absent(str(path)) or 'no such file'}; check the path")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty (0 bytes): one row per document is needed")
        if reader is not _parquet_rows and _is_utf16(path):
            raise DataError(f"{path} is text in UTF-16: save it as UTF-8 (in an editor or by iconv -f UTF-16 -t UTF-8)")
        yield from reader(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def hub_rows(source: str, split: str | None) -> Iterator[Row]:
    """Read the rows of a hub data set, `"cnn_dailymail:3.0.0"` being data set and configuration.

    Raises:
        DataError: no split was named, or the hub is out of reach or does not have this data set, configuration or split.
    """
    match = HUB_ID.fullmatch(source)
    if match is None:
        raise DataError(f"{source!r} is neither a data file here nor a hub data set (written like cnn_dailymail:3.0.0): check the path")
    if close := nearest(source, CORPORA):
        # no data set on the hub is called so: those of one word are the few from before owners stood in names
        raise DataError(f"{source!r} is neither a file here nor a known corpus: did you mean {close}?")
    if split is None:
        raise DataError(f'{source} is read from the hub, where a data set has splits: say which (for example split="validation")')
    try:
        rows = load_dataset(match["path"], match["config"], split=split)
    except Exception as error:  # the hub client fails in dozens of ways: each means that there are no documents
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = f"; did you mean the file {file}?" if (file := data_file_like(source)) else ""
        raise DataError(f"{source}: no file of this name here, and not to be had from the hub: {reason}{hint}") from error
    for number, values in enumerate(rows, start=1):
        yield Row(f"row {number:,}", dict(values))


def _is_utf16(path: Path) -> bool:
    """Tell whether a file begins as UTF-16 does: by its mark, or with a character of which one byte is zero, which no text in UTF-8 has."""
    with path.open("rb") as file:
        start = file.read(2)
    return start in (b"\xff\xfe", b"\xfe\xff") or (len(start) == 2 and 0 in start and start != b"\0\0")


def _decode(line: bytes) -> str | None:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:  # a binary file is split at b"\n" alone, which never stands inside a UTF-8 character
        for number, line in enumerate(lines, start=1):
            text = _decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            if text is None:
                yield Row(f"line {number:,}", None)
            elif text.strip():
                yield Row(f"line {number:,}", _object(path, number, text))


def _object(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        if "}\r" in text.rstrip():
            raise DataError(f"{path}: its lines end in lone carriage returns: save it with line feeds (tr '\\r' '\\n')") from error
        raise DataError(f"{path}: line {number:,} is not valid JSON ({error}): one object per line is needed") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: line {number:,} holds a JSON {type(value).__name__}, not an object with named columns")
    return value


def _json_rows(path: Path) -> Iterator[Row]:
    """Read a `.json` file, which may hold one array of objects or, as often, JSON lines."""
    text = _decode(path.read_bytes())
    if text is None or not text.removeprefix("\ufeff").lstrip().startswith("["):
        yield from _jsonl_rows(path)
        return
    try:
        values = json.loads(text.removeprefix("\ufeff"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error})") from error
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise DataError(f"{path}: item {number:,} is a JSON {type(value).__name__}, not an object with named columns")
        yield Row(f"item {number:,}", value)


def _csv_rows(path: Path) -> Iterator[Row]:
    # bytes that are not UTF-8 become lone surrogates, so that one bad row does not end the reading
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    previous = csv.field_size_limit(LONGEST_FIELD)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        for values in reader:
            place = f"row ending in line {reader.line_num:,}"
            if None in values:
                raise DataError(f"{path}: {place} has more fields than the header: quote texts that contain commas")
            broken = any(re.search("[\udc80-\udcff]", value) for value in values.values() if value)
            yield Row(place, None if broken else dict(values))
    except csv.Error as error:
        raise DataError(f"{path} is not valid CSV near line {reader.reader.line_num:,}: {error}") from error
    finally:
        csv.field_size_limit(previous)


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        table = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield Row(f"row {number:,}", values)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
