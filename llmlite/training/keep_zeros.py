"""Zeros that pruning made stay zeros while the model trains: after every optimizer step they are set to zero again.

Source: Zhu and Gupta 2017, arXiv:1710.01878, section 3 (masked training).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

__all__ = ["KeepZeros"]

_FEWEST = 0.01
"""A matrix with a smaller share of zeros was not pruned; its few zeros are chance."""


class KeepZeros(TrainerCallback):  # type: ignore[misc]
    """Keeps the zeros of every trained matrix that has many of them. Frozen weights, adapters and dense models cost nothing."""

    def __init__(self) -> None:
        self.zeros: list[tuple[torch.nn.Parameter, Tensor]] = []

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Called by the Trainer, after a checkpoint was loaded."""
        self.zeros = []
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim == 2 and parameter.is_floating_point():
                zeros = parameter == 0
                if _FEWEST < float(zeros.float().mean()) < 1:  # lora_B starts as nothing but zeros
                    self.zeros.append((parameter, zeros))

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the Trainer between the optimizer's step and the next forward pass."""
        for parameter, zeros in self.zeros:
            parameter.masked_fill_(zeros, 0)
