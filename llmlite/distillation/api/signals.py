"""The teacher's log-probabilities of the tokens of a batch, found by the examples in it.

Rows may be packed, padded, shuffled or spread over processes: an example is known by its own tokens.

Shapes: B rows, T tokens of a row, N = B * T, K candidates kept per position.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llmlite.distillation.api.align import Signal

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["signal_of"]


def signal_of(inputs: Mapping[str, Any], signals: Mapping[bytes, Signal], candidates: int) -> tuple[Tensor, Tensor]:
    """Ids int64 (N, K) and log-probabilities float32 (N, K) of a batch; -inf everywhere for tokens of which the teacher says nothing.

    Args:
        inputs: the model's: `input_ids`, and `position_ids` (packed) or `attention_mask` (padded on the right).
        signals: by the int32 token ids of an example.
        candidates: K.
    """
    ids_BT = inputs["input_ids"].cpu().numpy().astype(np.int32)
    ids_NK = np.zeros((ids_BT.size, candidates), dtype=np.int64)
    logprobs_NK = np.full((ids_BT.size, candidates), -np.inf, dtype=np.float32)
    for row, start, end in _examples(inputs, ids_BT):
        found = signals.get(ids_BT[row, start:end].tobytes())
        if found is not None:
            where = slice(row * ids_BT.shape[1] + start, row * ids_BT.shape[1] + end)
            ids_NK[where], logprobs_NK[where] = found.ids_TK, found.logprobs_TK
    return torch.from_numpy(ids_NK), torch.from_numpy(logprobs_NK)


def _examples(inputs: Mapping[str, Any], ids_BT: NDArray[np.int32]) -> Iterator[tuple[int, int, int]]:
    """Row, start and end of each example: positions restart at 0 in packed rows; padded rows hold one."""
    if "position_ids" in inputs:
        for row, positions_T in enumerate(inputs["position_ids"].cpu().numpy()):
            starts = [*map(int, np.flatnonzero(positions_T == 0)), len(positions_T)]
            yield from ((row, start, end) for start, end in itertools.pairwise(starts))
    else:
        for row, mask_T in enumerate(inputs["attention_mask"].cpu().numpy()):
            yield row, 0, int(mask_T.sum())
