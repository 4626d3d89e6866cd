"""Factors of rows, columns and norms: computing with them is multiplying them in, in every family; and the step that tunes them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmlite
from llmlite.context import Run
from llmlite.distillation import descent
from llmlite.errors import ConfigError, LlmliteError, RunError
from llmlite.memory import measured_peak, resident_bytes
from llmlite.models.size import count_zeros, expected_bytes, runtime_bytes
from llmlite.models.view import ModelView
from llmlite.pruning.factors import Factors
from llmlite.pruning.rescale import PruneRescale
from llmlite.step import ModelPlan
from tests.conftest import ALL_FAMILIES, build_tiny, logits_of, require_stock_reload, save_tiny, token_ids

pytestmark = pytest.mark.usefixtures("own_cache")


def random_factors(factors: Factors) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for factor in factors.all.values():
            factor += 0.3 * torch.randn(factor.shape, generator=generator)


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_computing_with_factors_is_multiplying_them_into_the_weights(name: str) -> None:
    with_factors, model = build_tiny(name), build_tiny(name)
    factors = Factors(ModelView(with_factors))
    assert torch.equal(logits_of(with_factors), logits_of(model))  # ones change nothing
    random_factors(factors)
    assert (logits_of(with_factors) - logits_of(model)).abs().max() > 0.1
    factors.multiply_into(ModelView(model))
    torch.testing.assert_close(logits_of(with_factors), logits_of(model), rtol=1e-4, atol=1e-4)


def test_every_family_reloads_by_stock_code_and_zeros_stay_zeros(tmp_path: Path) -> None:
    models = {}
    for name in ALL_FAMILIES:
        models[name] = build_tiny(name)
        for linear in ModelView(models[name]).linears():
            linear.weight_OI[:, ::2] = 0
        zeros = count_zeros(models[name]).zeros
        factors = Factors(ModelView(build_tiny(name)))
        random_factors(factors)
        factors.multiply_into(ModelView(models[name]))
        assert count_zeros(models[name]).zeros == zeros > 0
    require_stock_reload(models, tmp_path)


# the step

ROWS, STEPS = 16, 8


def run_on(folder: Path, scratch: Path = Path(), **step: Any) -> Run:
    run = Run(llmlite.Recipe(model=str(folder), steps=(PruneRescale(**step),), seed=3), scratch=scratch)
    run.__dict__["calibration_windows"] = token_ids(ROWS, 24, seed=3)
    return run


def divergence(model: Any, dense: Any, ids_BT: Tensor) -> float:
    logp, logq = (logits_of(one, ids_BT).log_softmax(-1) for one in (model, dense))
    return float((logq.exp() * (logq - logp)).sum(-1).mean())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "base")
    build_tiny("llama", vocab_size=320).save_pretrained(tmp_path / "base")  # weights far from degenerate
    return tmp_path / "base"


@pytest.mark.parametrize("pruning", [llmlite.PruneFfn(keep=0.5, multiple_of=16), llmlite.PruneHidden(keep=0.75, multiple_of=16), llmlite.PruneWeights()])
def test_a_pruned_model_comes_nearer_to_the_base(folder: Path, pruning: Any) -> None:
    dense = AutoModelForCausalLM.from_pretrained(folder)
    run = run_on(folder, epochs=4, learning_rate=1e-2)
    pruned = pruning.apply(AutoModelForCausalLM.from_pretrained(folder), run)
    seen, unseen = run.calibration_windows, token_ids(ROWS, 24, seed=9)
    before = divergence(pruned, dense, seen), divergence(pruned, dense, unseen)
    shapes = {name: weight.shape for name, weight in pruned.state_dict().items()}
    (step,) = run.recipe.steps
    tuned = step.apply(pruned, run)
    assert divergence(tuned, dense, seen) < 0.9 * before[0]
    assert divergence(tuned, dense, unseen) < 0.95 * before[1]
    assert {name: weight.shape for name, weight in tuned.state_dict().items()} == shapes
    assert run.notes["factors"] > 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tuned.modules())


def test_a_descent_stopped_twice_ends_in_the_same_bits(folder: Path, tmp_path: Path, descents: Any) -> None:
    def once(scratch: Path, stop: int | None) -> tuple[Any, int]:
        calls = descents(stop)
        run = run_on(folder, scratch)
        pruned = llmlite.PruneFfn(keep=0.5, multiple_of=16).apply(AutoModelForCausalLM.from_pretrained(folder), run_on(folder))
        (step,) = run.recipe.steps
        return step.apply(pruned, run), len(calls)

    whole, calls = once(tmp_path / "whole", None)
    assert calls == ROWS
    for stop in (3, 6):  # in the second step, in the fourth of those that are left
        with pytest.raises(KeyboardInterrupt):
            once(tmp_path / "stopped", stop)
    again, calls = once(tmp_path / "stopped", None)
    assert calls == ROWS - 2 - 6
    assert all(torch.equal(one, other) for one, other in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_the_plan_counts_the_logits_of_a_large_vocabulary(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "wide", vocab_size=49_152)
    run = Run(llmlite.Recipe(model=str(folder), data=llmlite.Data(max_length=512, calibration_sequences=2), steps=(PruneRescale(),)))
    run.__dict__["calibration_windows"] = token_ids(2, 512, seed=3)
    (step,) = run.recipe.steps
    planned = step.check(ModelPlan(run.config), run).peak_bytes - runtime_bytes(run.device)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with measured_peak() as peak:
        before = resident_bytes() - expected_bytes(run.config)
        step.apply(model, run)
    assert planned == pytest.approx(peak.bytes - before, rel=0.4)  # 0.85 too little without them


def test_a_descent_that_overflows_says_so_and_leaves_the_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_on(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}

    def overflow(_model: Any, factors: dict[str, Tensor], *_: Any) -> None:
        next(iter(factors.values())).data.fill_(torch.inf)

    monkeypatch.setattr(descent, "descend", overflow)
    (step,) = run.recipe.steps
    with pytest.raises(RunError, match=r"Lower learning_rate \(0.002\)"):
        step.apply(model, run)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_what_cannot_work_is_refused_before_anything_is_loaded(model_folder: Path) -> None:
    run = run_on(model_folder)
    (step,) = run.recipe.steps
    smaller = type(run.config)(**{**run.config.to_dict(), "vocab_size": 300})
    with pytest.raises(ConfigError, match=r"before prune.vocabulary"):
        step.check(ModelPlan(smaller), run)
    with pytest.raises(ConfigError, match="adapter"):
        step.check(dataclasses.replace(ModelPlan(run.config), adapters=True), run)
    plan = step.check(ModelPlan(run.config), run)
    assert plan.peak_bytes > 0
    assert "multiplied into the weights" in plan.notes[0]
    quantized = llmlite.Recipe(model=str(model_folder), data=llmlite.Data(max_length=32), steps=(llmlite.Quantize(scheme="int8"), PruneRescale()))
    with pytest.raises(LlmliteError, match=r"prune\.rescale"):
        quantized.check()


def test_no_epochs_leave_it_out_so_that_a_model_in_blocks_can_be_pruned_by_the_preset(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    data = llmlite.Data(train=str(pairs_file), max_length=32, calibration_sequences=8, evaluation_rows=8)
    options = {"model": llmlite.Model(name=str(model_folder), load="blocks"), "data": data, "output_dir": str(tmp_path / "out")}
    steps = llmlite.PruneFfn(keep=0.5, multiple_of=16)
    with pytest.raises(LlmliteError, match="it goes backward through the whole model; epochs: 0 leaves it out"):
        llmlite.Recipe(**options, steps=(steps, PruneRescale())).check()
    report = llmlite.Recipe(**options, steps=(steps, PruneRescale(epochs=0))).run()
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / "out" / place).state_dict() for place in ("steps/01-prune.ffn", "."))
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert report.reload_difference == 0


def test_a_recipe_prunes_and_rescales_and_reports_both(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    data = llmlite.Data(train=str(pairs_file), max_length=32, calibration_sequences=8, evaluation_rows=8)
    steps = (llmlite.PruneWeights(sparsity=0.5), PruneRescale(epochs=2), llmlite.Finetune(max_steps=2))
    report = llmlite.Recipe(model=str(model_folder), data=data, steps=steps, output_dir=str(tmp_path / "out")).run()
    pruned, rescaled, _trained = report.rows[1:]
    assert rescaled.parameters == pruned.parameters
    assert rescaled.details["factors"] > 0
    assert report.reload_difference == 0
    assert count_zeros(tmp_path / "out/steps/02-prune.rescale").zeros >= count_zeros(tmp_path / "out/steps/01-prune.weights").zeros
    assert count_zeros(tmp_path / "out").sparsity >= 0.5
