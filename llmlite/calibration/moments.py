"""Running sums over calibration tokens: the input Hessian of a projection, and the means and norms that fall out of it.

    gram = sum_n x_n x_n^T,   total = sum_n x_n,   mean = total / N,   variance = diag(gram) / N - mean^2,   norm = sqrt(diag(gram))

The gram matrix is the Hessian of ||W X - W' X||^2 in each row of W', up to a factor 2.

Shapes: N tokens, I inputs of the projection, J inputs of the same projection in the dense model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmlite.processes import sum_over_processes

__all__ = ["Moments"]

_NARROWEST = 64
"""Inputs of a strip at least: products of a few columns are rounded more often, and one process and two then choose otherwise."""
_STRIPS = 6
"""Measured on one core, 4,096 tokens: 0.62 of the time of the whole product at width 1,536, 0.70 at 576."""


class Moments:
    """Sums for the input of one projection, float32 by default, on the device of the inputs; with `gram=False` of values and squares alone.

    Attributes:
        tokens: tokens counted.
        gram_II: sum of x x^T; empty where only squares are taken.
        total_I: sum of x.
        cross_JI: sum of (dense x) x^T, when the dense inputs were given too, else None: it says what the dense model would have put in.
    """

    def __init__(self, width: int, *, cross: bool = False, gram: bool = True, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self.gram_II = torch.zeros(*([width, width] if gram else [0, 0]), dtype=dtype, device=device)
        self._squares_I = None if gram else torch.zeros(width, dtype=dtype, device=device)
        self.total_I = torch.zeros(width, dtype=dtype, device=device)
        self.cross_JI = torch.zeros(width, width, dtype=dtype, device=device) if cross else None

    def add(self, input_NI: Tensor, dense_NJ: Tensor | None = None, weight_N1: Tensor | None = None) -> None:
        """Count tokens. Padding must have been left out before.

        Args:
            input_NI, dense_NJ: what the projection is given, and what it is given in the dense model.
            weight_N1: how much each token counts, 1 in the mean over all; None: all alike.
        """
        x_NI = input_NI.to(self.gram_II.dtype)
        weighted_NI = x_NI if weight_N1 is None else x_NI * weight_N1
        self.tokens += len(x_NI)
        if self._squares_I is None:
            _add_gram_(self.gram_II, weighted_NI, x_NI)
        else:
            self._squares_I += (weighted_NI * x_NI).sum(0)
        self.total_I += weighted_NI.sum(0)
        if self.cross_JI is not None and dense_NJ is not None:
            self.cross_JI.addmm_(dense_NJ.to(self.gram_II.dtype).T, weighted_NI)

    def merged(self, other: Moments) -> Moments:
        """The sums over both sets of tokens."""
        both = Moments(len(self.total_I), gram=self._squares_I is None, dtype=self.gram_II.dtype, device=self.gram_II.device)
        both.tokens, both.gram_II, both.total_I = self.tokens + other.tokens, self.gram_II + other.gram_II, self.total_I + other.total_I
        if self._squares_I is not None:
            both._squares_I = self._squares_I + other.squares_I
        both.cross_JI = None if self.cross_JI is None or other.cross_JI is None else self.cross_JI + other.cross_JI
        return both

    def all_reduce(self) -> None:
        """Add up over the processes of `torch.distributed`; nothing when there is one process. Sums travel in float64, so that the order matters little."""
        count = torch.tensor([self.tokens], dtype=torch.float64, device=self.gram_II.device)
        squares = self.gram_II if self._squares_I is None else self._squares_I
        sum_over_processes([count, squares, self.total_I, *([] if self.cross_JI is None else [self.cross_JI])])
        self.tokens = int(count.item())

    @property
    def squares_I(self) -> Tensor:  # noqa: N802 - a tensor with its shape suffix
        """Sum of each input's square."""
        return self.gram_II.diagonal() if self._squares_I is None else self._squares_I

    @property
    def hessian_II(self) -> Tensor:  # noqa: N802 - a tensor with its shape suffix
        """Mean of x x^T over all tokens."""
        return self.gram_II / max(self.tokens, 1)

    def relative_output_error(self, change_OI: Tensor, whole_OI: Tensor) -> float:
        """What a change of a weight does to its outputs: sum_x |E x|^2 / sum_x |W x|^2.

        Args:
            change_OI: E, float32, (O, I).
            whole_OI: W, float32, (O, I): the weight, or another change that this one is measured by.
        """
        changed, whole = (((matrix_OI @ self.gram_II) * matrix_OI).sum() for matrix_OI in (change_OI, whole_OI))
        return float(changed.clamp_min(0) / whole.clamp_min(1e-30))

    @property
    def target_JI(self) -> Tensor:  # noqa: N802 - a tensor with its shape suffix
        """What the gram matrix becomes when the outputs wanted are the dense model's: `cross_JI` where it was taken, else the gram matrix itself."""
        return self.gram_II if self.cross_JI is None else self.cross_JI

    @property
    def norm_I(self) -> Tensor:  # noqa: N802 - a tensor with its shape suffix
        """L2 norm of each input over all tokens."""
        return self.squares_I.clamp(min=0).sqrt()

    @property
    def mean_I(self) -> Tensor:  # noqa: N802 - a tensor with its shape suffix
        """Mean of each input."""
        return self.total_I / max(self.tokens, 1)

    @property
    def variance_I(self) -> Tensor:  # noqa: N802 - a tensor with its shape suffix
        """Variance of each input over the tokens, at least 0."""
        return (self.squares_I / max(self.tokens, 1) - self.mean_I**2).clamp(min=0)


def _add_gram_(gram_II: Tensor, weighted_NI: Tensor, x_NI: Tensor) -> None:
    """Add the product of weighted x^T and x, which is symmetric: strips of its upper half are multiplied, the lower half is their mirror image."""
    width = len(gram_II)
    strip = max(-(-width // _STRIPS), _NARROWEST)
    for start in range(0, width, strip):
        rows = slice(start, start + strip)
        gram_II[rows, start:].addmm_(weighted_NI[:, rows].T, x_NI[:, start:])
    for start in range(strip, width, strip):
        gram_II[start:, start - strip : start] = gram_II[start - strip : start, start:].T
