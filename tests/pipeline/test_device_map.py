"""A model whose blocks lie partly on disk gives the figures and codes of the whole one; what would write into it is refused before weights load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import llmlite
from llmlite.calibration.blocks import batches_of
from llmlite.calibration.walk import Walk, walk_blocks
from llmlite.cli import main
from llmlite.context import Run
from llmlite.errors import ConfigError, LoadError, RunError
from llmlite.layout import Layout
from llmlite.models.blockwise import present
from llmlite.models.device_map import dispatch_map, is_offloaded, memory_limits
from llmlite.models.load import load_model
from llmlite.models.settings import Model
from llmlite.models.view import ModelView
from llmlite.plan import check, size_line
from llmlite.quantization.error import layer_errors
from llmlite.recipe import Recipe
from llmlite.step import ModelPlan
from llmlite.training.trainer import train
from tests.conftest import logits_of, save_noisy, save_tiny, tiny_config

CPU = torch.device("cpu")
QUANTIZE = {"step": "quantize", "scheme": "nf4", "token_weights": "equal", "tune_epochs": 0, "sweeps": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in 16 bit, as most are on the Hub."""
    place = save_tiny(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=4)
    AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def limit(folder: Path) -> str:
    """Room for what lies outside of the blocks and for two of the four, one of them the one that is brought in."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, block = (sum(p.nbytes for p in module.parameters()) for module in (model, model.model.layers[0]))
    return f"cpu={(total - 2 * block + 100) / 1000}KB"


def recipe(folder: Path, pairs: Path, *steps: Any, **options: Any) -> Recipe:
    data = {"train": str(pairs), "calibration": str(pairs), "max_length": 64, "evaluation_rows": 6, "calibration_sequences": 4}
    model = {"name": str(folder), **options.pop("model", {})}
    return Recipe.from_options(("test", {"model": model, "data": data | options.pop("data", {}), "steps": list(steps), **options}))


def test_the_first_blocks_stay_and_the_others_go_to_disk(folder: Path, limit: str) -> None:
    config = tiny_config("llama", vocab_size=320, num_hidden_layers=4)
    found = dispatch_map(config, Model(device_map="auto", max_memory=limit), torch.float32, CPU)
    assert found is not None
    assert [found[f"model.layers.{index}"] for index in range(4)] == ["cpu", "disk", "disk", "disk"]
    assert {found[name] for name in ("model.embed_tokens", "model.norm", "lm_head")} == {"cpu"}
    assert dispatch_map(config, Model(device_map="auto", max_memory="cpu=1GB"), torch.float32, CPU) is None
    assert dispatch_map(config, Model(), torch.float32, CPU) is None
    with pytest.raises(LoadError, match=r"needs 0\.3 MB on cpu, .* max_memory=cpu=10KB gives it 0\.0 MB"):
        dispatch_map(config, Model(device_map="auto", max_memory="cpu=10KB"), torch.float32, CPU)


@pytest.mark.parametrize(("kind", "expected"), [("auto", [4, 4]), ("balanced", [4, 4]), ("sequential", [6, 2])])
def test_blocks_are_shared_out_over_accelerators_as_asked(kind: Any, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("accelerate.utils", "accelerate.utils.modeling"):  # there are none here
        monkeypatch.setattr(f"{place}.get_max_memory", lambda limits: dict(limits))
    config = tiny_config("llama", vocab_size=320, num_hidden_layers=8)
    model = AutoModelForCausalLM.from_config(config)
    total, block = (sum(p.nbytes for p in module.parameters()) for module in (model, model.model.layers[0]))
    settings = Model(device_map=kind, max_memory=f"0={total - block // 2},1={8 * block}")
    found = dispatch_map(config, settings, torch.float32, torch.device("cuda", 0))
    assert found is not None
    assert [[found[f"model.layers.{index}"] for index in range(8)].count(device) for device in (0, 1)] == expected


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gemma2", "phi3", "gpt_neox"])
def test_every_kind_of_family_runs_from_disk_bit_for_bit(model_type: str, tmp_path: Path, tiny_model: Any) -> None:
    whole = tiny_model(model_type)
    whole.save_pretrained(tmp_path)
    room = sum(p.nbytes for p in whole.parameters()) - 2 * sum(p.nbytes for p in ModelView(whole).blocks[0].module.parameters())
    offloaded = load_model(tmp_path, Model(device_map="sequential", max_memory=f"cpu={room + 200}"), CPU)
    assert is_offloaded(offloaded)
    assert torch.equal(logits_of(offloaded), logits_of(whole))


def test_calibrated_codes_and_figures_are_those_of_the_whole_model(
    folder: Path, pairs_file: Path, limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmlite.evaluation.reload.require_reload", lambda model, lines: 0.0)  # the files are the same, and other tests load them
    asked = {"batch_sizes": [1], "repeats": 1, "answers": 1}
    whole = recipe(folder, pairs_file, QUANTIZE, output_dir=str(tmp_path / "whole"), evaluate=asked).run()
    layout = {"device_map": "auto", "max_memory": limit}
    offloaded = recipe(folder, pairs_file, QUANTIZE, output_dir=str(tmp_path / "offloaded"), model=layout, evaluate=asked)
    planned = size_line(check(offloaded))
    assert "blocks of the dense base on cpu (1), disk (3)" in planned
    assert planned.endswith("energy; 1 answer. Of the base, part of which is brought in for each forward pass, neither speed nor energy nor answers.")
    report = offloaded.run()
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "offloaded"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    for whole_row, row in zip(whole.rows, report.rows, strict=True):
        assert (row.perplexity, row.kl, row.top1_agreement) == (whole_row.perplexity, whole_row.kl, whole_row.top1_agreement)
    assert report.rows[1].details["layer_errors"] == whole.rows[1].details["layer_errors"]
    assert report.rows[0].decode_tokens_per_second is None
    assert "not_measured" not in report.rows[1].details
    first, second = (json.loads((tmp_path / name / "evaluation.json").read_text())["models"] for name in ("whole", "offloaded"))
    for name in ("base", "this"):  # each reloaded
        assert [first[name][figure] for figure in ("perplexity", "kl")] == [second[name][figure] for figure in ("perplexity", "kl")]
    assert [(len(model["latency"]), len(model["answers"])) for model in second.values()] == [(0, 0), (1, 1)]
    assert recipe(folder, pairs_file, QUANTIZE, output_dir=str(tmp_path / "whole")).identity() == offloaded.identity()  # where weights lie changes nothing


def test_the_errors_of_rounding_are_measured_on_an_offloaded_model_as_on_the_whole_one(folder: Path, limit: str) -> None:
    whole, offloaded = (load_model(folder, settings, CPU) for settings in (Model(), Model(device_map="auto", max_memory=limit)))
    rounded = load_model(folder, Model(), CPU, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    batches = batches_of(torch.arange(96).view(4, 24))
    errors = layer_errors(offloaded, rounded, batches)
    assert len(errors) == 28
    assert errors == layer_errors(whole, rounded, batches)


def test_an_offloaded_model_is_evaluated_like_the_whole_one(
    folder: Path, pairs_file: Path, limit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_noisy(folder, tmp_path / "other")
    options: dict[str, Any] = {"base": str(folder), "data": str(pairs_file), "batch_sizes": (1,), "repeats": 1, "answers": 1}
    whole = llmlite.evaluate(tmp_path / "other", **options)
    words = [word for name in ("base", "data") for word in (f"--{name}", options[name])]
    main(["evaluate", str(tmp_path / "other"), *words, "--device_map", "auto", "--max_memory", limit])
    assert "TTFT" not in capsys.readouterr().out
    found = json.loads((tmp_path / "other" / "evaluation.json").read_text())["models"]
    for name in ("base", "this"):
        assert [found[name][figure] for figure in ("perplexity", "kl", "tokens")] == [whole.models[name][figure] for figure in ("perplexity", "kl", "tokens")]
        assert (found[name]["latency"], found[name]["answers"]) == ([], [])
    assert found["this"]["kl"] > 0


def test_an_offloaded_teacher_teaches_what_the_whole_one_does(folder: Path, pairs_file: Path, limit: str, tmp_path: Path) -> None:
    found = []
    for name, layout in (("whole", {}), ("offloaded", {"teacher_device_map": "auto", "teacher_max_memory": limit})):
        other = str(save_tiny(tmp_path / name / "student", num_hidden_layers=2))
        step = {"step": "distill.whitebox", "teacher": str(folder), "cache": "none", "max_steps": 2, "learning_rate": 0.01, **layout}
        run = Run(recipe(Path(other), pairs_file, step))
        run.scratch = tmp_path / name
        teaching = run.recipe.steps[0]
        assert is_offloaded(teaching.teacher_model(run).load()) == bool(layout)
        teaching.check(ModelPlan(run.config), run)
        found.append(dict(teaching.apply(run.load_base(), run).named_parameters()))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (["finetune"], ["gradients stop at them", "Train on what `quantize` makes"]),
        ([{"step": "prune.weights", "sparsity": 0.5}], ["changes to weights that lie elsewhere would vanish", "load: blocks does this step"]),
        (["prune.structured"], ["load: blocks does this step with other settings: spread: measured tries out whole models; spread: auto"]),
        (["prune.layers"], ["would vanish, and gradients stop at them. Do it on a device that holds the model."]),
        (["quantize", "lora"], ["has 1 problem", "go backward through the whole model; with token_weights: equal"]),
        ([QUANTIZE, {"step": "lora", "init_lora_weights": "quantization_error"}], ["steps[1] lora", "goes backward through the whole dense base"]),
        ([QUANTIZE, "correct"], ["steps[1] correct", "goes backward"]),
    ],
)
def test_steps_that_would_write_into_offloaded_weights_are_refused(folder: Path, pairs_file: Path, limit: str, steps: list[Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        recipe(folder, pairs_file, *steps, model={"device_map": "auto", "max_memory": limit}).check()
    assert all(word in str(error.value) for word in words)
    recipe(folder, pairs_file, *steps, model={"device_map": "auto", "max_memory": "cpu=1GB"}).check()  # all of it fits: nothing lies elsewhere


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"model": {"max_memory": "cpu=1GB"}}, "device_map is none"),
        ({"model": {"device_map": "auto", "load": "blocks"}}, "two ways to load a model"),
        ({"model": {"device_map": "auto", "add_tokens": "<x>"}}, "device_map and add_tokens together"),
        ({"model": {"device_map": "auto"}, "data": {"calibration": "self"}}, "cannot write its calibration text"),
    ],
)
def test_what_device_map_does_not_go_with_is_refused(folder: Path, pairs_file: Path, options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        recipe(folder, pairs_file, QUANTIZE, **options).check()


def test_a_launch_of_several_processes_is_refused(folder: Path, pairs_file: Path) -> None:
    made = recipe(folder, pairs_file, QUANTIZE, model={"device_map": "auto"})
    context = Run(made)
    context.layout = Layout("ddp", 2)
    with pytest.raises(ConfigError, match="this launch has 2 with one each"):
        check(made, context)


def test_limits_are_read_as_text_or_mapping_and_mistakes_named() -> None:
    assert memory_limits("cpu=1.5GiB, 1=2GB,0=20GB") == {0: 20 * 10**9, 1: 2 * 10**9, "cpu": 3 * 2**29}
    assert Model(device_map="auto", max_memory={0: "20GB", "cpu": "1GB"}).max_memory == "0=20GB,cpu=1GB"  # type: ignore[arg-type]
    for wrong in ("20GB", "gpu=1GB", "cpu=many", "cpu=1PB", "0=1.2.3GB"):
        with pytest.raises(ConfigError, match="should be bytes by device, such as 0=20GB,cpu=60GB"):
            Model(device_map="auto", max_memory=wrong)


def test_offloaded_weights_are_there_within_present_and_forget_what_is_written(folder: Path, limit: str, pairs_file: Path) -> None:
    model = load_model(folder, Model(device_map="auto", max_memory=limit), CPU)
    block, before = ModelView(model).blocks[2], logits_of(model)
    assert block.linears["down"].weight_OI.is_meta
    with present(block):
        weight_OI = block.linears["down"].weight_OI
        assert not weight_OI.is_meta
        weight_OI.zero_()
        assert not torch.equal(logits_of(model), before)  # a forward pass within sees it
    assert block.linears["down"].weight_OI.is_meta
    assert torch.equal(logits_of(model), before)
    with pytest.raises(ValueError, match="would vanish"):
        walk_blocks(model, batches_of(torch.zeros(4, 16, dtype=torch.int64)), Walk(stages=(("down",),)), lambda block, found: None)
    with pytest.raises(RunError, match="get no gradients"):
        train(model, llmlite.Finetune(max_steps=1), Run(recipe(folder, pairs_file, "finetune")))
