"""Trackers that the Trainer reports to: what they write stays with the run, and one that is not there is named before anything is done."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

import llmlite
from llmlite.errors import ConfigError
from llmlite.hub.public import result_files


def recipe(model_folder: Path, pairs_file: Path, out: Path, **options: Any) -> llmlite.Recipe:
    step = llmlite.Finetune(max_steps=2, logging_steps=1, per_device_train_batch_size=2, **options)
    data = llmlite.Data(train=str(pairs_file), max_length=64, evaluation_rows=4)
    return llmlite.Recipe(model=str(model_folder), data=data, steps=[step], output_dir=str(out))


def test_what_tensorboard_writes_stays_with_the_run_and_is_never_uploaded(
    model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("llmlite.pipeline._Pipeline._finish", lambda self: None)
    monkeypatch.setattr("llmlite.pipeline._Pipeline._sample", lambda self, model: {})
    monkeypatch.setattr("llmlite.evaluation.speed.measure_speed", lambda model: None)
    report = recipe(model_folder, pairs_file, tmp_path / "out", report_to="tensorboard").run()
    assert not (tmp_path / "out" / "steps" / "01-finetune.work").exists()
    events = EventAccumulator(str(tmp_path / "out" / "runs" / "01-finetune")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([entry["loss"] for entry in report.rows[1].details["train_loss"]])
    ours, others = result_files(tmp_path / "out")
    assert not any("runs" in path.parts for path in ours + others)
    recipe(model_folder, pairs_file, tmp_path / "out").check()  # the same run, whoever is told of it
    assert "report_to" not in (tmp_path / "out" / "recipe.yaml").read_text()


def test_a_tracker_that_is_not_known_or_not_installed_is_named_before_anything_is_done(
    model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"steps\[0\] finetune: report_to: transformers knows no tracker 'tensorbord'. Did you mean 'tensorboard'\?") as found:
        recipe(model_folder, pairs_file, tmp_path / "out", report_to="tensorbord").run()
    assert found.value.exit_code == 2
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in {"wandb", "trackio"} else find_spec(name, *rest))
    for name in ("wandb", "trackio"):
        with pytest.raises(ConfigError, match=rf"report_to: '{name}' cannot be used here: .*requires {name} to be installed"):
            recipe(model_folder, pairs_file, tmp_path / "out", report_to=["tensorboard", name]).run()
    assert not (tmp_path / "out").exists()
