"""Real launches: Ctrl-C on a running process, and two processes over gloo."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llmlite.report import Report
from llmlite.training.checkpoints import newest_complete

FLAGS = ["--max_length", "64", "--evaluation_rows", "4", "--lora_r", "4", "--save_steps", "1000", "--logging_steps", "1"]


def command(model_folder: Path, pairs_file: Path, out: Path, *more: str) -> list[str]:
    return ["-m", "llmlite.recipes.lora", "--model", str(model_folder), "--data", str(pairs_file), "--output_dir", str(out), *FLAGS, *more]


def test_ctrl_c_leaves_a_checkpoint_and_prints_the_command_that_continues(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, *command(model_folder, pairs_file, out, "--max_steps", "100000")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    work = out / "steps" / "01-lora.work" / "trainer"
    deadline = time.monotonic() + 240
    while not (work / "rows.txt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(3)  # into the training loop
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    assert f"To continue:\n  python -m llmlite.recipes.lora --model {model_folder}" in err
    assert "Traceback" not in err
    assert newest_complete(work) is not None


@pytest.mark.skipif(sys.platform != "linux", reason="gloo over loopback as CI has it")
def test_two_processes_train_the_same_adapter_as_one_with_the_same_global_batch(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517"]
    two = subprocess.run(
        [*torchrun, *command(model_folder, pairs_file, tmp_path / "two", "--max_steps", "3", "--per_device_train_batch_size", "2")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert two.returncode == 0, two.stderr[-3000:]
    one = subprocess.run(
        [sys.executable, *command(model_folder, pairs_file, tmp_path / "one", "--max_steps", "3", "--per_device_train_batch_size", "4")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert one.returncode == 0, one.stderr[-3000:]
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-5
    losses = [[entry["loss"] for entry in Report.read(tmp_path / name).rows[-1].details["train_loss"]] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert two.stdout.count("The plan") == 1
