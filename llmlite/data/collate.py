"""From rows to a batch of tensors, without ever asking which token is the padding token.

Padding is known by position: many tokenizers pad with EOS, and masking every EOS from the loss gives models that never stop. So the id
that fills a row does not matter here.

Shapes: B rows, T tokens of the longest one; everything int64.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmlite.data.tokens import IGNORE_INDEX

__all__ = ["PackedCollator", "PaddedCollator", "examples_of"]


@dataclass(frozen=True)
class PaddedCollator:
    """Rows of one example each -> `input_ids_BT`, `attention_mask_BT`, `labels_BT`, padded on the right.

    Args:
        pad_token_id: fills up rows; any id will do.
        multiple_of: round T up to a multiple, which some accelerators like.
    """

    pad_token_id: int = 0
    multiple_of: int = 1

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate one batch."""
        return {
            "input_ids": _fill([row["input_ids"] for row in rows], self.pad_token_id, self.multiple_of),
            "attention_mask": _fill([[1] * len(row["input_ids"]) for row in rows], 0, self.multiple_of),
            "labels": _fill([row["labels"] for row in rows], IGNORE_INDEX, self.multiple_of),
        }


@dataclass(frozen=True)
class PackedCollator:
    """Packed rows -> `input_ids_BT`, `position_ids_BT`, `labels_BT`, and `use_cache=False`.

    There is no attention mask: transformers looks for packed examples only when it is absent. `use_cache` stands in the batch since with a
    cache, which configs ask for by default, packed examples silently see each other.

    Args:
        pad_token_id: fills up rows; any id will do. The padding counts as one more example, so no other sees it.
        flatten: join the batch into one row, (1, B*T) without any padding. FlashAttention separates examples only in a batch of one row.
    """

    pad_token_id: int = 0
    flatten: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate one batch."""
        ids, labels, positions = ([list(row[name]) for row in rows] for name in ("input_ids", "labels", "position_ids"))
        if self.flatten:
            ids, labels, positions = ([list(itertools.chain.from_iterable(column))] for column in (ids, labels, positions))
        width = max(map(len, ids))
        positions = [[*row, *range(width - len(row))] for row in positions]
        return {
            "input_ids": _fill(ids, self.pad_token_id),
            "position_ids": torch.tensor(positions, dtype=torch.int64),
            "labels": _fill(labels, IGNORE_INDEX),
            "use_cache": False,
        }


def examples_of(batch: Mapping[str, Tensor]) -> list[tuple[int, slice]]:
    """Where the examples of a batch lie: (row, places in it) of each, padding left out where it can be told (a packed row's is one more example)."""
    ids_BT, mask_BT, positions_BT = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
    found = []
    for row in range(len(ids_BT)):
        if mask_BT is not None:
            real_T = mask_BT[row].nonzero().flatten().tolist()
            found += [(row, slice(real_T[0], real_T[-1] + 1))] if real_T else []
        elif positions_BT is not None:
            starts = (positions_BT[row] == 0).nonzero().flatten().tolist()
            found += [(row, slice(start, stop)) for start, stop in itertools.pairwise([*starts, ids_BT.shape[1]])]
        else:
            found.append((row, slice(0, ids_BT.shape[1])))
    return found


def _fill(rows: Sequence[Sequence[int]], value: int, multiple_of: int = 1) -> Tensor:
    width = -(-max(map(len, rows)) // multiple_of) * multiple_of
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.int64)
