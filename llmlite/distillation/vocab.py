"""Do two models mean the same tokens by the same ids? What most distillation losses rest on, and what nothing else would notice.

Vocabularies padded to other sizes are fine: the ids in front are what counts. So are special tokens with other names in reserved places, with a warning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmlite.errors import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Comparison", "compare"]

_ALIKE = 0.95
"""Share of tokens in common from which two vocabularies look identical to a person."""


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        problem: why a loss over shared ids would be nonsense, as a sentence; None when it would not.
        renamed: special tokens that differ in name only: (id, student's, teacher's).
        missing: tokens of the student that the teacher's tokenizer does not have.
    """

    problem: str | None
    renamed: tuple[tuple[int, str, str], ...] = ()
    missing: tuple[str, ...] = ()


def compare(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, teacher_vocab_size: int) -> Comparison:
    """Compare two tokenizers id by id.

    Args:
        student, teacher: the tokenizers.
        teacher_vocab_size: rows of the teacher's embedding, padding included.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    our_tokens, their_tokens = {i: token for token, i in ours.items()}, {i: token for token, i in theirs.items()}
    added = {*student.added_tokens_decoder} & {*teacher.added_tokens_decoder}
    different = sorted(i for i, token in our_tokens.items() if i in their_tokens and their_tokens[i] != token)
    ordinary = [i for i in different if i not in added]
    if ordinary:
        first = ordinary[0]
        common = len(ours.keys() & theirs.keys()) / max(len(ours.keys() | theirs.keys()), 1)
        example = f"id {first} is {our_tokens[first]!r} to the student and {their_tokens[first]!r} to the teacher"
        if common >= _ALIKE:
            other = counted(len(ordinary), "id means another token", "ids mean other tokens")
            return Comparison(f"their vocabularies look alike ({common:.1%} of the tokens in common), but {other}: {example}")
        return Comparison(f"they have different tokenizers ({common:.1%} of the tokens in common; {example})")
    beyond = sorted(i for i in our_tokens if i >= teacher_vocab_size)
    if beyond:
        first_token = f"first {our_tokens[beyond[0]]!r}, id {beyond[0]}"
        return Comparison(f"the student has {counted(len(beyond), 'token')} beyond the teacher's vocabulary of {teacher_vocab_size:,}, {first_token}")
    missing = tuple(our_tokens[i] for i in sorted(our_tokens) if i not in their_tokens)
    return Comparison(None, tuple((i, our_tokens[i], their_tokens[i]) for i in different), missing)
