"""Answers, kept for good: an SQLite file that is only ever added to, keyed by the whole request, so that nothing is paid for twice.

The key is a hash of where the question went, the model, and every parameter; the API key is no part of it and is never stored. Each answer is committed
on its own: what a killed run had received is there for the next. Several runs may use the file at once.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmlite.config import fingerprint
from llmlite.errors import OutputError
from llmlite.storage import telling

__all__ = ["Answers", "Spent", "request_key"]

log = logging.getLogger(__name__)

_TABLE = """
create table if not exists answers (
    key text primary key, teacher text not null, request blob not null, answer blob not null,
    prompt_tokens integer not null, completion_tokens integer not null, asked_by text not null, asked_at text not null default current_timestamp
) without rowid
"""
_FAILED = "create table if not exists failed (key text not null, asked_by text not null, asked_at text not null default current_timestamp)"
_MOVE = (
    "Move it away, or name another folder with answers_cache. Of a damaged file, what is whole can be had again: sqlite3 answers.sqlite .recover | "
    "sqlite3 new.sqlite"
)


@dataclass(frozen=True)
class Spent:
    """What requests have used: how many, tokens read and written."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


def request_key(teacher: str, endpoint: str, body: Mapping[str, Any], sample: int) -> str:
    """The key of a request.

    Args:
        teacher: where it goes: the base URL, or what a served folder holds.
        endpoint: chat or completions.
        body: everything that is sent.
        sample: the same question asked again for another answer.
    """
    return fingerprint(teacher, endpoint, dict(body), sample) + fingerprint(sample, dict(body), endpoint, teacher)


class Answers:
    """The file.

    Args:
        path: made with its folder when it is not there.

    Raises:
        OutputError: it cannot be written, or is no SQLite file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with telling(path, "Name another folder with answers_cache."):
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._using():
            self._database = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._database.execute("pragma journal_mode = wal")
            self._database.execute("pragma synchronous = normal")
            self._database.execute(_TABLE)
            self._database.execute(_FAILED)

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer's body, or None.

        Raises:
            OutputError: the file is damaged there.
        """
        with self._using():
            found = self._database.execute("select answer from answers where key = ?", (key,)).fetchone()
        if found is None:
            return None
        try:
            body: dict[str, Any] = json.loads(zlib.decompress(found[0]))
        except (zlib.error, ValueError, TypeError):
            log.warning("an answer in %s is damaged; the question is asked again", self.path.name)
            with self._using():
                self._database.execute("delete from answers where key = ?", (key,))
            return None
        return body

    def add(self, key: str, teacher: str, request: Mapping[str, Any], answer: Mapping[str, Any], used: Spent, asked_by: str) -> None:
        """Keep an answer. It is on its way to the disk when this returns, and outlives a kill of the process.

        Raises:
            OutputError: the file cannot be written, for instance because the disk is full.
        """
        values = (key, teacher, _packed(request), _packed(answer), used.prompt_tokens, used.completion_tokens, asked_by)
        with self._using():
            self._database.execute(
                "insert or ignore into answers (key, teacher, request, answer, prompt_tokens, completion_tokens, asked_by) values (?, ?, ?, ?, ?, ?, ?)", values
            )

    def add_failed(self, key: str, asked_by: str) -> None:
        """Keep that a request was sent and got no answer, which counts against the budget of the run over all its starts.

        Raises:
            OutputError: as `add`.
        """
        with self._using():
            self._database.execute("insert into failed (key, asked_by) values (?, ?)", (key, asked_by))

    def spent(self, asked_by: str) -> Spent:
        """What one run has used so far, over all its starts; requests without an answer among them.

        Raises:
            OutputError: the file is damaged.
        """
        with self._using():
            answered, read, written = self._database.execute(
                "select count(*), coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0) from answers where asked_by = ?", (asked_by,)
            ).fetchone()
            failed = self._database.execute("select count(*) from failed where asked_by = ?", (asked_by,)).fetchone()[0]
        try:
            return Spent(int(answered) + int(failed), int(read), int(written))
        except ValueError as error:
            raise OutputError(f"cache: {self.path} is damaged ({error}). {_MOVE}") from None

    def __len__(self) -> int:
        with self._using():
            return int(self._database.execute("select count(*) from answers").fetchone()[0])

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Turn SQLite's errors into one that says which file it is. It is left as it is: what is whole in it was paid for."""
        try:
            yield
        except (sqlite3.Error, sqlite3.Warning) as error:
            full = "Free some space, or name another folder with answers_cache." if "full" in str(error) else _MOVE
            raise OutputError(f"cache: {self.path} cannot be used ({error}). {full}") from None

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def _packed(value: Mapping[str, Any]) -> bytes:
    return zlib.compress(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass"))
