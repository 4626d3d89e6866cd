"""Where a descent (`llmlite.distillation.descent`) stands, kept on disk now and then: one that was stopped goes on and ends in the same bits.

The state is the factors, Adam's moments and the number of steps; the order of the rows follows from the seed. It is kept when at least
`KEEP_SECONDS` have passed and at least fifty times as long as keeping it took the last time, so that a large one costs no more than 2 % of the time either.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmlite.calibration.kept import keep_tensors, kept_tensors

__all__ = ["KEEP_SECONDS", "KEEP_SHARE", "DescentState"]

log = logging.getLogger(__name__)

KEEP_SECONDS = 15.0
"""So long a stopped descent may have to do again."""
KEEP_SHARE = 0.02
"""Of the time, for keeping."""

_NAME = re.compile(r"tuning-\d{6}")


class DescentState:
    """The state of one descent.

    Args:
        folder: where it is kept, of this process; None: nowhere.
        made_of: what it belongs to, see `llmlite.calibration.kept.digest_of`.
        factors: what is tuned, by name.
        optimizer: Adam over these factors.
    """

    def __init__(self, folder: Path | None, made_of: str, factors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        self._folder, self._made_of, self._factors, self._optimizer = folder, made_of, factors, optimizer
        self._next = time.monotonic() + KEEP_SECONDS

    @torch.no_grad()
    def restore(self) -> tuple[int, list[float]]:
        """Put factors and moments back. Returns the steps that are done and the divergences since the last message; 0 and none where nothing usable is kept."""
        for place in reversed(self._places()):
            if (kept := kept_tensors(place, self._made_of)) is not None:
                break
        else:
            return 0, []
        for name, factor in self._factors.items():
            factor.copy_(kept[f"{name}/factor"])
            moments = {key.rpartition("/")[2]: tensor for key, tensor in kept.items() if key.startswith(f"{name}/") and not key.endswith("/factor")}
            # Adam counts its steps on the CPU
            self._optimizer.state[factor] = {key: tensor if key == "step" else tensor.to(factor.device) for key, tensor in moments.items()}
        return int(kept["done"]), kept["recent"].tolist()

    def keep(self, done: int, recent: list[float]) -> None:
        """Write the state after a step, when it is time; older ones go.

        Raises:
            OutputError, ResourceError: the folder cannot be written, or the disk is full.
        """
        started = time.monotonic()
        if self._folder is None or started < self._next:
            return
        tensors = {"done": torch.tensor(done), "recent": torch.tensor(recent, dtype=torch.float64)}
        for name, factor in self._factors.items():
            tensors[f"{name}/factor"] = factor
            tensors |= {f"{name}/{key}": value for key, value in self._optimizer.state[factor].items()}
        older = self._places()
        keep_tensors(self._folder / f"tuning-{done:06d}", self._made_of, tensors)
        for place in older:
            shutil.rmtree(place, ignore_errors=True)
        now = time.monotonic()
        self._next = now + max(KEEP_SECONDS, (now - started) / KEEP_SHARE)

    def _places(self) -> list[Path]:
        return [] if self._folder is None else sorted(place for place in self._folder.glob("tuning-*") if _NAME.fullmatch(place.name))
