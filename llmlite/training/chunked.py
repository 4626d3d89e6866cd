"""A loss through the LM head that never holds all logits, with its gradient computed in the forward pass.

    for every chunk of tokens:   logits = hidden @ W.T   ->   loss, d loss / d logits   ->   d loss / d hidden, d loss / d W
    in backward:                 multiply by the incoming gradient

A full `(tokens, vocabulary)` tensor costs 400 MB at 2,048 tokens and a vocabulary of 49,152, and autograd keeps several. Here two sizes
rule instead: `chunk_tokens` rows go through the matrix products, and of those a handful at a time (as many as fit a CPU cache; all of
them on a GPU) through the element-wise mathematics. Nothing is recomputed, which is what makes it faster than checkpointing. A loss may take a part
of itself out of the loop when that part needs no logits at all (`TokenLoss.without_logits`).

What is computed per token is a `TokenLoss`: cross entropy, or the distillation losses in `llmlite.distillation.objective`.

Shapes: B sequences, T positions, N = B * T tokens, K tokens kept, C tokens of one chunk, R rows of one block, V vocabulary, D hidden size,
P parts of the loss.

Source: the idea of fusing the head with the loss, forward and backward, Wijmans et al. 2024, arXiv:2411.09009, and Hsu et al. 2024 (Liger),
arXiv:2410.10989.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from llmlite.errors import ConfigError
from llmlite.training.token_loss import LogitTransform, PlainHead, TokenLoss, WithoutLogits

__all__ = ["CHUNK_ELEMENTS", "HeadLoss", "as_weight_and_bias", "chunked_head_loss", "fitting_chunk", "head_logits"]

CHUNK_ELEMENTS = 24 * 2**20
"""Logits of a chunk: 100 MB of float32."""
_CPU_BLOCK_ELEMENTS = 2**20  # 4 MB of float32: measured twice as fast as whole chunks, whose temporaries miss the cache and page-fault


@dataclass(frozen=True)
class HeadLoss:
    """What `chunked_head_loss` returns.

    Attributes:
        loss: the number to call `backward` on, float32 (float64 for float64 inputs), ().
        parts: each part of the loss by name, unweighted, normalised as `loss` is, detached, ().
        per_token: each part by name for each of the N tokens, zero where a token was dropped; `None` unless asked for.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    per_token: dict[str, Tensor] | None


def chunked_head_loss(
    hidden_ND: Tensor,
    head: nn.Module | Tensor,
    per_token_loss: TokenLoss,
    *,
    head_bias_V: Tensor | None = None,
    keep_N: Tensor | None = None,
    num_items_in_batch: Tensor | float | None = None,
    transform: LogitTransform | None = None,
    chunk_tokens: int | None = None,
    return_per_token: bool = False,
) -> HeadLoss:
    """Sum of a per-token loss through the LM head, divided by a token count, without the full logits.

    The matrix products run in the dtype autocast or the weights prescribe, the loss in float32. Gradients go to the hidden states and to
    whatever of the head requires one, and are computed at once; under `no_grad`, or when nothing requires a gradient, none of that work is done.
    A head that is not a plain `nn.Linear` (LoRA, bitsandbytes, sharded, hooked) is called as a module, chunk by chunk, with autograd inside.
    `nn.Identity()` as the head takes logits for hidden states: the way back for models of which only full logits are to be had.

    Args:
        hidden_ND: what enters the LM head, (N, D).
        head: the LM head, or its weight (V, D).
        per_token_loss: what to compute.
        head_bias_V: with a head given as a weight, its bias.
        keep_N: which tokens count, bool; the others are dropped before the matrix product. `None` keeps all.
        num_items_in_batch: what to divide by; `None` divides by the number of kept tokens.
        transform: from raw logits to logits.
        chunk_tokens: tokens per matrix product. None: as many as keep a chunk's logits at 100 MB of float32, 512 at vocabulary 49,152. Measured there: the
            products take 17 % longer than whole at 128 tokens, 5 % at 256, 3 % at 512.
        return_per_token: also return the loss of each token.

    Returns:
        `HeadLoss`. With a gradient for the head, `backward` may run once: the head's gradient, as large as the head, is scaled in place.

    Raises:
        ConfigError: shapes that do not fit together, or `chunk_tokens` below 1.
    """
    _check(hidden_ND, head, head_bias_V, keep_N, chunk_tokens)
    linear = as_weight_and_bias(head, head_bias_V)
    if chunk_tokens is None:
        chunk_tokens = fitting_chunk(len(linear[0]) if linear is not None else getattr(head, "out_features", hidden_ND.shape[-1]))
    rows_K = torch.arange(len(hidden_ND), device=hidden_ND.device)
    if keep_N is not None and not bool(keep_N.all()):
        rows_K = keep_N.to(hidden_ND.device).nonzero().squeeze(1)
        hidden_ND = hidden_ND.index_select(0, rows_K)

    module = None
    if linear is not None:
        parameters: tuple[Tensor | None, ...] = linear
        hidden_ND = hidden_ND.to(linear[0].device)
    else:
        assert isinstance(head, nn.Module)
        module = head
        parameters = tuple(parameter for parameter in module.parameters() if parameter.requires_grad)
    job = _Job(module, per_token_loss, rows_K, transform or LogitTransform(), chunk_tokens)

    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (hidden_ND, *parameters)):
        total, values_PK = _GradientInForward.apply(job, hidden_ND, *parameters)  # type: ignore[no-untyped-call]
    else:
        values_PK, _ = job.run(hidden_ND, *parameters, needs=(False,) * (1 + len(parameters)))
        total = job.total(values_PK)

    count = num_items_in_batch if num_items_in_batch is not None else max(len(rows_K), 1)
    count = count.to(total.device) if isinstance(count, Tensor) else count
    parts = {name: value_K.sum() / count for name, value_K in zip(per_token_loss.names, values_PK, strict=True)}
    per_token = None
    if return_per_token:
        where = rows_K.to(values_PK.device)
        tokens = len(keep_N) if keep_N is not None else len(rows_K)
        per_token = {name: v.new_zeros(tokens).index_copy_(0, where, v) for name, v in zip(per_token_loss.names, values_PK, strict=True)}
    return HeadLoss(total / count, parts, per_token)


def head_logits(
    hidden_ND: Tensor, head: nn.Module | Tensor, head_bias_V: Tensor | None = None, transform: LogitTransform | None = None, out: Tensor | None = None
) -> Tensor:
    """Logits of a few tokens without a gradient, (N, D) to (N, V); `out` is a buffer to write them to when the head is a plain linear map."""
    linear = as_weight_and_bias(head, head_bias_V)
    transform = transform or LogitTransform()
    if linear is None:
        assert isinstance(head, nn.Module)
        weight = getattr(head, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta:
            hidden_ND = hidden_ND.to(weight.device, weight.dtype)
        with torch.no_grad():
            return transform(head(hidden_ND))
    weight_VD, bias_V = linear
    with torch.no_grad(), torch.autocast(weight_VD.device.type, enabled=False):
        return transform.apply_(_linear(hidden_ND.to(weight_VD.device, weight_VD.dtype), weight_VD, bias_V, out))


def _check(hidden_ND: Tensor, head: nn.Module | Tensor, bias_V: Tensor | None, keep_N: Tensor | None, chunk_tokens: int | None) -> None:
    """Every shape at once, since a mismatch found by a matrix product in the middle of a chunk explains nothing."""
    problems = []
    if hidden_ND.dim() != 2:
        problems.append(f"hidden_ND has shape {tuple(hidden_ND.shape)}, wanted (tokens, hidden size). Flatten it with reshape(-1, hidden size).")
    if isinstance(head, Tensor) and (head.dim() != 2 or head.shape[1] != hidden_ND.shape[-1]):
        problems.append(f"the head's weight has shape {tuple(head.shape)}, wanted (vocabulary, {hidden_ND.shape[-1]}).")
    if isinstance(head, nn.Module) and bias_V is not None:
        problems.append("head_bias_V goes with a head given as a weight; a head given as a module brings its own bias.")
    if keep_N is not None and keep_N.shape != hidden_ND.shape[:1]:
        problems.append(f"labels or keep_N have shape {tuple(keep_N.shape)}, wanted one for each of the {hidden_ND.shape[0]} tokens.")
    if chunk_tokens is not None and chunk_tokens < 1:
        problems.append(f"chunk_tokens={chunk_tokens} should be at least 1; None chooses by the vocabulary.")
    if problems:
        raise ConfigError("chunked_head_loss", problems)


def fitting_chunk(vocabulary: int) -> int:
    """Tokens of a chunk whose logits are `CHUNK_ELEMENTS` numbers, 64 to 2,048."""
    return max(64, min(2048, CHUNK_ELEMENTS // max(vocabulary, 1) // 64 * 64))


def as_weight_and_bias(head: nn.Module | Tensor, bias_V: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a head that is nothing but `x @ W.T + b`, else `None`: then only calling it is right."""
    if isinstance(head, Tensor):
        return head, bias_V
    plain = (
        type(head) is nn.Linear  # bitsandbytes and parametrised layers are subclasses, LoRA wraps
        and head.weight.is_floating_point()
        and not head.weight.is_meta  # offloaded by accelerate
        and not isinstance(head.weight, DTensor)  # tensor parallel, FSDP2 outside of its forward
        and not hasattr(head.weight, "ds_id")  # ZeRO-3
        and "forward" not in vars(head)  # patched, as accelerate does
        and not (head._forward_hooks or head._forward_pre_hooks)
    )
    return (head.weight, head.bias) if plain else None  # type: ignore[return-value]


def _linear(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, out: Tensor | None) -> Tensor:
    if bias_V is None:
        return torch.mm(hidden_CD, weight_VD.T, out=out)
    return torch.addmm(bias_V, hidden_CD, weight_VD.T, out=out)


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: _Job, hidden_KD: Tensor, *parameters: Tensor | None) -> tuple[Tensor, Tensor]:
        values_PK, ctx.grads = job.run(hidden_KD, *parameters, needs=ctx.needs_input_grad[1:])
        ctx.mark_non_differentiable(values_PK)
        return job.total(values_PK), values_PK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("chunked_head_loss: backward ran twice over a head that requires a gradient. Compute the loss again instead.")
        grad_hidden, *grads = ctx.grads
        if any(grad is not None for grad in grads):
            ctx.grads = None  # handed over below
        scaled = [None if grad is None else grad.mul_(grad_total.to(grad.device)) for grad in grads]
        return None, None if grad_hidden is None else grad_hidden * grad_total, *scaled


@dataclass
class _Job:
    """The loop over chunks. Tensors that may require a gradient come in as arguments of `run`, so that autograd sees them."""

    module: nn.Module | None
    loss: TokenLoss
    rows: Tensor  # (K,), positions among the N tokens
    transform: LogitTransform
    chunk_tokens: int

    def total(self, values_PK: Tensor) -> Tensor:
        terms = [weight * value_K.sum() for weight, value_K in zip(self.loss.weights, values_PK, strict=True) if weight]
        return sum(terms, values_PK.new_zeros(()))

    def run(self, hidden_KD: Tensor, *parameters: Tensor | None, needs: tuple[bool, ...]) -> tuple[Tensor, list[Tensor | None]]:
        """Values of all tokens, (P, K), and the unscaled gradients of hidden states and parameters."""
        part = self._without_logits(hidden_KD, *parameters)
        if part is None:
            return self._through_logits(hidden_KD, *parameters, needs=needs)
        if part.rest is None:
            tensors = (hidden_KD, *parameters)
            grad_hidden_KD, *grads = (torch.zeros_like(x) if x is not None and need else None for x, need in zip(tensors, needs, strict=True))
            values_PK = part.values_K[None].to(_math_dtype(hidden_KD))
        else:
            rest = replace(self, loss=part.rest)
            values_PK, (grad_hidden_KD, *grads) = rest._through_logits(hidden_KD, *parameters, needs=needs)
            found = dict(zip(part.rest.names, values_PK, strict=True)) | {part.name: part.values_K.to(values_PK.dtype)}
            values_PK = torch.stack([found[name] for name in self.loss.names])
        if grad_hidden_KD is not None:
            grad_hidden_KD += part.grad_hidden_KD
        if grads and grads[0] is not None:
            part.add_weight_gradient_(grads[0])
        return values_PK, [grad_hidden_KD, *grads]

    def _without_logits(self, hidden_KD: Tensor, *parameters: Tensor | None) -> WithoutLogits | None:
        """See `TokenLoss.without_logits`; never where products run in another dtype than the weights', or logits are more than a product."""
        weight_VD, bias_V = (None, None) if self.module is not None else parameters
        if weight_VD is None or bias_V is not None or self.transform != LogitTransform():
            return None
        if weight_VD.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(weight_VD.device.type):
            return None
        return self.loss.without_logits(PlainHead(hidden_KD.detach().to(weight_VD.dtype), weight_VD.detach(), self.rows))

    def _through_logits(self, hidden_KD: Tensor, *parameters: Tensor | None, needs: tuple[bool, ...]) -> tuple[Tensor, list[Tensor | None]]:
        head: _LinearHead | _ModuleHead
        if self.module is None:
            assert parameters[0] is not None
            head = _LinearHead(parameters[0], parameters[1], needs, min(self.chunk_tokens, len(hidden_KD)), hidden_KD.device)
        else:
            head = _ModuleHead(self.module, [parameter for parameter in parameters if parameter is not None], needs)
        math_dtype = _math_dtype(hidden_KD)
        values_PK = torch.zeros(len(self.loss.names), len(hidden_KD), dtype=math_dtype, device=hidden_KD.device)
        grad_hidden_KD = torch.empty_like(hidden_KD) if needs[0] else None
        for start in range(0, len(hidden_KD), self.chunk_tokens):
            chunk = slice(start, start + self.chunk_tokens)
            logits_CV = head.logits(hidden_KD[chunk])
            prepared = self.loss.prepare(self.rows[chunk], logits_CV.device)
            for block in _blocks(logits_CV):
                values = self._block(logits_CV[block], [tensor[block] for tensor in prepared], math_dtype, any(needs))
                values_PK[:, start + block.start : start + block.stop] = torch.stack(values)
            if any(needs):
                grad_CD = head.backward(logits_CV, hidden_KD[chunk])
                if grad_hidden_KD is not None and grad_CD is not None:
                    grad_hidden_KD[chunk] = grad_CD
        return values_PK, [grad_hidden_KD, *head.gradients()]

    def _block(self, raw_RV: Tensor, prepared: list[Tensor], math_dtype: torch.dtype, need_grad: bool) -> tuple[Tensor, ...]:
        """Losses of a few rows; with `need_grad` their raw logits are replaced by the gradient."""
        logits_RV = self.transform.apply_(raw_RV.to(math_dtype))
        if not need_grad:
            return self.loss.values(logits_RV, *prepared)
        kept_RV = logits_RV.clone() if self.transform.softcap is not None else None
        values, grad_RV = self.loss.values_and_grad_(logits_RV, *prepared)
        raw_RV.copy_(self.transform.pull_back_(grad_RV, kept_RV))
        return values


def _math_dtype(hidden_KD: Tensor) -> torch.dtype:
    return torch.float64 if hidden_KD.dtype == torch.float64 else torch.float32


def _blocks(logits_CV: Tensor) -> Iterator[slice]:
    """Rows to do the element-wise work on: what fits a CPU cache; everything on an accelerator, where launches cost more than memory."""
    rows, vocabulary = logits_CV.shape
    step = max(1, _CPU_BLOCK_ELEMENTS // vocabulary) if logits_CV.device.type == "cpu" else rows
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class _LinearHead:
    """`x @ W.T + b` and its gradients, written into buffers that live as long as the loop over chunks."""

    def __init__(self, weight_VD: Tensor, bias_V: Tensor | None, needs: tuple[bool, ...], chunk_tokens: int, device: torch.device) -> None:
        autocast = torch.is_autocast_enabled(device.type) and weight_VD.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device.type) if autocast else weight_VD.dtype
        self.dtypes = (weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        self.weight_VD = weight_VD.to(dtype)
        self.bias_V = None if bias_V is None else bias_V.to(dtype)
        self.buffer_CV = torch.empty(chunk_tokens, len(weight_VD), dtype=dtype, device=device)
        self.need_hidden = needs[0]
        accumulator = torch.promote_types(dtype, torch.float32)  # bf16 sums over chunks would lose what the chunks gained
        self.grad_weight_VD = torch.empty_like(weight_VD, dtype=accumulator) if needs[1] else None
        self.grad_bias_V = torch.zeros_like(bias_V, dtype=accumulator) if bias_V is not None and needs[2] else None
        self.first = True
        self.no_autocast = torch.autocast(device.type, enabled=False) if autocast else contextlib.nullcontext()

    def logits(self, hidden_CD: Tensor) -> Tensor:
        with self.no_autocast:
            return _linear(hidden_CD.to(self.weight_VD.dtype), self.weight_VD, self.bias_V, self.buffer_CV[: len(hidden_CD)])

    def backward(self, grad_CV: Tensor, hidden_CD: Tensor) -> Tensor | None:
        with self.no_autocast:
            if self.grad_weight_VD is not None:
                self._add_weight_gradient(self.grad_weight_VD, grad_CV, hidden_CD.to(grad_CV.dtype))
            if self.grad_bias_V is not None:
                self.grad_bias_V += grad_CV.sum(0, dtype=self.grad_bias_V.dtype)
            return grad_CV @ self.weight_VD if self.need_hidden else None

    def _add_weight_gradient(self, total_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
        if total_VD.dtype == grad_CV.dtype:
            total_VD.addmm_(grad_CV.T, hidden_CD, beta=0 if self.first else 1)
        elif self.first:
            total_VD.copy_(grad_CV.T @ hidden_CD)
        else:
            total_VD.add_(grad_CV.T @ hidden_CD)
        self.first = False

    def gradients(self) -> list[Tensor | None]:
        if self.first and self.grad_weight_VD is not None:
            self.grad_weight_VD.zero_()  # not one chunk: no token counted
        pairs = zip((self.grad_weight_VD, self.grad_bias_V), self.dtypes, strict=True)
        return [None if grad is None else grad.to(dtype) for grad, dtype in pairs]


class _ModuleHead:
    """Any callable head: autograd inside the chunk, from given gradients of the logits."""

    def __init__(self, module: nn.Module, parameters: list[Tensor], needs: tuple[bool, ...]) -> None:
        self.module = module
        self.parameters = parameters
        self.need_hidden, self.need_any = needs[0], any(needs)
        self.sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) if self.need_any else None for p in parameters]

    def logits(self, hidden_CD: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.need_any):
            self.leaf_CD = hidden_CD.detach().requires_grad_(self.need_hidden)
            self.raw_CV: Tensor = self.module(self.leaf_CD)
        logits_CV: Tensor = self.raw_CV.detach()
        return logits_CV.clone()  # the loss overwrites it, and the module's backward may want it

    def backward(self, grad_CV: Tensor, hidden_CD: Tensor) -> Tensor | None:
        wanted = [*([self.leaf_CD] if self.need_hidden else []), *self.parameters]
        grads: list[Tensor | None] = list(torch.autograd.grad(self.raw_CV, wanted, grad_CV, allow_unused=True))
        grad_CD = grads.pop(0) if self.need_hidden else None
        for total, grad in zip(self.sums, grads, strict=True):
            if total is not None and grad is not None:
                total.add_(grad)
        if self.need_hidden and grad_CD is None:
            return torch.zeros_like(hidden_CD)
        return grad_CD

    def gradients(self) -> list[Tensor | None]:
        return [None if total is None else total.to(p.dtype) for total, p in zip(self.sums, self.parameters, strict=True)]
