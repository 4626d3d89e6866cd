"""Levels, scales, double quantization and packing, against bitsandbytes itself."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit
from torch import Tensor

from llmlite.models.safety import make_safe
from llmlite.quantization.nf4 import DoubleScales, dequantize, grid_of, largest_scales, nearest_index
from llmlite.quantization.second_order import calibrated_codes
from llmlite.quantization.stock_format import pack, write_codes
from tests.quantization.test_second_order import problem

SCHEMES = ("nf4", "fp4")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_to_nearest_at_the_largest_scale_is_what_bitsandbytes_stores(scheme: str) -> None:
    weight_OI, grid = problem()[0], grid_of(scheme)  # type: ignore[arg-type]
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
    weight_OI, hessian_II = problem()
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
    weight_OI, hessian_II = problem()
    (codes,) = calibrated_codes([weight_OI], hessian_II, grid_of("nf4"))
    with pytest.raises(ValueError, match="double quantization"):
        write_codes(_stock_layer(weight_OI, "nf4", True), codes, grid_of("nf4"))
    with pytest.raises(ValueError, match="shape"):
        write_codes(_stock_layer(weight_OI[:12], "nf4", False), codes, grid_of("nf4"))
    with pytest.raises(ValueError, match="another grid"):
        write_codes(_stock_layer(weight_OI, "fp4", False), codes, grid_of("nf4"))
