"""What the teacher is asked, and what row of training data its answer makes.

A question becomes a request of one of two endpoints: messages for `chat`, plain text for `completions`. Of a chat everything before the last answer is
asked; of plain text the first half, which the teacher continues; of a file with prompts alone each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmlite.data.columns import ColumnNames, find_columns, normalise
from llmlite.data.files import data_suffix, read_file
from llmlite.data.text import Rows, read_rows
from llmlite.distillation.api.client import Endpoint
from llmlite.errors import DataError

__all__ = ["Question", "questions_of", "read_prompts"]

_PROMPT = ("prompt", "instruction", "question", "query", "problem", "user", "q", "input", "text", "content")
_MESSAGES = ("messages", "conversations", "conversation", "chat", "dialogue")


@dataclass(frozen=True)
class Question:
    """One thing to ask.

    Attributes:
        asked: the messages (chat) or the text (completions), as the API takes them.
        row: the row without its answer: prompt and system, messages, or the text so far.
        expected: the answer that the data holds, for scoring; empty when there is none.
        place: where it comes from, for messages.
        room: tokens of an answer that the teacher has positions for, where its server would not stop there; None where that sets no limit.
    """

    asked: list[dict[str, Any]] | str
    row: dict[str, Any]
    expected: str
    place: str
    room: int | None = None

    @property
    def endpoint(self) -> Endpoint:
        """Where it is asked."""
        return "completions" if isinstance(self.asked, str) else "chat"

    def answered(self, answer: str) -> dict[str, Any]:
        """The row of training data."""
        if "messages" in self.row:
            return {"messages": [*self.row["messages"], {"role": "assistant", "content": answer}]}
        if "prompt" in self.row:
            return {**self.row, "completion": answer}
        return {"text": self.row["text"] + answer}


def questions_of(rows: Rows, endpoint: Literal["auto", "chat", "completions"] = "auto") -> list[Question]:
    """The questions in rows of any kind, in their order, each once.

    Args:
        rows: as `read_rows` gives them.
        endpoint: auto asks plain text by `completions` and everything else by `chat`.

    Raises:
        DataError: chats for an endpoint that takes plain text, or plain text for one that takes chats.
    """
    found: dict[str, Question] = {}
    for row, place in zip(rows.rows, rows.places, strict=True):
        question = _question(row, place, endpoint)
        found.setdefault(repr(question.asked), question)
    return list(found.values())


def _question(row: Mapping[str, Any], place: str, endpoint: str) -> Question:
    if "text" in row:
        if endpoint == "chat":
            raise DataError(f"{place} is plain text, which has no question for endpoint=chat. Use endpoint: completions, or give prompts: a file with prompts.")
        half = _half(row["text"])
        return Question(half, {"text": half}, row["text"][len(half) :], place)
    if "messages" in row:
        if endpoint == "completions":
            raise DataError(f"{place} is a chat; endpoint=completions takes prompts and plain text. Use endpoint: chat.")
        last = max(index for index, message in enumerate(row["messages"]) if message["role"] == "assistant")
        before = [dict(message) for message in row["messages"][:last]]
        if not any(message["role"] == "user" for message in before):
            raise DataError(f"{place}: nothing is asked before the answer.")
        return Question(before, {"messages": before}, str(row["messages"][last]["content"]), place)
    system = str(row.get("system") or "")
    kept = {"prompt": row["prompt"]} | ({"system": system} if system else {})
    if endpoint == "completions":
        return Question(f"{system}\n\n{row['prompt']}\n\n".lstrip(), kept, row["completion"], place)
    messages = [{"role": "system", "content": system}] if system else []
    return Question([*messages, {"role": "user", "content": row["prompt"]}], kept, row["completion"], place)


def _half(text: str) -> str:
    """The first half, up to the end of a word."""
    middle = len(text) // 2
    blank = text.find(" ", middle)
    return text[: blank if 0 < blank < len(text) - 1 else middle]


def read_prompts(source: str, *, first: int | None = None) -> Rows:
    """Prompts without answers: a JSON, JSONL, CSV, Parquet or TXT file, or any source that training data can come from.

    Args:
        source: the file, or what `read_rows` takes.
        first: look at so many only.

    Raises:
        DataError: no such file, or no prompt in it.
    """
    path = Path(source).expanduser()
    if not path.is_file() or not data_suffix(path):
        return read_rows(source, None)
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    kind: Literal["pair", "chat"] = "pair"
    for number, record in read_file(path):
        if first is not None and len(rows) >= first:
            break
        row = _prompt_row(record, f"{path} row {number}")
        if row is not None:
            kind = "chat" if "messages" in row else "pair"
            rows.append(row)
            places.append(f"{path} row {number}")
    if not rows:
        raise DataError(f"{source}: no prompt in it. Wanted rows with one of the columns {', '.join(_PROMPT)}, or messages that end with the user's.")
    return Rows(kind, rows, places, source, None, "prompts", len(rows))


def _prompt_row(record: Mapping[str, Any], place: str) -> dict[str, Any] | None:
    """The row with an empty answer; None for a blank one."""
    lower = {name.strip().lower(): name for name in record}
    if messages := next((lower[name] for name in _MESSAGES if name in lower), None):
        listed = [message for message in (record[messages] or []) if isinstance(message, Mapping)]
        ends_with_answer = bool(listed) and (listed[-1].get("role") or listed[-1].get("from")) in {"assistant", "gpt"}
        whole = listed if ends_with_answer else [*listed, {"role": "assistant", "content": "-"}]
        return normalise({messages: whole}, find_columns([messages], ColumnNames(messages_column=messages), place), place) if listed else None
    name = next((lower[name] for name in _PROMPT if name in lower), None)
    if name is None:
        raise DataError(f"{place} has no prompt. Its columns are {', '.join(record) or 'none'}; wanted one of {', '.join(_PROMPT)}, or messages.")
    prompt, context = str(record[name] or ""), str(record.get(lower.get("input", ""), "") or "") if name != lower.get("input") else ""
    system = str(record.get(lower.get("system", lower.get("system_prompt", "")), "") or "")
    if not prompt.strip():
        return None
    whole_prompt = f"{prompt}\n\n{context}" if context.strip() else prompt
    return {"prompt": whole_prompt, "completion": "-"} | ({"system": system} if system.strip() else {})
