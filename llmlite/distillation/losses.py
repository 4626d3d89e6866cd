"""How far a student's next-token distribution p is from the teacher's q: one number per token, from logits.

Every function takes `(student_logits_NV, teacher_logits_NV, temperature)`, works in float32 (float64 for float64 logits) and returns the
loss per token in nats, (N,), differentiable by the student. p = softmax(student / T), q = softmax(teacher / T). Divergences are
multiplied by T^2, so that their gradient keeps its size as T changes and one loss weight serves all temperatures (Hinton et al. 2015,
arXiv:1503.02531, section 2). Log-probabilities serve as teacher logits as well: softmax does not see the difference.

Vocabularies padded to different sizes (Qwen: 151,936 and 152,064) are compared on their shared prefix, both distributions renormalised over
it. The excess of the student gets no gradient here (cross entropy, over the student's whole vocabulary, pushes it down); the excess of
the teacher is ignored. That both prefixes mean the same tokens is for the caller to check (`llmlite.distillation.vocab`).

Logits of -inf (masked tokens) are probability zero. Where that meets a positive probability in a logarithm, log 0 stands as -1e4: the loss
is large, but finite.

From a badly broken student the mode-seeking losses (reverse KL, JSD) go nowhere: start with cross entropy + forward KL.

Shapes: N tokens, V vocabulary, K teacher tokens kept per position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmlite.errors import ConfigError

__all__ = [
    "LOG_ZERO",
    "check_temperature",
    "finite_logprobs",
    "forward_kl",
    "generalised_jsd",
    "in_top_k",
    "logit_mse",
    "pointwise_kl",
    "reverse_kl",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "top_k_forward_kl",
    "top_k_outcomes",
    "top_k_teacher",
    "total_variation",
]

LOG_ZERO = -1e4
"""What log 0 counts as, in nats. Finite logarithms stay as they are."""


def forward_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q || p) * T^2: the student must cover whatever the teacher says. Mean-seeking, and the best healer measured.

    Source: Hinton et al. 2015, arXiv:1503.02531.
    """
    logp_NV, logq_NV = _logprobs(student_logits_NV, teacher_logits_NV, temperature)
    return temperature**2 * _kl(logq_NV, logp_NV)


def reverse_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) * T^2: the student must not say what the teacher would not. Mode-seeking.

    Source: Gu et al. 2023 (MiniLLM), arXiv:2306.08543, here token by token.
    """
    logp_NV, logq_NV = _logprobs(student_logits_NV, teacher_logits_NV, temperature)
    return temperature**2 * _kl(logp_NV, logq_NV)


def generalised_jsd(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence, T^2 * (beta KL(q || m) + (1 - beta) KL(p || m)) with m = beta q + (1 - beta) p.

    Bounded, unlike the KLs. `beta` 0 and 1 mean its scaled limits, forward and reverse KL, as in the paper's experiments.

    Raises:
        ConfigError: beta outside of [0, 1].

    Source: Agarwal et al. 2023 (GKD), arXiv:2306.13649, eq. 1.
    """
    _check_share("generalised_jsd", "beta", beta)
    if beta == 0.0:
        return forward_kl(student_logits_NV, teacher_logits_NV, temperature)
    if beta == 1.0:
        return reverse_kl(student_logits_NV, teacher_logits_NV, temperature)
    logp_NV, logq_NV = _logprobs(student_logits_NV, teacher_logits_NV, temperature)
    logm_NV = _log_mixture(logq_NV, logp_NV, beta)
    return temperature**2 * (beta * _kl(logq_NV, logm_NV) + (1 - beta) * _kl(logp_NV, logm_NV))


def skewed_forward_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0, alpha: float = 0.1) -> Tensor:
    """KL(q || alpha q + (1 - alpha) p) * T^2: forward KL, bounded by log(1 / alpha) where the student says almost nothing.

    Raises:
        ConfigError: alpha outside of [0, 1); 0 is forward KL.

    Source: Ko et al. 2024 (DistiLLM), arXiv:2402.03898, section 3.1.
    """
    _check_share("skewed_forward_kl", "alpha", alpha, closed_above=False)
    logp_NV, logq_NV = _logprobs(student_logits_NV, teacher_logits_NV, temperature)
    return temperature**2 * _kl(logq_NV, _log_mixture(logq_NV, logp_NV, alpha))


def skewed_reverse_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0, alpha: float = 0.1) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q) * T^2: reverse KL, bounded by log(1 / alpha). Alpha is the student's share here.

    Raises:
        ConfigError: alpha outside of [0, 1); 0 is reverse KL.

    Source: Ko et al. 2024 (DistiLLM), arXiv:2402.03898, section 3.1.
    """
    _check_share("skewed_reverse_kl", "alpha", alpha, closed_above=False)
    logp_NV, logq_NV = _logprobs(student_logits_NV, teacher_logits_NV, temperature)
    return temperature**2 * _kl(logp_NV, _log_mixture(logp_NV, logq_NV, alpha))


def total_variation(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Total variation distance, T^2 / 2 * sum |p - q|: symmetric, between 0 and T^2.

    Source: Wen et al. 2023 (f-distill), arXiv:2307.15190.
    """
    logp_NV, logq_NV = _logprobs(student_logits_NV, teacher_logits_NV, temperature)
    return temperature**2 / 2 * (logp_NV.exp() - logq_NV.exp()).abs().sum(-1)


def logit_mse(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0, centred: bool = False) -> Tensor:
    """Mean over the vocabulary of the squared difference of the logits; tokens masked (-inf) on either side count zero.

    Twice the large-temperature limit of KL * T^2 if logits are centred. Temperature cancels and is accepted for uniformity.

    Args:
        student_logits_NV: (N, V), real logits.
        teacher_logits_NV: (N, V), real logits: with log-probabilities pass `centred`.
        temperature: checked, otherwise unused.
        centred: subtract each row's mean first, since softmax does not see a shift.

    Source: Kim et al. 2021, arXiv:2105.08919.
    """
    check_temperature(temperature)
    student_NV, teacher_NV = _shared_prefix(student_logits_NV, teacher_logits_NV)
    valid_NV = torch.isfinite(student_NV) & torch.isfinite(teacher_NV)
    # masked before the subtraction: -inf - -inf has a nan gradient even where its value is thrown away
    difference_NV = student_NV.masked_fill(~valid_NV, 0.0) - teacher_NV.masked_fill(~valid_NV, 0.0)
    count_N = valid_NV.sum(-1).clamp(min=1)
    if centred:
        difference_NV = (difference_NV - (difference_NV.sum(-1) / count_N)[:, None]).masked_fill(~valid_NV, 0.0)
    return difference_NV.square().sum(-1) / count_N


def top_k_forward_kl(student_logits_NV: Tensor, ids_NK: Tensor, logprobs_NK: Tensor, temperature: float = 1.0, tail: str = "bucket") -> Tensor:
    """Forward KL against a teacher of whom only the k likeliest tokens are known, times T^2.

    With `tail="bucket"` all other tokens are one more outcome, of probability 1 - sum q on one side and 1 - sum p on the other: a lower bound of
    the full KL, equal to it for k = V, that says nothing about the order within the tail. With `tail="renormalise"` q is scaled to sum to one
    and the rest is taken for impossible: sharper than the teacher.

    Args:
        student_logits_NV: (N, V).
        ids_NK: token ids, int64, distinct within a row. Ids beyond the student's vocabulary join the tail.
        logprobs_NK: their log-probabilities **at this same temperature**, over the teacher's whole vocabulary (`top_k_teacher`). -inf marks an
            unused place. Logprobs at T = 1, as an API gives them, allow `temperature=1` only (or `renormalise`, divided by T beforehand).
        temperature: T.
        tail: "bucket" or "renormalise".

    Raises:
        ConfigError: an unknown tail, or a temperature that is not positive.
    """
    check_temperature(temperature)
    _check_tail(tail)
    logp_NV = torch.log_softmax(_float(student_logits_NV) / temperature, -1)
    known_NK, safe_NK, logq_NK, logq_tail_N = top_k_outcomes(ids_NK, logprobs_NK, logp_NV.shape[-1], tail, logp_NV.dtype)
    kl_N = pointwise_kl(logq_NK, logp_NV.gather(1, safe_NK)).masked_fill(~known_NK, 0.0).sum(-1)
    if logq_tail_N is not None:
        tail_NV = logp_NV.masked_fill(in_top_k(known_NK, safe_NK, logp_NV.shape[-1]), -math.inf)
        kl_N = kl_N + pointwise_kl(logq_tail_N, _safe_logsumexp(tail_NV))
    return temperature**2 * kl_N


def top_k_teacher(teacher_logits_NV: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens and their log-probabilities at a temperature: int64 (N, K) and float (N, K), likeliest first."""
    check_temperature(temperature)
    logprobs_NK, ids_NK = torch.log_softmax(_float(teacher_logits_NV) / temperature, -1).topk(min(k, teacher_logits_NV.shape[-1]), dim=-1)
    return ids_NK, logprobs_NK


def top_k_outcomes(ids_NK: Tensor, logprobs_NK: Tensor, vocabulary: int, tail: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The outcomes of `top_k_forward_kl`: which places are in use, ids safe to gather, log q of each, and log q of the tail (bucket only)."""
    known_NK = (ids_NK < vocabulary) & (logprobs_NK > -math.inf)
    safe_NK = ids_NK.masked_fill(~known_NK, 0).long()
    logq_NK = logprobs_NK.to(dtype).masked_fill(~known_NK, -math.inf)
    if tail == "renormalise":
        return known_NK, safe_NK, logq_NK - _safe_logsumexp(logq_NK)[:, None].nan_to_num(neginf=0.0), None
    tail_N = (1 - logq_NK.exp().sum(-1)).clamp(min=0.0)
    return known_NK, safe_NK, logq_NK, tail_N.log()


def in_top_k(known_NK: Tensor, safe_NK: Tensor, vocabulary: int) -> Tensor:
    """Whether each token of the vocabulary is among the teacher's known ones, bool, (N, V)."""
    counts_NV = torch.zeros(len(safe_NK), vocabulary, dtype=torch.int8, device=safe_NK.device)
    return counts_NV.scatter_add_(1, safe_NK, known_NK.to(torch.int8)).bool()


def _logprobs(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p and log q at temperature T over the shared prefix of the two vocabularies."""
    check_temperature(temperature)
    student_NV, teacher_NV = _shared_prefix(student_logits_NV, teacher_logits_NV)
    if temperature != 1.0:
        student_NV, teacher_NV = student_NV / temperature, teacher_NV / temperature
    return torch.log_softmax(student_NV, -1), torch.log_softmax(teacher_NV, -1)


def _kl(loga_NV: Tensor, logb_NV: Tensor) -> Tensor:
    """KL(a || b), (N,)."""
    return pointwise_kl(loga_NV, logb_NV).sum(-1)


def pointwise_kl(loga: Tensor, logb: Tensor) -> Tensor:
    """a * (log a - log b), zero where a is zero, finite where b is."""
    return loga.exp() * (finite_logprobs(loga) - finite_logprobs(logb))


def _log_mixture(loga_NV: Tensor, logb_NV: Tensor, share: float) -> Tensor:
    """log(share * a + (1 - share) * b), stable where both are tiny; 0 <= share < 1."""
    if share == 0.0:
        return logb_NV
    return torch.logaddexp(finite_logprobs(loga_NV) + math.log(share), finite_logprobs(logb_NV) + math.log1p(-share))


def _safe_logsumexp(logits_NV: Tensor) -> Tensor:
    """logsumexp, (N,); -inf with gradient zero, not nan, for a row of nothing but -inf."""
    empty_N = (logits_NV == -math.inf).all(-1)
    return logits_NV.masked_fill(empty_N[:, None], 0.0).logsumexp(-1).masked_fill(empty_N, -math.inf)


def finite_logprobs(logprobs: Tensor) -> Tensor:
    """Log-probabilities with `LOG_ZERO` for -inf."""
    return logprobs.masked_fill(logprobs == -math.inf, LOG_ZERO)


def _float(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _shared_prefix(student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    shared = min(student_logits_NV.shape[-1], teacher_logits_NV.shape[-1])
    return _float(student_logits_NV[..., :shared]), _float(teacher_logits_NV[..., :shared])


def check_temperature(temperature: float) -> None:
    """Raise a ConfigError for a temperature that divides to nonsense."""
    if not 0 < temperature < math.inf:
        raise ConfigError(
            "distillation", [f"temperature={temperature} should be positive and finite. 1 compares the distributions as they are; 2 softens them."]
        )


def _check_tail(tail: str) -> None:
    if tail not in ("bucket", "renormalise"):
        raise ConfigError("distillation.top_k_forward_kl", [f"tail={tail!r} should be 'bucket' or 'renormalise'."])


def _check_share(where: str, name: str, value: float, closed_above: bool = True) -> None:
    if not (0 <= value <= 1 if closed_above else 0 <= value < 1):
        raise ConfigError(f"distillation.{where}", [f"{name}={value} should be in [0, 1{']' if closed_above else ')'}. It is a share of the mixture."])
