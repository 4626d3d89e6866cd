"""Tune the scales of chosen codes end to end: a short descent on the divergence from the dense model, with the codes fixed.

    min over scale   KL(dense || quantized),    W[o, j] = level[code[o, j]] * scale[o, j // 64]

Second-order error chooses codes layer by layer and knows nothing of what the layers' errors do together; the scales, one number for 64 weights, can still make
up for it. They are stored as they are, so the format and its bytes stay the same. With double quantization each scale is rounded in the forward pass to what
can be stored, and its gradient passes straight through (Bengio et al. 2013, arXiv:1308.3432).

Source: Chen et al. 2024, arXiv:2407.11062 (EfficientQAT, its second phase: only the step sizes are trained, end to end).

Legend: O out_features, I in_features, B blocks of 64 inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmlite.calibration.kept import digest_of
from llmlite.distillation.descent import DenseAnswers, Descent, Kept, descend
from llmlite.models.quick import quick_copy, quick_dtype
from llmlite.models.view import LinearView, ModelView
from llmlite.quantization.nf4 import Codes, DoubleScales, Grid

if TYPE_CHECKING:
    from llmlite.calibration.blocks import Batch

__all__ = ["scaled_product", "tune_scales"]

log = logging.getLogger(__name__)


class _ScaledProduct(torch.autograd.Function):
    """x W^T with W made of levels and scales; W is made again in the backward pass, so only levels and inputs are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels_OI: Tensor, scales_OB: Tensor) -> Tensor:
        ctx.save_for_backward(x, levels_OI, scales_OB)
        return x @ _scaled(levels_OI, scales_OB).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, levels_OI, scales_OB = ctx.saved_tensors
        grad_OI = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        grad_OB = (grad_OI.view(*scales_OB.shape, -1) * levels_OI.view(*scales_OB.shape, -1)).sum(-1, dtype=scales_OB.dtype)
        return grad @ _scaled(levels_OI, scales_OB) if ctx.needs_input_grad[0] else None, None, grad_OB


def _scaled(levels_OI: Tensor, scales_OB: Tensor) -> Tensor:
    return (levels_OI.view(*scales_OB.shape, -1) * scales_OB[..., None].to(levels_OI.dtype)).view(levels_OI.shape)


def scaled_product(x: Tensor, levels_OI: Tensor, scales_OB: Tensor) -> Tensor:
    """x times the transposed weights, (..., I) to (..., O), differentiable by x and by the scales.

    Args:
        x: inputs, in the levels' dtype.
        levels_OI: the levels that the codes stand for, before scaling.
        scales_OB: scales, float32.
    """
    product: Tensor = _ScaledProduct.apply(x, levels_OI, scales_OB)  # type: ignore[no-untyped-call]
    return product


def tune_scales(
    model: Any,
    codes: Mapping[str, Codes],
    grid: Grid,
    batches: Sequence[Batch],
    hidden: Sequence[Tensor],
    how: Descent,
    state: Path | None = None,
) -> dict[str, Codes]:
    """The same codes with better scales.

    Args:
        model: the calibrated model in eval mode. Not changed.
        codes: of every quantized projection, by name.
        grid: the levels that indices count.
        batches: calibration inputs.
        hidden: of the dense model, see `llmlite.calibration.blocks.last_hidden`.
        how: see `llmlite.distillation.descent.Descent`.
        state: a folder of this process in which the descent keeps where it stands (`llmlite.distillation.descent_state`). One that was stopped goes on there
            with the same arguments, and ends in the same bits; a state that is damaged, or of other codes, rows or settings, is not used.

    Returns:
        Codes with new scales, all of them above 0, and with their second level such that they can be stored; the codes given where the descent overflows.

    Raises:
        OutputError, ResourceError: `state` cannot be written, or the disk is full.
    """
    device = next(model.parameters()).device
    dtype = quick_dtype(device, model.dtype)
    model = quick_copy(model, dtype, [linear.base for linear in ModelView(model).linears() if linear.name in codes])
    factors = {name: torch.ones_like(one.scales_OB, device=device).requires_grad_() for name, one in codes.items()}
    linears = {linear.name: linear for linear in ModelView(model).linears() if linear.name in codes}
    for name, linear in linears.items():
        _replace(linear, codes[name], grid, dtype, factors[name])
    made_of = digest_of("scales", how, dtype, *batches, {name: one.tensors() for name, one in codes.items()})
    descend(model, factors, batches, DenseAnswers(hidden), how, Kept(state, made_of))
    if not all(bool(factor.isfinite().all()) for factor in factors.values()):
        log.warning("scales: the descent overflows in %s, so they stay as calibration chose them", dtype)
        return dict(codes)
    return {name: Codes(one.index_OI, _stored(one, factors[name].detach().to(one.scales_OB.device)), one.double) for name, one in codes.items()}


def _replace(linear: LinearView, codes: Codes, grid: Grid, dtype: torch.dtype, factor_OB: Tensor) -> None:
    """Let a projection compute with levels and scales."""
    codes = codes.to(factor_OB.device)
    levels_OI = grid.levels_L.to(factor_OB.device, dtype)[codes.index_OI.int()]
    linear.base.forward = _forward(levels_OI, codes.scales_OB, codes.double, factor_OB, linear.base)


def _forward(levels_OI: Tensor, start_OB: Tensor, double: DoubleScales | None, factor_OB: Tensor, base: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        scales_OB = start_OB * factor_OB
        if double is not None:
            scales_OB = scales_OB + (double.round(scales_OB.detach()) - scales_OB).detach()
        product = scaled_product(x, levels_OI, scales_OB)
        return product if base.bias is None else product + base.bias

    return forward


def _stored(codes: Codes, factor_OB: Tensor) -> Tensor:
    """The scales as they will be read back."""
    scales_OB = (codes.scales_OB * factor_OB).clamp_min(1e-12)
    return scales_OB if codes.double is None else codes.double.round(scales_OB)
