"""A copy of a model for gradients that only have to be about right: in the type that this machine multiplies fastest; and what it does slowly."""

from __future__ import annotations

import copy
import platform
from collections.abc import Collection
from typing import TypeVar

import torch
from torch import nn

__all__ = ["quick_copy", "quick_dtype", "quick_dtype_of", "quickened", "slow_here"]

AnyModel = TypeVar("AnyModel", bound=nn.Module)


def quick_dtype(device: torch.device, own: torch.dtype) -> torch.dtype:
    """bfloat16 where the processor multiplies it itself, else `own`. On a CPU with AVX512-BF16 forward and backward take a third of the time of float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else own
    return torch.bfloat16 if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else own


def quick_dtype_of(model: nn.Module) -> torch.dtype:
    """`quick_dtype` for a model where it lies and as it is."""
    first = next(model.parameters())
    return quick_dtype(first.device, first.dtype)


def slow_here(device: torch.device, dtype: torch.dtype | None, form: str) -> str:
    """What this processor computes slowly without a word of torch's or bitsandbytes', as a sentence for the plan; empty when it does not.

    Args:
        device: where the model computes.
        dtype: what it computes in.
        form: of its weights; see `ModelPlan.form`.
    """
    if device.type != "cpu" or torch.cpu._is_avx512_bf16_supported():
        return ""
    slow = []
    if form in {"nf4", "fp4"}:
        slow.append(
            "this processor has no AVX512-BF16, which bitsandbytes' packed 4-bit kernel needs: every layer is unpacked at each forward pass, so each token is "
            "written slower than by dense weights"
        )
    if dtype == torch.bfloat16 and platform.machine() in {"x86_64", "AMD64"} and not torch.cpu._is_amx_tile_supported():
        slow.append("this processor has neither AMX nor AVX512-BF16 and only emulates products in bfloat16: float32 is usually faster, in twice the memory")
    return "; ".join(slow)


def quick_copy(model: AnyModel, dtype: torch.dtype, without: Collection[nn.Module] = ()) -> AnyModel:
    """The model with frozen parameters in another type; tied ones stay tied, buffers keep their type.

    Args:
        model: not changed.
        dtype: of the parameters.
        without: modules of the model whose weight is left out (empty), for who has another in its place.
    """
    empty = {id(module.weight) for module in without}
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        values = parameter.detach().new_empty(0, dtype=dtype) if id(parameter) in empty else parameter.detach().to(dtype, copy=True)
        memo[id(parameter)] = nn.Parameter(values, requires_grad=False)
    return copy.deepcopy(model, memo)


def quickened(model: AnyModel) -> AnyModel:
    """The model itself where its type is the quickest, else a quick copy."""
    dtype = quick_dtype_of(model)
    return model if dtype == next(model.parameters()).dtype else quick_copy(model, dtype)
