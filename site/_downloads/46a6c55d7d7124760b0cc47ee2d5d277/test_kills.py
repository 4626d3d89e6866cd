"""`kill -9` at any moment loses nothing: the same command ends with the same bytes as a run that nobody touched."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import save_tiny
from tests.pipeline.kills import PHASES, RECIPE, campaign, command, environment


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
