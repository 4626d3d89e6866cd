"""All weights, towards a teacher that is split as well, then LoRA on NF4 and on 16 bit, under FSDP2 on two CPU processes (`fsdp2_on_cpu.py`).

Each process holds half, is stopped, goes on, and leaves what one leaves."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from llmlite.recipe import Recipe
from tests.pipeline.split_training import require_equal_weights, require_halves, run_broken_off

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo over loopback as CI has it")

FINETUNED = """
model: {model}
data: {{train: {pairs}, max_length: 64, evaluation_rows: 4}}
steps:
  - {{step: finetune, max_steps: 3, save_steps: 2, per_device_train_batch_size: {batch}, learning_rate: 0.005}}
"""
RECIPE = (
    FINETUNED
    + """\
  - {{step: distill.whitebox, cache: none, max_steps: 2, per_device_train_batch_size: {batch}, learning_rate: 0.005}}
  - {{step: quantize, scheme: nf4, calibrate: false, report_sequences: 0}}
  - {{step: lora, r: 4, max_steps: 2, per_device_train_batch_size: {batch}, init_lora_weights: default}}
  - {{step: merge}}
  - {{step: lora, r: 4, max_steps: 2, per_device_train_batch_size: {batch}, gradient_accumulation_steps: 2, learning_rate: 0.005}}
evaluate: {{each_step: false, batch_sizes: [1], repeats: 1, answers: 1}}
"""
)
FSDP2 = {
    "ACCELERATE_USE_CPU": "1",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def folder(pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one/: a plain run. two/: FSDP2, broken off after the first checkpoint and started again. sizes/: what each process held."""
    folder = tmp_path_factory.mktemp("fsdp2")
    done = run_broken_off(folder, "fsdp2_on_cpu.py", RECIPE, pairs_file, {**os.environ, **FSDP2})
    assert "2 processes, FSDP2" in done.stdout
    assert done.stderr.count("measuring the base and 1 reloaded model") == 1
    with pytest.MonkeyPatch.context() as patched:  # the other result was loaded in a fresh process; each costs seconds
        patched.setattr("llmlite.evaluation.reload.require_reload", lambda model, lines: 0.0)
        Recipe.from_file(folder / "one.yaml", output_dir=str(folder / "one")).run()
    return folder


@pytest.mark.parametrize("step", ["01-finetune", "02-distill.whitebox", "04-lora", "06-lora"])
def test_each_process_holds_half_of_every_weight(folder: Path, step: str) -> None:
    require_halves(folder, step)


def test_the_teacher_is_split_as_well_but_for_what_lies_outside_of_its_blocks(folder: Path) -> None:
    for rank in (0, 1):
        sizes = json.loads((folder / "sizes" / f"teacher-{rank}.json").read_text(encoding="utf-8"))
        inside = [size for name, size in sizes.items() if ".layers." in name]
        assert len(inside) > 20
        assert all(2 * local == whole for whole, local in inside)
        assert all(local == whole for name, (whole, local) in sizes.items() if ".layers." not in name)


@pytest.mark.parametrize(
    ("step", "file"),
    [
        ("01-finetune", "model.safetensors"),
        ("02-distill.whitebox", "model.safetensors"),
        ("04-lora", "adapter_model.safetensors"),
        ("06-lora", "adapter_model.safetensors"),
    ],
)
def test_stopped_and_continued_it_leaves_the_weights_of_one_process_tied_ones_once(folder: Path, step: str, file: str) -> None:
    require_equal_weights(folder, step, file)


def test_the_result_is_measured_by_one_process_as_without_a_launch(folder: Path) -> None:
    one, two = (json.loads((folder / name / "evaluation.json").read_text(encoding="utf-8"))["models"] for name in ("one", "two"))
    assert list(one) == list(two) == ["base", "this"]
    for name, model in two.items():
        assert model["perplexity"] == pytest.approx(one[name]["perplexity"], rel=1e-3)
        assert [len(model["latency"]), len(model["answers"])] == [1, 1]
