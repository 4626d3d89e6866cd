"""The teacher's log-probabilities of the tokens of a batch, found by the examples in it.

Rows may be packed, padded, shuffled or spread over processes: an example is known by its own tokens.

Shapes: B rows, T tokens of a row, N = B * T, K candidates kept per position.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmlite.data.collate import examples_of
from llmlite.distillation.api.align import Signal

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
    for row, places in examples_of(inputs):
        found = signals.get(ids_BT[row, places].tobytes())
        if found is not None:
            where = slice(row * ids_BT.shape[1] + places.start, row * ids_BT.shape[1] + places.stop)
            ids_NK[where], logprobs_NK[where] = found.ids_TK, found.logprobs_TK
    return torch.from_numpy(ids_NK), torch.from_numpy(logprobs_NK)
