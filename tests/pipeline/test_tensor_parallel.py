"""Models cut over the processes of a launch say what whole ones say: two CPU processes over gloo against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import llmlite
from llmlite.context import Run
from llmlite.errors import ConfigError
from llmlite.layout import Layout
from llmlite.models.tensor_parallel import indivisible
from llmlite.plan import check
from llmlite.recipe import Recipe
from tests.conftest import ALL_FAMILIES, build_tiny, logits_of, save_noisy, save_tiny, tiny_config

# What each of the processes does: `llmlite evaluate`, a student under DDP with a teacher that is cut, live and from a cache, and logits of every family.
SCRIPT = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from llmlite.cli import main
from llmlite.context import Run
from llmlite.models.load import load_model
from llmlite.models.settings import Model
from llmlite.recipe import Recipe

folder, options, taught = Path(sys.argv[1]), sys.argv[2].split(), sys.argv[3:]
main(["evaluate", str(folder / "other"), *options])
for name in taught:
    run = Run(Recipe.from_file(folder / f"{name}.yaml"))
    run.scratch = folder / name
    step = run.recipe.steps[0]
    student = step.apply(run.load_base(), run)
    if run.is_main:
        save_file({key: value.contiguous() for key, value in student.state_dict().items() if "lm_head" not in key}, folder / f"{name}.safetensors")
for place in sorted((folder / "families").iterdir()):
    cut = load_model(place, Model(), run.device, tensor_parallel=True)
    ids_BT = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        logits = cut(input_ids=ids_BT).logits
    if run.is_main:
        local = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in cut.model.layers.parameters()) if hasattr(cut, "model") else 0
        torch.save((ids_BT, logits, local), place / "logits.pt")
"""

STEP = """
model: {model}
data: {{train: {pairs}, max_length: 64}}
steps:
  - step: distill.whitebox
    teacher: {teacher}
    cache: {cache}
    teacher_tp_plan: {plan}
    max_steps: 2
    per_device_train_batch_size: {batch}
    learning_rate: 0.003
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo over loopback as CI has it")
def test_two_processes_that_hold_a_half_each_measure_and_teach_what_one_does(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    save_noisy(model_folder, tmp_path / "other")
    student = save_tiny(tmp_path / "student", num_hidden_layers=2)
    planned = [name for name in ALL_FAMILIES if not indivisible(tiny_config(name), 2)]
    assert len(planned) == 13
    for name in planned:
        build_tiny(name).save_pretrained(tmp_path / "families" / name)
    taught = []
    for plan, batch in (("none", 4), ("auto", 2)):
        for cache in ("none", "hidden"):
            taught.append(f"{plan}-{cache}")
            text = STEP.format(model=student, pairs=pairs_file, teacher=tmp_path / "other", cache=cache, plan=plan, batch=batch)
            (tmp_path / f"{taught[-1]}.yaml").write_text(text)
    options = f"--base {model_folder} --data {pairs_file} --batch_sizes 1 --repeats 1 --answers 1"
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "LLMLITE_CACHE": str(tmp_path / "cache-two")}
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "script.py"), str(tmp_path)]
    two = subprocess.run([*torchrun, f"{options} --tp_plan auto", *taught[2:]], env=environment, capture_output=True, text=True, check=False)
    assert two.returncode == 0, two.stderr[-3000:]
    assert two.stdout.count("perplexity") == 1  # one process speaks
    cut = json.loads((tmp_path / "other" / "evaluation.json").read_text())["models"]

    whole = llmlite.evaluate(tmp_path / "other", base=str(model_folder), data=str(pairs_file), batch_sizes=(1,), repeats=1, answers=1).models
    for name in ("base", "this"):
        assert cut[name]["perplexity"] == pytest.approx(whole[name]["perplexity"], rel=1e-5)
        assert cut[name]["answers"] == whole[name]["answers"]
    assert cut["this"]["kl"] == pytest.approx(whole["this"]["kl"], rel=1e-3)
    assert whole["this"]["kl"] > 0.01

    for name in planned:
        ids_BT, logits_BTV, local = torch.load(tmp_path / "families" / name / "logits.pt")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "families" / name, dtype=torch.float32).eval()
        wanted_BTV = logits_of(model, ids_BT)
        assert float((logits_BTV - wanted_BTV).abs().max()) < 2e-5 * max(1.0, float(wanted_BTV.abs().max())), name
        assert local < 0.6 * sum(p.numel() for p in model.model.layers.parameters()) if local else name == "gpt_neox"

    run = Run(Recipe.from_file(tmp_path / "none-none.yaml"))
    run.scratch = tmp_path / "one"
    alone = run.recipe.steps[0].apply(run.load_base(), run).state_dict()
    before = run.load_base().state_dict()
    live, cached = (load_file(tmp_path / f"auto-{cache}.safetensors") for cache in ("none", "hidden"))
    moved = max(float((alone[name] - before[name]).abs().max()) for name in live)
    assert moved > 1e-3
    assert max(float((alone[name] - live[name]).abs().max()) for name in live) < 1e-4
    assert max(float((alone[name] - cached[name]).abs().max()) for name in live) < 0.2 * moved  # the cache rounds to bfloat16


def test_what_cannot_be_cut_is_said_up_front() -> None:
    assert indivisible(tiny_config("llama"), 2) == []
    assert indivisible(tiny_config("llama", intermediate_size=129), 2) == []  # the last slice is narrower
    assert indivisible(tiny_config("phi3", num_attention_heads=3, num_key_value_heads=3, hidden_size=96), 2) == []  # gathered before heads are taken apart
    assert "this is one process" in indivisible(tiny_config("llama"), 1)[0]
    assert "no plan for gpt2" in indivisible(tiny_config("gpt2"), 2)[0]
    problems = indivisible(tiny_config("qwen3", num_attention_heads=9, num_key_value_heads=3), 4)
    assert problems[0].startswith("tp_plan=auto: 9 query heads of qwen3 do not divide by 4 processes. 3 processes would do.")
    assert "3 key/value heads" in problems[1]
    quantized = tiny_config("llama")
    quantized.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert "this model is quantized" in indivisible(quantized, 2)[0]


@pytest.mark.parametrize(
    ("layout", "options", "words"),
    [
        (Layout("ddp", 2), {}, ["each would measure the same", "--tp_plan auto"]),
        (Layout("ddp", 3), {"tp_plan": "auto"}, ["4 query heads of llama do not divide by 3", "2 processes would do"]),
        (Layout("ddp", 2), {"tp_plan": "auto", "device_map": "auto", "tasks": ("piqa",)}, ["this launch has 2 with one each", "tasks are not built"]),
        (Layout(), {"tp_plan": "auto"}, ["this is one process"]),
    ],
)
def test_evaluations_that_cannot_be_laid_out_are_refused_before_weights_load(
    layout: Layout, options: dict[str, Any], words: list[str], model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "layout", layout)
    monkeypatch.setattr("llmlite.evaluation.tasks.check_tasks", lambda tasks: None)
    monkeypatch.setattr("llmlite.context.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError) as error:
        llmlite.evaluate(model_folder, base=str(model_folder), data=str(pairs_file), **options)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("layout", "options", "word"),
    [
        (Layout("ddp", 2), {"teacher_device_map": "balanced"}, "this launch has 2 with one each. teacher_tp_plan: auto cuts it over them"),
        (Layout(), {"teacher_tp_plan": "auto"}, "this is one process"),
        (Layout("ddp", 3), {"teacher_tp_plan": "auto"}, "teacher: tp_plan=auto: 4 query heads"),
        (Layout("ddp", 2), {"teacher_tp_plan": "auto", "teacher_quantization": "nf4"}, "cuts a dense teacher"),
        (Layout("ddp", 2), {"teacher_tp_plan": "auto", "hidden_weight": 0.1}, "look inside of the teacher"),
        (Layout("fsdp2", 2), {"teacher_tp_plan": "auto"}, "under FSDP2 is not built"),
        (Layout(), {"teacher_max_memory": "cpu=1GB"}, "teacher_max_memory=cpu=1GB limits"),
    ],
)
def test_teachers_that_cannot_be_laid_out_are_refused(
    layout: Layout, options: dict[str, Any], word: str, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmlite.plan._refuse_launch", lambda context: None)
    step = {"step": "distill.whitebox", **options}
    recipe = Recipe.from_options(("test", {"model": str(model_folder), "data": {"train": str(pairs_file), "max_length": 64}, "steps": [step]}))
    context = Run(recipe)
    context.layout = layout
    with pytest.raises(ConfigError, match=word):
        check(recipe, context)
