"""One call from a source to what `transformers.Trainer` takes, and an account of what was understood on the way."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmlite.data.packing import packed_dataset, padded_dataset
from llmlite.data.split import Split
from llmlite.data.text import Rows, read_rows
from llmlite.data.tokens import Encoded, encode, preview
from llmlite.errors import counted

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from llmlite.data.collate import PackedCollator, PaddedCollator

__all__ = ["Counts", "Prepared", "prepare", "prepared"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Counts:
    """What became of the rows.

    Attributes:
        rows_read, blank, duplicates: of this split; see `Rows`.
        truncated, cut_tokens: rows that lost their end, and how many tokens went.
        pieces: windows that overlong plain texts were cut into.
        dropped: examples with nothing left to train.
        merged: rows in which one token spans the border of prompt and answer.
        examples: what is trained on; sequences: rows of the data set, fewer when packed.
        tokens, trained_tokens: read by the model, averaged over by the loss.
        fill: tokens / (sequences * sequence_tokens), 1 when no place is wasted.
    """

    rows_read: int
    blank: int
    duplicates: int
    truncated: int
    cut_tokens: int
    pieces: int
    dropped: int
    merged: int
    examples: int
    sequences: int
    tokens: int
    trained_tokens: int
    fill: float


@dataclass(frozen=True)
class Prepared:
    """A tokenised split.

    Attributes:
        dataset: `input_ids`, `labels` and, if packed, `position_ids`; in memory.
        rows: the text behind it, for generation before and after.
        packed: whether a row holds several examples; then batches want `collator()`, which leaves out the attention mask.
        counts: see `Counts`.
        echo: one paragraph for people: what was understood, and what was left out.
        preview: the first example, its trained tokens between ⟦ and ⟧.
        pad_token_id: for the collator.
    """

    dataset: datasets.Dataset
    rows: Rows
    packed: bool
    counts: Counts
    echo: str
    preview: str
    pad_token_id: int

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change when any token or label changes."""
        digest = hashlib.sha256()
        for column in ("input_ids", "labels"):
            for row in self.dataset[column]:
                digest.update(np.asarray(row, dtype=np.int64).tobytes())
        return digest.hexdigest()[:16]

    def collator(self, *, flatten: bool = False) -> PackedCollator | PaddedCollator:
        """The collator that belongs to this data set. Set `flatten` for packed rows on a model with FlashAttention."""
        from llmlite.data.collate import PackedCollator, PaddedCollator

        return PackedCollator(self.pad_token_id, flatten) if self.packed else PaddedCollator(self.pad_token_id)


def prepare(
    source: str | Path | Rows,
    tokenizer: PreTrainedTokenizerBase,
    sequence_tokens: int,
    *,
    split: Split | None = "train",
    packing: bool = True,
    seed: int = 0,
    separator: str = "\n\n",
    most_rows: int | None = None,
    progress: bool = True,
    **options: Any,
) -> Prepared:
    """Read, tokenise, mask and pack.

    Args:
        source: see `read_splits`; or rows that were read already.
        tokenizer: its chat template is used if it has one.
        sequence_tokens: longest example, and the width of a packed row.
        split: which share; None for the whole source. Ignored for rows.
        packing: put several examples into one row; not for families without `packs_by_position`, in which they would see each other.
        seed: order of packed rows, and the draw of `most_rows`.
        separator: between prompt and completion when there is no chat template.
        most_rows: take at most so many rows, drawn by `seed`.
        progress: a bar for long tokenising.
        options: columns and fractions, passed to `read_splits`.

    Raises:
        DataError: the source cannot be read or used, or no token is left to train.
    """
    rows = source if isinstance(source, Rows) else read_rows(source, split, **options)
    chosen = rows if most_rows is None else rows.sample(most_rows, seed)
    encoded = encode(chosen, tokenizer, sequence_tokens, separator=separator, progress=progress)
    return prepared(rows, chosen, encoded, tokenizer, sequence_tokens, packing=packing, seed=seed)


def prepared(
    rows: Rows, chosen: Rows, encoded: Encoded, tokenizer: PreTrainedTokenizerBase, sequence_tokens: int, *, packing: bool = True, seed: int = 0
) -> Prepared:
    """The second half of `prepare`, for rows whose tokens or labels were changed in between: pack and count.

    Args:
        rows: what was read.
        chosen: those of them that were tokenised.
        encoded: their tokens.
        tokenizer, sequence_tokens, packing, seed: as there.
    """
    dataset = packed_dataset(encoded, sequence_tokens, seed) if packing else padded_dataset(encoded)
    counts = _counts(rows, encoded, len(dataset), sequence_tokens)
    # pad_token_id may be absent, or EOS; neither matters, since padding is masked by position.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    echo = _echo(chosen, counts, tokenizer, sequence_tokens, packing)
    for loss in _losses(counts, sequence_tokens):
        log.warning("%s: %s", rows.source, loss)
    return Prepared(dataset, chosen, packing, counts, echo, preview(encoded.input_ids[0], encoded.labels[0], tokenizer), int(pad))


def _counts(rows: Rows, encoded: Encoded, sequences: int, sequence_tokens: int) -> Counts:
    return Counts(
        rows_read=rows.read,
        blank=rows.blank,
        duplicates=rows.duplicates,
        truncated=encoded.truncated,
        cut_tokens=encoded.cut_tokens,
        pieces=encoded.pieces,
        dropped=encoded.dropped,
        merged=encoded.merged,
        examples=len(encoded.input_ids),
        sequences=sequences,
        tokens=encoded.tokens,
        trained_tokens=encoded.trained_tokens,
        fill=encoded.tokens / (sequences * sequence_tokens),
    )


def _losses(counts: Counts, sequence_tokens: int) -> list[str]:
    """What was cut or dropped, one sentence each."""
    said = []
    if counts.truncated:
        longer, ends = (counted(counts.truncated, "row is", "rows are"), "its end" if counts.truncated == 1 else "their ends")
        said.append(f"{longer} longer than sequence_tokens={sequence_tokens} and lost {ends}, {counted(counts.cut_tokens, 'token')} in all")
    if counts.dropped:
        said.append(f"{counted(counts.dropped, 'example was', 'examples were')} dropped, since no trained token is left")
    if counts.merged:
        said.append(
            f"in {counted(counts.merged, 'row')} one token holds the end of the prompt and the start of the answer; when generating, the prompt is split "
            "otherwise. End prompts without a blank"
        )
    return said


def _echo(rows: Rows, counts: Counts, tokenizer: PreTrainedTokenizerBase, sequence_tokens: int, packing: bool) -> str:
    templated = bool(getattr(tokenizer, "chat_template", None))
    meaning = {
        "text": "plain text, every token trained",
        "pair": f"prompts and completions, written {'by the chat template' if templated else 'one after the other'}, only completions trained",
        "chat": "chats, written by the chat template, all turns of the assistant trained",
    }[rows.kind]
    share = f"The {rows.split} share of {rows.source}" if rows.split else rows.source
    parts = [
        f"{share} was read as {meaning} (columns: {rows.columns}).",
        f"{counted(len(rows), 'row is', 'rows are')} {counted(counts.examples, 'example')} with {counted(counts.tokens, 'token')}, "
        f"{counts.trained_tokens:,} of them trained"
        + (f", packed into {counted(counts.sequences, 'row')} of {sequence_tokens:,}, {counts.fill:.0%} full." if packing else ", padded per batch."),
    ]
    repeated = counted(counts.duplicates, "that is in the training data or repeated", "that are in the training data or repeated")
    left_out = [counted(counts.blank, "blank row")] * bool(counts.blank) + [repeated] * bool(counts.duplicates)
    if left_out:
        parts.append(f"Left out: {', '.join(left_out)}.")
    if counts.pieces:
        parts.append(f"Longer texts were cut into {counted(counts.pieces, 'piece')}, nothing lost.")
    parts += [f"{sentence[0].upper()}{sentence[1:]}." for sentence in _losses(counts, sequence_tokens)]
    return " ".join(parts)
