"""Which weights become zero: the lowest scores of each row, or N of every M neighbours.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pattern_mask", "row_mask", "tensor_mask"]


def row_mask(score_OI: Tensor, sparsity: float) -> Tensor:
    """True where a weight stays: in each output row the round(sparsity * I) lowest scores go, (O, I) bool."""
    gone = round(sparsity * score_OI.shape[1])
    keep = torch.ones_like(score_OI, dtype=torch.bool)
    return keep.scatter_(1, score_OI.topk(gone, dim=1, largest=False).indices, False)


def tensor_mask(score_OI: Tensor, sparsity: float) -> Tensor:
    """True where a weight stays: the round(sparsity * O * I) lowest scores of the whole matrix go."""
    gone = round(sparsity * score_OI.numel())
    keep = torch.ones(score_OI.numel(), dtype=torch.bool, device=score_OI.device)
    keep[score_OI.flatten().topk(gone, largest=False).indices] = False
    return keep.view_as(score_OI)


def pattern_mask(score_OI: Tensor, zeros: int, group: int) -> Tensor:
    """True where a weight stays: in each run of `group` neighbouring inputs the `zeros` lowest scores go.

    Raises:
        ValueError: the inputs are not a multiple of `group`.

    Source: Mishra et al. 2021, arXiv:2104.08378 (2:4).
    """
    if score_OI.shape[1] % group:
        raise ValueError(f"{score_OI.shape[1]} inputs are not a multiple of {group}")
    return row_mask(score_OI.reshape(-1, group), zeros / group).view_as(score_OI)
