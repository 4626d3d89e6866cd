"""What several processes make is what one makes: calibration, distillation and evaluation over gloo, and a rank that fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmlite.report import Report, Row

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo over loopback as CI has it")

RECIPE = """
model: {model}
data: {{train: {pairs}, max_length: 64, evaluation_rows: 18, calibration: {pairs}, calibration_sequences: 8}}
steps:
  - step: quantize
    scheme: nf4
  - step: distill.whitebox
    cache: none
    adapter: {{step: lora, r: 4}}
    max_steps: 3
    per_device_train_batch_size: {batch}
    gradient_accumulation_steps: 2
    learning_rate: 0.01
"""


def launch(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    return subprocess.run([sys.executable, *torchrun, *command], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def one_and_two(model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same recipe on one process with batch 4 and on two with batch 2."""
    folder = tmp_path_factory.mktemp("parallel")
    for processes, name in ((1, "one"), (2, "two")):
        (folder / f"{name}.yaml").write_text(RECIPE.format(model=model_folder, pairs=pairs_file, batch=4 // processes), encoding="utf-8")
        done = launch(processes, "-m", "llmlite", "run", str(folder / f"{name}.yaml"), "--output_dir", str(folder / name))
        assert done.returncode == 0, done.stderr[-3000:]
    return folder / "one", folder / "two"


def rows(out: Path) -> list[Row]:
    return Report.read(out).rows


def test_calibrated_codes_are_those_of_one_process(one_and_two: tuple[Path, Path]) -> None:
    one, two = (load_file(out / "steps" / "01-quantize" / "model.safetensors") for out in one_and_two)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_distilled_adapter_is_that_of_one_process(one_and_two: tuple[Path, Path]) -> None:
    one, two = (load_file(out / "adapter_model.safetensors") for out in one_and_two)
    assert one.keys() == two.keys()
    assert max(float(one[name].abs().max()) for name in one if "lora_B" in name) > 1e-3  # it learnt something
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4


def test_rows_measured_by_several_processes_give_the_figures_of_one(one_and_two: tuple[Path, Path]) -> None:
    for one, two in list(zip(*map(rows, one_and_two), strict=True))[:2]:  # the third model was trained, and differs in its last digits
        assert two.perplexity == pytest.approx(one.perplexity, rel=1e-9)
        assert two.kl == (None if one.kl is None else pytest.approx(one.kl, rel=1e-6))
        assert two.top1_agreement == one.top1_agreement
    assert rows(one_and_two[0])[0].details["tokens"] == rows(one_and_two[1])[0].details["tokens"]
    one, two = (load_file(out / "steps" / "00-base" / "reference.safetensors") for out in one_and_two)
    assert torch.equal(one["hidden"], two["hidden"])
