"""Distilling towards the base: the student comes nearer, the teacher stays, the result is stock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llmlite
from llmlite.config import settings
from llmlite.errors import ConfigError
from llmlite.step import ModelPlan, Step


@settings
class Noise(Step):
    """Damage every weight a little, so that there is something to heal."""

    amount: float = 0.3
    """Standard deviation, relative to the weight's own."""

    def check(self, model: ModelPlan, run: Any) -> ModelPlan:
        """Nothing changes its shape."""
        return model

    def apply(self, model: Any, run: Any) -> Any:
        """Add noise."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter += self.amount * parameter.std() * torch.randn(parameter.shape, generator=generator)
        return model


def run(model: Path, data: Path, out: Path, *steps: Step) -> Any:
    recipe = llmlite.Recipe(
        model=str(model), data=llmlite.Data(train=str(data), max_length=64, evaluation_rows=6), steps=[Noise(), *steps], output_dir=str(out)
    )
    return recipe.run()


def test_distilling_brings_a_damaged_model_nearer_to_the_base(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    step = llmlite.DistillWhiteBox(max_steps=12, learning_rate=3e-3, ce_weight=0.0, kd_weight=1.0, per_device_train_batch_size=4)
    report = run(model_folder, pairs_file, tmp_path / "out", step)
    _, damaged, healed = report.rows
    assert healed.kl < 0.5 * damaged.kl
    assert report.reload_difference < 1e-4


def test_finetuning_all_weights_lowers_the_perplexity(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    report = run(model_folder, pairs_file, tmp_path / "out", llmlite.Finetune(max_steps=12, learning_rate=3e-3))
    assert report.rows[2].perplexity < 0.8 * report.rows[1].perplexity


def test_a_step_with_nothing_to_learn_is_refused(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    recipe = llmlite.Recipe(
        model=str(model_folder), data=str(pairs_file), max_length=64, steps=[llmlite.DistillWhiteBox(ce_weight=0, kd_weight=0)], output_dir=str(tmp_path / "x")
    )
    with pytest.raises(ConfigError, match="nothing to learn"):
        recipe.check()
