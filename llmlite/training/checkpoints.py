"""Training checkpoints that are complete or absent, and stopping without losing any.

transformers writes a checkpoint file by file and, when it resumes, takes the highest number: a truncated one crashes every later run. Here
each checkpoint is sealed by a manifest once it is written; resuming takes the newest sealed and undamaged one and sets the others aside. Newest is what has the
highest number: transformers deletes old checkpoints by their dates, and where the clock was set back that is the one just written.
"""

from __future__ import annotations

import logging
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmlite.storage import damage, seal, set_aside, telling

__all__ = ["SealCheckpoints", "StopRequest", "newest_complete", "stopping_at_signals"]

log = logging.getLogger(__name__)


_KEPT = 2
"""Newest checkpoints that are kept; one is enough as long as it stays whole."""


def _newest_first(folder: Path) -> list[Path]:
    numbered = [(int(p.name.rpartition("-")[2]), p) for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    return [place for _, place in sorted(numbered, reverse=True)]


def newest_complete(folder: Path) -> Path | None:
    """The newest whole ``checkpoint-N`` below a folder, or None. Half-written and damaged ones are set aside with a message, until the step is complete."""
    for place in _newest_first(folder):
        reason = damage(place)
        if reason is None:
            return place
        log.warning("%s is damaged (%s); set aside as %s", place.name, reason, set_aside(place).name)
    return None


class SealCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Seal each checkpoint after the Trainer wrote it, and remove those that are too old."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer on every process; the main one seals when all have written their parts."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            place = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            with telling(place):
                seal(place)
            for old in _newest_first(place.parent)[_KEPT:]:
                shutil.rmtree(old, ignore_errors=True)


class StopRequest(TrainerCallback):  # type: ignore[misc]
    """Ends training after the current optimizer step, with a checkpoint, once `asked` is set."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        """Called by the Trainer. One process that was asked to stop stops all of them, at the same step."""
        state_of = PartialState()
        if state_of.num_processes > 1:
            self.asked = bool(reduce(torch.tensor(float(self.asked), device=state_of.device), "sum").item())
        if self.asked:
            control.should_save = True
            control.should_training_stop = True
        return control


@contextmanager
def stopping_at_signals(request: StopRequest, first: str = "finishing this optimizer step and saving a checkpoint") -> Iterator[None]:
    """Within the block Ctrl-C and SIGTERM ask for a stop; a second one interrupts at once. `first` says what still happens."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, _: FrameType | None) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.asked = True
        log.warning("%s: %s; once more stops at once", signal.Signals(number).name, first)

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
