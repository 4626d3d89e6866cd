"""Recipes of a few steps on a tiny model, for the tests that measure what every step left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llmlite

PRUNED = [
    {"step": "prune.ffn", "keep": 0.5, "multiple_of": 1, "score": "magnitude", "reconstruct": False},
    {"step": "prune.weights", "method": "magnitude", "sparsity": 0.7},
]
LORA = {"step": "lora", "max_steps": 2, "r": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01}


def options(model: Path, pairs: Path, out: Path, steps: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"model": str(model), "data": {"train": str(pairs), "max_length": 64, "evaluation_rows": 6}, "output_dir": str(out), "steps": steps, **more}


def recipe_of(*given: Any, **more: Any) -> llmlite.Recipe:
    return llmlite.Recipe.from_options(("options", options(*given, **more)))
