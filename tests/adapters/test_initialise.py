"""Adapters that start as the correction of the quantization: the best low-rank answer, closer logits, loadable by stock peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import llmlite
from llmlite.adapters.initialise import initialise, low_rank_correction
from llmlite.calibration.blocks import batches_of
from llmlite.errors import ConfigError
from llmlite.models.safety import make_safe
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
    steps = [{"step": "quantize", "scheme": "fp4"}, {"step": "lora", "r": 4, "learning_rate": 1e-9, "init_lora_weights": "quantization_error"}]
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


@pytest.mark.parametrize("steps", [[{"step": "lora", "init_lora_weights": "quantization_error"}], ["correct"]])
def test_without_a_quantize_step_there_is_nothing_to_correct(model_folder: Path, pairs_file: Path, steps: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"quantize step|takes a model that is"):
        llmlite.Recipe.from_options(("test", {"model": str(model_folder), "data": str(pairs_file), "steps": steps, **SMALL})).check()
