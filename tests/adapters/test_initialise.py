"""Adapters that start as the correction of the quantization: the best low-rank answer, closer logits, loadable by stock peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import llmlite
import llmlite.plan
from llmlite.adapters.initialise import initialise, low_rank_correction
from llmlite.adapters.lora import quantize_step
from llmlite.calibration.blocks import batches_of
from llmlite.context import Run
from llmlite.errors import ConfigError
from llmlite.layout import Layout
from llmlite.models.safety import make_safe
from llmlite.models.save import save_model, settle_adapter
from llmlite.step import ModelPlan
from tests.conftest import build_tiny, logits_of, token_ids

SMALL: dict[str, Any] = {"max_length": 64, "evaluation_rows": 6, "calibration_sequences": 8}


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_no_matrix_of_the_rank_leaves_less_output_error(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    error_OI, x_NI = torch.randn(shape), torch.randn(300, shape[1]) @ torch.randn(shape[1], shape[1])
    a_RI, b_OR = low_rank_correction(error_OI, x_NI.t() @ x_NI / 300, rank=4, damping=0.0)
    left = (x_NI @ (error_OI - b_OR @ a_RI).t()).square().sum()
    # the outputs' own singular values say how much any rank-4 map must leave
    best = torch.linalg.svdvals((x_NI @ error_OI.t()).double())[4:].square().sum()
    assert left.item() == pytest.approx(best.item(), rel=1e-3)


def test_the_whole_rank_corrects_everything() -> None:
    torch.manual_seed(0)
    error_OI = torch.randn(6, 20)
    a_RI, b_OR = low_rank_correction(error_OI, torch.eye(20), rank=6)
    torch.testing.assert_close(b_OR @ a_RI, error_OI, rtol=1e-3, atol=1e-3)


def test_inputs_that_are_always_zero_are_survived() -> None:
    a_RI, b_OR = low_rank_correction(torch.randn(6, 20), torch.zeros(20, 20), rank=2)
    assert bool((b_OR @ a_RI).isfinite().all())


@pytest.mark.parametrize(("family", "scheme"), [("llama", "nf4"), ("llama", "int8"), ("gpt2", "nf4"), ("phi3", "nf4")])
def test_the_corrected_model_is_closer_and_stock_peft_loads_it(tmp_path: Path, family: str, scheme: str) -> None:
    dense = build_tiny(family)
    dense.save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(load_in_8bit=True) if scheme == "int8" else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=scheme)

    def base() -> Any:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}).eval()
        make_safe(model)
        return model

    expected, rounded = logits_of(dense), logits_of(base())
    targets = [name.rpartition(".")[2] for name in ("c_attn", "c_proj", "c_fc")] if family == "gpt2" else "all-linear"
    adapted = peft.get_peft_model(base(), peft.LoraConfig(r=16, lora_alpha=24, target_modules=targets, task_type="CAUSAL_LM")).eval()
    left = initialise(adapted, dense, batches_of(token_ids(rows=16, length=32, seed=5)))
    assert left
    assert all(0 <= share < 0.9 for share in left.values())
    corrected = logits_of(adapted)
    worth = 1.0 if scheme == "int8" else 0.9  # in int8 most of the error is the rounding of the inputs, which no weight repairs
    assert (corrected - expected).norm() < worth * (rounded - expected).norm()
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(again), corrected)


def test_a_lora_starts_closer_to_the_dense_model_and_trains_from_there(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    steps = [{"step": "quantize", "scheme": "fp4"}, {"step": "lora", "r": 4, "learning_rate": 1e-9}]  # by default
    options = {
        "model": str(model_folder),
        "data": str(pairs_file),
        "steps": steps,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "calibrate": False,
        "report_sequences": 0,
        **SMALL,
    }
    report = llmlite.Recipe.from_options(("test", options)).run(tmp_path / "out")
    assert (report.rows[2].kl or 0) < (report.rows[1].kl or 0)
    assert 0 < report.rows[2].details["quantization_error_left"] < 1
    assert report.reload_difference is not None
    assert report.reload_difference < 1e-3


def test_correct_adds_a_correction_without_training_also_after_pruning(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    steps = [{"step": "prune.ffn", "keep": 0.5}, {"step": "quantize", "scheme": "nf4"}, {"step": "correct", "r": 8}]
    options = {"model": str(model_folder), "data": str(pairs_file), "steps": steps, "calibration": str(pairs_file), **SMALL}
    recipe = llmlite.Recipe.from_options(("test", options))
    report = recipe.run(tmp_path / "out")
    assert report.rows[3].details["quantization_error_left"] < 0.9
    assert "optimizer_steps" not in report.rows[3].details
    assert report.reload_difference is not None
    assert report.reload_difference < 1e-3


def test_an_adapter_takes_half_of_the_bytes_where_nothing_is_lost(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted: Any = peft.get_peft_model(build_tiny("llama"), config).eval()
    save_model(adapted, tmp_path / "wide", torch.bfloat16)
    settle_adapter(adapted, torch.bfloat16)
    save_model(adapted, tmp_path / "narrow", torch.bfloat16)
    for name, dtype in (("wide", torch.float32), ("narrow", torch.bfloat16)):
        assert {tensor.dtype for tensor in load_file(tmp_path / name / "adapter_model.safetensors").values()} == {dtype}
    assert {parameter.dtype for parameter in adapted.parameters()} == {torch.float32}
    again = peft.PeftModel.from_pretrained(build_tiny("llama"), tmp_path / "narrow").eval()
    assert torch.equal(logits_of(again), logits_of(adapted))


@pytest.mark.parametrize("steps", [[{"step": "lora", "init_lora_weights": "quantization_error"}], ["correct"]])
def test_without_a_quantize_step_there_is_nothing_to_correct(model_folder: Path, pairs_file: Path, steps: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"quantize step|takes a model that is"):
        llmlite.Recipe.from_options(("test", {"model": str(model_folder), "data": str(pairs_file), "steps": steps, **SMALL})).check()


def planned_notes(model: Path, rows: Path, *steps: Any, context: Run | None = None, **options: Any) -> str:
    recipe = llmlite.Recipe(model=str(model), data=str(rows), steps=steps, **{**SMALL, **options})
    return " ".join(llmlite.plan.check(recipe, context or Run(recipe)).rows[-1]["notes"])


def test_the_correction_is_the_default_wherever_it_can_be(model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts, nf4 = "starts as the correction of the quantization, from 8 calibration rows", llmlite.Quantize(calibrate=False)
    assert starts in planned_notes(model_folder, pairs_file, nf4, llmlite.Lora())
    assert starts in planned_notes(model_folder, pairs_file, llmlite.Quantize(scheme="fp4"), llmlite.Lora(use_rslora=True))
    without: list[tuple[Any, ...]] = [
        (llmlite.Lora(),),
        (nf4, llmlite.Lora(init_lora_weights="default")),
        (llmlite.Quantize(scheme="int8", report_sequences=0), llmlite.Lora()),
    ]
    for steps in without:
        assert "starts" not in planned_notes(model_folder, pairs_file, *steps)
    recipe = llmlite.Recipe(model=str(model_folder), data=str(pairs_file), steps=(nf4, llmlite.Lora()), **SMALL)
    for kind in ("fsdp2", "zero3"):
        sharded = Run(recipe)
        sharded.layout = Layout(kind)  # type: ignore[arg-type]
        plan = recipe.steps[1]._planned_start(ModelPlan(sharded.config), ModelPlan(sharded.config, form="nf4", rounded=True), sharded)
        assert plan.notes == (f"starts as the quantized base: its correction under {sharded.layout.name} is not built",)
    assert "starts as the quantized base: DoRA" in planned_notes(model_folder, pairs_file, nf4, llmlite.Lora(use_dora=True))
    monkeypatch.setattr("llmlite.memory.free_bytes", lambda _device="cpu": 10**6)
    assert "starts as the quantized base; starting as its correction would take" in planned_notes(model_folder, pairs_file, nf4, llmlite.Lora())


def test_the_nearest_quantize_step_before_is_the_one_corrected() -> None:
    nf4 = llmlite.Quantize(calibrate=False)
    run = Run(llmlite.Recipe(steps=(nf4, llmlite.Lora(), llmlite.Merge(), nf4, llmlite.Lora(), llmlite.Merge())))
    found = []
    for position in range(6):
        run.position = position
        found.append(quantize_step(run))
    assert found == [None, 0, 0, 0, 3, 3]


@pytest.mark.slow
def test_each_correction_is_towards_what_its_own_quantize_step_got(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    train: dict[str, Any] = {"max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 0.02, "lora_dropout": 0.0}
    nf4 = llmlite.Quantize(scheme="fp4", calibrate=False, report_sequences=0)
    steps = (nf4, llmlite.Lora(**train), llmlite.Merge(), nf4, llmlite.Lora(**{**train, "max_steps": 1, "learning_rate": 1e-9}))
    recipe = llmlite.Recipe(model=str(model_folder), data=str(pairs_file), output_dir=str(tmp_path / "out"), steps=steps, **SMALL)
    kl = [row.kl or 0 for row in recipe.run().rows]
    merged, again, corrected = kl[3:]
    assert merged > 0.02  # training has moved it away from the base
    assert abs(corrected - merged) < abs(again - merged) + 0.1 * merged
    assert corrected > merged / 2  # and the correction does not bring the base back
