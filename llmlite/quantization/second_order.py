"""Better codes and scales for bitsandbytes' 4-bit types, from second-order error. The format, its bytes and its speed stay the stock ones.

bitsandbytes takes each block's largest weight for its scale and rounds to the nearest level. With H = E[x x^T] of the layer's inputs, what really matters is
the output error of each row w,

    (w - q)^T H (w - q),    q[j] = level[index[j]] * scale[j // 64]

and three plain steps make it several times smaller: `search_scales` tries many scales for each block, weighted by diag(H); `gptq` chooses codes one input
at a time and lets later ones make up for the error so far; `refine` then moves single codes and scales downhill on the full H.

Source: Frantar et al. 2022, arXiv:2210.17323 (GPTQ; activation order and static groups are from its published code); Behdin et al. 2023,
arXiv:2309.01885 (coordinate descent).

Legend: as in `llmlite.quantization.nf4`; K inputs handled together. All mathematics is in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmlite.calibration.inverse_factor import inverse_factor
from llmlite.models.size import BLOCK_SIZE
from llmlite.quantization.nf4 import Codes, DoubleScales, Grid, dequantize, largest_scales

__all__ = ["FACTORS", "calibrated_codes", "gptq", "refine", "search_scales"]

FACTORS = tuple(round(0.68 + 0.02 * step, 2) for step in range(20))  # shares of the block's largest weight tried as its scale: 0.68 ... 1.06
_BINS = 2048  # of a table of nearest levels, for each unit of the grid


def search_scales(weight_OI: Tensor, importance_I: Tensor, grid: Grid, factors: Sequence[float] = FACTORS) -> Tensor:
    """The scale of each block with the least weighted rounding error, then its closed-form refit.

        argmin_s sum_j importance[j] (w[j] - s level[j])^2,    s <- sum_j importance w level / sum_j importance level^2

    Args:
        weight_OI: weights, (O, I); I a multiple of `BLOCK_SIZE`.
        importance_I: weight of each input's error, for instance the diagonal of H, (I,).
        grid: see `grid_of`.
        factors: candidates as shares of the block's largest weight.

    Returns:
        Scales, (O, B) float32, above 0.
    """
    weight_OBk = weight_OI.float().view(len(weight_OI), -1, BLOCK_SIZE)
    importance_Bk = importance_I.float().view(-1, BLOCK_SIZE)
    largest_OB = largest_scales(weight_OI)
    best_OB, scales_OB = torch.full_like(largest_OB, torch.inf), largest_OB.clone()
    # thirteen times faster than a search for each weight; a weight between two levels, to 1/2 of a bin, may take either, which costs the same
    bins = _BINS * int(1 + 1 / min(factors, default=1.0))
    table_T = grid.levels_L[torch.bucketize(torch.arange(-bins, bins + 1, device=grid.levels_L.device) / _BINS, grid.bounds)]
    for factor in factors:
        candidate_OB = largest_OB * factor
        place_OBk = (weight_OBk * (_BINS / candidate_OB)[..., None]).add_(bins + 0.5).clamp_(0, 2 * bins)
        levels_OBk = torch.take(table_T, place_OBk.long())
        weighted_OBk = levels_OBk * importance_Bk
        inner_OB, square_OB = (weighted_OBk * weight_OBk).sum(-1), (weighted_OBk * levels_OBk).sum(-1)
        refit_OB = torch.where((inner_OB > 0) & (square_OB > 0), inner_OB / square_OB.clamp_min(1e-30), candidate_OB)
        # the error of these levels at their best scale, up to the constant sum of importance * w^2
        error_OB = square_OB * refit_OB**2 - 2 * refit_OB * inner_OB
        better_OB = error_OB < best_OB
        best_OB, scales_OB = torch.where(better_OB, error_OB, best_OB), torch.where(better_OB, refit_OB, scales_OB)
    return scales_OB


def _damped(hessian_II: Tensor, damping: float) -> Tensor:
    """H with `damping` times its mean diagonal added, and ones where an input is always zero."""
    hessian_II = hessian_II.float().clone()
    diagonal_I = hessian_II.diagonal()
    dead_I = diagonal_I <= 0
    mean = diagonal_I[~dead_I].mean() if not bool(dead_I.all()) else torch.ones((), device=hessian_II.device)
    hessian_II.diagonal().add_(damping * mean)
    hessian_II.diagonal()[dead_I] = mean
    return hessian_II


def _inverse_cholesky(hessian_II: Tensor, damping: float) -> Tensor:
    """Upper U with inverse(H + damping) = U^T U; the damping grows tenfold until H is positive definite."""
    while True:
        upper_II = inverse_factor(_damped(hessian_II, damping))
        if upper_II is not None:
            return upper_II
        damping = max(10 * damping, 1e-6)
        if damping > 1e3:
            raise ValueError("the Hessian is not finite, so no weights can be chosen by it")


def gptq(weight_OI: Tensor, hessian_II: Tensor, scales_OB: Tensor, grid: Grid, *, damping: float = 1e-3, columns: int = 64) -> Tensor:
    """Codes by GPTQ for scales that are fixed before: loudest inputs first, each rounding error spread over the inputs still to come.

        w[j+1:] -= (w[j] - q[j]) / U[j, j] * U[j, j+1:],    inverse(H) = U^T U

    Args:
        weight_OI: weights, (O, I).
        hessian_II: mean of x x^T over calibration tokens, (I, I).
        scales_OB: scales, (O, B).
        grid: see `grid_of`.
        damping: share of the mean diagonal added to H's diagonal.
        columns: inputs handled between two matrix products; changes the time only.

    Returns:
        Indices of levels, uint8, (O, I).

    Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1 (blocks of columns: section 3.3, step 2).
    """
    outputs, inputs = weight_OI.shape
    block_size = inputs // scales_OB.shape[1]
    order_I = torch.argsort(hessian_II.diagonal(), descending=True)
    upper_II = _inverse_cholesky(hessian_II[order_I][:, order_I], damping)
    rest_IO = weight_OI.float().t()[order_I].contiguous()  # one input a row, so that each step works on contiguous memory
    scales_BO = scales_OB.t().contiguous()
    blocks = torch.div(order_I, block_size, rounding_mode="floor").tolist()
    index_IO = torch.empty(inputs, outputs, dtype=torch.uint8, device=weight_OI.device)
    diagonal = upper_II.diagonal().tolist()
    for start in range(0, inputs, columns):
        end = min(start + columns, inputs)
        errors_KO = torch.empty(end - start, outputs, device=weight_OI.device)
        for j in range(start, end):
            scale_O = scales_BO[blocks[j]]
            index_O = torch.bucketize(rest_IO[j] / scale_O, grid.bounds, out_int32=True)
            index_IO[j] = index_O
            error_O = torch.sub(rest_IO[j], grid.levels_L[index_O] * scale_O, out=errors_KO[j - start]).div_(diagonal[j])
            rest_IO[j + 1 : end].addr_(upper_II[j, j + 1 : end], error_O, alpha=-1)
        rest_IO[end:].addmm_(upper_II[start:end, end:].t(), errors_KO, alpha=-1)
    restored_IO = torch.empty_like(index_IO)
    restored_IO[order_I] = index_IO
    return restored_IO.t().contiguous()


def refine(
    weight_OI: Tensor,
    hessian_II: Tensor,
    index_OI: Tensor,
    scales_OB: Tensor,
    grid: Grid,
    *,
    sweeps: int = 2,
    damping: float = 1e-3,
    double: DoubleScales | _Doubles | None = None,
) -> tuple[Tensor, Tensor]:
    """Coordinate descent on the full output error: for each block of inputs its scale in closed form, then its codes one by one.

        scale: s += c^T g / c^T H c,    code: q[j] <- round(q[j] + g[j] / H[j, j]),    g = H (w - q)

    The output error never rises, except by the rounding of scales to what can be stored.

    Args:
        weight_OI, hessian_II, index_OI, scales_OB, grid: see `gptq`, whose result this starts from.
        sweeps: passes over all inputs.
        damping: as for `gptq`.
        double: when the scales are stored in 8 bits; each is then rounded to what its block can hold.

    Returns:
        Indices, uint8, (O, I), and scales, float32, (O, B).

    Source: Behdin et al. 2023, arXiv:2309.01885, algorithm 1, with the scales among the coordinates.
    """
    inputs = weight_OI.shape[1]
    block_size = inputs // scales_OB.shape[1]
    hessian_II = _damped(hessian_II, damping)
    diagonal = hessian_II.diagonal().tolist()
    scales_OB = double.round(scales_OB) if double else scales_OB.float().clone()
    index_IO = index_OI.t().contiguous()
    slope_IO = hessian_II @ (weight_OI.float() - dequantize(index_OI, scales_OB, grid)).t()
    for _ in range(sweeps):
        for start in range(0, inputs, block_size):
            rows = slice(start, start + block_size)
            block = start // block_size
            inner_KK = hessian_II[rows, rows].contiguous()
            levels_KO = grid.levels_L[index_IO[rows].int()]
            before_KO = levels_KO * scales_OB[:, block]
            curvature_O = ((inner_KK @ levels_KO) * levels_KO).sum(0)
            step_O = (levels_KO * slope_IO[rows]).sum(0) / curvature_O.clamp_min(1e-30)
            scale_O = torch.where((curvature_O > 0) & (scales_OB[:, block] + step_O > 0), scales_OB[:, block] + step_O, scales_OB[:, block])
            if double:
                trial_OB = scales_OB.clone()
                trial_OB[:, block] = scale_O
                scale_O = double.round(trial_OB)[:, block]
            scales_OB[:, block] = scale_O
            now_KO = levels_KO * scale_O
            slope_KO = slope_IO[rows] - inner_KK @ (now_KO - before_KO)
            for j in range(block_size):
                wanted_O = (now_KO[j] + slope_KO[j] / diagonal[start + j]) / scale_O
                index_O = torch.bucketize(wanted_O, grid.bounds, out_int32=True)
                moved_O = grid.levels_L[index_O] * scale_O - now_KO[j]
                index_IO[start + j] = index_O
                now_KO[j] += moved_O
                slope_KO.addr_(inner_KK[:, j], moved_O, alpha=-1)
            slope_IO.addmm_(hessian_II[:, rows], now_KO - before_KO, alpha=-1)
    return index_IO.t().contiguous(), scales_OB


def calibrated_codes(
    weights: Sequence[Tensor],
    hessian_II: Tensor,
    grid: Grid,
    *,
    double_quant: bool = False,
    damping: float = 1e-3,
    sweeps: int = 2,
) -> list[Codes]:
    """Scales, then codes, then both once more: everything above in its order.

    Layers that hear the same input go in one pass: outputs do not depend on one another, and the steps over inputs are made once for all.

    Args:
        weights: of each layer, (O, I).
        hessian_II: mean of x x^T over calibration tokens, (I, I).
        grid: see `grid_of`.
        double_quant: the scales will be stored in 8 bits; codes are chosen for the scales that will really be there.
        damping: share of the mean diagonal added to H's diagonal.
        sweeps: passes of `refine`; 0 leaves it out.

    Returns:
        The codes of each layer.
    """
    rows = [len(weight_OI) for weight_OI in weights]
    weight_OI = torch.cat([weight_OI.float() for weight_OI in weights]).contiguous()
    scales_OB = search_scales(weight_OI, hessian_II.diagonal(), grid)
    double = _Doubles([DoubleScales.of(part_OB) for part_OB in torch.split(scales_OB, rows)], rows) if double_quant else None
    if double:
        scales_OB = double.round(scales_OB)
    index_OI = gptq(weight_OI, hessian_II, scales_OB, grid, damping=damping)
    if sweeps:
        index_OI, scales_OB = refine(weight_OI, hessian_II, index_OI, scales_OB, grid, sweeps=sweeps, damping=damping, double=double)
    parts = double.parts if double else [None] * len(rows)
    return [Codes(*layer) for layer in zip(torch.split(index_OI, rows), torch.split(scales_OB, rows), parts, strict=True)]


@dataclass(frozen=True)
class _Doubles:
    """The second levels of layers that are stacked along their outputs."""

    parts: Sequence[DoubleScales]
    rows: list[int]

    def round(self, scales_OB: Tensor) -> Tensor:
        """The nearest scales that can be stored."""
        return torch.cat([double.round(part_OB) for double, part_OB in zip(self.parts, torch.split(scales_OB, self.rows), strict=True)])
