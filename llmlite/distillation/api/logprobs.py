"""The three shapes in which servers return log-probabilities, read into one: for each token its bytes, its log-probability, and those of its rivals.

    chat                choices[0].logprobs.content[i] = {token, bytes, logprob, top_logprobs: [{token, bytes, logprob}]}     generated tokens
    completions         choices[0].logprobs = {tokens: [..], token_logprobs: [..], top_logprobs: [{token: logprob}]}          generated tokens
    prompt_logprobs     [null, {token id: {decoded_token, logprob, rank}, ...}, ...], the token that is there first           vLLM, tokens of the prompt

Bytes are what vocabularies have in common. Where a server gives only a string that is no whole character (U+FFFD in it), the bytes are unknown: None.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Candidate", "Position", "generated_positions", "prompt_positions"]


@dataclass(frozen=True)
class Candidate:
    """One token as the teacher names it.

    Attributes:
        text: its bytes; None when they cannot be told.
        logprob: natural logarithm of its probability.
        token_id: its id in the teacher's vocabulary, where the server says so.
    """

    text: bytes | None
    logprob: float
    token_id: int | None = None


@dataclass(frozen=True)
class Position:
    """One token of the text and what the teacher thought might stand there; `candidates` includes the token itself."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]


def generated_positions(choice: Mapping[str, Any]) -> list[Position] | None:
    """The generated tokens of a choice of either endpoint; None when it carries no usable log-probabilities."""
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, Mapping):
        return None
    content = logprobs.get("content")
    if isinstance(content, list):
        positions = [_chat_position(item) for item in content]
    elif isinstance(logprobs.get("tokens"), list) and isinstance(logprobs.get("top_logprobs"), list):
        each = zip(logprobs["tokens"], logprobs.get("token_logprobs") or [], logprobs["top_logprobs"], strict=False)
        positions = [_completion_position(token, logprob, top) for token, logprob, top in each]
    else:
        return None
    found = [position for position in positions if position is not None]
    return found if found and len(found) == len(positions) else None


def prompt_positions(body: Mapping[str, Any]) -> list[Position] | None:
    """The tokens of the prompt of a vLLM answer but the first, of which nothing is said; None when there are none."""
    listed = body.get("prompt_logprobs")
    if not isinstance(listed, list):  # completions carry it in the choice
        choices = body.get("choices")
        listed = choices[0].get("prompt_logprobs") if isinstance(choices, list) and choices and isinstance(choices[0], Mapping) else None
    if not isinstance(listed, list):
        return None
    positions = [_prompt_position(item) for item in listed if item]
    found = [position for position in positions if position is not None]
    return found if found and len(found) == len(positions) else None


def _chat_position(item: Any) -> Position | None:
    if not isinstance(item, Mapping):
        return None
    chosen = _chat_candidate(item)
    rivals = [_chat_candidate(other) for other in item.get("top_logprobs") or []]
    return _position(chosen, rivals)


def _chat_candidate(item: Any) -> Candidate | None:
    if not isinstance(item, Mapping) or not isinstance(item.get("token"), str) or not _is_logprob(item.get("logprob")):
        return None
    raw = item.get("bytes")
    if isinstance(raw, list) and raw and all(isinstance(byte, int) and 0 <= byte < 256 for byte in raw):
        return Candidate(bytes(raw), float(item["logprob"]))
    return Candidate(_bytes_of(item["token"]), float(item["logprob"]))


def _completion_position(token: Any, logprob: Any, top: Any) -> Position | None:
    if not isinstance(token, str) or not _is_logprob(logprob) or not isinstance(top, Mapping):
        return None
    rivals = [Candidate(_bytes_of(text), float(value)) if _is_logprob(value) else None for text, value in top.items()]
    return _position(Candidate(_bytes_of(token), float(logprob)), rivals)


def _prompt_position(item: Any) -> Position | None:
    if not isinstance(item, Mapping) or not item:
        return None
    found: list[Candidate | None] = []
    for key, entry in item.items():
        if not isinstance(entry, Mapping) or not _is_logprob(entry.get("logprob")) or not str(key).lstrip("-").isdigit():
            return None
        decoded = entry.get("decoded_token")
        found.append(Candidate(_bytes_of(decoded) if isinstance(decoded, str) and decoded else None, float(entry["logprob"]), int(key)))
    return _position(found[0], found)


def _position(chosen: Candidate | None, rivals: Sequence[Candidate | None]) -> Position | None:
    if chosen is None or any(rival is None for rival in rivals):
        return None
    known = tuple(rival for rival in rivals if rival is not None)
    there = any((rival.text, rival.token_id) == (chosen.text, chosen.token_id) for rival in known)
    return Position(chosen, known if there else (chosen, *known))


def _is_logprob(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value) and value < 1e-3


def _bytes_of(token: str) -> bytes | None:
    """The bytes of a token given as text; some servers write incomplete characters as ``bytes:\\xe2\\x80``."""
    if token.startswith("bytes:\\x"):
        return bytes(codecs.escape_decode(token.removeprefix("bytes:"))[0])
    return None if "\ufffd" in token else token.encode("utf-8", "surrogatepass")
