"""SparseGPT: zeros chosen column by column, each error made up for by the columns still to come.

    error of column i:  e = (w_i - ŵ_i) / U_ii,      update:  W[:, j] -= e U_ij  for j > i,      U = upper Cholesky factor of H^-1

Source: Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1.

Shapes: O outputs, I inputs, C inputs of one chunk of columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
        ValueError: neither or both of sparsity and pattern, or inputs that are no multiple of M.
    """
    if (sparsity is None) == (pattern is None):
        raise ValueError("give either sparsity or pattern")
    if pattern is not None and (weight_OI.shape[1] % pattern[1] or chunk % pattern[1]):
        raise ValueError(f"{weight_OI.shape[1]} inputs in chunks of {chunk} are not multiples of {pattern[1]}")
    weight = weight_OI.float().clone()
    hessian = gram_II.to(torch.float64, copy=True)
    dead_I = hessian.diagonal() == 0
    hessian.diagonal().add_(max(damping, 1e-9) * hessian.diagonal().mean().clamp(min=1e-12))
    weight[:, dead_I] = 0
    factor_II = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True).float()
    for start in range(0, weight.shape[1], chunk):
        columns = slice(start, min(start + chunk, weight.shape[1]))
        block_OC, factor_CC = weight[:, columns].clone(), factor_II[columns, columns]
        diagonal_C = factor_CC.diagonal()
        keep_OC = torch.empty_like(block_OC, dtype=torch.bool) if pattern else tensor_mask(block_OC.square() / diagonal_C.square(), sparsity or 0.0)
        error_OC = torch.zeros_like(block_OC)
        for i in range(block_OC.shape[1]):
            if pattern and i % pattern[1] == 0:
                group = slice(i, i + pattern[1])
                keep_OC[:, group] = pattern_mask(block_OC[:, group].square() / diagonal_C[group].square(), *pattern)
            before_O = block_OC[:, i].clone()
            block_OC[:, i] *= keep_OC[:, i]
            error_OC[:, i] = (before_O - block_OC[:, i]) / diagonal_C[i]
            block_OC[:, i + 1 :] -= error_OC[:, i, None] * factor_CC[i, i + 1 :]
        weight[:, columns] = block_OC
        weight[:, columns.stop :] -= error_OC @ factor_II[columns, columns.stop :]
    return weight
