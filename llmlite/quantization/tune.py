"""Tune the scales of chosen codes end to end: a short descent on the divergence from the dense model, with the codes fixed.

    min over scale   KL(dense || quantized),    W[o, j] = level[code[o, j]] * scale[o, j // 64]

Second-order error chooses codes layer by layer and knows nothing of what the layers' errors do together; the scales, one number for 64 weights, can still make
up for it. They are stored as they are, so the format and its bytes stay the same. With double quantization each scale is rounded in the forward pass to what
can be stored, and its gradient passes straight through (Bengio et al. 2013, arXiv:1308.3432).

Source: Chen et al. 2024, arXiv:2407.11062 (EfficientQAT, its second phase: only the step sizes are trained, end to end).

This is calibration, not training: a few dozen steps over rows that are at hand, the same on every process, so it needs nothing of what the Trainer brings.

Legend: O out_features, I in_features, B blocks of 64 inputs, N tokens, D hidden size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmlite.calibration.kept import digest_of
from llmlite.distillation.objective import Distillation, HiddenTeacher
from llmlite.errors import counted
from llmlite.models.quick import quick_copy, quick_dtype
from llmlite.models.view import LinearView, ModelView
from llmlite.quantization.nf4 import DoubleScales, Grid
from llmlite.quantization.tune_state import DescentState
from llmlite.training.backbone import hidden_and_head
from llmlite.training.chunked import chunked_head_loss

if TYPE_CHECKING:
    from llmlite.calibration.blocks import Batch

__all__ = ["Codes", "TuneScales", "scaled_product", "tune_scales"]

log = logging.getLogger(__name__)

_LOG_EVERY = 16


@dataclass(frozen=True)
class Codes:
    """What one layer's weights are: indices of levels, uint8, (O, I); scales, float32, (O, B); their second level, or None."""

    index_OI: Tensor
    scales_OB: Tensor
    double: DoubleScales | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, as it is kept in a file."""
        found = {"index": self.index_OI, "scales": self.scales_OB}
        if self.double is not None:
            found |= {"offset": self.double.offset.reshape(1), "absmax": self.double.absmax_G, "code": self.double.code_256}
        return found

    def to(self, device: torch.device) -> Codes:
        """The same codes on another device."""
        return Codes(self.index_OI.to(device), self.scales_OB.to(device), None if self.double is None else self.double.to(device))


@dataclass(frozen=True)
class TuneScales:
    """How the descent goes.

    Attributes:
        learning_rate: largest relative change of a scale in one step of Adam; it warms up over 4 steps and falls to 0 as a cosine.
        rows: calibration rows of one step.
        epochs: passes over the calibration rows.
        seed: of the order of the rows.
    """

    learning_rate: float = 1e-3
    rows: int = 1
    epochs: int = 1
    seed: int = 0


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
    how: TuneScales,
    state: Path | None = None,
) -> dict[str, Codes]:
    """The same codes with better scales.

    Args:
        model: the calibrated model in eval mode. Not changed.
        codes: of every quantized projection, by name.
        grid: the levels that indices count.
        batches: calibration inputs.
        hidden: of the dense model, see `llmlite.calibration.blocks.last_hidden`.
        how: see `TuneScales`.
        state: a folder of this process in which the descent keeps where it stands (`llmlite.quantization.tune_state`). One that was stopped goes on there with
            the same arguments, and ends in the bits that it would have ended in; a state that is damaged, or of other codes, rows or settings, is not used.

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
    rows = [(batch, place) for batch in range(len(batches)) for place in range(len(hidden[batch]))]
    schedule = _schedule(len(rows), how)
    optimizer = torch.optim.Adam(factors.values(), lr=how.learning_rate, betas=(0.9, 0.95))
    stands = DescentState(state, digest_of("scales", how, dtype, *batches, {name: one.tensors() for name, one in codes.items()}), factors, optimizer)
    begun, recent = stands.restore()
    log.info("scales: %s", f"continuing behind step {begun} of {len(schedule)}" if begun else f"tuned in {counted(len(schedule), 'step')}")
    for done, chosen in enumerate(schedule[begun:], start=begun):
        for group in optimizer.param_groups:
            group["lr"] = how.learning_rate * min(1.0, (done + 1) / 4) * 0.5 * (1 + math.cos(math.pi * done / len(schedule)))
        for batch, place in (rows[each] for each in chosen):
            inputs = {name: tensor[place : place + 1].to(device) for name, tensor in batches[batch].items()}
            recent.append(_descend(model, inputs, hidden[batch][place].to(device, dtype), how.rows))
        optimizer.step()
        optimizer.zero_grad()
        if (done + 1) % _LOG_EVERY == 0 or done + 1 == len(schedule):
            log.info("scales: step %d of %d, %.4f nats a token from the dense model", done + 1, len(schedule), sum(recent) / len(recent))
            recent = []
        stands.keep(done + 1, recent)
    if not all(bool(factor.isfinite().all()) for factor in factors.values()):
        log.warning("scales: the descent overflows in %s, so they stay as calibration chose them", dtype)
        return dict(codes)
    return {name: Codes(one.index_OI, _stored(one, factors[name].detach().to(one.scales_OB.device)), one.double) for name, one in codes.items()}


def _schedule(rows: int, how: TuneScales) -> list[list[int]]:
    """The rows of each step: every epoch in an order of its own, all of which follow from the seed."""
    generator = torch.Generator().manual_seed(how.seed)
    orders = [torch.randperm(rows, generator=generator).tolist() for _ in range(how.epochs)]
    return [order[start : start + how.rows] for order in orders for start in range(0, rows, how.rows)]


def _descend(model: Any, inputs: dict[str, Tensor], hidden_TD: Tensor, rows: int) -> float:
    """Add one row's gradient; its mean divergence."""
    mask = inputs.get("attention_mask")
    keep_N = None if mask is None else mask.reshape(-1).bool()
    with torch.enable_grad():
        student = hidden_and_head(model, inputs)
        distance = Distillation(HiddenTeacher(hidden_TD, student.head, transform=student.transform), kd_weight=1.0)
        flat_ND = student.hidden.reshape(-1, student.hidden.shape[-1])
        loss = chunked_head_loss(flat_ND, student.head, distance, keep_N=keep_N, transform=student.transform).loss
        (loss / rows).backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


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
