"""Put chosen codes and scales into bitsandbytes' own 4-bit parameters, so that stock transformers and bitsandbytes save, load and run them.

    byte n = code[2n] << 4 | code[2n + 1]      weights in row-major order
    absmax: float32 scales in row-major order, or with double quantization uint8 codes + an offset + one float32 for each 256 of them

Nothing here is a format of ours: the bytes are those that bitsandbytes would write if it had chosen these codes and scales.

Legend: O out_features, I in_features, B blocks of 64 inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmlite.quantization.nf4 import Codes, Grid

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit

__all__ = ["pack", "write_codes"]


def pack(codes_OI: Tensor) -> Tensor:
    """Two 4-bit codes to a byte, the earlier weight in the upper half: uint8, (O * I / 2, 1), as bitsandbytes stores them.

    Raises:
        ValueError: an odd number of codes.
    """
    flat = codes_OI.flatten()
    if len(flat) % 2:
        raise ValueError(f"{len(flat)} codes do not fill whole bytes")
    return ((flat[::2] << 4) | flat[1::2]).unsqueeze(1)


@torch.no_grad()
def write_codes(layer: Linear4bit, codes: Codes, grid: Grid) -> None:
    """Replace what a 4-bit layer holds, in place; its storage type, compute type and device stay.

    Args:
        layer: a layer that bitsandbytes has quantized, not packed for the CPU (see `make_safe`).
        codes: with a second level of the scales, which holds them, exactly when the layer has one.
        grid: the grid of the layer's own type.

    Raises:
        ValueError: another shape, block size, type or nesting than the layer has, or a layer packed for the CPU.
    """
    state = layer.weight.quant_state
    _require_plain(layer)
    wanted = (tuple(state.shape), state.blocksize, state.nested)
    index_OI, double = codes.index_OI, codes.double
    given = (tuple(index_OI.shape), index_OI.shape[1] // codes.scales_OB.shape[1], double is not None)
    if wanted != given:
        raise ValueError(f"the layer has shape, block size and double quantization {wanted}, the codes have {given}")
    if not torch.equal(grid.levels_L[torch.bucketize(state.code.cpu().float(), grid.bounds.cpu())].cpu(), state.code.cpu().float()):
        raise ValueError(f"the codes are for another grid than the layer's {state.quant_type}")
    data, device = layer.weight.data, layer.weight.device
    packed = pack(grid.codes_L.to(index_OI.device)[index_OI.long()]).to(device)
    layer.weight.data = packed.flatten().view(data.dtype).view(data.shape)
    if double is None:
        state.absmax = codes.scales_OB.float().flatten().to(device)
        return
    state.absmax = double.index(codes.scales_OB).flatten().to(device)
    state.offset = double.offset.float().to(device)
    state.state2.absmax = double.absmax_G.float().to(device)
    state.state2.code = double.code_256.float().to(device)


def _require_plain(layer: Any) -> None:
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        raise ValueError("the layer is packed for this CPU; call make_safe(model) right after loading")
