"""A whole run on a tiny model: what lies in the folder, what the report says, and that nothing is lost when it is stopped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import llmlite
from llmlite.config import settings
from llmlite.errors import ConfigError, OutputError, ResourceError, RunError
from llmlite.evaluation.speed import Speed
from llmlite.models.blockwise import load_blockwise
from llmlite.models.load import load_model
from llmlite.models.safety import linear_4bit_layers
from llmlite.models.settings import Model
from llmlite.report import Report
from llmlite.storage import damage
from llmlite.training.checkpoints import newest_complete
from tests.conftest import save_tiny

SMALL: dict[str, Any] = {"max_length": 64, "evaluation_rows": 6, "r": 4, "per_device_train_batch_size": 2, "save_steps": 2, "logging_steps": 1}


def recipe(model_folder: Path, pairs_file: Path, out: Path, **options: Any) -> llmlite.LoraInt4:
    return llmlite.LoraInt4(model=str(model_folder), data=str(pairs_file), output_dir=str(out), **{**SMALL, "max_steps": 4, **options})


@pytest.fixture(scope="module")
def finished(model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    torch.set_num_threads(1)
    return recipe(model_folder, pairs_file, tmp_path_factory.mktemp("runs") / "out").run()


def test_the_result_lies_in_the_folder_itself_and_each_step_below(finished: Report) -> None:
    names = {p.name for p in finished.path.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja", "recipe.yaml", "report.json", "steps"} <= names
    assert sorted(p.name for p in (finished.path / "steps").iterdir()) == ["00-base", "01-quantize", "02-lora"]
    assert all(damage(folder) is None for folder in (finished.path / "steps").iterdir())


def test_the_report_has_a_row_for_the_base_and_each_step_with_every_figure(finished: Report) -> None:
    assert [row.name for row in finished.rows] == ["base", "quantize", "lora"]
    base, quantized, lora = finished.rows
    assert base.kl is None
    assert quantized.kl is not None
    assert 0 < quantized.kl < 0.5
    assert 0 <= (quantized.top1_agreement or -1) <= 1
    assert quantized.parameters == base.parameters < lora.parameters
    assert quantized.bytes_on_disk == sum(p.stat().st_size for p in (finished.path / "steps" / "01-quantize").glob("*.safetensors"))
    assert lora.details["optimizer_steps"] == 4
    assert all(row.prefill_tokens_per_second and row.decode_tokens_per_second and row.peak_memory_bytes for row in finished.rows)
    assert Report.read(finished.path).to_json() == finished.to_json()


def test_the_lines_that_the_report_prints_load_the_result_in_a_fresh_process(finished: Report) -> None:
    script = f"{finished.loading}\nimport sys; assert not any(name.startswith('llmlite') for name in sys.modules); print(type(model).__name__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "PeftModelForCausalLM", done.stderr
    assert finished.reload_difference is not None
    assert finished.reload_difference < 1e-4


def test_neither_report_nor_adapter_names_a_folder_of_this_machine(finished: Report, model_folder: Path) -> None:
    config = json.loads((finished.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == model_folder.name


def test_the_same_command_again_does_no_step_again(finished: Report) -> None:
    before = {p: p.stat().st_mtime_ns for p in (finished.path / "steps").rglob("*") if p.is_file()}
    for leftover in (".01-quantize-k7hs2a", "01-quantize.work"):  # as a kill leaves them, between a rename and the next line
        (finished.path / "steps" / leftover).mkdir()
        (finished.path / "steps" / leftover / "model.safetensors").write_text("bytes")
    again = llmlite.Recipe.from_file(finished.path / "recipe.yaml").run(finished.path)
    assert {p: p.stat().st_mtime_ns for p in (finished.path / "steps").rglob("*") if p.is_file()} == before  # and the leftovers are gone
    assert again.rows == finished.rows


def test_other_weights_under_the_same_name_are_refused(pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmlite.pipeline._Pipeline._finish", lambda self: None)
    base = save_tiny(tmp_path / "base")
    steps = [llmlite.PruneWeights(method="magnitude")]
    made = llmlite.Recipe(model=str(base), data=llmlite.Data(train=str(pairs_file), max_length=64), steps=steps, output_dir=str(tmp_path / "out"))
    made.run()
    os.utime(base / "model.safetensors")  # a copy is the same model
    made.run()
    stored = load_file(base / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in stored.items()}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OutputError, match="the weights of .*base have changed since the run"):
        made.run()


def test_other_settings_in_the_same_folder_are_refused_and_named(finished: Report, model_folder: Path, pairs_file: Path) -> None:
    with pytest.raises(OutputError, match=r"other settings \(steps.1.r: 4 there, 8 now\)"):
        recipe(model_folder, pairs_file, finished.path, r=8).run()


def test_a_folder_with_something_else_in_it_is_refused_and_not_touched(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"holds something else \(thesis.tex\)"):
        recipe(model_folder, pairs_file, tmp_path, overwrite_output_dir=True).run()
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the process die, as by kill -9, when the given optimizer step ends."""
    from llmlite.training.checkpoints import StopRequest

    def die(self: Any, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if state.global_step == step:
            raise KeyboardInterrupt
        return control

    monkeypatch.setattr(StopRequest, "on_step_end", die)


def test_a_run_stopped_in_training_continues_and_ends_with_the_same_weights(
    finished: Report, model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        stop_at(3, patched)
        with pytest.raises(KeyboardInterrupt):
            recipe(model_folder, pairs_file, tmp_path / "out").run()
    work = tmp_path / "out" / "steps" / "02-lora.work" / "trainer"
    assert newest_complete(work) == work / "checkpoint-2"
    report = recipe(model_folder, pairs_file, tmp_path / "out").run()
    expected, got = (load_file(path / "adapter_model.safetensors") for path in (finished.path, report.path))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert not work.exists()


def test_a_truncated_checkpoint_is_set_aside_and_the_one_before_is_used(
    finished: Report, model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("llmlite.training.trainer.StopRequest", llmlite.training.checkpoints.StopRequest)
        stop_at(4, patched)
        with pytest.raises(KeyboardInterrupt):
            recipe(model_folder, pairs_file, tmp_path / "out", save_steps=1).run()
    work = tmp_path / "out" / "steps" / "02-lora.work" / "trainer"
    newest = newest_complete(work)
    assert newest is not None
    assert newest.name == "checkpoint-3"
    broken = newest / "adapter_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-10])
    older = newest_complete(work)
    assert older is not None
    assert older.name == "checkpoint-2"
    assert (work / "checkpoint-3.damaged-1").is_dir()


def test_a_damaged_step_is_done_again(finished: Report, model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = recipe(model_folder, pairs_file, out, max_steps=1).run()
    file = out / "steps" / "02-lora" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    file.unlink()  # it shares its bytes with the result
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    second = recipe(model_folder, pairs_file, out, max_steps=1).run()
    assert second.rows[-1].perplexity == first.rows[-1].perplexity
    assert (out / "steps" / "02-lora.damaged-1").is_dir()


def test_quantizing_twice_is_refused_before_anything_is_loaded(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    twice = llmlite.Recipe(
        model=str(model_folder), data=str(pairs_file), steps=[llmlite.Quantize(), llmlite.Quantize()], output_dir=str(tmp_path / "x"), max_length=64
    )
    with pytest.raises(ConfigError, match=r"steps\[1\] quantize: takes a model that is dense or sparse; the one that it would get is nf4"):
        twice.check()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_base_that_is_quantized_already_is_planned_as_it_is_and_loads_safe(scheme: str, model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    how = BitsAndBytesConfig(load_in_8bit=True) if scheme == "int8" else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    stock = AutoModelForCausalLM.from_pretrained(model_folder, quantization_config=how, dtype=torch.float32, device_map={"": "cpu"})
    folder = shutil.copytree(model_folder, tmp_path / "base")
    stock.save_pretrained(folder)
    data = llmlite.Data(train=str(pairs_file), max_length=64)
    plan = llmlite.Recipe(model=str(folder), data=data, steps=[llmlite.Lora()]).check()
    assert [row["form"] for row in plan.rows] == [scheme, scheme]
    assert plan.rows[0]["disk_bytes"] == (folder / "model.safetensors").stat().st_size
    steps = [llmlite.Quantize(), llmlite.PruneFfn()]
    with pytest.raises(
        ConfigError, match=rf"steps\[0\] quantize: takes a model that is dense or sparse; the one that it would get is {scheme}(?s:.*)steps\[1\] prune.ffn"
    ):
        llmlite.Recipe(model=str(folder), data=data, steps=steps).check()
    for load in (load_model, load_blockwise):
        layers = linear_4bit_layers(load(folder, Model(name=str(folder)), torch.device("cpu")))
        assert len(layers) == (0 if scheme == "int8" else 21)
        assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_a_base_that_computes_no_numbers_is_said_to_before_any_step(pairs_file: Path, tmp_path: Path) -> None:
    file = save_tiny(tmp_path / "base") / "model.safetensors"
    stored = load_file(file)
    stored["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.inf
    save_file(stored, file, metadata={"format": "pt"})
    steps = [llmlite.PruneWeights(method="magnitude")]
    with pytest.raises(RunError, match=r"base: the perplexity of .*base on the held-out text is inf, computed in float32"):
        llmlite.Recipe(model=str(file.parent), data=str(pairs_file), steps=steps, output_dir=str(tmp_path / "out"), max_length=64).run()
    assert not (tmp_path / "out" / "steps" / "00-base").exists()


@settings
class Greedy(llmlite.Step):
    """Wants more memory than any machine has."""

    def check(self, model: Any, run: Any) -> Any:
        return model

    def apply(self, model: Any, run: Any) -> Any:
        torch.empty(2**60, dtype=torch.uint8)


def test_a_failing_allocation_says_which_step_and_what_to_lower(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    made = llmlite.Recipe(model=str(model_folder), data=str(pairs_file), steps=[Greedy()], output_dir=str(tmp_path / "out"), max_length=64)
    with pytest.raises(ResourceError, match=r"Greedy: out of memory \(.*allocate.*\)\. Lower calibration_sequences or max_length\. What was finished"):
        made.run()
    assert damage(tmp_path / "out" / "steps" / "00-base") is None  # what was finished is kept


def test_memory_that_runs_out_anywhere_else_says_where_and_what_to_lower_there(
    model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*_: Any, **__: Any) -> None:
        raise MemoryError

    steps = [llmlite.PruneWeights(), llmlite.Finetune(max_steps=1, per_device_train_batch_size=1)]
    made = llmlite.Recipe(
        model=str(model_folder),
        data=llmlite.Data(train=str(pairs_file), calibration=str(pairs_file), calibration_sequences=4, max_length=32, evaluation_rows=2),
        steps=steps,
        output_dir=str(tmp_path / "out"),
    )
    for place, message in {  # in the order of a run, each time in the same folder
        "llmlite.context.Run.load_base": "base, loaded: .* Set load: blocks",
        "llmlite.evaluation.quality.reference_of": "base, measured: .* Lower evaluation_rows",
        "llmlite.evaluation.sample.sample": "base, timed: .* Free some",
        "llmlite.calibration.blocks.Blocks.collect": "prune.weights: .* Lower calibration_sequences or max_length, or set load: blocks",
        "llmlite.evaluation.quality.measure_quality": "prune.weights, measured: .* Lower evaluation_rows",
        "llmlite.evaluation.speed.measure_speed": "prune.weights, timed: .* Free some",
        "llmlite.kept.Kept.save": "prune.weights, saved: .* Free some",
        "llmlite.training.trainer.LiteTrainer.compute_loss": "finetune: .* Lower per_device_train_batch_size",
        "llmlite.evaluation.reload.require_reload": "the result, loaded once more: .* Free some",
    }.items():
        with monkeypatch.context() as patched:
            patched.setattr("llmlite.evaluation.sample.sample", lambda *_: {"prompt": "", "expected": "", "answer": ""})
            patched.setattr("llmlite.evaluation.speed.measure_speed", lambda model: Speed(1.0, 1.0))
            patched.setattr(place, greedy)
            with pytest.raises(ResourceError, match=message):
                made.run()


def test_the_plan_says_what_the_run_then_measures(finished: Report, model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    plan = recipe(model_folder, pairs_file, tmp_path / "x").check()
    assert [row["parameters"] for row in plan.rows] == [row.parameters for row in finished.rows]
    assert plan.rows[1]["disk_bytes"] == pytest.approx(finished.rows[1].bytes_on_disk, rel=0.01)
    assert plan.rows[2]["tokens"] == 4 * 2 * 2 * 64  # steps, rows, accumulated, tokens of a row


@pytest.mark.parametrize("preset", ["Lora", "LoraInt8"])
def test_the_other_lora_presets_train_and_reload_too(preset: str, model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    cls = getattr(llmlite.recipes, preset)
    report = cls(model=str(model_folder), data=str(pairs_file), output_dir=str(tmp_path / "out"), **{**SMALL, "max_steps": 2, "merge": True}).run()
    assert report.rows[-1].name == "lora"
    assert report.rows[-1].details["perplexity_merged"] == pytest.approx(report.rows[-1].details["perplexity_before_merge"], rel=0.02)
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(report.path / "merged")
    assert not hasattr(merged.config, "quantization_config")
