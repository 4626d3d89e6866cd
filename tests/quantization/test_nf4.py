"""The mathematics of calibrated 4-bit weights, against slow obvious loops and against bitsandbytes itself."""

from __future__ import annotations

import itertools

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit
from torch import Tensor

from llmlite.models.safety import make_safe
from llmlite.quantization.nf4 import (
    DoubleScales,
    calibrated_codes,
    dequantize,
    gptq,
    grid_of,
    largest_scales,
    nearest_index,
    refine,
    search_scales,
)
from llmlite.quantization.stock_format import pack, write_codes

SCHEMES = ("nf4", "fp4")


def _problem(outputs: int = 24, inputs: int = 128, tokens: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, and the Hessian of inputs that are correlated and unevenly loud."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    mix_II = torch.randn(inputs, inputs, generator=generator) * torch.logspace(-1, 0.5, inputs)
    x_NI = torch.randn(tokens, inputs, generator=generator) @ mix_II
    return weight_OI, x_NI.t() @ x_NI / tokens


def _error(weight_OI: Tensor, hessian_II: Tensor, index_OI: Tensor, scales_OB: Tensor, scheme: str) -> float:
    error_OI = weight_OI - dequantize(index_OI, scales_OB, grid_of(scheme))  # type: ignore[arg-type]
    return (error_OI @ hessian_II * error_OI).sum().item()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_to_nearest_at_the_largest_scale_is_what_bitsandbytes_stores(scheme: str) -> None:
    weight_OI, grid = _problem()[0], grid_of(scheme)  # type: ignore[arg-type]
    scales_OB = largest_scales(weight_OI)
    index_OI = nearest_index(weight_OI.view(24, 2, 64) / scales_OB[..., None], grid).view(24, 128)
    packed, state = quantize_4bit(weight_OI, quant_type=scheme)
    torch.testing.assert_close(dequantize(index_OI, scales_OB, grid), dequantize_4bit(packed, state), rtol=0, atol=1e-6)
    if scheme == "nf4":  # FP4 has two zeros, so its bytes are not unique
        assert torch.equal(pack(grid.codes_L[index_OI.long()]), packed)


def test_packing_and_unpacking_is_the_identity() -> None:
    codes_OI = torch.randint(0, 16, (6, 64), dtype=torch.uint8)
    packed = pack(codes_OI).flatten()
    assert packed.dtype == torch.uint8
    assert torch.equal(torch.stack([packed // 16, packed % 16], dim=1).view(6, 64), codes_OI)


def test_an_odd_number_of_codes_is_refused() -> None:
    with pytest.raises(ValueError, match="7 codes"):
        pack(torch.zeros(7, dtype=torch.uint8))


def test_searched_scales_are_the_best_of_all_candidates() -> None:
    weight_OI, hessian_II = _problem(outputs=5, inputs=64)
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
    weight_OI, hessian_II = _problem(outputs=6)
    scales_OB, grid = largest_scales(weight_OI), grid_of("nf4")
    index_OI = gptq(weight_OI, hessian_II, scales_OB, grid, damping=0.01, columns=columns)
    torch.testing.assert_close(dequantize(index_OI, scales_OB, grid), _slow_gptq(weight_OI, hessian_II, scales_OB, 0.01))


def test_gptq_on_independent_inputs_is_rounding_to_nearest() -> None:
    weight_OI, grid = _problem()[0], grid_of("nf4")
    scales_OB = largest_scales(weight_OI)
    index_OI = gptq(weight_OI, torch.diag(torch.rand(128) + 0.5), scales_OB, grid)
    assert torch.equal(index_OI, nearest_index(weight_OI.view(24, 2, 64) / scales_OB[..., None], grid).view(24, 128))


def test_inputs_that_are_always_zero_and_fewer_tokens_than_inputs_are_survived() -> None:
    weight_OI, _ = _problem()
    x_NI = torch.randn(20, 128)
    x_NI[:, 5] = 0
    (codes,) = calibrated_codes([weight_OI], x_NI.t() @ x_NI / 20, grid_of("nf4"))
    assert bool(codes.dequantized(grid_of("nf4")).isfinite().all())
    assert bool((codes.scales_OB > 0).all())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_step_lowers_the_output_error(scheme: str) -> None:
    weight_OI, hessian_II = _problem()
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
    weight_OI, hessian_II = _problem(outputs=2, inputs=64)
    grid = grid_of("nf4")
    (codes,) = calibrated_codes([weight_OI], hessian_II, grid, sweeps=50, damping=0.0)
    index_OI, scales_OB = codes.index_OI, codes.scales_OB
    best = _error(weight_OI, hessian_II, index_OI, scales_OB, "nf4")
    for row, column, step in itertools.product(range(2), range(64), (-1, 1)):
        moved_OI = index_OI.clone()
        moved_OI[row, column] = min(max(int(index_OI[row, column]) + step, 0), 15)
        assert _error(weight_OI, hessian_II, moved_OI, scales_OB, "nf4") >= best * (1 - 1e-4)


def test_scales_in_8_bits_are_the_ones_bitsandbytes_reads_back() -> None:
    scales_OB = torch.rand(40, 9, generator=torch.Generator().manual_seed(0)) + 0.1
    double = DoubleScales.of(scales_OB)
    offset = scales_OB.mean()
    codes, state = bnb.functional.quantize_blockwise((scales_OB - offset).flatten(), blocksize=256)
    assert torch.equal(double.index(scales_OB).flatten(), codes)
    torch.testing.assert_close(double.round(scales_OB).flatten(), dequantize_blockwise(codes, state) + offset)


def test_scales_in_8_bits_never_fall_to_zero() -> None:
    scales_OB = torch.cat([torch.full((1, 256), 1e-9), torch.ones(1, 256)])
    assert bool((DoubleScales.of(scales_OB).round(scales_OB) > 0).all())


def test_codes_chosen_for_8_bit_scales_beat_codes_whose_scales_are_rounded_afterwards() -> None:
    weight_OI, hessian_II = _problem(outputs=96, seed=3)
    weight_OI[::7] *= 6  # rows of very different size, so that 8 bits are coarse for the small ones
    grid = grid_of("nf4")
    (codes,) = calibrated_codes([weight_OI], hessian_II, grid)
    rounded_after = _error(weight_OI, hessian_II, codes.index_OI, DoubleScales.of(codes.scales_OB).round(codes.scales_OB), "nf4")
    (codes,) = calibrated_codes([weight_OI], hessian_II, grid, double_quant=True)
    assert codes.double is not None
    assert torch.equal(codes.double.round(codes.scales_OB), codes.scales_OB)
    assert _error(weight_OI, hessian_II, codes.index_OI, codes.scales_OB, "nf4") < rounded_after


def _stock_layer(weight_OI: Tensor, scheme: str, double_quant: bool, storage: torch.dtype = torch.uint8) -> bnb.nn.Linear4bit:
    outputs, inputs = weight_OI.shape
    layer = bnb.nn.Linear4bit(inputs, outputs, bias=False, quant_type=scheme, compress_statistics=double_quant, quant_storage=storage)
    layer.weight = bnb.nn.Params4bit(
        weight_OI.clone(), requires_grad=False, quant_type=scheme, compress_statistics=double_quant, quant_storage=storage, module=layer
    )
    layer = layer.to("cpu").eval()
    make_safe(layer)
    return layer


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_written_layer_computes_with_exactly_the_chosen_weights(scheme: str, double_quant: bool, storage: torch.dtype) -> None:
    weight_OI, hessian_II = _problem()
    grid = grid_of(scheme)  # type: ignore[arg-type]
    layer = _stock_layer(weight_OI, scheme, double_quant, storage)
    before = {name: (tensor.dtype, tensor.shape) for name, tensor in layer.state_dict().items() if "quant_state" not in name}
    (codes,) = calibrated_codes([weight_OI], hessian_II, grid, double_quant=double_quant)
    write_codes(layer, codes, grid)
    expected_OI = codes.dequantized(grid)
    torch.testing.assert_close(dequantize_4bit(layer.weight.data, layer.weight.quant_state), expected_OI, rtol=1e-6, atol=1e-7)
    x_NI = torch.randn(3, 128)
    torch.testing.assert_close(layer(x_NI), x_NI @ expected_OI.t())
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in layer.state_dict().items() if "quant_state" not in name} == before


def test_codes_for_another_layer_or_type_are_refused() -> None:
    weight_OI, hessian_II = _problem()
    (codes,) = calibrated_codes([weight_OI], hessian_II, grid_of("nf4"))
    with pytest.raises(ValueError, match="double quantization"):
        write_codes(_stock_layer(weight_OI, "nf4", True), codes, grid_of("nf4"))
    with pytest.raises(ValueError, match="shape"):
        write_codes(_stock_layer(weight_OI[:12], "nf4", False), codes, grid_of("nf4"))
    with pytest.raises(ValueError, match="another grid"):
        write_codes(_stock_layer(weight_OI, "fp4", False), codes, grid_of("nf4"))


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
