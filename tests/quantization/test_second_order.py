"""Scales and codes from second-order error, against slow obvious loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from llmlite.quantization.nf4 import DoubleScales, dequantize, grid_of, largest_scales, nearest_index
from llmlite.quantization.second_order import calibrated_codes, gptq, refine, search_scales

SCHEMES = ("nf4", "fp4")


def problem(outputs: int = 24, inputs: int = 128, tokens: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, and the Hessian of inputs that are correlated and unevenly loud."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    mix_II = torch.randn(inputs, inputs, generator=generator) * torch.logspace(-1, 0.5, inputs)
    x_NI = torch.randn(tokens, inputs, generator=generator) @ mix_II
    return weight_OI, x_NI.t() @ x_NI / tokens


def _error(weight_OI: Tensor, hessian_II: Tensor, index_OI: Tensor, scales_OB: Tensor, scheme: str) -> float:
    error_OI = weight_OI - dequantize(index_OI, scales_OB, grid_of(scheme))  # type: ignore[arg-type]
    return (error_OI @ hessian_II * error_OI).sum().item()


def test_searched_scales_are_the_best_of_all_candidates() -> None:
    weight_OI, hessian_II = problem(outputs=5, inputs=64)
    importance_I, grid, factors = hessian_II.diagonal(), grid_of("nf4"), (0.7, 0.9, 1.0)

    def error(w_I: Tensor, level_I: Tensor, scale: Tensor) -> float:
        return float((importance_I * (w_I - scale * level_I) ** 2).sum())

    found_O1 = search_scales(weight_OI, importance_I, grid, factors)
    for w_I, scale_1 in zip(weight_OI, found_O1, strict=True):
        best = float("inf")
        for factor in factors:
            level_I = torch.tensor([min(grid.levels_L.tolist(), key=lambda level: abs(level - w)) for w in (w_I / (factor * w_I.abs().max())).tolist()])
            scale = (importance_I * w_I * level_I).sum() / (importance_I * level_I**2).sum()
            if error(w_I, level_I, scale) < best:
                best, expected = error(w_I, level_I, scale), scale
        torch.testing.assert_close(scale_1[0], expected, rtol=1e-4, atol=0)


def _slow_gptq(weight_OI: Tensor, hessian_II: Tensor, scales_OB: Tensor, damping: float) -> Tensor:
    """Optimal brain quantization in the textbook's order: the exact best update of all remaining weights after each rounding, from a fresh inverse."""
    grid, inputs = grid_of("nf4"), weight_OI.shape[1]
    hessian_II = hessian_II.double() + damping * hessian_II.diagonal().mean().double() * torch.eye(inputs, dtype=torch.float64)
    left = torch.argsort(hessian_II.diagonal(), descending=True).tolist()
    rest_OI, quantized_OI = weight_OI.double().clone(), torch.zeros_like(weight_OI)
    while left:
        inverse = torch.linalg.inv(hessian_II[left][:, left])
        j = left[0]
        scale_O = scales_OB[:, j // 64]
        quantized_OI[:, j] = grid.levels_L[nearest_index((rest_OI[:, j] / scale_O).float(), grid).long()] * scale_O
        error_O = (rest_OI[:, j] - quantized_OI[:, j]) / inverse[0, 0]
        rest_OI[:, left] -= error_O[:, None] * inverse[0][None]
        left = left[1:]
    return quantized_OI


@pytest.mark.parametrize("columns", [1, 24, 500])
def test_gptq_equals_optimal_brain_quantization_in_the_same_order(columns: int) -> None:
    weight_OI, hessian_II = problem(outputs=6)
    scales_OB, grid = largest_scales(weight_OI), grid_of("nf4")
    index_OI = gptq(weight_OI, hessian_II, scales_OB, grid, damping=0.01, columns=columns)
    torch.testing.assert_close(dequantize(index_OI, scales_OB, grid), _slow_gptq(weight_OI, hessian_II, scales_OB, 0.01))


def test_gptq_on_independent_inputs_is_rounding_to_nearest() -> None:
    weight_OI, grid = problem()[0], grid_of("nf4")
    scales_OB = largest_scales(weight_OI)
    index_OI = gptq(weight_OI, torch.diag(torch.rand(128) + 0.5), scales_OB, grid)
    assert torch.equal(index_OI, nearest_index(weight_OI.view(24, 2, 64) / scales_OB[..., None], grid).view(24, 128))


def test_inputs_that_are_always_zero_and_fewer_tokens_than_inputs_are_survived() -> None:
    weight_OI, _ = problem()
    x_NI = torch.randn(20, 128)
    x_NI[:, 5] = 0
    (codes,) = calibrated_codes([weight_OI], x_NI.t() @ x_NI / 20, grid_of("nf4"))
    assert bool(codes.dequantized(grid_of("nf4")).isfinite().all())
    assert bool((codes.scales_OB > 0).all())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_step_lowers_the_output_error(scheme: str) -> None:
    weight_OI, hessian_II = problem()
    grid = grid_of(scheme)  # type: ignore[arg-type]

    def rounded(scales_OB: Tensor) -> Tensor:
        return nearest_index(weight_OI.view(24, 2, 64) / scales_OB[..., None], grid).view(24, 128)

    stock = largest_scales(weight_OI)
    searched = search_scales(weight_OI, hessian_II.diagonal(), grid)
    codes = gptq(weight_OI, hessian_II, searched, grid)
    errors = [
        _error(weight_OI, hessian_II, rounded(stock), stock, scheme),
        _error(weight_OI, hessian_II, rounded(searched), searched, scheme),
        _error(weight_OI, hessian_II, codes, searched, scheme),
    ]
    errors += [_error(weight_OI, hessian_II, *refine(weight_OI, hessian_II, codes, searched, grid, sweeps=n, damping=0), scheme) for n in (1, 2, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def test_refined_codes_cannot_be_improved_by_moving_any_one_of_them() -> None:
    weight_OI, hessian_II = problem(outputs=2, inputs=64)
    grid = grid_of("nf4")
    (codes,) = calibrated_codes([weight_OI], hessian_II, grid, sweeps=50, damping=0.0)
    index_OI, scales_OB = codes.index_OI, codes.scales_OB
    best = _error(weight_OI, hessian_II, index_OI, scales_OB, "nf4")
    for row, column, step in itertools.product(range(2), range(64), (-1, 1)):
        moved_OI = index_OI.clone()
        moved_OI[row, column] = min(max(int(index_OI[row, column]) + step, 0), 15)
        assert _error(weight_OI, hessian_II, moved_OI, scales_OB, "nf4") >= best * (1 - 1e-4)


def test_codes_chosen_for_8_bit_scales_beat_codes_whose_scales_are_rounded_afterwards() -> None:
    weight_OI, hessian_II = problem(outputs=96, seed=3)
    weight_OI[::7] *= 6  # rows of very different size, so that 8 bits are coarse for the small ones
    grid = grid_of("nf4")
    (codes,) = calibrated_codes([weight_OI], hessian_II, grid)
    rounded_after = _error(weight_OI, hessian_II, codes.index_OI, DoubleScales.of(codes.scales_OB).round(codes.scales_OB), "nf4")
    (codes,) = calibrated_codes([weight_OI], hessian_II, grid, double_quant=True)
    assert codes.double is not None
    assert torch.equal(codes.double.round(codes.scales_OB), codes.scales_OB)
    assert _error(weight_OI, hessian_II, codes.index_OI, codes.scales_OB, "nf4") < rounded_after


@pytest.mark.parametrize("double_quant", [False, True])
def test_layers_that_hear_the_same_input_get_the_codes_that_each_gets_alone(double_quant: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x_NI = torch.randn(300, 128, generator=generator)
    hessian_II = x_NI.t() @ x_NI / 300
    weights = [torch.randn(outputs, 128, generator=generator) for outputs in (64, 16, 40)]
    together = calibrated_codes(weights, hessian_II, grid_of("nf4"), double_quant=double_quant)
    for weight_OI, codes in zip(weights, together, strict=True):
        (alone,) = calibrated_codes([weight_OI], hessian_II, grid_of("nf4"), double_quant=double_quant)
        assert codes.index_OI.shape == weight_OI.shape
        assert (codes.index_OI == alone.index_OI).float().mean() > 0.999  # sums of other sizes end in other last bits
        torch.testing.assert_close(codes.scales_OB, alone.scales_OB, rtol=1e-2, atol=1e-2)
        assert (codes.double is None) == (alone.double is None) == (not double_quant)
        if codes.double is not None and alone.double is not None:
            torch.testing.assert_close(codes.double.absmax_G, alone.double.absmax_G)
            assert torch.equal(codes.double.round(codes.scales_OB), codes.scales_OB)
