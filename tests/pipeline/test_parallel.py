"""What several processes make is what one makes: calibration, distillation and evaluation over gloo, and a rank that fails."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmlite.recipe import Recipe
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


def torchrun(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Two CPU processes over gloo."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", **variables}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run([*start, *command], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def one_and_two(model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same recipe on one process with batch 4 and on two with batch 2."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, batch in (("one", 4), ("two", 2)):
        (folder / f"{name}.yaml").write_text(RECIPE.format(model=model_folder, pairs=pairs_file, batch=batch), encoding="utf-8")
    done = torchrun("-m", "llmlite", "run", str(folder / "two.yaml"), "--output_dir", str(folder / "two"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The plan") == 1
    assert "2 processes, DDP: the whole model" in done.stdout
    Recipe.from_file(folder / "one.yaml", output_dir=str(folder / "one")).run()
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


FAILING = """
from llmlite.config import settings
from llmlite.errors import ResourceError
from llmlite.step import Step

@settings
class Fails(Step):
    '''Fails on the second process while the first waits for it.'''

    def check(self, model, run):
        return model

    def apply(self, model, run):
        if not run.is_main:
            raise ResourceError("the second device is full. Lower max_length.")
        run.wait()
        return model
"""


def test_a_process_that_fails_ends_the_run_at_once_with_its_own_message_first(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING, encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(
        f"model: {model_folder}\ndata: {{train: {pairs_file}, max_length: 64, evaluation_rows: 2}}\nsteps: [{{step: 'failing:Fails'}}]\n", encoding="utf-8"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    started = time.monotonic()
    done = torchrun("-m", "llmlite", "run", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "out"), PYTHONPATH=path)
    assert time.monotonic() - started < 120  # the start of two interpreters included; the wait of a barrier alone would be 30 minutes
    assert done.returncode != 0
    spoken = [line for line in done.stderr.splitlines() if line.startswith("[process ")]
    assert spoken[0] == "[process 1] ResourceError: the second device is full. Lower max_length."
    assert all("another process of the launch has ended" in line for line in spoken[1:])
    assert "This is a bug" not in done.stderr
    assert not (tmp_path / "out" / "steps" / "01-Fails").exists()
