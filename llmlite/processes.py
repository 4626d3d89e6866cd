"""Several processes of one run (torchrun, accelerate launch): who this one is, sums and least over all. With one process everything here does nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["least_over_processes", "places_of", "rank_and_processes", "sum_over_processes"]


def rank_and_processes() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def places_of(count: int, shared: bool) -> list[int]:
    """Which of `count` things this process does: its share, or all of them."""
    rank, processes = rank_and_processes() if shared else (0, 1)
    return list(range(rank, count, processes))


def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Add up in place. Sums travel in float64, so that the order matters little."""
    if rank_and_processes()[1] == 1:
        return
    for tensor in tensors:
        wide = tensor.double()
        torch.distributed.all_reduce(wide)
        tensor.copy_(wide)


def least_over_processes(count: int, device: torch.device) -> int:
    """The smallest of the numbers that the processes give: how far all of them have come."""
    if rank_and_processes()[1] == 1:
        return count
    least = torch.tensor([count], device=device)
    torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
    return int(least)
