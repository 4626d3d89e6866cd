"""Where the teacher's tokens and the student's tokens of one text are the same, and what the teacher says there.

Both tokenise the same bytes. A student's token that begins and ends where one of the teacher's does can be distilled: the teacher's candidates for that
place, found in the student's vocabulary, are its target. With one tokenizer that is every token; with two it is most short and common ones. Everywhere else
only cross entropy trains.

Shapes: T tokens of an example, K candidates kept per position.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmlite.data.chat import common_prefix
from llmlite.distillation.api.logprobs import Position
from llmlite.distillation.api.vocabulary import Vocabulary

__all__ = ["Signal", "align", "matching", "overlap"]

_PROBE = 48
"""Bytes by which a longer text is found in another."""


@dataclass(frozen=True)
class Signal:
    """The teacher's candidates for the tokens of one example: `ids_TK` int32 and `logprobs_TK` float32, -inf for unused places.

    Row t speaks of the token at t + 1, as the model's logits at t do.
    """

    ids_TK: NDArray[np.int32]
    logprobs_TK: NDArray[np.float32]


def overlap(student: bytes, teacher: bytes) -> tuple[int, int, int]:
    """Where one text stands in the other: (offset in the student's, offset in the teacher's, bytes in common from there on).

    Chat templates strip what an answer begins and ends with, a student's row may be cut, and the teacher's may have a prompt before it.
    """
    bare = teacher.lstrip()
    lead = len(teacher) - len(bare)
    at, into = student.rfind(teacher), 0
    if at < 0:
        at, into = student.rfind(bare), lead
    if at < 0:
        at, into = 0, teacher.rfind(student)
    if into < 0:
        at, into = student.find(bare[:_PROBE]), lead
    if at < 0:
        at, into = 0, teacher.find(student[:_PROBE])
    if into < 0 or not teacher or not student:
        return 0, 0, 0
    return at, into, common_prefix(student[at:], teacher[into:])


def matching(student: Sequence[bytes], teacher: Sequence[bytes]) -> list[int | None]:
    """For each student's token the teacher's token of the same bytes in the same place, or None."""
    at, into, agreed = overlap(b"".join(student), b"".join(teacher))
    places: dict[tuple[int, int], int] = {}
    start = -into
    for index, text in enumerate(teacher):
        places[start, start + len(text)] = index
        start += len(text)
    found: list[int | None] = []
    start = -at
    for text in student:
        end = start + len(text)
        found.append(places.get((start, end)) if text and start >= 0 and end <= agreed else None)
        start = end
    return found


def align(
    ids_T: Sequence[int],
    trained: Sequence[int],
    positions: Sequence[Position],
    vocabulary: Vocabulary,
    candidates: int,
    firsts: frozenset[int] = frozenset({0}),
) -> tuple[Signal, int]:
    """The teacher's signal for one example.

    Args:
        ids_T: the example's tokens.
        trained: which of them, by index, the teacher's text covers, in order.
        positions: the teacher's tokens.
        vocabulary: the student's.
        candidates: K.
        firsts: tokens that no logits stand before: the first of each piece of a long text.

    Returns:
        The signal, and how many of the trained tokens it covers.
    """
    ids_TK = np.zeros((len(ids_T), candidates), dtype=np.int32)
    logprobs_TK = np.full((len(ids_T), candidates), -np.inf, dtype=np.float32)
    positions, theirs = _legible(positions, vocabulary)
    found = matching([vocabulary.by_id.get(int(ids_T[index]), b"") for index in trained], theirs)
    covered = 0
    for index, place in zip(trained, found, strict=True):
        if place is None or index in firsts:
            continue
        known: dict[int, float] = {}
        for candidate in positions[place].candidates:
            token_id = vocabulary.id_of(candidate)
            if token_id is not None:  # two of the teacher's tokens may be one of the student's
                known[token_id] = float(np.logaddexp(known.get(token_id, -math.inf), candidate.logprob))
        best = sorted(known.items(), key=lambda item: -item[1])[:candidates]
        for column, (token_id, logprob) in enumerate(best):
            ids_TK[index - 1, column], logprobs_TK[index - 1, column] = token_id, min(logprob, 0.0)
        covered += bool(best)
    return Signal(ids_TK, logprobs_TK), covered


def _legible(positions: Sequence[Position], vocabulary: Vocabulary) -> tuple[Sequence[Position], list[bytes]]:
    """The longest stretch of the teacher's tokens whose bytes are all known: behind an unknown one nothing can be placed."""
    texts = [vocabulary.text_of(position.chosen) for position in positions]
    breaks = [-1, *(index for index, text in enumerate(texts) if text is None), len(texts)]
    start, end = max(((one + 1, other) for one, other in itertools.pairwise(breaks)), key=lambda stretch: stretch[1] - stretch[0])
    return positions[start:end], [text for text in texts[start:end] if text is not None]
