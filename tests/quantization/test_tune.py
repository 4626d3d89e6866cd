"""Scales tuned end to end: the product they go through, a model that comes closer, and scales that can be stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmlite.calibration.blocks import batches_of
from llmlite.distillation.descent import Descent
from llmlite.models.quick import quick_copy
from llmlite.models.view import ModelView
from llmlite.quantization.calibrate import CalibratedScheme, calibrate
from llmlite.quantization.nf4 import Codes, DoubleScales, grid_of, nearest_index
from llmlite.quantization.tune import scaled_product, tune_scales
from tests.conftest import build_tiny, logits_of, token_ids


def test_the_product_is_that_of_the_dequantized_weights_and_so_are_its_gradients() -> None:
    torch.manual_seed(0)
    levels_OI = torch.randn(6, 128, dtype=torch.float64)
    x = torch.randn(2, 3, 128, dtype=torch.float64, requires_grad=True)
    scales_OB = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    plain = x @ (levels_OI.view(6, 2, 64) * scales_OB[..., None]).view(6, 128).t()
    ours = scaled_product(x, levels_OI, scales_OB)
    torch.testing.assert_close(ours, plain)
    pull = torch.randn_like(plain)
    for one, other in zip(torch.autograd.grad(ours, (x, scales_OB), pull), torch.autograd.grad(plain, (x, scales_OB), pull), strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def _divergence(model: torch.nn.Module, dense: torch.nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Of the calibration rows: on 256 tokens of noise nothing generalises."""
    p, q = (torch.cat([one(**batch).logits for batch in batches]).log_softmax(-1) for one in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(("family", "double_quant"), [("llama", False), ("llama", True), ("gpt2", True)])
def test_tuned_scales_bring_the_model_closer_with_the_same_codes(tmp_path: Path, family: str, double_quant: bool) -> None:
    from safetensors.torch import load_file

    batches = batches_of(token_ids(rows=8, length=32, seed=5))
    dense = build_tiny(family)
    distances = []
    for name, tune in (("plain", None), ("tuned", Descent(learning_rate=2e-3, epochs=2))):
        model = build_tiny(family)
        calibrate(model, batches, CalibratedScheme(double_quant=double_quant, tune=tune), tmp_path / name)
        distances.append(_divergence(model, dense, batches))
    assert distances[1] < 0.97 * distances[0]
    files = sorted(file.name for file in (tmp_path / "plain").glob("*.safetensors"))
    assert files == sorted(file.name for file in (tmp_path / "tuned" / "tuned").glob("*.safetensors"))
    moved = 0.0
    for file in files:
        before, after = load_file(tmp_path / "plain" / file), load_file(tmp_path / "tuned" / "tuned" / file)
        assert torch.equal(before["index"], after["index"])
        assert bool((after["scales"] > 0).all())
        moved = max(moved, float((after["scales"] / before["scales"] - 1).abs().max()))
    assert moved > 1e-3


def test_tuning_that_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmlite.quantization import calibrate as module

    batches, how = batches_of(token_ids(rows=8, length=32, seed=5)), CalibratedScheme()
    first = build_tiny("llama")
    calibrate(first, batches, how, tmp_path / "codes", tmp_path / "walk")
    monkeypatch.setattr(module, "tune_scales", lambda *_args: pytest.fail("tuned twice"))
    monkeypatch.setattr(module, "quick_sensitivity", lambda *_args: pytest.fail("read twice"))
    again = build_tiny("llama")
    calibrate(again, batches, how, tmp_path / "codes", tmp_path / "walk")
    assert torch.equal(logits_of(first), logits_of(again))


def test_a_descent_that_overflows_leaves_the_scales_as_they_were() -> None:
    model, batches, grid = build_tiny("llama"), batches_of(token_ids(rows=4, length=8)), grid_of("nf4")
    codes = {
        one.name: Codes(nearest_index(one.weight_OI, grid), torch.ones(one.weight_OI.shape[0], 1)) for one in ModelView(model).linears() if "q_" in one.name
    }
    hidden = [torch.full((*batch["input_ids"].shape, 64), torch.inf) for batch in batches]
    tuned = tune_scales(model, codes, grid, batches, hidden, Descent())
    assert all(torch.equal(tuned[name].scales_OB, one.scales_OB) for name, one in codes.items())


def test_codes_go_to_another_device_whole() -> None:
    scales_OB = torch.rand(6, 1)
    codes = Codes(torch.zeros(6, 64, dtype=torch.uint8), scales_OB, DoubleScales.of(scales_OB)).to(torch.device("meta"))
    assert codes.double is not None
    assert {str(one.device) for one in (codes.index_OI, codes.scales_OB, codes.double.offset, codes.double.absmax_G, codes.double.code_256)} == {"meta"}


def test_a_quick_copy_keeps_ties_and_leaves_the_model_alone() -> None:
    model = build_tiny("gpt2")
    before = logits_of(model)
    linear = next(iter(ModelView(model).linears()))
    copy = quick_copy(model, torch.bfloat16, [linear.base])
    assert ModelView(copy).tied == ModelView(model).tied
    assert next(iter(ModelView(copy).linears())).base.weight.numel() == 0
    assert [linear.name for linear in ModelView(copy).linears()] == [linear.name for linear in ModelView(model).linears()]
    assert {parameter.dtype for parameter in copy.parameters()} == {torch.bfloat16}
    assert torch.equal(logits_of(model), before)
