"""Let the inputs that stay make up for those that go: the output projection solved anew by regularised least squares.

    min_W'  || W' X_K - Y ||^2 + lambda || W' - W_K ||^2

    W' = W_K + (T_K - W_K H_KK) (H_KK + lambda 1)^-1,   H_KK = X_K X_K^T,   T_K = Y X_K^T

Y is what the projection should give: W X, or the dense model's output. The ridge pulls towards the old weights (no repair), not towards zero, so that with
few tokens the repair fades out instead of inventing something. lambda is a multiple of the mean of diag(H_KK), chosen on calibration rows that were held out.

Source: Meng et al. 2024 (OSSCAR), arXiv:2403.12983, section 3; Kurtic et al. 2023 (ZipLM), arXiv:2302.04089.

Shapes: O outputs, I inputs, K inputs that stay.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llmlite.calibration.moments import Moments

__all__ = ["DAMPINGS", "choose_damping", "least_squares", "output_error"]

DAMPINGS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Candidates, as multiples of the mean of the Hessian's diagonal."""


def least_squares(weight_OI: Tensor, keep_K: Tensor, moments: Moments, damping: float) -> Tensor:
    """The weight of the inputs that stay.

    Args:
        weight_OI: the old weight.
        keep_K: indices of the inputs that stay, int64.
        moments: sums over calibration tokens; with cross moments the target is the dense model's output, else the old output on the same inputs.
        damping: lambda over the mean of diag(H_KK), positive.

    Returns:
        float32, (O, K).
    """
    gram_KK = moments.gram_II.double()[keep_K][:, keep_K]
    weight_OI = weight_OI.double()
    weight_OK = weight_OI[:, keep_K]
    missing_OK = weight_OI @ moments.target_JI.double()[:, keep_K] - weight_OK @ gram_KK
    gram_KK.diagonal().add_(damping * gram_KK.diagonal().mean().clamp(min=1e-12))
    return (weight_OK + torch.cholesky_solve(missing_OK.T, torch.linalg.cholesky(gram_KK)).T).float()


def output_error(weight_OI: Tensor, new_OK: Tensor, keep_K: Tensor, moments: Moments) -> float:
    """|| W' X_K - Y ||^2, up to the constant || Y ||^2 - || W X ||^2 when the target is the dense model's output; zero-based otherwise."""
    gram_II, weight_OI, new_OK = moments.gram_II.double(), weight_OI.double(), new_OK.double()
    if moments.cross_JI is None:
        change_OI = -weight_OI
        change_OI[:, keep_K] += new_OK
        return float((change_OI @ gram_II * change_OI).sum())
    quadratic = (new_OK @ gram_II[keep_K][:, keep_K] * new_OK).sum()
    linear = (weight_OI @ moments.cross_JI.double()[:, keep_K] * new_OK).sum()
    return float(quadratic - 2 * linear + (weight_OI @ gram_II * weight_OI).sum())


def choose_damping(
    weight_OI: Tensor, keep_K: Tensor, fit: Moments, held: Moments | None, candidates: Sequence[float] = DAMPINGS, default: float = 0.03
) -> float:
    """The damping whose solution on `fit` errs least on `held`; `default` when nothing was held out.

    The error on rows that were not fitted falls and then rises with the damping, so the search goes downhill from the candidate nearest to `default`.
    """
    if held is None or not held.tokens:
        return default
    weight_OI = weight_OI.double()
    gram_KK, held_KK = (moments.gram_II.double()[keep_K][:, keep_K] for moments in (fit, held))
    weight_OK, wanted_OK = weight_OI[:, keep_K], weight_OI @ held.target_JI.double()[:, keep_K]
    missing_OK = weight_OI @ fit.target_JI.double()[:, keep_K] - weight_OK @ gram_KK
    size = float(gram_KK.diagonal().mean().clamp(min=1e-12))

    @functools.cache
    def error(index: int) -> float:
        damped_KK = gram_KK + candidates[index] * size * torch.eye(len(gram_KK), dtype=gram_KK.dtype, device=gram_KK.device)
        new_OK = weight_OK + torch.cholesky_solve(missing_OK.T, torch.linalg.cholesky(damped_KK)).T
        return float(((new_OK @ held_KK - 2 * wanted_OK) * new_OK).sum())

    best = min(range(len(candidates)), key=lambda index: abs(math.log(candidates[index] / default)))
    while True:
        nearest = min((index for index in (best - 1, best, best + 1) if 0 <= index < len(candidates)), key=error)
        if nearest == best:
            return candidates[best]
        best = nearest
