"""Several short examples in one row, none of which sees the others.

Padding wastes most of a batch of uneven examples. Packing puts examples end to end into rows of `sequence_tokens` and restarts
`position_ids` at 0 with each. transformers builds a block-diagonal mask from such restarts (`masking_utils.find_packed_sequence_indices`;
FlashAttention uses its variable-length kernels), so every example gets the loss it gets alone. That needs three things, all silent when
they fail: no attention mask, no key/value cache (`use_cache=False`), and a family that hands its position ids to the mask. OPT does not
(`packs_by_position` in `llmlite.models.families`).

Shapes: T tokens, N examples. Which examples share a row is bin packing by best-fit decreasing (Johnson 1973); the use for training
language models is e.g. Krell et al. 2021, arXiv:2107.02027, and Ding et al. 2024, arXiv:2404.10830.
"""

from __future__ import annotations

import bisect
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmlite.data.tokens import Encoded

if TYPE_CHECKING:
    import datasets
    from numpy.typing import NDArray

    Ids = NDArray[np.int32]

__all__ = ["pack", "packed_dataset", "padded_dataset"]


def pack(lengths_N: Sequence[int], capacity: int, seed: int = 0) -> list[list[int]]:
    """Share examples out over as few rows as best-fit decreasing finds (at most 11/9 of the optimum, plus one).

    Args:
        lengths_N: tokens of each example, each at most `capacity`.
        capacity: tokens of a row.
        seed: order of the rows; without shuffling the longest examples would come first.

    Returns:
        For each row the indices of its examples, ascending. Every index occurs once.
    """
    rows: list[list[int]] = []
    rows_with_space: defaultdict[int, list[int]] = defaultdict(list)
    spaces: list[int] = []  # the keys of rows_with_space, sorted
    for index in sorted(range(len(lengths_N)), key=lambda index: -lengths_N[index]):
        length = lengths_N[index]
        if length > capacity:
            raise ValueError(f"example {index} has {length} tokens; a row holds {capacity}")
        tightest = bisect.bisect_left(spaces, length)
        if tightest == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[tightest]
            row = rows_with_space[space].pop()
            if not rows_with_space[space]:
                del rows_with_space[space], spaces[tightest]
        rows[row].append(index)
        if space > length:
            if space - length not in rows_with_space:
                bisect.insort(spaces, space - length)
            rows_with_space[space - length].append(row)
    random.Random(seed).shuffle(rows)
    return [sorted(row) for row in rows]


def packed_dataset(encoded: Encoded, sequence_tokens: int, seed: int = 0) -> datasets.Dataset:
    """Rows of at most `sequence_tokens`: `input_ids`, `labels` and `position_ids` that restart at 0 with each example."""
    rows = pack([len(ids) for ids in encoded.input_ids], sequence_tokens, seed)
    return _dataset(
        {
            "input_ids": [np.concatenate([encoded.input_ids[index] for index in row]) for row in rows],
            "labels": [np.concatenate([encoded.labels[index] for index in row]) for row in rows],
            "position_ids": [np.concatenate([np.arange(len(encoded.input_ids[index]), dtype=np.int32) for index in row]) for row in rows],
        }
    )


def padded_dataset(encoded: Encoded) -> datasets.Dataset:
    """One example a row, `input_ids` and `labels`, unpadded; the collator pads each batch."""
    return _dataset({"input_ids": encoded.input_ids, "labels": encoded.labels})


def _dataset(columns: dict[str, list[Ids]]) -> datasets.Dataset:
    """In memory, so that nothing is written into a cache folder; values as int32."""
    import datasets
    import pyarrow as pa

    arrays: dict[str, Any] = {}
    for name, values in columns.items():
        offsets = np.concatenate([[0], np.cumsum([len(value) for value in values])]).astype(np.int64)
        flat = np.concatenate(values) if values else np.zeros(0, dtype=np.int32)
        arrays[name] = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat, type=pa.int32()))
    return datasets.Dataset(pa.table(arrays))
