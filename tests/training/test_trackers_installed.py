"""wandb (offline) and trackio (its local files), really installed: one run for each step that trains, the same one after a stop, no key in any file."""

from __future__ import annotations

import json
import os
import re
import socket
import sqlite3
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llmlite
from llmlite.errors import ConfigError, Interrupted
from llmlite.hub.public import result_files
from llmlite.report import Report
from llmlite.training.checkpoints import StopRequest
from tests.training.test_trackers import recipe

KEY, TOKEN = "5f" * 20, "hf_" + "Qz" * 17


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home of one's own, secrets in the environment, and no way out of this machine."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    for name, value in {"HOME": str(tmp_path / "home"), "WANDB_API_KEY": KEY, "HF_TOKEN": TOKEN, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] in {"127.0.0.1", "::1", "localhost"}, f"somebody calls {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
    monkeypatch.setattr("llmlite.pipeline._Pipeline._finish", lambda self: None)
    monkeypatch.setattr("llmlite.pipeline._Pipeline._sample", lambda self, model: {})
    monkeypatch.setattr("llmlite.evaluation.speed.measure_speed", lambda model: None)


def two_steps(model_folder: Path, pairs_file: Path, out: Path, tracker: str) -> llmlite.Recipe:
    """Two steps that train, of two and of three optimizer steps."""
    steps = [llmlite.Finetune(max_steps=n, logging_steps=1, save_steps=1, per_device_train_batch_size=2, report_to=tracker) for n in (2, 3)]
    data = llmlite.Data(train=str(pairs_file), max_length=64, evaluation_rows=4)
    return llmlite.Recipe(model=str(model_folder), data=data, steps=steps, output_dir=str(out))


def losses(report: Report) -> list[list[tuple[int, float]]]:
    return [[(entry["step"], pytest.approx(entry["loss"], rel=1e-6)) for entry in row.details["train_loss"]] for row in report.rows[1:]]


def stopping_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let training stop as by Ctrl-C behind so many optimizer steps."""
    ends = StopRequest.on_step_end

    def stop(self: StopRequest, args: Any, state: Any, control: Any, **more: Any) -> Any:
        self.asked = self.asked or state.global_step == steps
        return ends(self, args, state, control, **more)

    monkeypatch.setattr(StopRequest, "on_step_end", stop)


def holders_of_secrets(*roots: Path) -> list[Path]:
    files = [file for root in roots for file in root.rglob("*") if file.is_file() and file.suffix != ".safetensors"]
    assert files
    return [file for file in files if any(secret.encode() in file.read_bytes() for secret in (KEY, TOKEN))]


# wandb --------------------------------------------------------------------------------------------------------------------------------


def records(file: Path) -> Iterator[Any]:
    """What wandb wrote, in order: LevelDB's log format behind a header of seven bytes, blocks of 32 KiB, each record a protocol buffer."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def read_wandb(file: Path) -> tuple[str, str, dict[str, Any], list[tuple[int, float]]]:
    """Id and name of a run, its config, and (optimizer step, loss)."""
    name, run_id, config, curve = "", "", {}, []
    for record in records(file):
        if record.WhichOneof("record_type") == "run":
            name, run_id = record.run.display_name, record.run.run_id
        config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        logged = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        if "train/loss" in logged:
            curve.append((int(logged["train/global_step"]), logged["train/loss"]))
    return run_id, name, config, curve


def wandb_files(out: Path) -> list[Path]:
    return sorted((out / "runs").rglob("*.wandb"))


def test_wandb_gets_a_run_for_each_step_that_trains_beside_the_result_and_never_uploaded(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    out = tmp_path / "out"
    report = two_steps(model_folder, pairs_file, out, "wandb").run()
    assert wandb.run is None
    first, second = wandb_files(out)
    assert [file.relative_to(out).parts[:3] for file in (first, second)] == [("runs", "01-finetune", "wandb"), ("runs", "02-finetune", "wandb")]
    found = [read_wandb(file) for file in (first, second)]
    assert [name for _, name, _, _ in found] == ["out, 01-finetune", "out, 02-finetune"]
    assert found[0][0] != found[1][0]
    assert [curve for *_, curve in found] == losses(report)
    assert [config["max_steps"] for _, _, config, _ in found] == [2, 3]
    assert found[0][2]["hidden_size"] == 64
    assert not holders_of_secrets(out, tmp_path / "home")
    assert not (tmp_path / "wandb").exists()  # the working folder
    ours, others = result_files(out)
    assert not any("runs" in path.parts for path in ours + others)


def test_a_stopped_step_goes_on_in_the_same_run_of_wandb(model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    out = tmp_path / "out"
    made = two_steps(model_folder, pairs_file, out, "wandb")
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        stopping_after(1, patched)
        made.run()
    assert wandb.run is None
    report = made.run()
    before, after = (read_wandb(file) for file in sorted((out / "runs" / "01-finetune").rglob("*.wandb"), key=lambda file: file.stat().st_mtime_ns))
    assert before[0] == after[0]
    assert before[-1] + after[-1] == losses(report)[0]


def test_a_run_of_wandb_that_somebody_has_open_is_theirs(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    with wandb.init(project="mine", name="mine", dir=str(tmp_path)) as mine:
        recipe(model_folder, pairs_file, tmp_path / "out", report_to="wandb").run()
        assert wandb.run is mine
    assert not wandb_files(tmp_path / "out")


def test_wandb_without_a_key_is_named_before_anything_is_done(model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    wandb.teardown()
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError, match="report_to: wandb has no key here.*WANDB_MODE=offline"):
        recipe(model_folder, pairs_file, tmp_path / "out", report_to="wandb").run()
    assert not (tmp_path / "out").exists()
    wandb.teardown()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    recipe(model_folder, pairs_file, tmp_path / "out", report_to="wandb").check()
    wandb.teardown()


# trackio ------------------------------------------------------------------------------------------------------------------------------


def test_trackio_gets_a_run_for_each_step_that_trains_and_a_stopped_one_goes_on(
    model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackio")
    place = tmp_path / "trackio"
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "trackio" and hasattr(module, "TRACKIO_DIR"):  # read from the environment when first imported
            monkeypatch.setattr(module, "TRACKIO_DIR", place)
    made = two_steps(model_folder, pairs_file, tmp_path / "out", "trackio")
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        stopping_after(1, patched)
        made.run()
    report = made.run()
    recipe(model_folder, pairs_file, tmp_path / "elsewhere" / "out", report_to="trackio").run()  # a folder of the same name
    with sqlite3.connect(place / "huggingface.db") as database:
        rows = database.execute("select run_name, metrics from metrics order by id").fetchall()
        configs = dict(database.execute("select run_name, config from configs").fetchall())
    curves: dict[str, list[tuple[int, float]]] = {}
    for name, metrics in rows:
        logged = json.loads(metrics)
        if "train/loss" in logged:
            curves.setdefault(name, []).append((logged["train/global_step"], logged["train/loss"]))
    assert [re.sub(r" [0-9a-f]{8}$", "", name) for name in curves] == ["out, 01-finetune", "out, 02-finetune", "out, 01-finetune"]
    assert list(curves.values())[:2] == losses(report)
    assert [json.loads(configs[name])["max_steps"] for name in curves] == [2, 3, 2]
    assert not holders_of_secrets(place)
