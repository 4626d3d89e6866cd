"""llmlite's `distill.whitebox` as TRL is called: the same student, rows, steps and learning rate."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import ROWS_OF_A_STEP, STEPS, run

import llmlite
from llmlite.context import Run
from llmlite.data.prepare import Counts, Prepared
from llmlite.data.text import Rows


def compress(args: argparse.Namespace, windows_NT: torch.Tensor) -> Any:
    from datasets import Dataset

    step = llmlite.DistillWhiteBox(
        teacher=args.model,
        cache=args.method,
        ce_weight=0.0,
        kd_weight=1.0,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=ROWS_OF_A_STEP,
        max_steps=STEPS,
        learning_rate=2e-4,
    )
    run_ = Run(llmlite.Recipe(model=args.student, steps=(step,), seed=args.seed), Path(tempfile.mkdtemp(dir=args.hidden.parent)))
    tokens = windows_NT.numel()
    counts = Counts(len(windows_NT), 0, 0, 0, 0, 0, 0, 0, len(windows_NT), len(windows_NT), tokens, tokens, 1.0)
    rows = windows_NT.tolist()
    run_.__dict__["train_data"] = Prepared(
        Dataset.from_dict({"input_ids": rows, "labels": rows}), Rows("text", [], [], "windows", "train", "", 0), False, counts, "", "", 0
    )
    return step.load(run_)


if __name__ == "__main__":
    run(compress)
