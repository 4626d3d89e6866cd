"""What a student minimises: cross entropy and a distance to the teacher from the same logits, in one pass over a chunk of tokens.

    loss = ce_weight * CE(labels) + kd_weight * divergence(student, teacher)

`Distillation` is a `TokenLoss` for `llmlite.training.chunked.chunked_head_loss`. The teacher is a signal that is asked for a chunk of tokens at
a time: `HiddenTeacher` applies the teacher's head to its hidden states, so that its full logits never exist either; `LogitsTeacher` and
`TopKTeacher` read what is there already (a cache, an API).

Logit MSE alone needs no logits at all (`llmlite.distillation.logit_products`).

Gradients are written out (`llmlite.distillation.gradients`); that of ULD, which sorts, and those of logits that are not finite are left to autograd within a
block of rows.

Shapes: N tokens, C tokens of one chunk, R rows of one block of it, V vocabulary, D hidden size, K teacher tokens kept per position, J of them computed exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from llmlite.distillation import gradients, losses
from llmlite.distillation.logit_products import LogitProducts, pays
from llmlite.distillation.uld import universal_logit_distance
from llmlite.errors import ConfigError
from llmlite.training.chunked import as_weight_and_bias, head_logits
from llmlite.training.token_loss import CrossEntropy, LogitTransform, PlainHead, TokenLoss, WithoutLogits

__all__ = ["DIVERGENCES", "Distillation", "HiddenTeacher", "LogitsTeacher", "TeacherSignal", "TopKTeacher"]

DIVERGENCES: Mapping[str, Callable[..., Tensor]] = {
    "forward_kl": losses.forward_kl,
    "reverse_kl": losses.reverse_kl,
    "generalised_jsd": losses.generalised_jsd,
    "skewed_forward_kl": losses.skewed_forward_kl,
    "skewed_reverse_kl": losses.skewed_reverse_kl,
    "total_variation": losses.total_variation,
    "logit_mse": losses.logit_mse,
    "uld": universal_logit_distance,
}
"""The distances a `Distillation` knows by name, for teachers whose whole distribution is at hand."""

_GRADIENTS: Mapping[str, Callable[..., tuple[Tensor, Tensor] | None]] = {
    "forward_kl": gradients.forward_kl_gradient,
    "reverse_kl": gradients.reverse_kl_gradient,
    "generalised_jsd": gradients.generalised_jsd_gradient,
    "skewed_forward_kl": gradients.skewed_forward_kl_gradient,
    "skewed_reverse_kl": gradients.skewed_reverse_kl_gradient,
    "total_variation": gradients.total_variation_gradient,
}
"""Those of log-probabilities whose gradient is written out."""

_ROWS = 16  # whose likeliest tokens' rows of the head, gathered in float32, fit a CPU cache


class TeacherSignal(Protocol):
    """Whatever can tell what the teacher says of some tokens of the batch."""

    def signal(self, rows_C: Tensor, device: torch.device) -> tuple[Tensor, ...]:
        """`(logits_CV,)`, or `(ids_CK, logprobs_CK)` of its likeliest tokens, on `device`."""
        ...


class HiddenTeacher:
    """The teacher's last hidden states, live or from a cache, and its head: the exact distribution at D numbers per token.

    Args:
        hidden_ND: what enters the teacher's head, (N, D of the teacher), on any device.
        head: the teacher's LM head, or its weight (V, D). The product runs where the head lives, in its dtype, autocast or not.
        head_bias_V: with a head given as a weight, its bias.
        transform: the teacher's own logit transform.
        where_N: for each token of the batch its place in `hidden_ND`, int64, when that holds other tokens or in another order.
        likeliest_NJ: ids of the J likeliest tokens at each place of `hidden_ND`, int64, with a head given as a weight: their logits are computed in float32
            whatever the head's dtype, and only the others are rounded to it. So a head in bfloat16 is nearly as good as one in float32, where it is quicker.
        buffers: (at least the rows of a chunk, V) that chunks of `logits`, and of logits `rounded` to the head's dtype, are written to, from who makes a
            teacher for every batch; else the first chunk's is kept.
    """

    def __init__(
        self,
        hidden_ND: Tensor,
        head: nn.Module | Tensor,
        *,
        head_bias_V: Tensor | None = None,
        transform: LogitTransform | None = None,
        where_N: Tensor | None = None,
        likeliest_NJ: Tensor | None = None,
        buffers: dict[str, Tensor] | None = None,
    ) -> None:
        self.hidden_ND, self.head, self.head_bias_V, self.transform, self.where_N = hidden_ND.detach(), head, head_bias_V, transform, where_N
        self.likeliest_NJ = likeliest_NJ
        self._buffers = {} if buffers is None else buffers

    def signal(self, rows_C: Tensor, device: torch.device) -> tuple[Tensor, ...]:
        """The chunk's logits, valid until the next call, which overwrites them."""
        places_C = _places(rows_C, self.where_N).to(self.hidden_ND.device)
        hidden_CD = self.hidden_ND[places_C]
        out_CV = self._buffer("logits", len(rows_C))
        if self.likeliest_NJ is None:
            logits_CV = head_logits(hidden_CD, self.head, self.head_bias_V, self.transform, out=out_CV)
        else:
            rounded_CV = head_logits(hidden_CD, self.head, self.head_bias_V, out=self._buffer("rounded", len(rows_C)))
            logits_CV = rounded_CV.float() if out_CV is None else out_CV.copy_(rounded_CV)
            self._sharpen_(logits_CV, hidden_CD, self.likeliest_NJ[places_C])
            if self.transform is not None:
                self.transform.apply_(logits_CV)
        if out_CV is None:
            self._buffers["logits"] = logits_CV
        return (logits_CV.to(device),)

    def _buffer(self, what: str, rows: int) -> Tensor | None:
        kept_CV = self._buffers.get(what)
        return kept_CV[:rows] if kept_CV is not None and len(kept_CV) >= rows else None

    def _sharpen_(self, raw_CV: Tensor, hidden_CD: Tensor, ids_CJ: Tensor) -> None:
        """Replace the raw logits of a few tokens by what they are in float32."""
        assert isinstance(self.head, Tensor)
        ids_CJ = ids_CJ.to(raw_CV.device, torch.int64)
        hidden_CD = hidden_CD.to(raw_CV.device, torch.float32)
        for ids_RJ, hidden_RD, raw_RV in zip(*(torch.split(tensor, _ROWS) for tensor in (ids_CJ, hidden_CD, raw_CV)), strict=True):
            exact_RJ = F.embedding(ids_RJ, self.head).float().mul_(hidden_RD[:, None]).sum(-1)
            if self.head_bias_V is not None:
                exact_RJ += self.head_bias_V[ids_RJ]
            raw_RV.scatter_(1, ids_RJ, exact_RJ)

    def plain(self, rows_K: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hidden states of some tokens, (K, D), and the weight (V, D) of a head that is a product with it and nothing else, `None` for other heads."""
        hidden_KD = self.hidden_ND[_places(rows_K, self.where_N).to(self.hidden_ND.device)]
        weight_VD, bias_V = as_weight_and_bias(self.head, self.head_bias_V) or (None, None)
        if weight_VD is not None and self.likeliest_NJ is not None:
            weight_VD = weight_VD.float()
        return hidden_KD, weight_VD if bias_V is None and (self.transform or LogitTransform()) == LogitTransform() else None


class LogitsTeacher:
    """Logits, or log-probabilities over the whole vocabulary, that exist already, (N, V)."""

    def __init__(self, logits_NV: Tensor) -> None:
        self.logits_NV = logits_NV.detach()

    def signal(self, rows_C: Tensor, device: torch.device) -> tuple[Tensor, ...]:
        """The chunk's logits."""
        return (self.logits_NV[rows_C.to(self.logits_NV.device)].to(device),)


class TopKTeacher:
    """The likeliest tokens of each position: ids (N, K) of any integer type, and log-probabilities (N, K) at the loss's temperature.

    See `llmlite.distillation.losses.top_k_forward_kl` for what the two tails mean. `where_N` as for `HiddenTeacher`.
    """

    def __init__(self, ids_NK: Tensor, logprobs_NK: Tensor, tail: str = "bucket", where_N: Tensor | None = None) -> None:
        self.ids_NK, self.logprobs_NK, self.tail, self.where_N = ids_NK, logprobs_NK.detach(), tail, where_N

    def signal(self, rows_C: Tensor, device: torch.device) -> tuple[Tensor, ...]:
        """The chunk's ids, widened to int64, and its log-probabilities."""
        rows_C = _places(rows_C, self.where_N).to(self.ids_NK.device)
        return self.ids_NK[rows_C].to(device, torch.int64), self.logprobs_NK[rows_C].to(device)


def _places(rows_C: Tensor, where_N: Tensor | None) -> Tensor:
    return rows_C if where_N is None else where_N[rows_C.to(where_N.device)]


class Distillation(TokenLoss):
    """Cross entropy and a distance to the teacher, weighted, per token.

    Args:
        teacher: where the teacher's words come from.
        labels_N: next-token labels, int64, or `None` for no cross entropy. -100 must have been dropped by the engine's `keep_N`.
        divergence: a name of `DIVERGENCES`; for a `TopKTeacher` only "forward_kl".
        temperature: T of the divergence, T^2 convention; cross entropy always is at T = 1.
        ce_weight: weight of cross entropy; 0 still reports it.
        kd_weight: weight of the divergence.
        options: further arguments of the divergence, for instance `beta` or `alpha`.

    Raises:
        ConfigError: every argument that cannot work, together.
    """

    def __init__(
        self,
        teacher: TeacherSignal,
        labels_N: Tensor | None = None,
        *,
        divergence: str = "forward_kl",
        temperature: float = 1.0,
        ce_weight: float = 0.5,
        kd_weight: float = 0.5,
        **options: Any,
    ) -> None:
        problems = []
        if divergence not in DIVERGENCES:
            problems.append(f"divergence={divergence!r} should be one of {', '.join(DIVERGENCES)}.")
        if isinstance(teacher, TopKTeacher) and divergence != "forward_kl":
            problems.append(f"divergence={divergence!r} needs the teacher's whole distribution; of its top-k only forward_kl can be computed.")
        if min(ce_weight, kd_weight) < 0:
            problems.append(f"ce_weight={ce_weight} and kd_weight={kd_weight} should not be negative.")
        if problems:
            raise ConfigError("distillation", problems)
        self.teacher, self.labels_N, self.divergence, self.temperature = teacher, labels_N, divergence, temperature
        self.ce_weight, self.kd_weight, self.options = ce_weight, kd_weight, options
        self.names = (divergence,) if labels_N is None else ("ce", divergence)
        self.weights = (kd_weight,) if labels_N is None else (ce_weight, kd_weight)
        self.distance: Callable[..., Tensor]
        if isinstance(teacher, TopKTeacher):
            self.distance = partial(losses.top_k_forward_kl, temperature=temperature, tail=teacher.tail, **options)
        elif divergence == "uld":  # its signal may say which tokens have a counterpart
            self.distance = lambda student, teacher, aligned=None: universal_logit_distance(student, teacher, temperature, aligned, **options)
        else:
            self.distance = partial(DIVERGENCES[divergence], temperature=temperature, **options)
        self._probe()

    def _probe(self) -> None:
        """Let the divergence check its own options now rather than in the first step."""
        two_12 = torch.zeros(1, 2)
        args = (torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1)) if isinstance(self.teacher, TopKTeacher) else (two_12,)
        try:
            self.distance(two_12, *args)
        except TypeError as error:
            raise ConfigError("distillation", [f"{self.divergence} does not take these options: {error}."]) from None

    def without_logits(self, head: PlainHead) -> WithoutLogits | None:
        """Logit MSE to a teacher with a plain head of the same hidden size, when the batch is large enough for it to be quicker."""
        if self.divergence != "logit_mse" or self.options.get("centred") or not isinstance(self.teacher, HiddenTeacher):
            return None
        teacher_ND, teacher_VD = self.teacher.plain(head.rows_K)
        if teacher_VD is None or teacher_VD.shape[1] != head.weight_VD.shape[1] or not pays(*head.hidden_KD.shape):
            return None
        if (teacher_VD.dtype, teacher_VD.device) != (head.weight_VD.dtype, head.weight_VD.device):
            return None
        teacher_ND = teacher_ND.to(teacher_VD.device, teacher_VD.dtype)
        products = LogitProducts(head.weight_VD, teacher_VD)
        values_K, grad_KD = products.mse_and_gradient(head.hidden_KD, teacher_ND)
        return WithoutLogits(
            name=self.divergence,
            values_K=values_K,
            grad_hidden_KD=grad_KD.mul_(self.kd_weight),
            add_weight_gradient_=partial(products.add_weight_gradient_, head.hidden_KD, teacher_ND, self.kd_weight),
            rest=None if self.labels_N is None else CrossEntropy(self.labels_N, self.ce_weight),
        )

    def prepare(self, rows_C: Tensor, device: torch.device) -> tuple[Tensor, ...]:
        """The teacher's signal, and the labels if there are any."""
        signal = self.teacher.signal(rows_C, device)
        return signal if self.labels_N is None else (self.labels_N[rows_C.to(self.labels_N.device)].to(device), *signal)

    def values(self, logits_RV: Tensor, *prepared: Tensor) -> tuple[Tensor, ...]:
        """Cross entropy (with labels) and the divergence."""
        if self.labels_N is None:
            return (self.distance(logits_RV, *prepared),)
        labels_R, *signal = prepared
        return F.cross_entropy(logits_RV, labels_R, reduction="none"), self.distance(logits_RV, *signal)

    def values_and_grad_(self, logits_RV: Tensor, *prepared: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Values and the gradient of their weighted sum, sharing log softmax(logits) where temperature and vocabulary allow."""
        signal = prepared if self.labels_N is None else prepared[1:]
        logp_RV = torch.log_softmax(logits_RV, -1) if self.labels_N is not None else None
        kd_R, grad_kd_RW = self._distance_and_grad(logits_RV, logp_RV, signal)  # W: the vocabulary that is shared with the teacher
        if logp_RV is None:
            grad_RW = grad_kd_RW if self.kd_weight == 1.0 else grad_kd_RW.mul_(self.kd_weight)
            excess = logits_RV.shape[-1] - grad_kd_RW.shape[-1]
            return (kd_R,), F.pad(grad_RW, (0, excess)) if excess else grad_RW
        labels_R1 = prepared[0][:, None]
        ce_R = -logp_RV.gather(1, labels_R1).squeeze(1)
        grad_RV = logp_RV.exp_().mul_(self.ce_weight)
        grad_RV.scatter_add_(1, labels_R1, grad_RV.new_full(labels_R1.shape, -self.ce_weight))
        grad_RV[:, : grad_kd_RW.shape[-1]].add_(grad_kd_RW, alpha=self.kd_weight)
        return (ce_R, kd_R), grad_RV

    def _distance_and_grad(self, logits_RV: Tensor, logp_RV: Tensor | None, signal: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The divergence and its gradient by the logits, unweighted. `logp_RV`, log softmax(logits) if at hand, is only read."""
        if self.divergence == "logit_mse":  # here and for top-k the logits are not needed any more
            shared = min(logits_RV.shape[-1], signal[0].shape[-1])
            student_RW, teacher_RW = logits_RV[:, :shared], signal[0][:, :shared].to(logits_RV.dtype)
            return gradients.logit_mse_gradient(student_RW, teacher_RW, **self.options, out_NV=student_RW)
        top_k = isinstance(self.teacher, TopKTeacher)
        if not top_k and self.divergence not in _GRADIENTS:
            return self._by_autograd(logits_RV, signal)
        shared = logits_RV.shape[-1] if top_k else min(logits_RV.shape[-1], signal[0].shape[-1])
        if logp_RV is None or self.temperature != 1.0 or shared < logits_RV.shape[-1]:
            logp_RV = self._log_softmax(logits_RV, shared)
        result: tuple[Tensor, Tensor] | None
        if isinstance(self.teacher, TopKTeacher):
            result = gradients.top_k_forward_kl_gradient(logp_RV, signal[0], signal[1], self.teacher.tail, out_NV=logits_RV)
        else:
            result = _GRADIENTS[self.divergence](logp_RV, self._log_softmax(signal[0].to(logits_RV.dtype), shared), **self.options)
        if result is None:
            return self._by_autograd(logits_RV, signal)
        values_R, grad_RW = result
        if self.temperature != 1.0:
            values_R.mul_(self.temperature**2)
            grad_RW.mul_(self.temperature)  # T^2 of the convention, 1 / T of the chain rule
        return values_R, grad_RW

    def _log_softmax(self, logits_RV: Tensor, vocabulary: int) -> Tensor:
        logits_RW = logits_RV[:, :vocabulary]
        return torch.log_softmax(logits_RW if self.temperature == 1.0 else logits_RW / self.temperature, -1)

    def _by_autograd(self, logits_RV: Tensor, signal: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = logits_RV.detach().requires_grad_()
            values_R = self.distance(leaf, *signal)
            (grad_RV,) = torch.autograd.grad(values_R.sum(), leaf)
        return values_R.detach(), grad_RV
