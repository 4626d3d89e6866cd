"""`llmlite shrink`: measured once, chosen by size, written as a recipe that runs, expected beside obtained."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoConfig

import llmlite
from llmlite.cli import main
from llmlite.config import to_yaml
from llmlite.context import Run
from llmlite.errors import ConfigError, RunError
from llmlite.expected import Expected
from llmlite.models.size import linear_shapes
from llmlite.recipe import Recipe
from llmlite.report import Report, Row
from llmlite.shrink.options import store_options
from llmlite.shrink.search import Candidate, Limits, Option
from llmlite.shrink.shrink import Shrunk, shrink
from tests.conftest import save_noisy, save_sums, save_tiny
from tests.pipeline.kills import run_killed

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


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """One format, no mixture, and no fresh process that proves each result: what is measured stays a run of the ordinary pipeline."""
    monkeypatch.setattr("llmlite.shrink.shrink.store_options", lambda _: store_options(["bfloat16"])[1:2])
    monkeypatch.setattr("llmlite.shrink.shrink._mixed", lambda *_: [])
    monkeypatch.setattr("llmlite.evaluation.reload.require_reload", lambda *_: 0.0)
    return monkeypatch


def command(model: Path, rows: Path, out: Path) -> list[str]:
    options = {"data": rows, "calibration": rows, "output_dir": out, "target": 0.75, "keeps": 0.6, "heal_steps": 0}
    sizes = {"max_length": 64, "evaluation_rows": 4, "calibration_sequences": 4}
    return ["shrink", str(model), *(word for name, value in {**options, **sizes}.items() for word in (f"--{name}", str(value)))]


def test_the_command_line_ends_with_the_table_and_with_run_with_what_was_obtained(
    folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: pytest.MonkeyPatch
) -> None:
    asked = command(folder, pairs_file, tmp_path / "out")
    main(asked)
    told = capsys.readouterr().out
    assert "Size against expected quality" in told
    assert "* is the choice" in told
    assert "keep 0.6" in told
    assert "nf4, 16-bit rest" in told
    printed = next(line for line in told.splitlines() if line.startswith("  llmlite run "))
    assert printed == f"  llmlite run {tmp_path / 'out' / 'shrink.yaml'}"
    quick.chdir(tmp_path)
    main(shlex.split(printed)[1:])  # the command, word for word
    report = Report.read(tmp_path / "out" / "result")
    assert report.expected["bytes_on_disk"] == pytest.approx(report.rows[-1].bytes_on_disk, rel=0.02)
    assert set(report.expected) == {"kl", "perplexity", "bytes_on_disk"}
    assert report.expectation() in capsys.readouterr().out
    assert report.expectation() in (tmp_path / "out" / "result" / "report.html").read_text()
    quick.setattr("llmlite.pipeline._Pipeline._step", lambda *_: pytest.fail("the same result, made again"))
    main([*asked, "--run"])
    told = capsys.readouterr().out
    assert "Size against expected quality" in told
    assert "Expected KL" in told
    assert "obtained" in told
    assert (tmp_path / "out" / "result" / "model.safetensors").is_file()


def test_a_small_mixture_is_measured_and_the_chosen_layers_are_in_4_and_16_bit(pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "tiny", num_hidden_layers=1, intermediate_size=256)
    monkeypatch.setattr("llmlite.shrink.shrink.store_options", lambda _: store_options(["bfloat16"])[1:2])
    monkeypatch.setattr("llmlite.evaluation.reload.require_reload", lambda *_: 0.0)
    found = shrink(recipe(folder, pairs_file, tmp_path / "out"), target=0.75, keeps=(), run=True)
    (step,) = found.chosen.steps
    assert step["skip"]
    (nf4,) = [candidate for candidate in found.front if candidate.name == "nf4, 16-bit rest"]
    assert found.chosen.kl < nf4.kl
    assert found.report is not None
    assert found.report.rows[-1].bytes_on_disk <= 0.75 * found.full_bytes * 1.01
    with safe_open(tmp_path / "out" / "result" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    layers = linear_shapes(AutoConfig.from_pretrained(folder))
    assert {layer for layer in layers if f"{layer}.weight.absmax" not in names} == set(step["skip"])


# The command in a process of its own, quick as above.
_PATCHED = """
import sys
import llmlite.evaluation.reload as reload, llmlite.shrink.shrink as shrink
from llmlite.cli import main
options = shrink.store_options
shrink.store_options = lambda _: options(["bfloat16"])[1:2]
shrink._mixed = lambda *_: []
reload.require_reload = lambda *_: 0.0
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_kill_in_a_measurement_loses_no_other_and_the_same_command_ends_with_the_same_choice(
    folder: Path, pairs_file: Path, tmp_path: Path, quick: pytest.MonkeyPatch
) -> None:
    asked = command(folder, pairs_file, tmp_path / "out")
    assert run_killed([sys.executable, "-c", _PATCHED, *asked], "step 1 of 1: quantize", 0.1) == "killed"
    measured = tmp_path / "out" / "measured"
    (first,) = measured.glob("*.json")
    (work,) = measured.glob("*.run")
    assert (work / "steps" / "00-base" / "row.json").is_file()
    assert not (tmp_path / "out" / "shrink.yaml").exists()
    before = first.stat().st_mtime_ns
    main(asked)
    assert first.stat().st_mtime_ns == before
    assert not list(measured.glob("*.run"))
    main(command(folder, pairs_file, tmp_path / "whole"))
    killed, whole = (Recipe.from_file(tmp_path / name / "shrink.yaml") for name in ("out", "whole"))
    assert killed.steps == whole.steps
    assert killed.expected.kl == pytest.approx(whole.expected.kl)
    assert killed.expected.perplexity_ratio == pytest.approx(whole.expected.perplexity_ratio)
    assert killed.expected.bytes_on_disk == whole.expected.bytes_on_disk


def test_a_recipe_says_what_is_expected_and_it_changes_nothing() -> None:
    recipe = Recipe.from_options(("flags", {"steps": ["quantize"], "expected": {"kl": 0.1}, "expected.perplexity_ratio": 1.5}))
    assert recipe.expected == Expected(kl=0.1, perplexity_ratio=1.5)
    assert recipe.identity() == Recipe.from_options(("flags", {"steps": ["quantize"]})).identity()
    report = Report(Path(), {}, {}, {}, [Row("base", 1, 1, 20.0), Row("quantize", 1, 1, 28.0, 0.12)], expected=recipe.expected.of_base(20.0))
    assert report.expectation() == "Expected KL 0.1000, obtained 0.1200; perplexity 30, obtained 28."
    with pytest.raises(ConfigError, match=r"no option 'perplexity_rati'\. Did you mean 'perplexity_ratio'"):
        Recipe.from_options(("flags", {"steps": ["quantize"], "expected": {"perplexity_rati": 1.5}}))


def test_a_choice_that_something_beats_is_in_the_table_too() -> None:
    front = [Candidate((Option("large", ({"step": "a"},), 0.1),), 50, 50), Candidate((Option("small", ({"step": "b"},), 0.2),), 40, 40)]
    other = Candidate((Option("fast", ({"step": "c"},), 0.3, 1.2, 2.0),), 60, 60)
    for chosen, names in ((front[1], ["large", "small"]), (other, ["large", "small", "fast"])):
        table = Shrunk(Path(), 100, chosen, front, Limits()).table()
        assert list(table.columns[1].cells) == names
        assert [name for name, star in zip(names, table.columns[0].cells, strict=True) if star] == [chosen.name]


@pytest.mark.parametrize("changed", ["weights", "train", "evaluation", "calibration"])
def test_other_weights_or_texts_under_the_same_names_are_measured_anew(
    folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    places = {name: Path(shutil.copy(pairs_file, tmp_path / f"{name}.jsonl")) for name in ("train", "evaluation", "calibration")}
    model = shutil.copytree(folder, tmp_path / "model")
    about = {**{name: str(place) for name, place in places.items() if name != "train"}, "max_length": 64, "evaluation_rows": 4}
    asked = Recipe.from_options(
        ("test", {"model": str(model), "data": str(places["train"]), "output_dir": str(tmp_path / "out"), "steps": ["quantize"], **about})
    )
    ran: list[str] = []

    def run(recipe: Recipe) -> Report:
        ran.append(type(recipe.steps[0]).__name__)
        if recipe.folder.parent.name == "measured":
            recipe.folder.mkdir()
        else:
            recipe.folder.mkdir(exist_ok=True)
            (recipe.folder / "recipe.yaml").write_text(to_yaml(recipe.identity()))
        return Report(recipe.folder, {}, {}, {}, [Row("base", 1, 1, 20.0), *(Row("", 1, 1, 22.0, 0.1) for _ in recipe.steps)])

    def costs(context: Run) -> dict[str, float]:
        ran.append("costs")
        return {name: 1.0 + place for place, name in enumerate(linear_shapes(context.config))}

    monkeypatch.setattr("llmlite.pipeline.run", run)
    monkeypatch.setattr("llmlite.shrink.measure._measured_costs", costs)
    monkeypatch.setattr("llmlite.shrink.shrink.store_options", lambda _: store_options(["bfloat16"])[1:2])
    everything = ["PruneStructured", "Quantize", "costs", "Quantize"]  # the last one with layers in 16 bit
    for result in ("result", "result-2"):
        ran.clear()
        shrink(asked, target=0.75, keeps=(0.6,), heal_steps=0)
        assert ran == everything
        ran.clear()
        found = shrink(asked, target=0.75, keeps=(0.6,), heal_steps=0, run=True)
        assert len(ran) == 1  # the result; nothing is measured twice
        assert found.report is not None
        assert found.report.path.name == result
        if changed == "weights":
            save_noisy(folder, model)
        else:
            save_sums(places[changed], 61)


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
