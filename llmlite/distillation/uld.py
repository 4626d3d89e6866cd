"""Universal logit distillation: compare next-token distributions over two different vocabularies by the shape of their sorted probabilities.

    ULD(p, q) = sum_i | p_(i) - q_(i) |        p_(1) >= p_(2) >= ..., the shorter one padded with zeros

This is the Wasserstein distance of the two distributions when every pair of different tokens is equally far apart. It says how sure to be, not of what: cross
entropy has to say that. Which positions may be compared is found by characters: where student and teacher have read exactly the same text.

Shapes: N tokens, V vocabulary of the student, W of the teacher, T student tokens and S teacher tokens of one example.

Source: Boizard et al. 2024, arXiv:2402.12030 (their alignment is by position; by characters it is ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llmlite.distillation.losses import check_temperature

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Alignment", "align", "universal_logit_distance"]


def universal_logit_distance(student_logits_NV: Tensor, teacher_logits_NW: Tensor, temperature: float = 1.0, aligned_N: Tensor | None = None) -> Tensor:
    """T^2 * sum of the differences of the sorted probabilities, between 0 and 2 T^2, (N,); zero where `aligned_N` is false.

    Sorting makes it the dearest of the losses: about V log V for each token.
    """
    check_temperature(temperature)
    dtype = torch.float64 if student_logits_NV.dtype == torch.float64 else torch.float32
    rows_K = torch.arange(len(student_logits_NV), device=student_logits_NV.device) if aligned_N is None else aligned_N.nonzero().flatten()
    p_KV, q_KW = (
        torch.softmax(logits[rows_K].to(dtype) / temperature, -1).sort(dim=-1, descending=True).values for logits in (student_logits_NV, teacher_logits_NW)
    )
    size = max(p_KV.shape[1], q_KW.shape[1])
    distance_K = (F.pad(p_KV, (0, size - p_KV.shape[1])) - F.pad(q_KW, (0, size - q_KW.shape[1]))).abs().sum(-1)
    return torch.zeros(len(student_logits_NV), dtype=dtype, device=student_logits_NV.device).index_add(0, rows_K, temperature**2 * distance_K)


@dataclass(frozen=True)
class Alignment:
    """One example for both models.

    Attributes:
        teacher_ids: the same text by the teacher's tokenizer.
        places: for each student token the teacher token up to which both have read the same characters, or -1, (T,).
    """

    teacher_ids: list[int]
    places: list[int]


def align(student_ids: Sequence[int], student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> Alignment:
    """Give the teacher what the student reads, and find the positions at which both have read the same.

    Special tokens of the student keep their text where the teacher knows the same special token; elsewhere they are left out, as are their positions.

    Args:
        student_ids: one example, T ids.
        student, teacher: fast tokenizers.
    """
    text, ends = _text_with_ends(student_ids, student, set(_specials(teacher).values()))
    encoded = teacher(text, return_offsets_mapping=True, verbose=False)
    place_of_end = {int(end): place for place, (start, end) in enumerate(encoded["offset_mapping"]) if end > start}  # the last token that ends there
    return Alignment(list(encoded["input_ids"]), [place_of_end.get(end, -1) for end in ends])


def _text_with_ends(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, shared_specials: set[str]) -> tuple[str, list[int]]:
    """The text, and after each token how many characters of it were read; -1 within a character and after special tokens that are left out."""
    from tokenizers.decoders import DecodeStream

    backend = tokenizer.backend_tokenizer
    special = _specials(tokenizer)
    stream = DecodeStream(skip_special_tokens=False)
    text, ends = "", []
    for token in ids:
        if token in special and special[token] not in shared_specials:
            ends.append(-1)
            continue
        piece = stream.step(backend, int(token))
        text += piece or ""
        ends.append(len(text) if piece else -1)
    return text, ends


def _specials(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Id -> text of every special token, those of chat templates too, which `all_special_tokens` may leave out."""
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=False))
    return named | {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
