"""Tuning of scales that is stopped: it goes on where it was, towards the dense model, and ends in the bits of one that nobody stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmlite.calibration.blocks import Blocks, batches_of
from llmlite.distillation import descent, descent_state
from llmlite.distillation.descent import Descent
from llmlite.distillation.descent_state import DescentState
from llmlite.quantization import calibrate as calibrate_module
from llmlite.quantization.calibrate import CalibratedScheme, calibrate
from tests.conftest import build_tiny, logits_of, token_ids
from tests.pipeline.kills import environment

ROWS, EPOCHS = 8, 2
STEPS = ROWS * EPOCHS


pytestmark = pytest.mark.usefixtures("kept_each_step")


def scheme(**options: Any) -> CalibratedScheme:
    return CalibratedScheme(double_quant=options.pop("double_quant", False), tune=Descent(**{"learning_rate": 2e-3, "epochs": EPOCHS, **options}))


def run(place: Path, how: CalibratedScheme, seed: int = 5, family: str = "llama") -> Tensor:
    """A calibration from the dense model, as a run and its resume begin; what the model says afterwards."""
    model = build_tiny(family)
    calibrate(model, batches_of(token_ids(rows=ROWS, length=32, seed=seed)), how, place / "codes", place / "walk")
    return logits_of(model)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration that nobody stops."""
    place = tmp_path_factory.mktemp("whole")
    run(place, scheme())
    return place


def codes_of(place: Path) -> dict[str, Tensor]:
    return {f"{file.name}/{name}": tensor for file in sorted((place / "codes" / "tuned").glob("*.safetensors")) for name, tensor in load_file(file).items()}


def require_same(one: Path, other: Path) -> None:
    ours, theirs = codes_of(one), codes_of(other)
    assert len({name.split("/")[0] for name in ours}) == 21
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("family", "double_quant"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_tuning_stopped_several_times_ends_in_the_same_bits(
    tmp_path: Path, descents: Any, family: str, double_quant: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "llmlite")
    whole = run(tmp_path / "whole", scheme(double_quant=double_quant), family=family)
    for stop in (1, 4, 9):  # steps behind which the run is stopped, the last in the second epoch
        descents(stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", scheme(double_quant=double_quant), family=family)
    assert not (tmp_path / "stopped" / "codes" / "tuned").exists()
    calls = descents(None)
    logits = run(tmp_path / "stopped", scheme(double_quant=double_quant), family=family)
    assert len(calls) == STEPS - 14
    assert "scales: continuing behind step 14 of 16" in caplog.messages
    assert torch.equal(logits, whole)
    ours, theirs = codes_of(tmp_path / "stopped"), codes_of(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert len(list((tmp_path / "stopped" / "walk").glob("tuning-*"))) == 1  # older states are gone


CHILD = """
import os, signal, sys
from pathlib import Path
from llmlite.distillation import descent, descent_state
from tests.quantization.test_tune_state import run, scheme
descent_state.KEEP_SECONDS, descent_state.KEEP_SHARE = 0.0, float("inf")
place, stop = Path(sys.argv[1]), int(sys.argv[2])
real, calls = descent._descend, []
def descend(*args):
    if len(calls) == stop:
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(1)
    return real(*args)
descent._descend = descend
run(place, scheme())
print(len(calls))
"""


def test_tuning_killed_in_a_process_of_its_own_ends_in_the_same_bits_in_another(tmp_path: Path, whole: Path) -> None:
    def child(name: str, stop: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", CHILD, str(tmp_path / name), str(stop)]
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums in another order are others
        return subprocess.run(command, env=environment() | threads, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])

    assert child("killed", 5).returncode == -signal.SIGKILL
    done = child("killed", -1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(STEPS - 5)]
    require_same(tmp_path / "killed", whole)


@pytest.mark.parametrize("kept", [True, False], ids=["hidden states kept", "hidden states lost"])
def test_stopped_between_walk_and_tuning_it_still_aims_at_the_dense_model(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(calibrate_module, "tune_scales", lambda *_args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", scheme())
    folders = sorted((tmp_path / "stopped" / "walk").glob("hidden-*"))
    assert len(folders) == 4  # one for each batch
    if not kept:  # then they come from the dense base, which a resumed run loads again
        for folder in folders:
            (folder / "kept.safetensors").unlink()
    else:
        monkeypatch.setattr(descent, "last_hidden", lambda *_args: pytest.fail("computed again"))
    monkeypatch.setattr(calibrate_module, "quick_sensitivity", lambda *_args: pytest.fail("computed again"))
    monkeypatch.setattr(Blocks, "advance", lambda *_args: pytest.fail("walked through blocks that are all complete"))
    run(tmp_path / "stopped", scheme())
    require_same(tmp_path / "stopped", whole)


def test_a_damaged_state_is_set_aside_and_tuning_starts_at_its_beginning(tmp_path: Path, whole: Path, descents: Any, caplog: pytest.LogCaptureFixture) -> None:
    descents(6)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", scheme())
    file = tmp_path / "stopped" / "walk" / "tuning-000006" / "kept.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    calls = descents(None)
    run(tmp_path / "stopped", scheme())
    assert len(calls) == STEPS
    assert any(one.startswith("tuning-000006 is damaged (kept.safetensors has ") and "set aside as tuning-000006.damaged-1" in one for one in caplog.messages)
    require_same(tmp_path / "stopped", whole)


@pytest.mark.parametrize("other", [{"seed": 3}, {"learning_rate": 1e-3}, {"epochs": 1}])
def test_the_state_of_other_settings_is_not_used(tmp_path: Path, whole: Path, descents: Any, other: dict[str, Any]) -> None:
    descents(6)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", scheme(**other))
    calls = descents(None)
    run(tmp_path / "stopped", scheme())
    assert len(calls) == STEPS
    require_same(tmp_path / "stopped", whole)


def test_the_state_of_other_codes_or_rows_is_not_used(tmp_path: Path, descents: Any) -> None:
    descents(6)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, scheme())
    for block in (tmp_path / "walk").glob("block-*"):  # the walk alone is done again, on other rows
        (block / "manifest.json").unlink()
    calls = descents(None)
    run(tmp_path, scheme(), seed=6)
    assert len(calls) == STEPS
    run(tmp_path / "whole", scheme(), seed=6)
    require_same(tmp_path, tmp_path / "whole")


def test_tuned_scales_that_are_damaged_are_set_aside_and_tuned_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = run(tmp_path, scheme())
    file = sorted((tmp_path / "codes" / "tuned").glob("*.safetensors"))[3]
    file.write_bytes(file.read_bytes()[:-1])
    assert torch.equal(run(tmp_path, scheme()), whole)
    assert any("the tuned scales are damaged" in one and "set aside as tuned.damaged-1" in one for one in caplog.messages)


def test_keeping_costs_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, kept = [0.0], []

    def slow(folder: Path, _made_of: str, _tensors: Any) -> None:
        kept.append(folder.name)
        clock[0] += 3.0

    monkeypatch.setattr(descent_state, "KEEP_SECONDS", 15.0)
    monkeypatch.setattr(descent_state, "KEEP_SHARE", 0.02)
    monkeypatch.setattr(descent_state.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(descent_state, "keep_tensors", slow)
    factor = torch.ones(4, requires_grad=True)
    state = DescentState(tmp_path, "of this", {"one": factor}, torch.optim.Adam([factor]))
    for done in range(1, 101):
        clock[0] += 10.0
        state.keep(done, [])
    assert kept[0] == "tuning-000002"  # the first after 15 seconds
    assert 3.0 * len(kept) <= 15 + 0.02 * clock[0]
    assert len(kept) >= 5


def test_a_folder_that_cannot_be_written_ends_in_one_message(tmp_path: Path) -> None:
    from llmlite.errors import OutputError

    (tmp_path / "file").write_text(json.dumps({}))
    factor = torch.ones(4, requires_grad=True)
    state = DescentState(tmp_path / "file", "of this", {"one": factor}, torch.optim.Adam([factor]))
    with pytest.raises(OutputError, match="cannot be written"):
        state.keep(1, [])


@pytest.mark.parametrize("lost", [False, True], ids=["changed", "lost"])
def test_codes_that_are_damaged_are_chosen_again(tmp_path: Path, whole: Path, descents: Any, lost: bool, caplog: pytest.LogCaptureFixture) -> None:
    descents(3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", scheme())
    file = tmp_path / "stopped" / "codes" / "model.layers.1.mlp.up_proj.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    if lost:
        file.unlink()
    calls = descents(None)
    run(tmp_path / "stopped", scheme())
    said = "the codes of model.layers.1.mlp.up_proj are damaged; block-001 is set aside as block-001.damaged-1 and done again"
    assert said in caplog.messages
    assert len(calls) == STEPS - 3  # the same codes again, so that the descent goes on
    require_same(tmp_path / "stopped", whole)
