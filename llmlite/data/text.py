"""Rows to train, calibrate and test on: from a file, a folder, the Hub, or the documentation inside the interpreter.

`check_source` looks without loading: seconds, no tokenizer, no torch, so a misspelt column is found before the weights load.
`read_splits` reads everything once and shares it out. A row is one of three kinds, see `llmlite.data.columns`.
"""

from __future__ import annotations

import difflib
import itertools
import logging
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmlite.config import shorten
from llmlite.data.builtin import PYTHON_DOCS, PYTHON_DOCS_PROSE, python_docs
from llmlite.data.columns import ColumnNames, Kind, find_columns, normalise
from llmlite.data.files import SUFFIXES, data_suffix, read_file
from llmlite.data.hub import check_hub, hub_splits, saved_splits
from llmlite.data.split import SPLITS, Split, row_key, split_by_content
from llmlite.errors import DataError
from llmlite.paths import path_problem

__all__ = ["Rows", "SourceCheck", "check_source", "read_rows", "read_splits"]

log = logging.getLogger(__name__)

_BUILTIN = (PYTHON_DOCS, PYTHON_DOCS_PROSE)
_SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "calibration": ("calibration", "calib"),
    "test": ("test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev"),
}
_HUB_ID = 96  # characters of the longest
_FIRST_ROWS = 20  # that check_source looks at in each file

# What is named, and its records: ("chat.jsonl line 3", {"prompt": ...})
_Records = Iterator[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Rows:
    """Rows of one kind, ready for a tokenizer.

    Attributes:
        kind: text, pair (prompt and completion) or chat.
        rows: ``{"text"}``, ``{"prompt", "completion", "system"?}`` or ``{"messages"}`` each.
        places: where each row came from, for messages, for instance ``chat.jsonl line 3``.
        source: as the caller wrote it.
        split: which share this is; None for everything.
        columns: how the columns were understood, in words.
        read: rows read from this share of the source, blank ones included.
        blank: left out because there was nothing to read or to learn.
        duplicates: left out of the test because training or an earlier test row holds the same.
    """

    kind: Kind
    rows: Sequence[dict[str, Any]]
    places: Sequence[str]
    source: str
    split: Split | None
    columns: str
    read: int
    blank: int = 0
    duplicates: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Iterable[int]) -> Rows:
        """These rows, in this order; the counts stay those of the whole."""
        chosen = list(indices)
        return replace(self, rows=[self.rows[index] for index in chosen], places=[self.places[index] for index in chosen])

    def sample(self, count: int, seed: int = 0) -> Rows:
        """`count` rows drawn without repetition (all of them if there are fewer), in their original order."""
        return self if count >= len(self) else self.take(sorted(random.Random(seed).sample(range(len(self)), count)))

    def without(self, *others: Rows) -> Rows:
        """A test set cleaned: no row of `others`, and each row once. Use it when train and test come from two sources."""
        seen = {row_key(row) for other in others for row in other.rows}
        keep = []
        for index, row in enumerate(self.rows):
            key = row_key(row)
            if key not in seen:
                seen.add(key)
                keep.append(index)
        return replace(self.take(keep), duplicates=self.duplicates + len(self) - len(keep))


@dataclass(frozen=True)
class SourceCheck:
    """What a look at the first rows showed. `kind` and `columns` are None for a Hub id, which is read later."""

    source: str
    kind: Kind | None
    columns: str | None


def check_source(
    source: str | Path,
    *,
    text_column: str | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    messages_column: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
) -> SourceCheck:
    """Look at a source without loading it: it exists, is readable and not empty, its first rows are usable.

    A Hub id is asked for once, with a short timeout, unless it is in the cache.

    Raises:
        DataError: what is wrong, where, and what to try.
    """
    names = ColumnNames(text_column, prompt_column, completion_column, messages_column)
    place = _locate(source)
    if place == "hub":
        check_hub(str(source), revision)
        return SourceCheck(str(source), None, None)
    if place == "builtin":
        return SourceCheck(str(source), "pair" if str(source) == PYTHON_DOCS else "text", "prompt, completion" if str(source) == PYTHON_DOCS else "text")
    seen: list[Rows] = []
    for records in _piles(source, place, config_name, revision, first=_FIRST_ROWS).values():
        rows = _understood(records, names, str(source), None)
        if rows.rows:
            seen.append(rows)
    if not seen:
        raise DataError(f"{source}: no usable row among the first {_FIRST_ROWS}; they are blank, or have nothing to learn from.")
    return SourceCheck(str(source), seen[0].kind, seen[0].columns)


def read_rows(source: str | Path, split: Split | None = "train", **options: Any) -> Rows:
    """One share of a source, or everything with ``split=None``; options as in `read_splits`."""
    if split is not None:
        return read_splits(source, **options)[split]
    return _read_all(source, **options)


def read_splits(
    source: str | Path,
    *,
    text_column: str | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    messages_column: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    calibration_fraction: float | None = None,
    test_fraction: float | None = None,
) -> dict[Split, Rows]:
    """Read a source and share it out into train, calibration and test, which never overlap.

    Splits the source has itself (a folder with train.jsonl and test.jsonl, a Hub data set with a validation split) are taken as they
    are; what is missing is cut from the training rows by a hash of their content. Rows of the test that training or calibration also
    holds, and repeated ones, are dropped from the test and counted.

    Args:
        source: Hub id, file (JSON, JSONL, Parquet, CSV, TSV, TXT), folder, `builtin:python-docs` or `builtin:python-docs-prose`.
        text_column, prompt_column, completion_column, messages_column: name the columns outright when their names are unusual.
        config_name: the configuration of a Hub data set that has several.
        revision: branch, tag or commit on the Hub.
        calibration_fraction, test_fraction: 0.05 each by default; 0.2 and 0.1 of the builtin text. With 0 the calibration rows are the
            training rows, and the test is empty.

    Raises:
        DataError: see `check_source`; all messages name the file and the line or row.
    """
    names = ColumnNames(text_column, prompt_column, completion_column, messages_column)
    builtin = str(source) in _BUILTIN
    calibration_share = calibration_fraction if calibration_fraction is not None else (0.2 if builtin else 0.05)
    test_share = test_fraction if test_fraction is not None else (0.1 if builtin else 0.05)
    if not (calibration_share >= 0 and test_share >= 0 and calibration_share + test_share < 1):
        raise DataError(f"{source}: calibration_fraction={calibration_share} and test_fraction={test_share} want to be at least 0 and together below 1.")
    piles = {split: _understood(records, names, str(source), split) for split, records in _piles(source, _locate(source), config_name, revision).items()}
    if len(kinds := {rows.kind for rows in piles.values() if len(rows)}) > 1:
        raise DataError(f"{source}: its splits are of different kinds ({', '.join(sorted(kinds))}). Name one of its files.")
    if not (pile := piles["train"]).rows:
        raise DataError(f"{source}: {_nothing_in(pile)}.")
    shares = split_by_content(
        [row_key(row) for row in pile.rows], 0.0 if "calibration" in piles else calibration_share, 0.0 if "test" in piles else test_share, str(source)
    )
    train = replace(pile.take(shares["train"]), split="train")
    calibration = piles.get("calibration") or pile.take(shares["calibration"] or shares["train"])
    test = (piles.get("test") or pile.take(shares["test"])).without(train, calibration)
    return {"train": train, "calibration": replace(calibration, split="calibration"), "test": replace(test, split="test")}


def _nothing_in(rows: Rows) -> str:
    read = "the only row is blank or has" if rows.read == 1 else f"all {rows.read:,} rows are blank or have"
    return f"{read} nothing to learn from ({rows.columns})"


def _read_all(source: str | Path, *, config_name: str | None = None, revision: str | None = None, **columns: str | None) -> Rows:
    records = itertools.chain.from_iterable(_piles(source, _locate(source), config_name, revision).values())
    rows = _understood(records, ColumnNames(**columns), str(source), None)
    if not rows.rows:
        raise DataError(f"{source}: {_nothing_in(rows)}.")
    return rows


def _locate(source: str | Path) -> str:
    """builtin, file, folder, saved (by `datasets`) or hub; an error for a path that is not there."""
    written = str(source)
    if problem := path_problem(source):
        raise DataError(f"data: {shorten(repr(written))} should {problem}.")
    if written.startswith("builtin:"):
        if written in _BUILTIN:
            return "builtin"
        near = difflib.get_close_matches(written, _BUILTIN, n=1, cutoff=0.4)
        raise DataError(f"no builtin data '{written}'. {f'Did you mean {near[0]!r}?' if near else 'There is ' + ' and '.join(_BUILTIN) + '.'}")
    path = Path(source).expanduser()
    if path.is_dir():
        return "saved" if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file() else "folder"
    if path.exists():
        return "file"
    looks_like_id = len(written) <= _HUB_ID and re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", written) and not isinstance(source, Path)
    if not looks_like_id or data_suffix(path) or ("/" in written and path.parent.is_dir()):
        raise DataError(f"no file or folder {written}.{_near_names(path)}")
    return "hub"


def _near_names(path: Path) -> str:
    if not path.parent.is_dir():
        return f" There is no folder {path.parent} either."
    names = sorted(entry.name for entry in itertools.islice(path.parent.iterdir(), 2000))
    near = difflib.get_close_matches(path.name, names, n=3)
    if near:
        return f" Did you mean {' or '.join(str(path.parent / name) for name in near)}?"
    data = [name for name in names if data_suffix(Path(name))][:5]
    return f" Data files there: {', '.join(data)}." if data else f" {path.parent.resolve()} holds no data files."


def _piles(source: str | Path, place: str, config_name: str | None, revision: str | None, first: int | None = None) -> dict[Split, _Records]:
    """The records of each split the source has; "train" is always there and holds everything that belongs to no split."""
    if place == "builtin":
        docs = python_docs()
        if str(source) == PYTHON_DOCS:
            rows = [(f"{source} pair {number}", {"prompt": question, "completion": answer}) for number, (question, answer) in enumerate(docs.pairs, 1)]
        else:
            rows = [(f"{source} block {number}", {"text": text}) for number, text in enumerate(docs.prose, 1)]
        return {"train": iter(rows[:first])}
    path = Path(source).expanduser()
    if place == "file":
        return {"train": _file_records([path], first)}
    if place == "folder":
        return {split: _file_records(files, first) for split, files in _folder_files(path).items()}
    found = saved_splits(path) if place == "saved" else hub_splits(str(source), config_name, revision)
    piles: dict[Split, _Records] = {}
    for split, chosen in _assign(list(found)).items():
        piles[split] = itertools.chain.from_iterable(
            ((f"{source} {name} row {number}", dict(record)) for number, record in enumerate(itertools.islice(found[name], first), 1)) for name in chosen
        )
    return piles


def _file_records(files: Sequence[Path], first: int | None) -> _Records:
    for file in files:
        unit = "row" if data_suffix(file) in (".json", ".parquet") else "line"
        for number, record in itertools.islice(read_file(file), first):
            yield f"{file} {unit} {number}", record


def _folder_files(folder: Path) -> dict[Split, list[Path]]:
    """The data files of a folder and one level below, by the split their name (or their folder's) speaks of."""
    files = sorted(path for path in [*folder.glob("*"), *folder.glob("*/*")] if path.is_file() and data_suffix(path) and path.name[0] not in "._")
    structured = [path for path in files if data_suffix(path) not in (".txt", ".md", ".text")]
    files = structured or files  # a README.md beside train.jsonl is no data
    if not files:
        raise DataError(f"{folder} holds no data file; understood are {', '.join(SUFFIXES)}, each also with .gz.")
    by_name = {str(path.relative_to(folder)): path for path in files}
    return {split: [by_name[name] for name in names] for split, names in _assign(list(by_name)).items()}


def _assign(names: Sequence[str]) -> dict[Split, list[str]]:
    """Names of files or splits -> train, calibration, test. Of several kinds of test (test, validation) only the first is used."""
    words = {name: re.split(r"[^a-z]+", name.lower()) for name in names}
    assigned: dict[Split, list[str]] = {}
    spoken_for: set[str] = set()
    for split in SPLITS:
        for alias in _SPLIT_NAMES[split]:
            matching = [name for name in names if alias in words[name]]
            if matching and split not in assigned:
                assigned[split] = matching
            spoken_for |= set(matching)
    rest = [name for name in names if name not in spoken_for]
    if "train" not in assigned:
        # Only test files, or files that speak of no split at all: everything is one pile.
        return {**assigned, "train": rest} if rest else {"train": list(names)}
    if rest:
        log.warning("%s: not read, since others are named as training data.", ", ".join(rest))
    return assigned


def _understood(records: _Records, names: ColumnNames, source: str, split: Split | None) -> Rows:
    """Find the columns on the first record, then bring every record into the toolkit's form."""
    first = next(records, None)
    if first is None:
        raise DataError(f"{source} has no rows{f' for {split}' if split not in (None, 'train') else ''}: only blank lines, or a header alone.")
    # JSON Lines may leave a key out in a row: look at a few before deciding.
    ahead = [first, *itertools.islice(records, _FIRST_ROWS - 1)]
    columns = find_columns(list(dict.fromkeys(name for _, record in ahead for name in record)), names, first[0].rpartition(" ")[0].rpartition(" ")[0])
    used = {name for name in (columns.text, columns.prompt, columns.completion, columns.messages) if name}
    rows, places, read, first_blank = [], [], 0, ""
    for place, record in itertools.chain(ahead, records):
        read += 1
        if absent := used - record.keys():
            raise DataError(f"{place} has no column {', '.join(repr(name) for name in sorted(absent))}, which the first rows have.")
        row = normalise(record, columns, place)
        if row is None:
            first_blank = first_blank or place
        else:
            rows.append(row)
            places.append(place)
    if blank := read - len(rows):
        verbs = ("is blank or has", "was") if blank == 1 else ("are blank or have", "were")
        log.warning("%s: %d of %d rows %s nothing to learn from and %s left out; the first is %s.", source, blank, read, *verbs, first_blank)
    return Rows(columns.kind, rows, places, source, split, str(columns), read, blank)
