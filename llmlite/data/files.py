"""Reading records out of files, each with the line or row it came from, so that every later complaint can name it.

JSON Lines, JSON, CSV, TSV, Parquet and plain text; `.gz` of any of them. Reading is strict: text that is not UTF-8, a broken JSON line
or a CSV row with a field too many stops with its number, since skipping it would hide that the file is not what its owner believes.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmlite.config import shorten
from llmlite.errors import DataError, counted, first_line

__all__ = ["SUFFIXES", "Record", "data_suffix", "no_json", "read_file"]

Record = tuple[int, dict[str, Any]]  # the line (JSONL, CSV, TXT) or row (JSON, Parquet) counted from 1, and its columns

_TEXT_BLOCK = 4000  # characters of a plain text file that make one row, about 1,000 tokens
_WRAPPERS = ("data", "rows", "examples", "instances", "train")


def data_suffix(path: Path) -> str | None:
    """The kind of a data file by its name (`.jsonl` for ``a.jsonl.gz``), or None if it is no data file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else None


def read_file(path: Path) -> Iterator[Record]:
    """The records of one file, blank lines left out.

    Raises:
        DataError: an empty, unreadable or malformed file, an unknown suffix. Raised while iterating, so reading the first rows is cheap
            for JSON Lines, CSV and Parquet.
    """
    suffix = data_suffix(path)
    if suffix is None:
        raise DataError(f"{path}: unknown kind of file '{path.suffix}'; understood are {', '.join(SUFFIXES)}, each also with .gz.")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty (0 bytes).")
        yield from _READERS[suffix](path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: broken gzip file ({error}). Fetch or compress it again.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _decode(raw: bytes, path: Path, first_line: int = 1) -> str:
    """UTF-8 with or without a byte order mark; the error names the line."""
    if first_line == 1:
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{path} is UTF-16; wanted UTF-8. Convert it, for instance with `iconv -f UTF-16 -t UTF-8`.")
        raw = raw.removeprefix(b"\xef\xbb\xbf")
    if (place := raw.find(b"\0")) >= 0:  # also in UTF-16 without a mark, which would pass for UTF-8 where it is English
        line = first_line + raw.count(b"\n", 0, place)
        raise DataError(f"{path} line {line} holds a NUL byte, which text does not: UTF-16 (`iconv -f UTF-16LE -t UTF-8` converts it), or no text file?")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise DataError(
            f"{path} line {line}, byte {column}: 0x{raw[error.start]:02x} is not UTF-8. "
            "Convert the file, for instance with `iconv -f WINDOWS-1252 -t UTF-8` (CP949 for Korean), or cut the line out."
        ) from None


def _read_jsonl(path: Path) -> Iterator[Record]:
    with _open(path) as file:
        yield from _json_lines(file, path)


def _json_lines(lines: Iterator[bytes] | io.BufferedIOBase, path: Path) -> Iterator[Record]:
    for number, raw in enumerate(lines, 1):
        line = _decode(raw, path, number).strip()
        if line:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                raise DataError(f"{path} line {number}{column}: {no_json(error)}; wanted one JSON object a line. The line starts {line[:60]!r}.") from None
            yield number, _object(value, f"{path} line {number}")


def no_json(error: ValueError | RecursionError) -> str:
    """Why `json.loads` could not read a text, as a phrase without its place."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deeply" if isinstance(error, RecursionError) else "a number with too many digits"


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{where} is a {type(value).__name__}; wanted a JSON object such as {{"prompt": ..., "completion": ...}}.')
    return value


def _read_json(path: Path) -> Iterator[Record]:
    """A list of objects, such a list under one key ("data", "rows", ...), an object of columns, or JSON Lines under another name."""
    with _open(path) as file:
        raw = file.read()
    text = _decode(raw, path)
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _json_lines(io.BytesIO(raw), path)
            return
        raise DataError(f"{path} line {error.lineno}, column {error.colno}: {error.msg}; wanted JSON.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {no_json(error)}; wanted JSON.") from None
    if isinstance(value, dict):
        wrapped = [value[key] for key in _WRAPPERS if isinstance(value.get(key), list)]
        lengths = {len(column) if isinstance(column, list) else None for column in value.values()}
        if wrapped and all(isinstance(item, dict) for item in wrapped[0]):
            value = wrapped[0]
        elif len(lengths) == 1 and None not in lengths:
            value = [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
        else:
            value = [value]
    if not isinstance(value, list):
        raise DataError(f"{path} holds a {type(value).__name__}; wanted a list of JSON objects.")
    for number, item in enumerate(value, 1):
        yield number, _object(item, f"{path} row {number}")


def _read_csv(path: Path) -> Iterator[Record]:
    with _open(path) as file:
        text = _decode(file.read(), path)
    first_line = text.lstrip().partition("\n")[0]
    delimiter = "\t" if data_suffix(path) == ".tsv" else max(",;\t", key=first_line.count)
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # 128 kB by default, a long document
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = next((row for row in reader if any(cell.strip() for cell in row)), [])
        if twice := next((name for place, name in enumerate(header) if name.strip() and name in header[:place]), None):
            raise DataError(f"{path} line {reader.line_num}: the column {shorten(repr(twice))} is there twice; rename one, or take it out.")
        start = reader.line_num + 1
        for cells in reader:
            line, start = start, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path} line {line}: {counted(len(cells), 'field')}, but the header has {len(header)}. "
                    "A comma, quote or line break inside a field wants quotes around the field."
                )
            # pandas writes its index as a column without a name
            yield line, {name: cell for name, cell in zip(header, cells, strict=True) if name.strip() and not name.startswith("Unnamed:")}
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: {error}. Is a quote left open?") from None
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _open(path) as file:
            source = pa.BufferReader(file.read()) if path.suffix.lower() == ".gz" else path
        number = 0
        with pq.ParquetFile(source) as table:
            names = [name for name in table.schema_arrow.names if not name.startswith("__index_level_")]
            for batch in table.iter_batches(batch_size=256, columns=names):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{path} is no readable Parquet file: {first_line(error)}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} row {number + 1} or later: a string that is not UTF-8.") from None


def _read_text(path: Path) -> Iterator[Record]:
    """Consecutive paragraphs, joined until about 4,000 characters; a longer paragraph is cut between lines."""
    with _open(path) as file:
        text = _decode(file.read(), path).replace("\r\n", "\n").replace("\r", "\n")
    block, block_line, line = "", 1, 1
    for unit in _paragraphs(text):
        if block.strip() and len(block) + len(unit) > _TEXT_BLOCK:
            yield block_line, {"text": block.strip("\n")}
            block = ""
        if not block.strip():
            block, block_line = "", line
        block += unit
        line += unit.count("\n")
    if block.strip():
        yield block_line, {"text": block.strip("\n")}


def _paragraphs(text: str) -> Iterator[str]:
    """The text cut after blank lines, and between lines where a paragraph is overlong; together they are the whole text."""
    unit, ended = "", False
    for line in io.StringIO(text):
        blank = not line.strip()
        if unit and not blank and (ended or len(unit) > _TEXT_BLOCK):
            yield unit
            unit = ""
        unit += line
        ended = blank
    if unit:
        yield unit


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv,
    ".parquet": _read_parquet, ".txt": _read_text, ".md": _read_text, ".text": _read_text,
}  # fmt: skip
SUFFIXES = tuple(_READERS)
