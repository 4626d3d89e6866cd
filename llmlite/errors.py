"""The errors a user can cause or meet, one small tree.

Each message says what was wrong, where, the value got, the value wanted and what to try next. Everything in this tree ends the command
line with one message and `exit_code`, never with a traceback; anything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "ApiError",
    "ConfigError",
    "DataError",
    "GateFailed",
    "HubError",
    "Interrupted",
    "LlmliteError",
    "LoadError",
    "OutputError",
    "PushFailed",
    "ResourceError",
    "RunError",
    "UnsupportedModel",
    "counted",
    "first_line",
]


def counted(number: int | str, one: str, many: str | None = None) -> str:
    """A number and what it counts, as a message says it: 1 row, 2 rows, 1,000 rows.

    Args:
        number: how many there are, or a mark where nobody knows.
        one: what one of them is called, with its verb where there is one (``row is``).
        many: what several are called, where it is not `one` with an s (``rows are``).
    """
    shown = f"{number:,}" if isinstance(number, int) else number
    return f"{shown} {one if number == 1 else many or one + 's'}"


def first_line(error: BaseException) -> str:
    """What an error of a library says first, to be quoted in a message of ours; its class where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class LlmliteError(Exception):
    """Root of the tree. `str(error)` is the whole message, ready to be read by a person."""

    exit_code = 2


class ConfigError(LlmliteError):
    """A setting that cannot work. Carries every problem found, not only the first.

    Args:
        where: the file or call in which the problems stand, for instance ``recipes/mine.yaml``.
        problems: one complete sentence or more for each problem.
    """

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.where = where
        self.problems = tuple(problems)
        super().__init__("\n".join([f"{where} has {counted(len(self.problems), 'problem')}", *(f"  {problem}" for problem in self.problems)]))


class UnsupportedModel(LlmliteError):
    """An architecture, or one combination of architecture and method, that cannot give a stock checkpoint."""


class DataError(LlmliteError):
    """Data that cannot be read or cannot be used as asked."""


class LoadError(LlmliteError):
    """A model, tokenizer or adapter that is missing, broken or unsafe to load."""


class HubError(LlmliteError):
    """The Hub refuses, or the place asked for is not one to upload to. Nothing was sent.

    Args:
        message: the whole message.
        status: the Hub's HTTP status, where it answered.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        self.status = status
        super().__init__(message)


class ApiError(LlmliteError):
    """A teacher behind an API that refuses, cannot be reached, or does not return what the recipe needs. What was answered before is kept."""


class OutputError(LlmliteError):
    """An output folder that is in use, holds something else, or cannot be written."""


class ResourceError(LlmliteError):
    """Not enough disk or memory for what the plan needs."""


class RunError(LlmliteError):
    """A run that started and could not end well, for instance a saved folder whose reload gives other logits."""

    exit_code = 1


class PushFailed(RunError):
    """An upload that did not end well. The folder is untouched; the message ends with the command that continues."""


class GateFailed(RunError):
    """A quality gate was crossed. The last good checkpoint stays."""

    exit_code = 3


class Interrupted(LlmliteError):
    """Ctrl-C or SIGTERM, after everything worth keeping was written."""

    exit_code = 130
