"""The layouts of launches: accelerate reads every file under recipes/accelerate, and what cannot work is refused before it costs anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

import llmlite.plan
from llmlite.context import Run
from llmlite.errors import ConfigError
from llmlite.layout import Layout
from llmlite.recipe import Recipe

FILES = sorted((Path(__file__).parents[2] / "recipes" / "accelerate").glob("*.yaml"))


def environment_of(file: Path) -> dict[str, str]:
    """What accelerate puts into the environment of the processes that it starts with this file."""
    args = launch_command_parser().parse_args(["--config_file", str(file), "--num_processes", "2", "script.py"])
    args, _, _ = _validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = "zero_stage"  # which `accelerate launch` notes between the two
    found = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return dict(found) | {"WORLD_SIZE": "2"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_the_file_and_its_launch_has_the_layout_of_its_name(file: Path) -> None:
    load_config_from_file(str(file))  # refuses unknown keys
    assert (
        file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").removeprefix("ACCELERATE_USE_CPU=1 ").startswith("accelerate launch --config_file")
    )
    layout = Layout.of_launch(environment_of(file))
    assert layout.kind == {"cpu2": "ddp", "fsdp2_qlora": "fsdp2"}.get(file.stem, file.stem)
    assert layout.processes == 2
    assert not [problem for problem in layout.problems(on_accelerators=True) if "which is not installed: pip install deepspeed" not in problem]


@pytest.mark.parametrize(
    ("variables", "word"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "splits nothing on CPUs"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "ZeRO stage 3 is what is built"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "ZeRO-3 splits nothing on CPUs"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, "zero3_init_flag gives"),
    ],
)
def test_a_launch_that_cannot_work_is_refused_by_the_check(variables: dict[str, str], word: str, model_folder: Path, pairs_file: Path) -> None:
    recipe = Recipe.from_options(("test", {"model": str(model_folder), "data": str(pairs_file), "steps": ["finetune"]}))
    context = Run(recipe)
    context.layout = Layout.of_launch({**variables, "WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match=word):
        llmlite.plan.check(recipe, context)


@pytest.mark.parametrize(
    ("kind", "steps", "word"),
    [
        ("zero3", [{"step": "quantize", "scheme": "nf4"}, "lora"], "nf4 under ZeRO-3 is not built"),
        ("fsdp2", [{"step": "quantize", "scheme": "int8"}, "lora"], "int8 under FSDP2 is not built"),
        ("fsdp2", [{"step": "prune.weights", "sparsity": 0.5}, "finetune"], "sparse model under FSDP2 is not built"),
        ("zero3", [{"step": "distill.whitebox", "hidden_weight": 1.0}], "hidden_weight, attention_weight and on_policy"),
    ],
)
def test_steps_that_cannot_be_split_are_refused(
    kind: str, steps: list[object], word: str, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmlite.plan, "_refuse_launch", lambda context: None)
    recipe = Recipe.from_options(("test", {"model": str(model_folder), "data": {"train": str(pairs_file), "max_length": 64}, "steps": steps}))
    context = Run(recipe)
    context.layout = Layout(kind, 2)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=word):
        llmlite.plan.check(recipe, context)


def test_the_plan_says_what_each_device_holds(model_folder: Path, pairs_file: Path) -> None:
    recipe = Recipe.from_options(("test", {"model": str(model_folder), "data": {"train": str(pairs_file), "max_length": 64}, "steps": ["finetune"]}))
    one = llmlite.plan.check(recipe)
    context = Run(recipe)
    context.layout = Layout("ddp", 4)
    four = llmlite.plan.check(recipe, context)
    assert four.peak_bytes == one.peak_bytes  # DDP saves time, no memory
    assert "4 processes, DDP: the whole model" in llmlite.plan.size_line(four)
    assert "\n" not in llmlite.plan.size_line(one)


def test_fsdp2_divides_what_is_trained_and_never_goes_below_the_whole_model() -> None:
    layout = Layout("fsdp2", 4)
    assert layout.peak_bytes(peak=10_000, trained=400, parameters=500, whole=2_000) == 10_000 - 16 * 300
    assert layout.peak_bytes(peak=10_000, trained=600, parameters=700, whole=9_000) == 9_000
    assert layout.peak_bytes(peak=10_000, trained=0, parameters=700, whole=2_000) == 10_000
    assert Layout("ddp", 4).peak_bytes(peak=10_000, trained=400, parameters=500, whole=2_000) == 10_000


@pytest.mark.parametrize("words", [["--num_processes", "2"], ["--num-processes=2"], ["--config_file", str(FILES[0])]], ids=lambda words: words[0])
def test_another_number_of_processes_than_was_asked_for_is_refused(words: list[str]) -> None:
    command = ["python", "/usr/bin/accelerate", "launch", "--cpu", *words, "-m", "llmlite.recipes.lora"]
    assert "started one" in Layout().not_as_asked(command)
    assert not Layout("ddp", 2).not_as_asked(command)
    assert "asked for 2 processes and started 3. WORLD_SIZE=3" in Layout("ddp", 3).not_as_asked(command)
    assert not Layout().not_as_asked([*command[:3], "--num_processes", "1"])
    assert "asked for 1 process and started 2." in Layout("ddp", 2).not_as_asked([*command[:3], "--num_processes", "1"])
    assert not Layout().not_as_asked(["python", "/usr/bin/accelerate", "launch", "-m", "llmlite.recipes.lora"])
    assert not Layout().not_as_asked(["bash", "run.sh", *words])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the parent's command is read from /proc")
def test_what_accelerate_starts_on_a_cpu_when_it_was_asked_for_two_is_refused(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    started = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2", "-m", "llmlite.recipes.lora"]
    options = ["--model", str(model_folder), "--data", str(pairs_file), "--output_dir", str(tmp_path / "out"), "--dry_run"]
    done = subprocess.run([*started, *options], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "accelerate was asked for 2 processes and started one. On CPUs: ACCELERATE_USE_CPU=1" in done.stderr
    assert not (tmp_path / "out").exists()
