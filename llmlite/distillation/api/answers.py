"""From collected answers to rows that can be trained on: what is left out and why, which tokens are trained, and the teacher's word on each.

Left out and counted: refusals (the server's own, and texts that begin like one), empty answers, answers that were cut at the longest length (or, if wanted,
trained on without an end, so that the student does not learn to stop there), answers without the log-probabilities that were asked for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmlite.data.prepare import Prepared, prepared
from llmlite.data.text import Rows
from llmlite.data.tokens import IGNORE_INDEX, Encoded, encode, leading_ids
from llmlite.distillation.api.align import Signal, align
from llmlite.distillation.api.asking import Mode, positions_of
from llmlite.distillation.api.logprobs import Position
from llmlite.distillation.api.prompts import Question
from llmlite.distillation.api.vocabulary import Vocabulary, same_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Accepted", "Lesson", "accepted", "lesson_of"]

Signals = dict[bytes, Signal]
"""By the int32 token ids of an example."""


@dataclass(frozen=True)
class Accepted:
    """An answer worth training on.

    Attributes:
        question: what was asked.
        text: the answer.
        cut: it ended at the longest length.
        positions: the teacher's log-probabilities; None in mode text.
    """

    question: Question
    text: str
    cut: bool
    positions: list[Position] | None


@dataclass
class Lesson:
    """What is trained: rows, and the signal of each example.

    Attributes:
        data: tokens and labels, packed or not.
        signals: empty in mode text.
        counts: tokens that the signal covers; the teacher's candidates mapped, ambiguous, unmapped; answers none of whose tokens could be placed.
    """

    data: Prepared
    signals: Signals = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


def accepted(
    answers: Sequence[tuple[Question, dict[str, Any]]], mode: Mode, truncated: Literal["drop", "cut"], refusals: str | None, need_logprobs: bool
) -> tuple[list[Accepted], Counter[str]]:
    """The usable answers, and how many were left out for which reason.

    Args:
        answers: questions and bodies.
        mode: see `llmlite.distillation.api.asking`.
        truncated: what to do with answers that were cut.
        refusals: regular expression of how a refusal begins; None looks for none.
        need_logprobs: leave out answers that came without them, rather than train on their text.
    """
    pattern = re.compile(refusals, re.IGNORECASE) if refusals else None
    counts: Counter[str] = Counter(refused=0, empty=0, truncated=0, without_logprobs=0)
    kept = []
    for question, body in answers:
        text, reason, cut = _read(question, body, mode, pattern)
        positions = positions_of(mode, body) if mode != "text" else None
        counts["truncated"] += cut and not reason
        if reason:
            counts[reason] += 1
        elif cut and truncated == "drop":
            pass
        elif mode != "text" and positions is None and need_logprobs:
            counts["without_logprobs"] += 1
        else:
            counts["without_logprobs"] += mode != "text" and positions is None
            kept.append(Accepted(question, text, cut, positions))
    return kept, counts


def _read(question: Question, body: dict[str, Any], mode: Mode, pattern: re.Pattern[str] | None) -> tuple[str, str | None, bool]:
    """The answer, why it is no use (a name of the counts), and whether it was cut."""
    if mode == "prompt_logprobs":
        return question.expected, None if question.expected.strip() else "empty", False
    choice = body["choices"][0]
    message = choice.get("message") if isinstance(choice.get("message"), dict) else {}
    text = message.get("content") if question.endpoint == "chat" else choice.get("text")
    text = text if isinstance(text, str) else ""
    finish = choice.get("finish_reason")
    if message.get("refusal") or finish == "content_filter" or (pattern and pattern.match(text.lstrip())):
        return text, "refused", False
    return text, None if text.strip() else "empty", finish == "length"


def lesson_of(
    answers: Sequence[Accepted], source: str, tokenizer: PreTrainedTokenizerBase, sequence_tokens: int, *, candidates: int, packing: bool, seed: int
) -> Lesson:
    """Tokenise the answers as any training data, train only what the teacher said, and align its log-probabilities.

    Args:
        answers: at least one.
        source: named in messages.
        tokenizer: the student's.
        sequence_tokens: longest example.
        candidates: kept at each place; 0 for text alone.
        packing, seed: see `prepare`.

    Raises:
        DataError: the student's chat template refuses a row, or nothing is left to train.
    """
    made = [answer.question.answered(answer.text) for answer in answers]
    kind: Literal["text", "pair", "chat"] = "chat" if "messages" in made[0] else "pair" if "prompt" in made[0] else "text"
    rows = Rows(kind, made, [str(index) for index in range(len(made))], source, None, "the teacher's answers", len(made))
    encoded = encode(rows, tokenizer, sequence_tokens, progress=False)
    pieces: dict[int, list[int]] = {}
    for example, place in enumerate(encoded.places):
        pieces.setdefault(int(place), []).append(example)
    special = {int(i) for i in (*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder)}
    for index, answer in enumerate(answers):
        _train_the_answer_only(encoded, pieces.get(index, ()), kind, answer.cut, special)
    lesson = Lesson(prepared(rows, rows, encoded, tokenizer, sequence_tokens, packing=packing, seed=seed))
    if candidates:
        vocabulary = Vocabulary(tokenizer)
        vocabulary.trust_ids = same_ids(vocabulary, [answer.positions or [] for answer in answers])
        lesson.counts.update(covered_tokens=0, unplaced=0, teacher_ids_are_the_students=int(vocabulary.trust_ids))
        for index, answer in enumerate(answers):
            if answer.positions and index in pieces:
                _signal(encoded, pieces[index], kind, answer.positions, vocabulary, candidates, special, lesson)
        lesson.counts.update({name: vocabulary.counts[name] for name in ("mapped", "ambiguous", "unmapped")})
    return lesson


def _train_the_answer_only(encoded: Encoded, examples: Sequence[int], kind: str, cut: bool, special: set[int]) -> None:
    """Of a chat only the last turn is the teacher's; of a cut answer no end is trained."""
    for example in examples:
        labels = encoded.labels[example]
        if kind == "chat":
            labels[: _last_run(labels)[0]] = IGNORE_INDEX
        if cut:
            for index in reversed(np.flatnonzero(labels != IGNORE_INDEX)):
                if int(encoded.input_ids[example][index]) not in special:
                    break
                labels[index] = IGNORE_INDEX


def _last_run(labels_T: Any) -> tuple[int, int]:
    """Start and end of the last stretch of trained tokens."""
    trained = np.flatnonzero(labels_T != IGNORE_INDEX)
    if not len(trained):
        return len(labels_T), len(labels_T)
    gaps = np.flatnonzero(np.diff(trained) > 1)
    return int(trained[gaps[-1] + 1] if len(gaps) else trained[0]), int(trained[-1]) + 1


def _signal(
    encoded: Encoded,
    examples: Sequence[int],
    kind: str,
    positions: Sequence[Position],
    vocabulary: Vocabulary,
    candidates: int,
    special: set[int],
    lesson: Lesson,
) -> None:
    """Align one answer with the example, or the pieces of a long text, that it became."""
    ids_T = np.concatenate([encoded.input_ids[example] for example in examples])
    labels_T = np.concatenate([encoded.labels[example] for example in examples])
    starts = np.cumsum([0, *(len(encoded.input_ids[example]) for example in examples)])
    if kind == "text":  # the first token of a piece is never trained, but what follows it stands behind its bytes; only BOS is not of the text
        leading = leading_ids(vocabulary.tokenizer)
        heads = {int(start) + place for start in starts[:-1] for place, token in enumerate(leading) if ids_T[start : start + len(leading)].tolist() == leading}
        spoken = [index for index in range(len(ids_T)) if index not in heads]
    else:
        spoken = [int(index) for index in np.flatnonzero(labels_T != IGNORE_INDEX)]
    ends = {vocabulary.by_id.get(token) for token in special}
    if not any(position.chosen.text in ends for position in positions[-1:]):  # servers seldom show the token that ends an answer
        while spoken and int(ids_T[spoken[-1]]) in special:
            spoken.pop()
    signal, covered = align([int(i) for i in ids_T], spoken, positions, vocabulary, candidates, firsts=frozenset(int(start) for start in starts))
    lesson.counts["covered_tokens"] += covered
    lesson.counts["unplaced"] += covered == 0
    for example, start, end in zip(examples, starts[:-1], starts[1:], strict=True):
        lesson.signals[encoded.input_ids[example].astype(np.int32).tobytes()] = Signal(signal.ids_TK[start:end], signal.logprobs_TK[start:end])
