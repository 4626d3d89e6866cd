"""Folders are complete or absent."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from llmlite.errors import OutputError, ResourceError
from llmlite.storage import (
    MANIFEST,
    damage,
    file_sums,
    link_or_copy,
    locked,
    require_space,
    set_aside,
    telling,
    telling_full,
    telling_refused,
    writing_folder,
)

Usage = namedtuple("Usage", "total used free")


def write(folder: Path, text: str = "weights") -> None:
    with writing_folder(folder) as temporary:
        (temporary / "a.bin").write_text(text)
        (temporary / "sub").mkdir()
        (temporary / "sub" / "b.bin").write_text("more")


def test_a_folder_is_whole_after_its_block_and_nothing_else_is_left(tmp_path: Path) -> None:
    write(tmp_path / "out")
    assert damage(tmp_path / "out") is None
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_another_run_writes_at_the_same_moment_is_replaced(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of a sweep that fill one cache: the place is taken, or taken away, between a look at it and the renaming."""
    real, seen = Path.exists, []

    def exists(self: Path, **options: Any) -> bool:
        found = real(self, **options)
        if self == tmp_path / "0000" and not seen:
            seen.append(found)
            if there:
                shutil.rmtree(self)
            else:
                self.mkdir()
                (self / "signals").write_text("theirs")
        return found

    if there:
        (tmp_path / "0000").mkdir()
    monkeypatch.setattr(Path, "exists", exists)
    with writing_folder(tmp_path / "0000") as temporary:
        (temporary / "signals").write_text("ours")
    assert seen == [there]
    assert (tmp_path / "0000" / "signals").read_text() == "ours"
    assert [path.name for path in tmp_path.iterdir()] == ["0000"]


def test_a_block_that_fails_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(RuntimeError), writing_folder(tmp_path / "out") as temporary:
        (temporary / "a.bin").write_text("new")
        raise RuntimeError
    assert (tmp_path / "out" / "a.bin").read_text() == "old"
    assert damage(tmp_path / "out") is None
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda out: (out / "a.bin").unlink(), "a.bin is missing"),
        (lambda out: (out / "a.bin").write_text("weight"), "6 bytes instead of 7"),
        (lambda out: (out / "a.bin").write_text("weightz"), "a.bin has changed"),
        (lambda out: (out / MANIFEST).unlink(), "never finished"),
        (lambda out: (out / MANIFEST).write_text("{"), "manifest is unreadable"),
        (lambda out: (out / MANIFEST).write_text("[1]"), "manifest is unreadable"),
        (lambda out: (out / MANIFEST).write_text("[" * 20_000), "manifest is unreadable"),
    ],
)
def test_every_kind_of_damage_is_found(tmp_path: Path, harm: object, words: str) -> None:
    write(tmp_path / "out")
    harm(tmp_path / "out")  # type: ignore[operator]
    assert words in (damage(tmp_path / "out") or "")


@pytest.mark.parametrize("foreign", ["{", "5", "[1]", '{"a.bin": "abc"}', '{"a.bin": {"md5": "abc"}}', "[" * 20_000], ids=range(6))
def test_sums_are_computed_where_the_manifest_is_somebody_elses(tmp_path: Path, foreign: str) -> None:
    write(tmp_path / "out")
    known = file_sums(tmp_path / "out", "*.bin")
    (tmp_path / "out" / MANIFEST).write_text(foreign)
    assert file_sums(tmp_path / "out", "*.bin") == known == {"a.bin": hashlib.sha256(b"weights").hexdigest()}


def test_damaged_folders_are_set_aside_under_new_names(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path / "out")
        assert set_aside(tmp_path / "out").name == f"out.damaged-{number}"


def test_a_full_disk_is_told_as_one(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="the disk is full"), writing_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_place_that_cannot_be_written_is_told_as_one(number: int, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"out: cannot be written \(.*\). Choose another --output_dir"), writing_folder(tmp_path / "out"):
        raise OSError(number, os.strerror(number))
    assert list(tmp_path.iterdir()) == []


def test_of_a_cache_that_cannot_be_written_the_cache_is_to_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMLITE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(OutputError, match=r"cannot be written \(.*\). Set LLMLITE_CACHE to"), writing_folder(tmp_path / "cache" / "teachers" / "0000"):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    with pytest.raises(ResourceError, match=r"^the cache: .*Set LLMLITE_CACHE to a folder on a larger disk"):
        require_space(tmp_path / "cache" / "teachers", 10**18)
    with pytest.raises(ResourceError, match=r"^output_dir: .*Choose an --output_dir on a larger disk"):
        require_space(tmp_path / "caches", 10**18)
    with pytest.raises(OutputError, match=r"\). Name another\.$"), telling(tmp_path / "cache" / "answers", "Name another."):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def test_more_than_the_disk_has_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="GB free"):
        require_space(tmp_path / "not" / "there", 10**18)
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_in_one_folder_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(OutputError, match="another run is working"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_linked_file_has_the_same_bytes_and_replaces_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("old")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "new"


def test_a_full_disk_is_said_to_be_full_by_whatever_library_noticed_it(tmp_path: Path) -> None:
    with pytest.raises(SafetensorError), telling_full(tmp_path):
        save_file({"x": torch.zeros(2)}, tmp_path / "no folder" / "x.safetensors")
    with pytest.raises(ResourceError, match="the disk is full"), telling_full(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")  # what it says on a full disk


def test_torch_that_lost_its_place_in_a_file_of_a_full_disk_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")  # what torch.save says on a full disk

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(RuntimeError, match="unexpected pos"), telling_full(tmp_path):  # of a disk with space it is something else
        torch.save({}, tmp_path / "optimizer.pt")
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10**9, 10**9, 0))
    with pytest.raises(ResourceError, match="the disk is full"), telling_full(tmp_path / "not" / "there"):
        torch.save({}, tmp_path / "optimizer.pt")
    with pytest.raises(KeyError), telling_full(tmp_path):
        raise KeyError("a mistake of ours")


def test_a_full_disk_is_found_among_the_errors_that_led_to_one(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="the disk is full"), telling_full(tmp_path):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("could not write the archive") from error


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_refusal_in_mid_run_is_blamed_on_the_output_only_where_the_file_lies_there(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = os.strerror(number)
    monkeypatch.chdir(tmp_path)
    for file in (tmp_path / "out" / "steps" / "trainer_state.json", "out/steps/trainer_state.json"):
        with pytest.raises(OutputError, match=rf"out: cannot be written any more \({refusal}\)"), telling_refused(tmp_path / "out"):
            raise OSError(number, refusal, str(file))
    with pytest.raises(OSError, match=r"model.safetensors"), telling_refused(tmp_path / "out"):
        raise OSError(number, refusal, str(tmp_path / "model" / "model.safetensors"))


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: Read-only file system (os error 30)"),
        RuntimeError("[enforce fail at inline_container.cc:747] . open file failed with strerror: Read-only file system"),
    ],
    ids=["safetensors", "torch"],
)
def test_a_refusal_that_names_no_file_is_blamed_on_the_output_where_that_refuses(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(type(error)), telling_refused(tmp_path):
        raise error
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(OutputError, match="Read-only file system"), telling_refused(tmp_path):
        raise error
