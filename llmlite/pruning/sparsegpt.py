"""SparseGPT: zeros chosen column by column, each error made up for by the columns still to come.

    error of column i:  e = (w_i - ŵ_i) / U_ii,      update:  W[:, j] -= e U_ij  for j > i,      U = upper Cholesky factor of H^-1

Source: Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1.

Shapes: O outputs, I inputs, C inputs of one chunk of columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmlite.calibration.inverse_factor import inverse_factor
from llmlite.pruning.masks import pattern_mask, tensor_mask

__all__ = ["sparsegpt"]


def sparsegpt(
    weight_OI: Tensor, gram_II: Tensor, *, sparsity: float | None = None, pattern: tuple[int, int] | None = None, damping: float = 0.01, chunk: int = 128
) -> Tensor:
    """A sparse weight whose outputs are near the dense ones.

    Args:
        weight_OI: the weight.
        gram_II: sum of x x^T over calibration tokens.
        sparsity: share of zeros, reached in each chunk of columns; or
        pattern: (N, M): N zeros in every M neighbouring inputs. `chunk` must be a multiple of M.
        damping: added to the Hessian, as a multiple of the mean of its diagonal.
        chunk: columns that are masked together.

    Returns:
        float32, (O, I).

    Raises:
        ValueError: neither or both of sparsity and pattern, inputs that are no multiple of M, or a gram matrix that is not finite.
    """
    if (sparsity is None) == (pattern is None):
        raise ValueError("give either sparsity or pattern")
    if pattern is not None and (weight_OI.shape[1] % pattern[1] or chunk % pattern[1]):
        raise ValueError(f"{weight_OI.shape[1]} inputs in chunks of {chunk} are not multiples of {pattern[1]}")
    weight_IO = weight_OI.float().T.contiguous()  # one input at a time changes all those behind it: rows, not columns, for the memory's sake
    hessian = gram_II.to(torch.float64, copy=True)
    dead_I = hessian.diagonal() == 0
    hessian.diagonal().add_(max(damping, 1e-9) * hessian.diagonal().mean().clamp(min=1e-12))
    weight_IO[dead_I] = 0
    factor = inverse_factor(hessian)
    if factor is None:
        raise ValueError("the gram matrix is not finite or not positive, so no weights can be chosen by it")
    factor_II = factor.float()
    for start in range(0, len(weight_IO), chunk):
        inputs, behind = slice(start, min(start + chunk, len(weight_IO))), slice(start + chunk, None)
        block_CO, factor_CC = weight_IO[inputs], factor_II[inputs, inputs]
        diagonal_C = factor_CC.diagonal()
        if pattern is None:
            keep_CO = tensor_mask(block_CO.square() / diagonal_C.square()[:, None], sparsity or 0.0)
        else:
            keep_CO = torch.empty_like(block_CO, dtype=torch.bool)
        error_CO = torch.empty_like(block_CO)
        for i in range(len(block_CO)):
            if pattern and i % pattern[1] == 0:
                group = slice(i, i + pattern[1])
                keep_CO[group] = pattern_mask((block_CO[group].square() / diagonal_C[group].square()[:, None]).T, *pattern).T
            error_CO[i] = block_CO[i].masked_fill(keep_CO[i], 0.0) / diagonal_C[i]
            block_CO[i] *= keep_CO[i]
            block_CO[i + 1 :].addr_(factor_CC[i, i + 1 :], error_CO[i], alpha=-1)
        weight_IO[behind].addmm_(factor_II[inputs, behind].T, error_CO, alpha=-1)
    return weight_IO.T.contiguous()
