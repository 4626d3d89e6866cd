"""The student's vocabulary as bytes, and the teacher's tokens found in it.

A token of the teacher is the student's token of the same bytes. Several of the student's tokens can have the same bytes (a letter and its byte
fallback): the one that its tokenizer writes itself is taken, and counted as ambiguous. A token that the student does not have is left out; its probability
joins the tail.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmlite.distillation.api.logprobs import Candidate, Position

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Vocabulary", "same_ids"]

_FEWEST = 20
"""Different tokens that must agree by id before ids are trusted."""


class Vocabulary:
    """A tokenizer's tokens as bytes.

    Args:
        tokenizer: of the student.

    Attributes:
        usable: whether its tokens could be read as bytes: byte-level BPE, and SentencePiece's forms.
        counts: what `id_of` found: mapped, ambiguous, unmapped.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.counts: Counter[str] = Counter()
        self.trust_ids = False
        self.by_id = _token_bytes(tokenizer)
        self._ids: dict[bytes, list[int]] = {}
        for token_id, text in self.by_id.items():
            self._ids.setdefault(text, []).append(token_id)
        self._chosen: dict[bytes, int] = {}
        self.usable = self._spells("The cat, naïve: 东京 🙂\n  x=1")

    def _spells(self, text: str) -> bool:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return b"".join(self.by_id.get(int(i), b"?") for i in ids).lstrip(b" ") == text.encode()

    def candidates(self, text: bytes) -> Sequence[int]:
        """All ids of these bytes."""
        return self._ids.get(text, ())

    def id_of(self, candidate: Candidate) -> int | None:
        """The student's id of a teacher's token, or None."""
        if self.trust_ids and candidate.token_id in self.by_id:
            self.counts["mapped"] += 1
            return candidate.token_id
        found = self.candidates(candidate.text) if candidate.text else ()
        if candidate.text is None or not found:
            self.counts["unmapped"] += 1
            return None
        self.counts["mapped"] += 1
        if len(found) == 1:
            return found[0]
        self.counts["ambiguous"] += 1
        return self._preferred(candidate.text, found)

    def text_of(self, candidate: Candidate) -> bytes | None:
        """The token's bytes: by its id where ids are trusted, since servers garble incomplete characters."""
        return self.by_id.get(candidate.token_id) if self.trust_ids and candidate.token_id is not None else candidate.text

    def _preferred(self, text: bytes, found: Sequence[int]) -> int:
        if text not in self._chosen:
            written = self.tokenizer(text.decode("utf-8", "replace"), add_special_tokens=False)["input_ids"]
            self._chosen[text] = int(written[0]) if len(written) == 1 and int(written[0]) in found else found[0]
        return self._chosen[text]


def same_ids(vocabulary: Vocabulary, answers: Sequence[Sequence[Position]]) -> bool:
    """Whether the teacher's ids are the student's: every token whose bytes are clear has the same id on both sides, and there are enough of them."""
    seen = {
        (candidate.token_id, candidate.text)
        for positions in answers
        for position in positions
        for candidate in position.candidates
        if candidate.token_id is not None and candidate.text and len(vocabulary.candidates(candidate.text)) == 1
    }
    return len(seen) >= _FEWEST and all(vocabulary.by_id.get(token_id) == text for token_id, text in seen if token_id is not None)


def _token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    added = {int(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    byte_level = _is_byte_level(tokenizer)
    letters = _byte_of_letter()
    table: dict[int, bytes] = {}
    for token, token_id in tokenizer.get_vocab().items():
        if token_id in added:
            table[token_id] = added[token_id].encode()
        elif byte_level:
            if all(letter in letters for letter in token):
                table[token_id] = bytes(letters[letter] for letter in token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            table[token_id] = bytes([int(token[3:5], 16)])
        else:
            table[token_id] = token.replace("▁", " ").encode()
    return table


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return "Ġ" in "".join(list(tokenizer.get_vocab())[:5000])
    return '"ByteLevel"' in json.dumps(json.loads(backend.to_str()).get("decoder") or {})


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others are moved behind U+0100 in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(rest)}
