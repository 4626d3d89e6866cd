"""The factor of an inverse Hessian that column-by-column methods (SparseGPT, GPTQ) read their corrections from.

    inverse(H) = U^T U, U upper triangular:  row i of U, divided by U_ii, says how the inputs behind i make up for an error at i when those before are settled

Written from the Cholesky factor of H with rows and columns in reverse, one factorisation and one triangular solve instead of two and an inverse.

Source: Frantar et al. 2022 (GPTQ), arXiv:2210.17323, section 3.3, for the use of U.

Shapes: I inputs of a projection.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inverse_factor"]


def inverse_factor(hessian_II: Tensor) -> Tensor | None:
    """Upper U with inverse(H) = U^T U, in H's dtype, (I, I); `None` when H is not positive definite, or infinite on its diagonal."""
    lower_II, failed = torch.linalg.cholesky_ex(hessian_II.flip(0, 1))
    if int(failed) or not bool(lower_II.diagonal().isfinite().all()):  # the root of an infinite diagonal is infinite, which LAPACK does not call a failure
        return None
    identity_II = torch.eye(len(lower_II), device=lower_II.device, dtype=lower_II.dtype)
    upper_II: Tensor = torch.linalg.solve_triangular(lower_II.flip(0, 1), identity_II, upper=True)
    return upper_II
