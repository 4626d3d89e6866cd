"""A disk that fills up while FSDP2 writes a checkpoint in parts (`full_disk_on_cpu.py`): one message, nothing half written, and the same command goes on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmlite.recipe import Recipe
from llmlite.storage import damage
from tests.conftest import save_tiny
from tests.pipeline.split_training import require_equal_weights
from tests.pipeline.test_fsdp2 import FINETUNED, FSDP2

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo over loopback as CI has it")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"A FULL DISK IS NOT TESTED HERE: nothing can be mounted ({done.stderr.strip()})")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def start(recipe: Path, out: Path, full: str = "") -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(Path(__file__).with_name("full_disk_on_cpu.py"))]
    environment = {**os.environ, **FSDP2, "FULL": full}
    return subprocess.run([*torchrun, "run", str(recipe), "--output_dir", str(out)], env=environment, capture_output=True, text=True, check=False, timeout=300)


def require_one_message(done: subprocess.CompletedProcess[str], out: Path) -> None:
    assert done.returncode != 0
    ours = re.split(r"^.*torch/distributed/elastic", done.stderr, maxsplit=1, flags=re.MULTILINE)[0]  # then comes the launcher's account of who ended how
    spoken = re.findall(r"^\[process \d\].*", ours, re.MULTILINE)
    assert spoken == [f"[process 0] ResourceError: {out}: the disk is full. Free some space and run the same command again; it continues where it stopped."]
    assert re.search(r"exitcode\s*: 2\b", done.stderr)
    assert "Traceback" not in ours
    assert "This is a bug" not in done.stderr
    assert [place.name for place in (out / "steps").iterdir()] != []
    assert damage(out / "steps" / "00-base") is None
    assert not (out / "steps" / "01-finetune").exists()
    assert not (out / "report.json").exists()


def require_continued(folder: Path, out: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = start(recipe, out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"checkpoint-2 is damaged \(.*\); set aside as checkpoint-2.damaged-1", done.stderr)
    assert sorted(path.name for path in (out / "steps").iterdir()) == ["00-base", "01-finetune"]
    if out != folder / "two":
        shutil.copytree(out, folder / "two")
    monkeypatch.setattr("llmlite.evaluation.reload.require_reload", lambda model, lines: 0.0)
    Recipe.from_file(folder / "one.yaml", output_dir=str(folder / "one")).run()
    require_equal_weights(folder, "01-finetune", "model.safetensors")


def written(folder: Path, pairs: Path) -> Path:
    model = save_tiny(folder / "tied", tie_word_embeddings=True)
    for name, batch in (("one", 4), ("two", 2)):
        (folder / f"{name}.yaml").write_text(FINETUNED.format(model=model, pairs=pairs, batch=batch), encoding="utf-8")
    return folder / "two.yaml"


def test_a_part_that_one_process_cannot_write_ends_the_run_in_one_message(pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = written(tmp_path, pairs_file), tmp_path / "two"
    require_one_message(start(recipe, out, "part"), out)
    require_continued(tmp_path, out, recipe, monkeypatch)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_in_one_message_and_with_space_the_same_command_goes_on(
    disk: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = written(tmp_path, pairs_file), disk / "out"
    require_one_message(start(recipe, out, str(disk / "another's")), out)
    (disk / "another's").unlink()
    require_continued(tmp_path, out, recipe, monkeypatch)
