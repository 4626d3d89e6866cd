"""What this processor is slow at is in the plan, before anything is computed."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest
import torch

import llmlite
from llmlite.cli import main
from llmlite.models.quick import slow_here

ROOT = Path(__file__).parent.parent.parent
NO_KERNEL, NO_BFLOAT16 = "no AVX512-BF16, which bitsandbytes' packed 4-bit kernel needs", "only emulates products in bfloat16"


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`processor(avx512_bf16=..., amx=...)` makes this machine such an x86."""

    def become(avx512_bf16: bool, amx: bool) -> None:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")

    return become


def notes(model_folder: Path, pairs_file: Path, out: Path, dtype: str, **options: Any) -> list[str]:
    steps = [llmlite.Quantize(**options), llmlite.Lora()]
    data = llmlite.Data(train=str(pairs_file), max_length=64)
    plan = llmlite.Recipe(model=llmlite.Model(name=str(model_folder), dtype=dtype), data=data, steps=steps, output_dir=str(out)).check()
    return [" ".join(row["notes"]) for row in plan.rows]


def test_four_bits_without_the_packed_kernel_are_said_to_be_slow(processor: Any, model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    processor(avx512_bf16=False, amx=False)
    base, quantize, lora = notes(model_folder, pairs_file, tmp_path, "float32")
    assert NO_KERNEL in quantize
    assert NO_KERNEL not in base + lora
    assert NO_KERNEL not in " ".join(notes(model_folder, pairs_file, tmp_path, "float32", scheme="int8"))


@pytest.mark.parametrize(("amx", "slow"), [(False, True), (True, False)])
def test_bfloat16_that_is_only_emulated_is_said_to_be_slow(processor: Any, model_folder: Path, pairs_file: Path, tmp_path: Path, amx: bool, slow: bool) -> None:
    processor(avx512_bf16=False, amx=amx)
    assert (NO_BFLOAT16 in notes(model_folder, pairs_file, tmp_path, "bfloat16")[0]) == slow
    assert NO_BFLOAT16 not in " ".join(notes(model_folder, pairs_file, tmp_path, "float32", scheme="int8"))


def test_a_processor_with_avx512_bf16_is_slow_at_neither(processor: Any, model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    processor(avx512_bf16=True, amx=False)
    told = " ".join(notes(model_folder, pairs_file, tmp_path, "bfloat16"))
    assert NO_KERNEL not in told
    assert NO_BFLOAT16 not in told


def test_of_devices_that_are_no_cpu_nothing_is_said(processor: Any) -> None:
    processor(avx512_bf16=False, amx=False)
    assert slow_here(torch.device("cuda"), torch.bfloat16, "nf4") == ""


def test_a_dry_run_prints_it(processor: Any, model_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    processor(avx512_bf16=False, amx=False)
    words = [
        "run",
        str(ROOT / "recipes" / "quantize_nf4.yaml"),
        "--model",
        str(model_folder),
        "--data",
        str(pairs_file),
        "--output_dir",
        str(tmp_path),
        "--max_length",
        "64",
    ]
    main([*words, "--dtype", "bfloat16", "--dry_run"])
    told = " ".join(capsys.readouterr().out.split())
    assert "AVX512-BF16, which bitsandbytes' packed 4-bit kernel needs" in told
    assert "emulates products in bfloat16" in told
