"""Which weights become zero: the lowest scores of each row, or N of every M neighbours.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

__all__ = ["follows_pattern", "parse_pattern", "pattern_mask", "row_mask", "tensor_mask"]


def parse_pattern(text: str) -> tuple[int, int]:
    """``2:4`` as (2, 4): of every 4 neighbouring inputs 2 are zero.

    Raises:
        ValueError: not N:M with 0 < N < M; the message is a sentence for the user.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text.strip())
    zeros, group = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 < zeros < group:
        raise ValueError(f"be a share of zeros in (0, 1), or a pattern N:M such as 2:4 with 0 < N < M; got {text!r}")
    return zeros, group


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


def follows_pattern(weight_OI: Tensor, zeros: int, group: int) -> bool:
    """Whether every run of `group` neighbouring inputs holds at least `zeros` exact zeros."""
    return bool((weight_OI.reshape(-1, group) == 0).sum(1).min() >= zeros)
