"""Trackers (`report_to`), where transformers' callbacks leave something open: one run for each step that trains, the same one after a stop, files with ours.

    tensorboard   OUT/runs/STEP/
    wandb         OUT/runs/STEP/wandb/, or WANDB_DIR
    trackio       its own folder (TRACKIO_DIR), where its dashboard looks

Left alone, the callback of wandb lets all steps of a process write into one run, and trackio continues any run of the same name.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.integrations import TensorBoardCallback, WandbCallback

from llmlite.config import shorten
from llmlite.errors import RunError
from llmlite.storage import write_text

if TYPE_CHECKING:
    from llmlite.context import Run

__all__ = ["run_name", "tracked", "without_key"]


def run_name(run: Run, report_to: Sequence[str], folder: Path) -> str:
    """What trackers call the training of the current step; trackio tells runs apart by it, so there a mark of the step's own stands behind.

    Args:
        run: names the output folder and the step.
        report_to: the trackers.
        folder: see `tracked`.
    """
    name = f"{run.recipe.folder.name}, {run.logs.name}"
    return f"{name} {_mark(folder)}" if run.is_main and {"trackio", "all"} & {*report_to} else name


def without_key() -> str:
    """Why wandb could not begin a run here, as a sentence; empty where it can: it has a key, or wants none."""
    import wandb

    if wandb.run is not None or wandb.setup().settings.mode in {"offline", "dryrun", "disabled"} or wandb.login(prompt=False, verify=False):
        return ""
    return "report_to: wandb has no key here, and would ask for one when training begins. `wandb login` once, or set WANDB_MODE=offline."


@contextmanager
def tracked(callbacks: Sequence[Any], run: Run, name: str, folder: Path) -> Iterator[None]:
    """Around the training of one step.

    Args:
        callbacks: the Trainer's, trackers among them.
        run: says where logs stay when the step's own folder goes.
        name: what the tracker shows.
        folder: survives a stop, and goes when the step is done.

    Raises:
        RunError: wandb cannot begin a run.
    """
    finish = None
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:  # TENSORBOARD_LOGGING_DIR wins
            callback.logging_dir = str(run.logs)
        elif isinstance(callback, WandbCallback) and run.is_main:
            finish = _wandb_run(run, name, folder)
    try:
        yield
    finally:
        if finish is not None:
            finish()


def _wandb_run(run: Run, name: str, folder: Path) -> Any:
    """Open a run that the callback then finds, and say how it ends; None where somebody has one open already, which is theirs to end."""
    import wandb

    if wandb.run is not None:
        return None
    place = os.environ.get("WANDB_DIR") or str(run.logs)
    Path(place).mkdir(parents=True, exist_ok=True)  # wandb would write elsewhere
    project = os.environ.get("WANDB_PROJECT", "huggingface")  # as transformers does
    try:
        return wandb.init(project=project, name=name, id=_mark(folder), resume="allow", dir=place).finish
    except wandb.errors.Error as error:
        raise RunError(f"report_to: wandb cannot begin a run ({shorten(str(error), 200)}). Set WANDB_MODE=offline, or go on without it.") from None


def _mark(folder: Path) -> str:
    """Eight hexadecimal digits that are this step's alone, the same after a stop."""
    note = folder / "tracker.txt"
    if not note.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(note, secrets.token_hex(4))
    return note.read_text(encoding="utf-8")
