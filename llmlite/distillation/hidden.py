"""Match what happens inside: hidden states and attention maps of chosen layers, one number per token.

Student and teacher widths may differ: a learned projection then lifts the student's states to the teacher's width. Train it with the student and
throw it away afterwards. All mathematics in float32, of float64 states in float64.

Shapes: B sequences, H heads, T positions, N tokens, D hidden size of the student, E hidden size of the teacher.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llmlite.errors import ConfigError

__all__ = ["attention_transfer", "hidden_cosine", "hidden_mse"]


def hidden_mse(student_ND: Tensor, teacher_NE: Tensor, projection_ED: Tensor | None = None, normalise: bool = False) -> Tensor:
    """Mean over the width of the squared difference, (N,).

    Args:
        student_ND: the student's hidden states.
        teacher_NE: the teacher's.
        projection_ED: the weight of a linear map from D to E; without it D must equal E.
        normalise: divide by the mean square of the teacher's state, so that layers of different loudness weigh the same.

    Raises:
        ConfigError: widths that differ without a projection, or a projection of the wrong shape.

    Source: Jiao et al. 2020 (TinyBERT), arXiv:1909.10351, eq. 8.
    """
    student_NE, teacher_NE = _aligned(student_ND, teacher_NE, projection_ED)
    loss_N = (student_NE - teacher_NE).square().mean(-1)
    return loss_N / teacher_NE.square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny) if normalise else loss_N


def hidden_cosine(student_ND: Tensor, teacher_NE: Tensor, projection_ED: Tensor | None = None) -> Tensor:
    """1 - cosine similarity, between 0 and 2, (N,). Arguments and errors as `hidden_mse`.

    Source: Sanh et al. 2019 (DistilBERT), arXiv:1910.01108, section 2.
    """
    return 1 - F.cosine_similarity(*_aligned(student_ND, teacher_NE, projection_ED), dim=-1)


def attention_transfer(student_BHTT: Tensor, teacher_BHTT: Tensor) -> Tensor:
    """Squared distance of the attention maps, averaged over heads and scaled to length one per query, (B, T), between 0 and 2.

    Averaging over heads lets the numbers of heads differ. Attention weights exist only with `attn_implementation="eager"`.

    Raises:
        ConfigError: maps that differ in anything but the number of heads.

    Source: Zagoruyko and Komodakis 2017, arXiv:1612.03928, eq. 2, on the maps of a transformer.
    """
    if student_BHTT.shape[::2] != teacher_BHTT.shape[::2] or student_BHTT.shape[-1] != teacher_BHTT.shape[-1]:
        shapes = f"student {tuple(student_BHTT.shape)}, teacher {tuple(teacher_BHTT.shape)}"
        raise ConfigError("distillation.attention_transfer", [f"attention maps should differ at most in the number of heads (dimension 1): {shapes}."])
    student_BTT = F.normalize(student_BHTT.float().mean(1), dim=-1)
    teacher_BTT = F.normalize(teacher_BHTT.float().mean(1), dim=-1)
    return (student_BTT - teacher_BTT).square().sum(-1)


def _aligned(student_ND: Tensor, teacher_NE: Tensor, projection_ED: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both at the teacher's width, in float32 (float64 for float64)."""
    width, wanted = student_ND.shape[-1], teacher_NE.shape[-1]
    if projection_ED is None and width != wanted:
        raise ConfigError("distillation.hidden", [f"student width {width} is not teacher width {wanted}: pass a projection of shape ({wanted}, {width})."])
    if projection_ED is not None and projection_ED.shape != (wanted, width):
        raise ConfigError("distillation.hidden", [f"the projection has shape {tuple(projection_ED.shape)}, wanted ({wanted}, {width})."])
    dtype = torch.float64 if student_ND.dtype == torch.float64 else torch.float32
    student = student_ND.to(dtype)
    return student if projection_ED is None else F.linear(student, projection_ED.to(dtype)), teacher_NE.to(dtype)
