"""All weights, then LoRA, under ZeRO-3 on two CPU processes (`zero3_on_cpu.py`): each holds half, is stopped, goes on, and leaves what one leaves."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llmlite.recipe import Recipe
from tests.conftest import save_tiny

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
    model = save_tiny(folder / "tied", tie_word_embeddings=True)
    for name, batch in (("one", 4), ("two", 2)):
        (folder / f"{name}.yaml").write_text(RECIPE.format(model=model, pairs=pairs_file, batch=batch), encoding="utf-8")
    (folder / "sizes").mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(Path(__file__).with_name("zero3_on_cpu.py"))]
    command = [*torchrun, str(folder / "sizes"), "run", str(folder / "two.yaml"), "--output_dir", str(folder / "two")]
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"} | ZERO3
    done = subprocess.run(command, env={**environment, "STOP_AT_STEP": "2"}, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("broken off") == 2
    assert "continuing the training from checkpoint-2" in done.stderr
    assert "2 processes, ZeRO-3" in done.stdout
    Recipe.from_file(folder / "one.yaml", output_dir=str(folder / "one")).run()
    return folder


@pytest.mark.parametrize("step", ["01-finetune", "02-lora"])
def test_each_process_holds_half_of_every_weight(folder: Path, step: str) -> None:
    for rank in (0, 1):
        sizes = json.loads((folder / "sizes" / f"{step}.work-{rank}.json").read_text(encoding="utf-8"))
        assert len(sizes) > 20
        assert all(2 * local == whole for whole, local in sizes.values())


@pytest.mark.parametrize(("step", "file"), [("01-finetune", "model.safetensors"), ("02-lora", "adapter_model.safetensors")])
def test_stopped_and_continued_it_leaves_the_weights_of_one_process_tied_ones_once(folder: Path, step: str, file: str) -> None:
    one, two = (load_file(folder / name / "steps" / step / file) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert "lm_head.weight" not in two
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
