"""A loss as a function of one token's logits, in the form the chunked engine wants: values, and the gradient by the logits on demand.

The distillation losses of `llmlite.distillation.objective` are such losses too; cross entropy, which everything mixes with, lives here.

Shapes: B sequences, T positions, N = B * T tokens, C tokens of one chunk, R rows of one block of it, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llmlite.data.tokens import IGNORE_INDEX

__all__ = ["IGNORE_INDEX", "CrossEntropy", "LogitTransform", "PlainHead", "TokenLoss", "WithoutLogits", "next_token_labels"]


def next_token_labels(labels_BT: Tensor) -> Tensor:
    """Labels shifted so that position t holds the token at t + 1; the last position is ignored. (B, T) to (B, T)."""
    return F.pad(labels_BT, (0, 1), value=IGNORE_INDEX)[..., 1:].contiguous()


@dataclass(frozen=True)
class LogitTransform:
    """What a family does to `hidden @ W.T + b` before it calls the result logits: `softcap * tanh(scale * raw / softcap)`.

    Args:
        scale: factor on the raw logits (granite: `1 / logits_scaling`; cohere: `logit_scale`).
        softcap: gemma2's `final_logit_softcapping`; `None` leaves the logits unbounded.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        """Logits from raw logits, out of place and differentiable."""
        logits = raw if self.scale == 1.0 else raw * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def apply_(self, raw: Tensor) -> Tensor:
        """Logits from raw logits, overwriting them."""
        if self.scale != 1.0:
            raw.mul_(self.scale)
        return raw if self.softcap is None else raw.div_(self.softcap).tanh_().mul_(self.softcap)

    def pull_back_(self, grad: Tensor, logits: Tensor | None) -> Tensor:
        """Gradient by the raw logits from the gradient by the logits, overwriting it; `logits` are needed only with a softcap."""
        if self.softcap is not None:
            assert logits is not None
            grad.mul_(1 - (logits / self.softcap).square_())
        return grad if self.scale == 1.0 else grad.mul_(self.scale)


@dataclass(frozen=True)
class PlainHead:
    """An LM head that is nothing but `hidden @ W.T`, and the hidden states that enter it.

    Attributes:
        hidden_KD: of the tokens that count, (K, D), in the weight's dtype.
        weight_VD: the weight, (V, D).
        rows_K: their places among the N tokens of the batch, int64.
    """

    hidden_KD: Tensor
    weight_VD: Tensor
    rows_K: Tensor


@dataclass(frozen=True)
class WithoutLogits:
    """One of a loss's parts, computed from hidden states and heads alone.

    Attributes:
        name: which part.
        values_K: the part for each token, unweighted, (K,).
        grad_hidden_KD: gradient of the weighted part's sum by the hidden states, (K, D).
        add_weight_gradient_: adds its gradient by the head's weight to a tensor (V, D).
        rest: the loss of the other parts, for which logits are needed; `None` if that was all.
    """

    name: str
    values_K: Tensor
    grad_hidden_KD: Tensor
    add_weight_gradient_: Callable[[Tensor], None]
    rest: TokenLoss | None


class TokenLoss(ABC):
    """One or more losses per token as a function of the student's logits. Their weighted sum is what is minimised.

    The engine calls `prepare` once for a chunk and then one of the other two for blocks of its rows. Subclasses must write `values`;
    `values_and_grad_` defaults to autograd within the block and is worth overriding when the analytic gradient is short.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]

    def without_logits(self, head: PlainHead) -> WithoutLogits | None:
        """The part that needs no logits where the head is plain, if there is one and it is worth it; asked once for a batch, before everything else."""
        return None

    @abstractmethod
    def prepare(self, rows_C: Tensor, device: torch.device) -> tuple[Tensor, ...]:
        """Everything the loss needs to know of those tokens besides the logits; every tensor starts with dimension C, on `device`."""

    @abstractmethod
    def values(self, logits_RV: Tensor, *prepared: Tensor) -> tuple[Tensor, ...]:
        """The P losses, each (R,), unweighted, differentiable by the logits."""

    def values_and_grad_(self, logits_RV: Tensor, *prepared: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """`values`, detached, and the gradient of their weighted sum, (R, V). May overwrite the logits."""
        with torch.enable_grad():
            leaf = logits_RV.detach().requires_grad_()
            values = self.values(leaf, *prepared)
            terms = [weight * value.sum() for weight, value in zip(self.weights, values, strict=True) if weight]
            (grad,) = torch.autograd.grad(sum(terms, leaf.new_zeros(())), leaf, allow_unused=True)
        return tuple(value.detach() for value in values), torch.zeros_like(logits_RV) if grad is None else grad


class CrossEntropy(TokenLoss):
    """Cross entropy against labels, -log softmax(logits)[label].

    Args:
        labels_N: one label for each token of the batch, already shifted (`next_token_labels`), int64.
        weight: factor in the sum.
    """

    names = ("ce",)

    def __init__(self, labels_N: Tensor, weight: float = 1.0) -> None:
        self.labels_N = labels_N
        self.weights = (weight,)

    def prepare(self, rows_C: Tensor, device: torch.device) -> tuple[Tensor, ...]:
        """The chunk's labels."""
        return (self.labels_N[rows_C.to(self.labels_N.device)].to(device),)

    def values(self, logits_RV: Tensor, *prepared: Tensor) -> tuple[Tensor, ...]:
        """Cross entropy in nats."""
        return (F.cross_entropy(logits_RV, prepared[0], reduction="none"),)

    def values_and_grad_(self, logits_RV: Tensor, *prepared: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Cross entropy and softmax(logits) - onehot(label)."""
        labels_R1 = prepared[0][:, None]
        logprobs_RV = torch.log_softmax(logits_RV, -1)
        values_R = -logprobs_RV.gather(1, labels_R1).squeeze(1)
        grad_RV = logprobs_RV.exp_()
        grad_RV.scatter_add_(1, labels_R1, grad_RV.new_full(labels_R1.shape, -1.0))
        return (values_R,), grad_RV if self.weights[0] == 1.0 else grad_RV.mul_(self.weights[0])
