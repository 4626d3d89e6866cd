"""A disk that is full, cannot be written or belongs to another run: one message, and the same command ends with the same weights."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from llmlite.cli import main
from llmlite.evaluation.speed import Speed
from llmlite.kept import Kept
from llmlite.report import Report
from llmlite.storage import locked

RECIPE = """
model: {model}
data: {{train: {rows}, max_length: 64, evaluation_rows: 2}}
steps:
  - step: finetune
    max_steps: 4
    save_steps: 2
    logging_steps: 1
    per_device_train_batch_size: 2
    learning_rate: 1e-3
    lr_scheduler_type: constant
"""


@pytest.fixture(scope="module", autouse=True)
def _only_weights_matter() -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("llmlite.evaluation.reload.require_reload", lambda model, lines: 0.0)
        patched.setattr("llmlite.evaluation.speed.measure_speed", lambda model: Speed(1.0, 1.0))
        patched.setattr("llmlite.evaluation.sample.sample", lambda *_: {"prompt": "", "expected": "", "answer": ""})
        yield


@pytest.fixture(scope="module")
def recipe(model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("refused") / "recipe.yaml"
    file.write_text(RECIPE.format(model=model_folder, rows=pairs_file), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    main(["run", str(recipe), "--output_dir", str(out)])
    return out


def run_refused(recipe: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one message with which a run ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["run", str(recipe), "--output_dir", str(out)])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "Traceback" not in said
    assert "This is a bug" not in said
    assert said.count("Error: ") == 1
    return said[said.index("Error: ") :]


def test_a_second_run_is_refused_and_touches_nothing(whole: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def state() -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(whole.rglob("*")) if path.name != ".lock"}

    before = state()
    with locked(whole):
        assert "another run is working in" in run_refused(recipe, whole, capsys)
    assert state() == before


def test_a_disk_that_refuses_a_checkpoint_or_a_step_costs_nothing(
    whole: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"

    def refusal(number: int, folder: Path) -> OSError:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "half").write_bytes(b"half")  # what was still written
        return OSError(number, os.strerror(number), str(folder / "model.safetensors"))

    def checkpoint(self: Any, *_: Any, **__: Any) -> None:
        raise refusal(number, Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def step(self: Any, model: Any, folder: Path) -> None:
        raise refusal(number, folder)

    words = {errno.ENOSPC: "out.*: the disk is full. Free some space", errno.EROFS: r"out.*: cannot be written.*\(Read-only file system\)"}
    for cls, name, refuses in ((Trainer, "_save_checkpoint", checkpoint), (Kept, "save", step)):
        for number in words:
            with monkeypatch.context() as patched:
                patched.setattr(cls, name, refuses)
                message = run_refused(recipe, out, capsys)
            assert re.search(words[number], message), message
            assert not (out / "steps" / "01-finetune").exists()
    assert "checkpoint-2 is damaged (it was never finished); set aside as checkpoint-2.damaged-1" in caplog.text
    main(["run", str(recipe), "--output_dir", str(out)])
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    one, other = (Report.read(folder).rows[-1].details["train_loss"] for folder in (whole, out))
    assert [entry["step"] for entry in one] == [entry["step"] for entry in other] == [1, 2, 3, 4]  # a run that only could not be saved trains no further
    assert sorted(path.name for path in (out / "steps").iterdir()) == ["00-base", "01-finetune"]


def test_a_report_that_was_cut_is_written_again(whole: Path, recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = whole / "report.json"
    before = file.read_text(encoding="utf-8")
    file.write_text(before[: len(before) // 2], encoding="utf-8")
    main(["run", str(recipe), "--output_dir", str(whole)])
    assert "report.json is damaged" in caplog.text
    assert file.read_text(encoding="utf-8") == before
