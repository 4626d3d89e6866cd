"""How much each unit matters: pure functions from weights and input statistics to one number for each weight, channel, head or layer.

Higher is more important. The units are inputs of an output projection (`down` for FFN channels, `o` for heads), since removing a unit removes exactly these.

Shapes: O outputs, I inputs of the projection, U units of I / U neighbouring inputs each, N tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "block_influence",
    "element_taylor_score",
    "flap_score",
    "inverse_hessian",
    "magnitude_score",
    "obs_score",
    "unit_sum",
    "wanda_score",
    "wanda_unit_score",
]


def magnitude_score(weight_OI: Tensor) -> Tensor:
    """Squared size of each weight, (O, I), float32. Source: Han et al. 2015, arXiv:1506.02626."""
    return weight_OI.float().square()


def wanda_score(weight_OI: Tensor, input_norm_I: Tensor) -> Tensor:
    """Importance of each weight: its size times how loud its input is.

        S[o, i] = |W[o, i]| * ||X[:, i]||_2

    Compare scores within one output row; rows have different scales.

    Args:
        weight_OI: weight of a projection.
        input_norm_I: L2 norm of each input over all calibration tokens, float32.

    Returns:
        Scores, float32, (O, I).

    Source: Sun et al. 2023, arXiv:2306.11695, eq. 1.
    """
    return weight_OI.float().abs() * input_norm_I.float()


def wanda_unit_score(weight_OI: Tensor, input_norm_I: Tensor) -> Tensor:
    """Wanda's score of whole inputs: how much output energy an input carries by itself, the squared scores summed over the outputs, (I,)."""
    return wanda_score(weight_OI, input_norm_I).square().sum(0)


def element_taylor_score(weight_OI: Tensor, gradient_OI: Tensor) -> Tensor:
    """First-order change of the loss when one weight becomes 0, its size: |W * dL/dW|, (O, I), float32. A unit's is the sum over its weights.

    Taking the size of a unit's sum instead lets weights make up for each other that first order says nothing about, once all of them go.

    Source: Ma et al. 2023 (LLM-Pruner), arXiv:2305.11627, section 3.2, "element-wise", first-order term.
    """
    return (weight_OI.float() * gradient_OI.float()).abs()


def flap_score(weight_OI: Tensor, variance_I: Tensor) -> Tensor:
    """How much of the output fluctuates with an input; its constant part can go into a bias.

        S[i] = var(X[:, i]) * ||W[:, i]||^2

    Args:
        weight_OI: weight of the projection.
        variance_I: variance of each input over all calibration tokens.

    Returns:
        Scores, float32, (I,). The scales of layers differ; FLAP standardises them within a layer, which changes nothing where each layer keeps the same number.

    Source: An et al. 2023 (FLAP), arXiv:2312.11983, the fluctuation metric.
    """
    return variance_I.float() * weight_OI.float().square().sum(0)


def obs_score(weight_OI: Tensor, inverse_II: Tensor, units: int) -> Tensor:
    """Least possible rise of the squared output error when a unit goes and the others make up for it.

        S[u] = tr( W[:, u] ([H^-1][u, u])^-1 W[:, u]^T )

    Args:
        weight_OI: weight of the projection.
        inverse_II: inverse of the damped input Hessian, see `inverse_hessian`.
        units: number of units.

    Returns:
        Scores, float32, (U,). Exact for one unit; units that stand in for each other score low all together.

    Source: Kurtic et al. 2023 (ZipLM), arXiv:2302.04089, eq. 3; Ling et al. 2024 (SlimGPT), arXiv:2412.18110, section 3.
    """
    size = weight_OI.shape[1] // units
    if size == 1:
        return weight_OI.float().square().sum(0) / inverse_II.diagonal().float()
    weight_UOS = weight_OI.float().reshape(-1, units, size).transpose(0, 1)
    diagonal_USS = torch.stack([inverse_II[u * size : (u + 1) * size, u * size : (u + 1) * size] for u in range(units)]).float()
    solved_USO: Tensor = torch.linalg.solve(diagonal_USS, weight_UOS.transpose(1, 2))
    score_U: Tensor = (weight_UOS.transpose(1, 2) * solved_USO).sum((1, 2))
    return score_U


def inverse_hessian(gram_II: Tensor, damping: float) -> Tensor:
    """(gram + damping * mean(diag) * 1)^-1, (I, I), computed in float64, in the type of `gram_II`. Inputs that never speak get the damping alone."""
    wide = gram_II.to(torch.float64, copy=True)
    wide.diagonal().add_(max(damping, 1e-9) * wide.diagonal().mean().clamp(min=1e-12))
    return torch.cholesky_inverse(torch.linalg.cholesky(wide)).to(gram_II.dtype)


def block_influence(entering_ND: Tensor, leaving_ND: Tensor) -> Tensor:
    """How far a block turns the hidden state of each token: 1 - cosine, (N,). A layer's influence is the mean over tokens.

    Source: Men et al. 2024 (ShortGPT), arXiv:2403.03853, eq. 1.
    """
    return 1 - torch.nn.functional.cosine_similarity(entering_ND.float(), leaving_ND.float(), dim=-1)


def unit_sum(score_I: Tensor, units: int) -> Tensor:
    """Sums over the neighbouring inputs that make one unit, (U,)."""
    return score_I.reshape(units, -1).sum(1)
