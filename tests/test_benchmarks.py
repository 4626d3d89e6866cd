"""The benchmarks' scripts start, and a run of some rows takes no others out of the table."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda script: script.stem)
def test_a_script_says_what_it_takes(script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {script.name}")


@pytest.fixture
def kept_rows(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    monkeypatch.syspath_prepend(str(FOLDER))
    found: Callable[..., dict[str, Any]] = runpy.run_path(str(FOLDER / "peers.py"))["kept_rows"]
    return found


def test_rows_that_do_not_run_stay_where_the_texts_are_the_same(kept_rows: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    out, about, rows = tmp_path / "peers.json", {"seed": 0, "calibration": "a.txt"}, ["ours", "theirs", "another"]
    assert kept_rows(out, about, rows, ["ours"]) == {}
    out.write_text(json.dumps({**about, "table": {"dense": {}, "ours": {"bytes": 1}, "theirs": {"bytes": 2}, "of old": {}}}))
    assert kept_rows(out, about, rows, ["ours"]) == {"theirs": {"bytes": 2}}
    assert kept_rows(out, {**about, "seed": 1}, rows, rows) == {}
    with pytest.raises(SystemExit, match=r"holds theirs, measured otherwise \(seed: 0 there, 1 now\)"):
        kept_rows(out, {**about, "seed": 1}, rows, ["ours"])


@pytest.mark.parametrize("more", [(), ("ENVS=envs",)])
def test_bench_all_runs_every_script_and_task_that_there_is(more: tuple[str, ...]) -> None:
    command = ["make", "-n", "bench-all", "TRAIN=train.txt", "TEST=test.txt", *more]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    in_loop = told.partition("for each in ")[2].partition(";")[0].split()
    assert not [script.stem for script in FOLDER.glob("*.py") if f"benchmarks/{script.name}" not in told and script.stem not in in_loop]
    assert set(told.partition("for task in ")[2].partition(";")[0].split()) == {"quantization", "sparsity", "structured", "distillation"}
    assert ("--envs envs" in told) == bool(more)
    assert ("--out outputs/bench-peers-" in told) == (not more)  # which leaves the rows of the peers where they are


def test_every_environment_of_the_peers_pins_what_loads_its_models() -> None:
    for name, packages in runpy.run_path(str(FOLDER / "peers" / "environments.py"))["PEERS"].items():
        assert all("==" in package for package in packages), name
        assert {"transformers", "accelerate"} <= {package.partition("==")[0] for package in packages}, name
