"""Tensors kept for a run that is stopped: bit for bit the same ones, of the same making, or none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmlite.calibration.kept import digest_of, keep_tensors, kept_tensors, made_once

TENSORS = {"wide": torch.randn(3, 5).t(), "narrow": torch.randn(4).bfloat16(), "one": torch.tensor(7.0), "none": torch.empty(0)}


def test_kept_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    keep_tensors(tmp_path / "kept", "of this", TENSORS)
    found = kept_tensors(tmp_path / "kept", "of this")
    assert found is not None
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items())


def test_what_is_kept_is_made_once_and_without_a_folder_each_time(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, Tensor]:
        made.append(1)
        return {"tensor": torch.full((2,), float(len(made)))}

    for folder in (tmp_path / "kept", tmp_path / "kept", None, None):
        made_once(folder, "of this", make)
    assert len(made) == 3
    assert torch.equal(made_once(tmp_path / "kept", "of this", make)["tensor"], torch.ones(2))
    assert torch.equal(made_once(tmp_path / "kept", "of that", make)["tensor"], torch.full((2,), 4.0))  # what was kept is of something else
    assert torch.equal(made_once(tmp_path / "kept", "of that", make)["tensor"], torch.full((2,), 4.0))


def test_damaged_tensors_are_set_aside_and_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keep_tensors(tmp_path / "kept", "of this", TENSORS)
    file = tmp_path / "kept" / "kept.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert kept_tensors(tmp_path / "kept", "of this") is None
    assert "kept is damaged (kept.safetensors has changed since it was written); set aside as kept.damaged-1 and done again" in caplog.messages
    assert not (tmp_path / "kept").exists()
    assert (tmp_path / "kept.damaged-1" / "kept.safetensors").is_file()


def test_the_digest_tells_apart_values_shapes_types_and_names() -> None:
    tensor = torch.arange(6)
    others = [
        digest_of(tensor),
        digest_of(tensor + 1),
        digest_of(tensor.view(2, 3)),
        digest_of(tensor.double()),
        digest_of({"a": tensor}),
        digest_of({"b": tensor}),
        digest_of(tensor, 1),
        digest_of(tensor, 2),
        digest_of(torch.tensor(3)),
        digest_of(torch.empty(0)),
    ]
    assert len(set(others)) == len(others)
    assert digest_of({"a": tensor, "b": 1}) == digest_of({"b": 1, "a": tensor.clone()})
    assert digest_of(tensor.view(2, 3).t()) == digest_of(tensor.view(2, 3).t().contiguous())
