"""All weights, then LoRA, under ZeRO-3 on two CPU processes (`zero3_on_cpu.py`): each holds half, is stopped, goes on, and leaves what one leaves."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from llmlite.recipe import Recipe
from tests.pipeline.split_training import require_equal_weights, require_halves, run_broken_off

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="gloo over loopback as CI has it"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="ZERO-3 IS NOT TESTED HERE: pip install deepspeed, and a C++ compiler"),
]

RECIPE = """
model: {model}
data: {{train: {pairs}, max_length: 64, evaluation_rows: 4}}
steps:
  - {{step: finetune, max_steps: 3, save_steps: 2, per_device_train_batch_size: {batch}, gradient_accumulation_steps: 2, learning_rate: 0.005}}
  - {{step: lora, r: 4, max_steps: 2, per_device_train_batch_size: {batch}}}
"""
ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def folder(pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one/: a plain run. two/: ZeRO-3, broken off after the first checkpoint and started again. sizes/: what each process held."""
    folder = tmp_path_factory.mktemp("zero3")
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"} | ZERO3
    done = run_broken_off(folder, "zero3_on_cpu.py", RECIPE, pairs_file, environment)
    assert "2 processes, ZeRO-3" in done.stdout
    Recipe.from_file(folder / "one.yaml", output_dir=str(folder / "one")).run()
    return folder


@pytest.mark.parametrize("step", ["01-finetune", "02-lora"])
def test_each_process_holds_half_of_every_weight(folder: Path, step: str) -> None:
    require_halves(folder, step)


@pytest.mark.parametrize(("step", "file"), [("01-finetune", "model.safetensors"), ("02-lora", "adapter_model.safetensors")])
def test_stopped_and_continued_it_leaves_the_weights_of_one_process_tied_ones_once(folder: Path, step: str, file: str) -> None:
    require_equal_weights(folder, step, file)
