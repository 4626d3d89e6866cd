"""What bitsandbytes' 4-bit types hold: levels, the scale of each block of 64 inputs, and scales that are kept in 8 bits themselves.

A 4-bit weight is a level times the scale of its block: `w[j] = level[index[j]] * scale[j // 64]`. How indices and scales are chosen is
`llmlite.quantization.second_order`; how they are written into a layer is `llmlite.quantization.stock_format`.

Source: Dettmers et al. 2023, arXiv:2305.14314 (NF4, double quantization).

Legend: O out_features, I in_features, B = I / block size, k inputs of a block, L levels of a grid (ascending). An index counts levels in ascending order;
`Grid.codes_L` turns it into the code that bitsandbytes stores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmlite.models.size import BLOCK_SIZE, NESTED_BLOCK_SIZE

__all__ = ["Codes", "DoubleScales", "Grid", "dequantize", "grid_of", "largest_scales", "nearest_index"]


@dataclass(frozen=True)
class Grid:
    """The values a 4-bit code can stand for, before scaling.

    Attributes:
        levels_L: distinct values, ascending, float32. 16 for NF4, 15 for FP4 (it has two zeros).
        bounds: the L - 1 midpoints between neighbours.
        codes_L: the code that bitsandbytes stores for each level, uint8.
    """

    levels_L: Tensor
    bounds: Tensor
    codes_L: Tensor

    def to(self, device: torch.device) -> Grid:
        """The same grid on another device."""
        return Grid(self.levels_L.to(device), self.bounds.to(device), self.codes_L.to(device))


def grid_of(scheme: Literal["nf4", "fp4"]) -> Grid:
    """bitsandbytes' own table of `scheme`, sorted; on the CPU."""
    from bitsandbytes.functional import get_4bit_type

    table = get_4bit_type(scheme, device="cpu").float()
    levels_L, order = torch.sort(table, stable=True)
    first = torch.cat([torch.ones(1, dtype=torch.bool), levels_L[1:] != levels_L[:-1]])
    levels_L, codes_L = levels_L[first], order[first].to(torch.uint8)
    return Grid(levels_L, (levels_L[1:] + levels_L[:-1]) / 2, codes_L)


def nearest_index(scaled: Tensor, grid: Grid) -> Tensor:
    """Index of the nearest level of each number, uint8, same shape."""
    return torch.bucketize(scaled, grid.bounds, out_int32=True).to(torch.uint8)


def largest_scales(weight_OI: Tensor) -> Tensor:
    """bitsandbytes' choice: the largest absolute weight of each block, (O, B) float32; a block of zeros gets a tiny scale above 0."""
    return weight_OI.float().view(len(weight_OI), -1, BLOCK_SIZE).abs().amax(-1).clamp_min(1e-12)


def dequantize(index_OI: Tensor, scales_OB: Tensor, grid: Grid) -> Tensor:
    """The weights that indices and scales stand for, (O, I) float32."""
    block_size = index_OI.shape[1] // scales_OB.shape[1]
    levels_OBk = grid.levels_L[index_OI.long()].view(*scales_OB.shape, block_size)
    return (levels_OBk * scales_OB[..., None]).view(index_OI.shape)


@dataclass(frozen=True)
class DoubleScales:
    """bitsandbytes' double quantization: the scales themselves in 8 bits, in blocks of 256.

        scale[n] = offset + code_256[index[n]] * absmax[n // 256]

    Built from scales as bitsandbytes does it (offset their mean, absmax the largest deviation), after which `round` gives the nearest scale that can really
    be stored, also for scales that were changed later.

    Attributes:
        offset: float32 scalar.
        absmax_G: second-level scales, float32, one for each 256 scales in row-major order.
        code_256: bitsandbytes' dynamic 8-bit map, ascending, float32.
    """

    offset: Tensor
    absmax_G: Tensor
    code_256: Tensor

    @classmethod
    def of(cls, scales_OB: Tensor) -> DoubleScales:
        """The second level for given scales."""
        from bitsandbytes.functional import create_dynamic_map

        flat = scales_OB.float().flatten()
        offset = flat.mean()
        padded = torch.nn.functional.pad((flat - offset).abs(), (0, -len(flat) % NESTED_BLOCK_SIZE))
        absmax_G = padded.view(-1, NESTED_BLOCK_SIZE).amax(1).clamp_min(1e-12)
        return cls(offset, absmax_G, create_dynamic_map().to(flat.device))

    def to(self, device: torch.device) -> DoubleScales:
        """The same second level on another device."""
        return DoubleScales(self.offset.to(device), self.absmax_G.to(device), self.code_256.to(device))

    def index(self, scales_OB: Tensor) -> Tensor:
        """The 8-bit code of the nearest scale that is above 0, uint8, (O, B)."""
        flat = scales_OB.float().flatten()
        absmax = self.absmax_G.repeat_interleave(NESTED_BLOCK_SIZE)[: len(flat)]
        bounds = (self.code_256[1:] + self.code_256[:-1]) / 2
        found = torch.bucketize((flat - self.offset) / absmax, bounds)
        lowest = torch.searchsorted(self.code_256, (-self.offset / absmax).contiguous(), right=True).clamp_max(255)  # a scale of 0 or less would end its block
        return torch.maximum(found, lowest).to(torch.uint8).view(scales_OB.shape)

    def values(self, index_OB: Tensor) -> Tensor:
        """The scales that codes stand for, float32, (O, B)."""
        flat = index_OB.flatten().long()
        absmax = self.absmax_G.repeat_interleave(NESTED_BLOCK_SIZE)[: len(flat)]
        return (self.code_256[flat] * absmax + self.offset).view(index_OB.shape)

    def round(self, scales_OB: Tensor) -> Tensor:
        """The nearest scales that can be stored."""
        return self.values(self.index(scales_OB))


@dataclass(frozen=True)
class Codes:
    """What the weights of one layer are in 4 bits.

    Attributes:
        index_OI: indices of the grid's levels, uint8, (O, I).
        scales_OB: scales, float32, (O, B), as they will be read back.
        double: the second level of the scales, or None.
    """

    index_OI: Tensor
    scales_OB: Tensor
    double: DoubleScales | None = None

    def dequantized(self, grid: Grid) -> Tensor:
        """The weights that they stand for, float32, (O, I)."""
        return dequantize(self.index_OI, self.scales_OB, grid)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, as it is kept in a file."""
        found = {"index": self.index_OI, "scales": self.scales_OB}
        if self.double is not None:
            found |= {"offset": self.double.offset.reshape(1), "absmax": self.double.absmax_G, "code": self.double.code_256}
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Codes:
        """What `tensors` gave."""
        double = DoubleScales(tensors["offset"][0], tensors["absmax"], tensors["code"]) if "absmax" in tensors else None
        return cls(tensors["index"], tensors["scales"], double)

    def to(self, device: torch.device) -> Codes:
        """The same codes on another device."""
        return Codes(self.index_OI.to(device), self.scales_OB.to(device), None if self.double is None else self.double.to(device))
