"""`kill -9` at any moment loses nothing: the same command ends with the same bytes as a run that nobody touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import save_tiny
from tests.pipeline.kills import ALL_IN_ONE, PHASES, PHASES_OF_ALL, RECIPE, campaign, command, environment, launch, rank_killed, small


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, pairs_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    model = save_tiny(folder / "model", intermediate_size=256)
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(model=model, rows=pairs_file))
    return file


def test_a_run_that_is_killed_in_several_phases_ends_with_the_same_bytes(recipe: Path, tmp_path: Path) -> None:
    done = subprocess.run(command(recipe, tmp_path / "whole"), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not [sign for sign in PHASES.values() if sign not in done.stdout + done.stderr]  # every phase has a sign that a run really gives
    found = campaign(recipe, tmp_path / "killed", ["between blocks", "a checkpoint of training"], seed=1, longest=0.5)
    assert len(found.kills) == 2
    for name in ("steps/01-prune.ffn/model.safetensors", "steps/02-distill.whitebox/model.safetensors", "model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_the_recipe_that_does_it_all_goes_on_behind_each_kill(tmp_path: Path, pairs_file: Path) -> None:
    flags = small(save_tiny(tmp_path / "model", intermediate_size=256), pairs_file)
    done = subprocess.run([*command(ALL_IN_ONE, tmp_path / "whole"), *flags], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not [sign for sign in PHASES_OF_ALL.values() if sign not in done.stdout + done.stderr]
    phases = ["trials of where to cut", "tuning of the scales", "the correction"]
    found = campaign(ALL_IN_ONE, tmp_path / "killed", phases, seed=1, longest=0.1, options=flags, signs=PHASES_OF_ALL)
    assert found.kills
    for file in (tmp_path / "whole").rglob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "killed" / file.relative_to(tmp_path / "whole")).read_bytes(), file


TRAINED = """
model: {model}
data: {{train: {rows}, calibration: {rows}, calibration_sequences: 8, max_length: 64, evaluation_rows: 6, max_train_rows: 18, packing: false}}
steps:
  - {{step: prune.weights, sparsity: 0.5}}
  - {{step: finetune, max_steps: 40, save_steps: 4, logging_steps: 1, per_device_train_batch_size: 2, learning_rate: 1e-3}}
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo over loopback as CI has it")
def test_a_launch_that_loses_any_of_its_processes_ends_within_seconds_and_goes_on_to_the_same_weights(
    tmp_path: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    file = tmp_path / "recipe.yaml"
    file.write_text(TRAINED.format(model=save_tiny(tmp_path / "model"), rows=pairs_file))
    done = subprocess.run(launch(file, tmp_path / "whole"), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for sign, rank in (("block 1 of", 1), ("'epoch': '2", 1), ("'epoch': '4", 0)):  # in the walk, and in later epochs of training
        seconds, said = rank_killed(launch(file, tmp_path / "killed"), sign, rank)
        assert sign in said
        assert seconds is not None
        assert seconds < 60
        assert "This is a bug" not in said
        assert not (tmp_path / "killed" / "report.json").exists()
    done = subprocess.run(launch(file, tmp_path / "killed"), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "continuing the training from checkpoint-" in done.stderr
    for step in ("01-prune.weights", "02-finetune"):
        one, two = (load_file(tmp_path / name / "steps" / step / "model.safetensors") for name in ("whole", "killed"))
        assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
