"""Logit MSE of two linear heads without one logit: the vocabulary enters through products of the heads with themselves.

    s - t = W h - U g = W d + E g          d = h - g,   E = W - U

    sum over V of (s - t)^2     =  d'A d + 2 g'B d + g'C g          A = W'W,   B = E'W,   C = E'E
    half its gradient by h      =  A d + B'g
    half its gradient by W      =  W (sum of d h') + E (sum of g h')

Logits cost 2 N V D operations a product and there are four of them; here five products cost 2 V D^2 each, less whenever a batch has more than
1.25 D tokens. Differences are taken before products, so nothing cancels when the student is close to its teacher.

Shapes: N tokens, V vocabulary (the shared prefix, where one head is padded), D hidden size of both models.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["LogitProducts", "pays"]

_ROWS = 8192
"""Rows of the heads whose difference is held at a time: 19 MB at hidden size 576."""


def pays(tokens: int, hidden_size: int) -> bool:
    """Whether there are tokens enough: twice D, well above the 1.25 D at which the operations are as many."""
    return tokens >= 2 * hidden_size


class LogitProducts:
    """A, B and C of two heads.

    Args:
        student_VD: weight of the student's head.
        teacher_VD: weight of the teacher's, of the same dtype and on the same device; its vocabulary may be another size.
    """

    def __init__(self, student_VD: Tensor, teacher_VD: Tensor) -> None:
        self.vocabulary = min(len(student_VD), len(teacher_VD))
        self.student_VD, self.teacher_VD = student_VD[: self.vocabulary], teacher_VD[: self.vocabulary]
        self.same = student_VD.data_ptr() == teacher_VD.data_ptr() and student_VD.stride() == teacher_VD.stride()
        self.a_DD, self.b_DD, self.c_DD = (student_VD.new_zeros(student_VD.shape[1], student_VD.shape[1]) for _ in range(3))
        for rows, difference_RD in self._differences():
            weight_RD = self.student_VD[rows]
            self.a_DD.addmm_(weight_RD.T, weight_RD)
            if difference_RD is not None:
                self.b_DD.addmm_(difference_RD.T, weight_RD)
                self.c_DD.addmm_(difference_RD.T, difference_RD)

    def _differences(self) -> Iterator[tuple[slice, Tensor | None]]:
        """W - U, a few rows at a time; `None` for heads that are one tensor."""
        for start in range(0, self.vocabulary, _ROWS):
            rows = slice(start, min(start + _ROWS, self.vocabulary))
            yield rows, None if self.same else self.student_VD[rows] - self.teacher_VD[rows]

    def mse_and_gradient(self, student_ND: Tensor, teacher_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Logit MSE of each token, (N,), and the gradient of its sum by the student's hidden states, (N, D)."""
        apart_ND = student_ND - teacher_ND
        from_student_ND = apart_ND @ self.a_DD
        from_heads_ND = teacher_ND @ self.b_DD
        squares_N = torch.linalg.vecdot(apart_ND, from_student_ND + 2 * from_heads_ND) + torch.linalg.vecdot(teacher_ND, teacher_ND @ self.c_DD)
        return squares_N.clamp_(min=0.0) / self.vocabulary, (from_student_ND + from_heads_ND).mul_(2 / self.vocabulary)

    def add_weight_gradient_(self, student_ND: Tensor, teacher_ND: Tensor, weight: float, out_VD: Tensor) -> None:
        """Add `weight` times the gradient of the tokens' sum by the student's head to `out_VD`; rows beyond the shared vocabulary have none."""
        factor = 2 * weight / self.vocabulary
        by_apart_DD, by_teacher_DD = (student_ND - teacher_ND).T @ student_ND, teacher_ND.T @ student_ND
        for rows, difference_RD in self._differences():
            out_RD = out_VD[rows].addmm_(self.student_VD[rows], by_apart_DD, alpha=factor)
            if difference_RD is not None:
                out_RD.addmm_(difference_RD, by_teacher_DD, alpha=factor)
