"""`llmlite shrink`: measured once, chosen by size, written as a recipe that runs, expected beside obtained."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import llmlite
from llmlite.cli import main
from llmlite.errors import ConfigError, RunError
from llmlite.recipe import Recipe
from llmlite.shrink.options import store_options
from llmlite.shrink.shrink import shrink
from tests.conftest import save_tiny

LIMITS = ("target", "max_bytes", "max_memory", "min_speedup", "max_perplexity_increase")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("wide") / "tiny-wide", intermediate_size=512)


def recipe(model: Path, rows: Path, out: Path) -> Recipe:
    options: dict[str, Any] = {"max_length": 64, "evaluation_rows": 4, "calibration_sequences": 4, "calibration": str(rows)}
    return Recipe.from_options(("test", {"model": str(model), "data": str(rows), "output_dir": str(out), "steps": [{"step": "quantize"}], **options}))


def test_the_chosen_recipe_keeps_the_limit_and_is_run(folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(folder, pairs_file, tmp_path / "out")
    monkeypatch.setattr("llmlite.shrink.shrink.store_options", lambda _: store_options(["bfloat16"])[1:2])  # one of the formats; each is a run of its own
    monkeypatch.setattr("llmlite.shrink.shrink._mixed", lambda *_: [])
    found = shrink(asked, target=0.75, keeps=(0.6,), heal_steps=0, run=True)
    assert found.report is not None
    assert found.report.rows[-1].bytes_on_disk <= 0.75 * found.full_bytes * 1.01
    assert found.report.rows[-1].bytes_on_disk == pytest.approx(found.chosen.bytes_on_disk, rel=0.02)
    assert "Expected KL" in found.report.expectation()
    assert "Expected KL" in (tmp_path / "out" / "result" / "report.html").read_text()
    again = llmlite.Recipe.from_file(tmp_path / "out" / "shrink.yaml")
    assert [step["step"] for step in again.to_mapping()["steps"]] == [step["step"] for step in found.chosen.steps]
    assert {path.suffix for path in (tmp_path / "out" / "measured").iterdir()} == {".json"}
    # another target needs no new measurement
    monkeypatch.setattr("llmlite.pipeline.run", lambda *_: pytest.fail("measured again"))
    other = shrink(asked, target=0.9, keeps=(0.6,), heal_steps=0)
    assert other.chosen.kl <= found.chosen.kl
    with pytest.raises(RunError, match=r"breaks the limit on .*speed"):
        shrink(asked, target=0.9, min_speedup=1000, keeps=(0.6,), heal_steps=0)


@pytest.mark.slow
def test_a_mixture_of_4_and_16_bit_is_measured_chosen_and_run(folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(folder, pairs_file, tmp_path / "out")
    monkeypatch.setattr("llmlite.shrink.shrink.store_options", lambda _: store_options(["bfloat16"])[1:2])
    found = shrink(asked, target=0.75, keeps=(0.6,), heal_steps=0, run=True)
    assert "layers in 16 bit" in found.chosen.name
    (nf4,) = [candidate for candidate in found.front if candidate.name == "nf4, 16-bit rest"]
    assert found.chosen.kl < nf4.kl
    assert found.report is not None
    assert found.report.rows[-1].kl < nf4.kl
    assert found.report.rows[-1].bytes_on_disk <= 0.75 * found.full_bytes * 1.01
    assert found.report.reload_difference < 1e-3


def test_what_cannot_be_is_said_before_anything_is_measured(folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    asked = recipe(folder, pairs_file, tmp_path / "out")
    for options, message in (
        ({}, "say how small"),
        ({"target": -1}, "should be a number above 0"),
        *(({name: value}, f"{name}={value} should be a number") for name in LIMITS for value in (math.nan, math.inf, -math.inf)),
        ({"target": 0.5, "keeps": (1.5,)}, "share of the decoder that stays"),
        ({"max_bytes": 1000}, "nothing that is tried gets below"),
        ({"max_memory": 1000}, "nothing that is tried needs less than"),
    ):
        with pytest.raises(ConfigError, match=message):
            shrink(asked, **{"keeps": (0.6,), **options})
    assert not (tmp_path / "out").exists()


def test_steps_that_do_not_take_such_a_base_are_left_out(folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    quantized = shutil.copytree(folder, tmp_path / "quantized")
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config.save_pretrained(quantized)
    with pytest.raises(ConfigError, match="nothing that is tried gets below"):  # neither pruned nor quantized once more
        shrink(recipe(quantized, pairs_file, tmp_path / "out"), target=0.3, keeps=(0.6,))


def test_the_command_line_reads_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["shrink", "--max_bytes", "sixty"])
    assert ended.value.code == 2
    assert "60MB" in capsys.readouterr().err
