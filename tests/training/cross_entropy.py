"""What transformers' `ForCausalLMLoss` returns, from hidden states instead of logits, by the one loss through the head that training uses."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llmlite.training.chunked import chunked_head_loss
from llmlite.training.token_loss import IGNORE_INDEX, CrossEntropy, next_token_labels


def chunked_cross_entropy(hidden_BTD: Tensor, head: nn.Module | Tensor, labels_BT: Tensor, *, shifted: bool = False, **options: Any) -> Tensor:
    labels_N = (labels_BT if shifted else next_token_labels(labels_BT)).reshape(-1)
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    return chunked_head_loss(hidden_ND, head, CrossEntropy(labels_N), keep_N=labels_N != IGNORE_INDEX, **options).loss
