"""Which columns of a data set hold what: plain text, a prompt and its completion, or the messages of a chat.

People name these columns in a dozen ways. The names below are understood in any case; anything else is named by the caller.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from llmlite.data.files import no_json
from llmlite.errors import DataError

__all__ = ["UNDERSTOOD", "ColumnNames", "Columns", "Kind", "find_columns", "normalise"]

Kind = Literal["text", "pair", "chat"]

_TEXT = ("text", "content", "document", "body", "sentence")
_PROMPT = ("prompt", "instruction", "question", "query", "problem", "user", "q", "input")
_COMPLETION = ("completion", "response", "output", "answer", "solution", "assistant", "target", "a")
_CONTEXT = ("input", "context")
_MESSAGES = ("messages", "conversations", "conversation", "chat", "dialogue")
_SYSTEM = ("system", "system_prompt")
_ROLES = {
    "system": "system", "developer": "developer", "tool": "tool", "function": "tool", "observation": "tool",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "ai": "assistant", "chatgpt": "assistant",
}  # fmt: skip

UNDERSTOOD = (
    f"plain text ({', '.join(_TEXT)}); a prompt ({', '.join(_PROMPT)}) with a completion ({', '.join(_COMPLETION)}); or chat messages ({', '.join(_MESSAGES)})"
)


@dataclass(frozen=True)
class ColumnNames:
    """Columns the caller names outright; None means: find it by its usual name."""

    text_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    messages_column: str | None = None


@dataclass(frozen=True)
class Columns:
    """The columns that are used. `context` is joined to the prompt, as in Alpaca's instruction + input."""

    kind: Kind
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    context: str | None = None
    system: str | None = None

    def __str__(self) -> str:
        used = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "kind"}
        return ", ".join(role if role == name else f"{role} from '{name}'" for role, name in used.items() if name)


def find_columns(found: Sequence[str], names: ColumnNames, where: str) -> Columns:
    """Decide what the columns mean. Chat messages win over prompt/completion, and those over plain text.

    Args:
        found: the columns of the data.
        names: what the caller said.
        where: named in the error.

    Raises:
        DataError: a named column is absent, the named columns contradict each other, or nothing usable was found.
    """
    for option in fields(names):
        wanted = getattr(names, option.name)
        if wanted is not None and wanted not in found:
            near = difflib.get_close_matches(wanted, found, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise DataError(f"{where}: {option.name}='{wanted}', but the columns are {_listed(found)}.{hint}")
    as_pair = names.prompt_column is not None or names.completion_column is not None
    if (names.text_column is not None) + (names.messages_column is not None) + as_pair > 1:
        raise DataError(f"{where}: text_column, prompt_column/completion_column and messages_column exclude each other; name one kind.")
    lower = {name.strip().lower(): name for name in reversed(found)}
    system = _first(lower, _SYSTEM)
    if names.text_column is not None:
        return Columns("text", text=names.text_column)
    if names.messages_column is not None:
        return Columns("chat", messages=names.messages_column, system=system)
    if not as_pair and (messages := _first(lower, _MESSAGES)):
        return Columns("chat", messages=messages, system=system)
    completion = names.completion_column or _first(lower, _COMPLETION, without=names.prompt_column)
    prompt = names.prompt_column or _first(lower, _PROMPT, without=completion)
    if prompt and completion and prompt != completion:
        context = None if names.prompt_column else _first(lower, _CONTEXT, without=prompt)
        return Columns("pair", prompt=prompt, completion=completion, context=None if context == completion else context, system=system)
    if as_pair:
        missing = "completion_column" if names.prompt_column else "prompt_column"
        raise DataError(f"{where}: a prompt needs a completion; name {missing} as well. The columns are {_listed(found)}.")
    if text := _first(lower, _TEXT):
        return Columns("text", text=text)
    raise DataError(
        f"{where}: no usable columns. Found {_listed(found)}; understood are {UNDERSTOOD}. "
        "Rename a column, or say which it is with text_column, prompt_column and completion_column, or messages_column."
    )


def normalise(record: Mapping[str, Any], columns: Columns, where: str) -> dict[str, Any] | None:
    """One row in the toolkit's own form, or None for a blank row (nothing to read or nothing to learn).

    Returns:
        ``{"text"}``, ``{"prompt", "completion"}`` (with ``"system"`` if there is one) or ``{"messages": [{"role", "content"}, ...]}``.

    Raises:
        DataError: a value of another type than the column asks for, an unknown role; names the row and the column.
    """
    if columns.kind == "chat":
        return _normalise_chat(record, columns, where)
    if columns.kind == "text":
        text = _string(record, columns.text, where)
        return {"text": text} if text.strip() else None
    prompt, completion = _string(record, columns.prompt, where), _string(record, columns.completion, where)
    if not prompt.strip() or not completion.strip():
        return None
    if context := _string(record, columns.context, where):
        prompt = f"{prompt}\n\n{context}" if context.strip() else prompt
    system = _string(record, columns.system, where)
    return {"prompt": prompt, "completion": completion} | ({"system": system} if system.strip() else {})


def _normalise_chat(record: Mapping[str, Any], columns: Columns, where: str) -> dict[str, Any] | None:
    assert columns.messages is not None
    value = record.get(columns.messages)
    if isinstance(value, str) and value.lstrip().startswith("["):  # CSV has no lists: JSON inside a cell
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, json.JSONDecodeError) else no_json(error)
            raise DataError(f"{where}: column '{columns.messages}' holds text that starts like a JSON list and is none ({reason}).") from None
    if value is None or value == "" or value == []:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"{where}: column '{columns.messages}' holds {_shown(value)}; wanted a list of messages with 'role' and 'content'.")
    messages = [_message(item, f"{where}, message {number}") for number, item in enumerate(value, 1)]
    system = _string(record, columns.system, where)
    if system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    answered = any(message["role"] == "assistant" and (message["content"].strip() or message.get("tool_calls")) for message in messages)
    return {"messages": messages} if answered else None


def _message(item: object, where: str) -> dict[str, Any]:
    """One message; ShareGPT's from/value becomes role/content, parts of text are joined, other keys (tool_calls, name) are kept."""
    if not isinstance(item, Mapping):
        raise DataError(f"{where} is {_shown(item)}; wanted an object with 'role' and 'content' (or 'from' and 'value').")
    message = {key: value for key, value in item.items() if value is not None}
    role = message.pop("role", None) or message.pop("from", None)
    content = message.pop("content", None)
    content = message.pop("value", "") if content is None else content
    if role is None:
        raise DataError(f"{where} has no role; its keys are {_listed(list(item))}, wanted 'role' and 'content' (or 'from' and 'value').")
    if str(role).lower() not in _ROLES:
        raise DataError(f"{where} has the role {role!r}; understood are {', '.join(sorted(_ROLES))}.")
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise DataError(f"{where} has parts that are not text; images and sounds cannot be trained here.")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise DataError(f"{where}: content is {_shown(content)}; wanted text.")
    _require_characters([content, *message.items()], where)
    return {"role": _ROLES[str(role).lower()], "content": content, **message}


def _string(record: Mapping[str, Any], column: str | None, where: str) -> str:
    value = None if column is None else record.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: column '{column}' holds {_shown(value)}; wanted text.")
    _require_characters(value, f"{where}, column '{column}'")
    return value


def _require_characters(value: Any, where: str) -> None:
    """JSON can write half of a pair of surrogates (an emoji cut in two), which Python reads and no tokenizer takes."""
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, Mapping | list | tuple):
            rest += item.items() if isinstance(item, Mapping) else item
        elif isinstance(item, str):
            try:
                item.encode("utf-8")
            except UnicodeEncodeError as error:
                half = f"\\u{ord(item[error.start]):04x}"
                raise DataError(f"{where}: '{half}' at character {error.start + 1:,} is half of a character, as where an emoji was cut; take it out.") from None


def _first(lower: Mapping[str, str], names: Sequence[str], without: str | None = None) -> str | None:
    return next((lower[name] for name in names if name in lower and lower[name] != without), None)


def _shown(value: object) -> str:
    written = repr(value)
    return f"{type(value).__name__} ({written if len(written) <= 40 else written[:37] + '...'})"


def _listed(names: Sequence[str]) -> str:
    shown = [repr(name if len(name) <= 40 else name[:37] + "...") for name in names[:12]]
    return (", ".join(shown) + (f" and {len(names) - 12} more" if len(names) > 12 else "")) or "none"
