"""The same losses as `llmlite.distillation.losses`, with their gradient written out: for those that every training step pays for.

The divergences take log-probabilities, log p = log_softmax(student / T) and log q = log_softmax(teacher / T), over one vocabulary, and return
the loss per token, (N,), and its gradient by student / T, (N, V). The caller multiplies by T^2 and by T (T^2 of the convention times 1 / T of the chain rule).
Arguments are only read.

For a loss L(log p) with g = dL / d log p the gradient by the logits is g - p * sum(g):

    forward KL            g = -q                          p - q
    reverse KL            g = p (log p - log q + 1)       p (log p - log q - KL)
    top-k, known tokens   g = -q                          p - q
    top-k, the tail       g = -q_tail * p / p_tail        p - q_tail * p / p_tail
    JSD, m of both        g = (1 - b) p (log p - log m)   (1 - b) p (log p - log m - KL(p || m))
    skewed forward KL     g = -(1 - a) p q / m            g - p sum(g)
    skewed reverse KL     g = p (log p - log m + 1 - a p / m)     g - p sum(g)
    total variation       g = p sign(p - q) / 2           g - p sum(g)

Those of mixtures m are for numbers as models give them: they return None where some logit is -inf, and autograd has to do it.

Shapes: N tokens, V vocabulary, K teacher tokens kept per position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmlite.distillation.losses import finite_logprobs, in_top_k, pointwise_kl, top_k_outcomes

__all__ = [
    "forward_kl_gradient",
    "generalised_jsd_gradient",
    "logit_mse_gradient",
    "reverse_kl_gradient",
    "skewed_forward_kl_gradient",
    "skewed_reverse_kl_gradient",
    "top_k_forward_kl_gradient",
    "total_variation_gradient",
]

_SMALL = 1e-30
"""A probability below it adds nothing to a sum; a tail below it is computed from logarithms."""


def forward_kl_gradient(logp_NV: Tensor, logq_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p), and p - q."""
    q_NV = logq_NV.exp()
    difference_NV = logq_NV - logp_NV
    kl_N = torch.linalg.vecdot(q_NV, difference_NV)
    if _all_finite(kl_N):
        return kl_N, torch.exp(logp_NV, out=difference_NV).sub_(q_NV)
    # some logit is -inf; where it is the student's, the term is a constant and pulls at nothing
    kl_N = pointwise_kl(logq_NV, logp_NV).sum(-1)
    q_NV.masked_fill_(logp_NV == -math.inf, 0.0)
    return kl_N, logp_NV.exp().mul_(q_NV.sum(-1, keepdim=True)).sub_(q_NV)


def reverse_kl_gradient(logp_NV: Tensor, logq_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q), and p * (log p - log q - KL(p || q))."""
    p_NV = logp_NV.exp()
    difference_NV = logp_NV - logq_NV
    kl_N = torch.linalg.vecdot(p_NV, difference_NV)
    if not _all_finite(kl_N):
        difference_NV = finite_logprobs(logp_NV) - finite_logprobs(logq_NV)
        kl_N = torch.linalg.vecdot(p_NV, difference_NV)
    return kl_N, difference_NV.sub_(kl_N[:, None]).mul_(p_NV)


def generalised_jsd_gradient(logp_NV: Tensor, logq_NV: Tensor, beta: float = 0.5) -> tuple[Tensor, Tensor] | None:
    """`generalised_jsd` at temperature 1, and (1 - beta) p (log p - log m - KL(p || m)); `None` when some logit is not finite."""
    if beta in (0.0, 1.0):
        return (reverse_kl_gradient if beta else forward_kl_gradient)(logp_NV, logq_NV)
    p_NV, q_NV = logp_NV.exp(), logq_NV.exp()
    logm_NV = torch.lerp(p_NV, q_NV, beta).clamp_min_(_SMALL).log_()
    kl_q_N = torch.linalg.vecdot(q_NV, logq_NV - logm_NV)
    difference_NV = torch.sub(logp_NV, logm_NV, out=logm_NV)
    kl_p_N = torch.linalg.vecdot(p_NV, difference_NV)
    values_N = beta * kl_q_N + (1 - beta) * kl_p_N
    return (values_N, difference_NV.sub_(kl_p_N[:, None]).mul_(p_NV).mul_(1 - beta)) if _all_finite(values_N) else None


def skewed_forward_kl_gradient(logp_NV: Tensor, logq_NV: Tensor, alpha: float = 0.1) -> tuple[Tensor, Tensor] | None:
    """`skewed_forward_kl` at temperature 1, and its gradient; `None` when some logit is not finite."""
    if alpha == 0.0:
        return forward_kl_gradient(logp_NV, logq_NV)
    p_NV, q_NV = logp_NV.exp(), logq_NV.exp()
    m_NV = torch.lerp(p_NV, q_NV, alpha).clamp_min_(_SMALL)
    pull_NV = q_NV / m_NV
    kl_N = torch.linalg.vecdot(q_NV, torch.sub(logq_NV, m_NV.log_(), out=m_NV))
    return (kl_N, _through_softmax_(pull_NV.mul_(alpha - 1), p_NV)) if _all_finite(kl_N) else None


def skewed_reverse_kl_gradient(logp_NV: Tensor, logq_NV: Tensor, alpha: float = 0.1) -> tuple[Tensor, Tensor] | None:
    """`skewed_reverse_kl` at temperature 1, and its gradient; `None` when some logit is not finite."""
    if alpha == 0.0:
        return reverse_kl_gradient(logp_NV, logq_NV)
    p_NV, q_NV = logp_NV.exp(), logq_NV.exp()
    m_NV = torch.lerp(q_NV, p_NV, alpha, out=q_NV).clamp_min_(_SMALL)
    share_NV = p_NV / m_NV
    difference_NV = torch.sub(logp_NV, m_NV.log_(), out=m_NV)
    kl_N = torch.linalg.vecdot(p_NV, difference_NV)
    return (kl_N, _through_softmax_(difference_NV.sub_(share_NV, alpha=alpha), p_NV)) if _all_finite(kl_N) else None


def total_variation_gradient(logp_NV: Tensor, logq_NV: Tensor) -> tuple[Tensor, Tensor]:
    """`total_variation` at temperature 1, and p (s - sum(p s)) / 2 with s = sign(p - q)."""
    p_NV, q_NV = logp_NV.exp(), logq_NV.exp()
    difference_NV = torch.sub(p_NV, q_NV, out=q_NV)
    values_N = difference_NV.abs().sum(-1).div_(2)
    return values_N, _through_softmax_(difference_NV.sign_().div_(2), p_NV)


def _through_softmax_(slope_NV: Tensor, p_NV: Tensor) -> Tensor:
    """From d L / d p, up to a number for each row, to d L / d logits, in place."""
    return slope_NV.sub_(torch.linalg.vecdot(p_NV, slope_NV)[:, None]).mul_(p_NV)


def top_k_forward_kl_gradient(logp_NV: Tensor, ids_NK: Tensor, logprobs_NK: Tensor, tail: str, out_NV: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`top_k_forward_kl` at temperature 1, and its gradient; arguments as there, with log p instead of logits. The gradient is written to `out_NV` if given."""
    vocabulary = logp_NV.shape[-1]
    known_NK, safe_NK, logq_NK, logq_tail_N = top_k_outcomes(ids_NK, logprobs_NK, vocabulary, tail, logp_NV.dtype)
    logp_NK = logp_NV.gather(1, safe_NK)
    kl_N = pointwise_kl(logq_NK, logp_NK).masked_fill(~known_NK, 0.0).sum(-1)
    q_NK = logq_NK.exp().masked_fill(logp_NK == -math.inf, 0.0)  # zero where unknown; where masked in the student, the term is a constant
    mass_N = q_NK.sum(-1)
    grad_NV = torch.exp(logp_NV, out=out_NV)
    if logq_tail_N is None:
        return kl_N, grad_NV.mul_(mass_N[:, None]).scatter_add_(1, safe_NK, -q_NK)

    q_tail_N = logq_tail_N.exp()
    if bool(known_NK.all()):  # the usual case: two dense passes fewer
        p_NK = logp_NK.exp()
        grad_NV.scatter_(1, safe_NK, 0.0)
        p_tail_N = grad_NV.sum(-1)
        if bool((p_tail_N > _SMALL).all()):
            kl_N = kl_N + pointwise_kl(logq_tail_N, p_tail_N.log())
            total_N = mass_N + q_tail_N
            grad_NV.mul_((total_N - q_tail_N / p_tail_N)[:, None])
            return kl_N, grad_NV.scatter_(1, safe_NK, p_NK * total_N[:, None] - q_NK)
        grad_NV.scatter_(1, safe_NK, p_NK)

    tail_NV = logp_NV.masked_fill(in_top_k(known_NK, safe_NK, vocabulary), -math.inf)
    logp_tail_N = torch.logsumexp(tail_NV, -1)
    kl_N = kl_N + pointwise_kl(logq_tail_N, logp_tail_N)
    q_tail_N = q_tail_N.masked_fill(logp_tail_N == -math.inf, 0.0)
    within_NV = tail_NV.sub_(finite_logprobs(logp_tail_N)[:, None]).exp_()  # p / p_tail, also where both underflow
    grad_NV.mul_((mass_N + q_tail_N)[:, None]).sub_(within_NV.mul_(q_tail_N[:, None]))
    return kl_N, grad_NV.scatter_add_(1, safe_NK, -q_NK)


def logit_mse_gradient(student_NV: Tensor, teacher_NV: Tensor, centred: bool = False, out_NV: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`logit_mse`, and 2 (s - t) / V with s - t centred or not. The gradient is written to `out_NV` if given, which may be the student's logits."""
    vocabulary = student_NV.shape[-1]
    difference_NV = torch.sub(student_NV, teacher_NV, out=out_NV)
    if not centred:
        mse_N = torch.linalg.vecdot(difference_NV, difference_NV) / vocabulary
        if _all_finite(mse_N):
            return mse_N, difference_NV.mul_(2 / vocabulary)
    valid_NV = torch.isfinite(difference_NV)  # tokens masked on either side count zero
    count_N1 = valid_NV.sum(-1, keepdim=True).clamp(min=1)
    difference_NV.masked_fill_(~valid_NV, 0.0)
    if centred:
        difference_NV.sub_(difference_NV.sum(-1, keepdim=True) / count_N1).masked_fill_(~valid_NV, 0.0)
    return difference_NV.square().sum(-1) / count_N1.squeeze(-1), difference_NV.mul_(2 / count_N1)


def _all_finite(values_N: Tensor) -> bool:
    return bool(torch.isfinite(values_N).all())
