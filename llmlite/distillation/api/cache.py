"""Answers, kept for good: an SQLite file that is only ever added to, keyed by the whole request, so that nothing is paid for twice.

The key is a hash of where the question went, the model, and every parameter; the API key is no part of it and is never stored. Each answer is committed
on its own: what a killed run had received is there for the next. Several runs may use the file at once.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import zlib
from collections.abc import Mapping
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
        with telling(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._database.execute("pragma journal_mode = wal")
            self._database.execute("pragma synchronous = normal")
            self._database.execute(_TABLE)
        except sqlite3.DatabaseError as error:
            raise OutputError(f"cache: {path} cannot be used ({error}). Move it away, or name another folder with cache.") from None

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer's body, or None."""
        found = self._database.execute("select answer from answers where key = ?", (key,)).fetchone()
        if found is None:
            return None
        try:
            body: dict[str, Any] = json.loads(zlib.decompress(found[0]))
        except (zlib.error, ValueError):
            log.warning("an answer in %s is damaged; the question is asked again", self.path.name)
            self._database.execute("delete from answers where key = ?", (key,))
            return None
        return body

    def add(self, key: str, teacher: str, request: Mapping[str, Any], answer: Mapping[str, Any], used: Spent, asked_by: str) -> None:
        """Keep an answer. It is on its way to the disk when this returns, and outlives a kill of the process.

        Raises:
            OutputError: the file cannot be written, for instance because the disk is full.
        """
        values = (key, teacher, _packed(request), _packed(answer), used.prompt_tokens, used.completion_tokens, asked_by)
        try:
            self._database.execute(
                "insert or ignore into answers (key, teacher, request, answer, prompt_tokens, completion_tokens, asked_by) values (?, ?, ?, ?, ?, ?, ?)", values
            )
        except sqlite3.Error as error:
            raise OutputError(f"cache: {self.path} cannot be written ({error}). Free some space, or name another folder with cache.") from None

    def spent(self, asked_by: str) -> Spent:
        """What one run has used so far, over all its starts."""
        found = self._database.execute(
            "select count(*), coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0) from answers where asked_by = ?", (asked_by,)
        ).fetchone()
        return Spent(*map(int, found))

    def __len__(self) -> int:
        return int(self._database.execute("select count(*) from answers").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def _packed(value: Mapping[str, Any]) -> bytes:
    return zlib.compress(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass"))
