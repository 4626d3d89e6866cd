"""The dense weights of a layer that bitsandbytes quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["dequantized"]


def dequantized(layer: Any) -> torch.Tensor:
    """The weights (out_features, in_features) that a layer computes with, on its device: new ones where they are quantized, else the layer's own, detached."""
    import bitsandbytes as bnb

    weight: Any = layer.weight
    dense: torch.Tensor
    if isinstance(layer, bnb.nn.Linear4bit):
        dense = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    elif isinstance(layer, bnb.nn.Linear8bitLt):
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        codes = weight.CB if getattr(weight, "CB", None) is not None else weight.data
        dense = codes.float() * (scales.float() / 127.0)[:, None]
    else:
        dense = weight.detach()
    return dense
