"""Rows to token ids and labels: label -100 wherever the model is not to be trained.

Shapes: T tokens of one example. `labels_T[t]` is `input_ids_T[t]` or -100; the model shifts them itself. The first label of every example
is always -100: nothing stands before the first token to predict it from, and in a packed row the previous example would.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from llmlite.data.chat import Rendered, common_prefix, render
from llmlite.data.text import Rows
from llmlite.errors import DataError, counted

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    Ids = NDArray[np.int32]

__all__ = ["IGNORE_INDEX", "Encoded", "encode", "leading_ids", "preview", "token_stream"]

IGNORE_INDEX = -100
"""The label of a token that is not trained and does not count, as in transformers and `torch.nn.functional.cross_entropy`."""
_BATCH_ROWS = 256


@dataclass
class Encoded:
    """Examples of one data set.

    Attributes:
        input_ids, labels: int32, (T,) each, T at most `sequence_tokens`.
        truncated: rows whose end was cut off; `cut_tokens` were lost with them.
        pieces: examples that long plain texts were cut into, nothing of them lost.
        dropped: examples in which no trained token is left.
        merged: rows in which one token holds both the end of the prompt and the start of the answer; it is trained.
        places: the row of each example.
    """

    input_ids: list[Ids] = field(default_factory=list)
    labels: list[Ids] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    truncated: int = 0
    cut_tokens: int = 0
    pieces: int = 0
    dropped: int = 0
    merged: int = 0

    @property
    def tokens(self) -> int:
        """All tokens that the model reads."""
        return sum(map(len, self.input_ids))

    @property
    def trained_tokens(self) -> int:
        """The tokens that the loss averages over."""
        return sum(int(np.count_nonzero(labels != IGNORE_INDEX)) for labels in self.labels)


def encode(rows: Rows, tokenizer: PreTrainedTokenizerBase, sequence_tokens: int, *, separator: str = "\n\n", progress: bool = True) -> Encoded:
    """Tokenise rows and mask their prompts.

    A prompt with its answer that is longer than `sequence_tokens` loses its end. Plain text is cut into pieces instead, since every part of
    it is as good a text as the whole.

    Args:
        rows: of any kind.
        tokenizer: its chat template writes pairs and chats; BOS is added only where the tokenizer itself would add it.
        sequence_tokens: longest example, at least 2.
        separator: between prompt and completion when there is no chat template.
        progress: show a bar once this takes longer than two seconds.

    Raises:
        DataError: `sequence_tokens` below 2, a row that the template refuses, or no trained token in any row.
    """
    if sequence_tokens < 2:
        raise DataError(f"sequence_tokens={sequence_tokens} should be at least 2: one token to read and one to predict.")
    leading = leading_ids(tokenizer)
    encoded = Encoded()
    for row, place, rendered, ids_T, trained_T in _tokenised(rows, tokenizer, separator, encoded, progress):
        if not rendered.templated and leading:
            ids_T = np.concatenate([np.array(leading, dtype=np.int32), ids_T])
            trained_T = np.concatenate([np.zeros(len(leading), dtype=bool), trained_T])
        if rendered.wants_end and tokenizer.eos_token_id is not None:
            ids_T = np.append(ids_T, np.int32(tokenizer.eos_token_id))
            trained_T = np.append(trained_T, True)
        if "text" in row:
            pieces = list(_pieces(ids_T, trained_T, leading, sequence_tokens))
            encoded.pieces += len(pieces) if len(pieces) > 1 else 0
        else:
            pieces = [(ids_T[:sequence_tokens], trained_T[:sequence_tokens])]
            encoded.truncated += len(ids_T) > sequence_tokens
            encoded.cut_tokens += max(0, len(ids_T) - sequence_tokens)
        for piece_ids, piece_trained in pieces:
            labels = np.where(piece_trained, piece_ids, np.int32(IGNORE_INDEX)).astype(np.int32)
            labels[:1] = IGNORE_INDEX
            if (labels == IGNORE_INDEX).all():
                encoded.dropped += 1
            else:
                encoded.input_ids.append(piece_ids)
                encoded.labels.append(labels)
                encoded.places.append(place)
    if not encoded.input_ids:
        hint = (
            f" {counted(encoded.truncated, 'row was', 'rows were')} cut at sequence_tokens={sequence_tokens} before an answer began; raise it."
            if encoded.truncated
            else ""
        )
        raise DataError(f"{rows.source}: {'its only row has no' if len(rows) == 1 else f'none of the {len(rows):,} rows has a'} token to train.{hint}")
    return encoded


def _tokenised(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, separator: str, encoded: Encoded, progress: bool
) -> Iterator[tuple[dict[str, Any], str, Rendered, Ids, NDArray[np.bool_]]]:
    """Each row with its ids and a mask of its trained tokens, no special tokens added yet."""
    from tqdm.auto import tqdm

    bar = tqdm(total=len(rows), desc=f"Tokenising {rows.split or 'rows'}", unit=" rows", delay=2, disable=None if progress else True, leave=False)
    with bar:
        for first in range(0, len(rows), _BATCH_ROWS):
            batch, places = rows.rows[first : first + _BATCH_ROWS], rows.places[first : first + _BATCH_ROWS]
            rendered = [render(row, tokenizer, place, separator) for row, place in zip(batch, places, strict=True)]
            masks = _masks_by_offsets(rendered, tokenizer) if getattr(tokenizer, "is_fast", False) else _masks_by_prefixes(rendered, tokenizer)
            for row, place, item, (ids_T, trained_T, merged) in zip(batch, places, rendered, masks, strict=True):
                encoded.merged += merged
                yield row, place, item, ids_T, trained_T
            bar.update(len(batch))


def _masks_by_offsets(rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Ids, NDArray[np.bool_], bool]]:
    """Ids, a mask of the tokens that touch a trained span, and whether one of them also holds the end of a prompt."""
    output = tokenizer([item.text for item in rendered], add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    for item, ids, offsets in zip(rendered, output["input_ids"], output["offset_mapping"], strict=True):
        offsets_T2 = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        starts_T, ends_T = offsets_T2[:, 0], offsets_T2[:, 1]
        trained_T, merged = np.zeros(len(ids), dtype=bool), False
        for start, end in item.spans:
            trained_T |= (starts_T < end) & (ends_T > start)
            merged |= bool(((starts_T < start) & (ends_T > start)).any())
        yield np.array(ids, dtype=np.int32), trained_T, merged


def _masks_by_prefixes(rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Ids, NDArray[np.bool_], bool]]:
    """The same for tokenizers written in Python, which give no offsets: the text up to a boundary is tokenised, and compared with the whole."""

    def tokenise(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    for item in rendered:
        ids = tokenise(item.text)
        trained_T, merged = np.zeros(len(ids), dtype=bool), False
        for start, end in item.spans:
            before, upto = tokenise(item.text[:start]), tokenise(item.text[:end])
            agreed = common_prefix(before, ids)
            merged |= agreed < len(before)
            until = common_prefix(upto, ids)
            trained_T[agreed : until + (until < len(upto))] = True
        yield np.array(ids, dtype=np.int32), trained_T, merged


def _pieces(ids_T: Ids, trained_T: NDArray[np.bool_], leading: Sequence[int], sequence_tokens: int) -> Iterator[tuple[Ids, NDArray[np.bool_]]]:
    """Consecutive windows; where the tokenizer opens every text with BOS, so does every window."""
    if len(ids_T) <= sequence_tokens:
        yield ids_T, trained_T
        return
    head = np.array(leading, dtype=np.int32)
    body, body_trained, step = ids_T[len(head) :], trained_T[len(head) :], max(1, sequence_tokens - len(head))
    for start in range(0, len(body), step):
        yield (
            np.concatenate([head, body[start : start + step]]),
            np.concatenate([np.zeros(len(head), dtype=bool), body_trained[start : start + step]]),
        )


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text by itself: BOS for most, none for Qwen or SmolLM2."""
    bare, full = (list(tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"]) for special in (False, True))
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


def token_stream(rows: Rows, tokenizer: PreTrainedTokenizerBase, *, progress: bool = True) -> Ids:
    """All rows as one long run of ids, int32, for perplexity and calibration.

    Plain texts are joined by a blank line and tokenised together, as they stood in their file, without BOS or EOS between them. Pairs
    and chats come as the chat template writes them, prompts included.
    """
    if rows.kind == "text":
        text = "\n\n".join(row["text"] for row in rows.rows)
        return np.array(tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"], dtype=np.int32)
    parts = []
    for _, _, rendered, ids_T, _ in _tokenised(rows, tokenizer, "\n\n", Encoded(), progress):
        parts.append(ids_T)
        if rendered.wants_end and tokenizer.eos_token_id is not None:
            parts.append(np.array([tokenizer.eos_token_id], dtype=np.int32))
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


def preview(
    input_ids: Sequence[int] | Ids, labels: Sequence[int] | Ids, tokenizer: PreTrainedTokenizerBase, *, marks: tuple[str, str] = ("⟦", "⟧"), most: int = 2000
) -> str:
    """One example as text, the trained tokens between marks; the middle of long stretches is left out.

    Args:
        input_ids, labels: (T,) each.
        marks: set before and after each run of trained tokens.
        most: characters shown of one run; longer ones lose their middle.
    """
    shown = []
    for trained, run in itertools.groupby(zip(input_ids, labels, strict=True), key=lambda pair: int(pair[1]) != IGNORE_INDEX):
        text = str(tokenizer.decode([int(token) for token, _ in run], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if len(text) > most:
            text = f"{text[: most // 2]} … {text[-most // 2 :]}"
        shown.append(f"{marks[0]}{text}{marks[1]}" if trained else text)
    return "".join(shown)
