"""How much an error in a projection's output would change what the model says, token by token.

    s[t] = sum_o (d loss / d y[t, o])^2,    loss = sum over tokens of -log p(label),    each label drawn from the model itself

With labels of its own the expected square of this gradient is the Fisher information, which is the curvature of the divergence from the dense model. A Hessian
sum_t s[t] x_t x_t^T then counts the tokens that matter, where sum_t x_t x_t^T counts all alike. One forward and one backward pass over the calibration text.

Source: Kim et al. 2025, arXiv:2505.07004 (GuidedQuant, with one group of output channels); Martens 2014, arXiv:1412.1193, section 5 (whose labels to take).

Legend: N tokens, R rows of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmlite.models.quick import quick_copy, quick_dtype
from llmlite.models.view import LinearView, ModelView
from llmlite.training.backbone import hidden_and_head
from llmlite.training.chunked import chunked_head_loss
from llmlite.training.token_loss import TokenLoss

if TYPE_CHECKING:
    from llmlite.calibration.blocks import Batch

__all__ = ["OwnLabels", "quick_sensitivity", "token_sensitivity"]


class OwnLabels(TokenLoss):
    """Cross entropy against labels drawn from the model's own prediction.

    Args:
        uniform_N: a number in [0, 1) for each token, which says where in the cumulated distribution its label lies.
    """

    names = ("own",)
    weights = (1.0,)

    def __init__(self, uniform_N: Tensor) -> None:
        self.uniform_N = uniform_N

    def prepare(self, rows_C: Tensor, device: torch.device) -> tuple[Tensor, ...]:
        """The chunk's numbers."""
        return (self.uniform_N[rows_C.to(self.uniform_N.device)].to(device),)

    def values(self, logits_RV: Tensor, *prepared: Tensor) -> tuple[Tensor, ...]:
        """Nats of the drawn labels."""
        logprobs_RV = torch.log_softmax(logits_RV, -1)
        total_RV = logprobs_RV.detach().exp().cumsum(-1)
        labels_R1 = torch.searchsorted(total_RV, prepared[0][:, None] * total_RV[:, -1:], right=True).clamp_max(logits_RV.shape[-1] - 1)
        return (-logprobs_RV.gather(1, labels_R1).squeeze(1),)


def token_sensitivity(model: nn.Module, batches: Sequence[Batch], places: Sequence[int], seed: int = 0) -> list[dict[str, Tensor]]:
    """The sensitivity of each token in each projection's output.

    Args:
        model: the dense model in eval mode; its weights get no gradient.
        batches: calibration inputs.
        places: which of the batches to read.
        seed: of the labels; those of a batch do not depend on which other batches are read.

    Returns:
        For each place: name of the projection -> (B * T,) float32, on the model's device. Padding has numbers too, which mean nothing.
    """
    view = ModelView(model)
    device = next(view.embedding.parameters()).device
    found = []
    for place in places:
        inputs = {name: tensor.to(device) for name, tensor in batches[place].items()}
        generator = torch.Generator().manual_seed(seed * 1_000_003 + place)
        rows = []
        for row in range(len(inputs["input_ids"])):  # one row's activations at a time
            one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
            rows.append(_of_row(view, one, torch.rand(one["input_ids"].numel(), generator=generator)))
        found.append({name: torch.cat([each[name] for each in rows]) for name in rows[0]})
    return found


def quick_sensitivity(model: nn.Module, batches: Sequence[Batch], places: Sequence[int], seed: int = 0) -> list[dict[str, Tensor]]:
    """`token_sensitivity` in the type that this machine multiplies fastest, on a copy where that is not the model's own."""
    first = next(model.parameters())
    dtype = quick_dtype(first.device, first.dtype)
    return token_sensitivity(model if dtype == first.dtype else quick_copy(model, dtype), batches, places, seed)


def _of_row(view: ModelView, inputs: dict[str, Tensor], uniform_N: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def watch(linear: LinearView) -> Any:
        def keep(grad: Tensor) -> None:
            found[linear.name] = grad.reshape(-1, grad.shape[-1]).float().square().sum(-1)

        def look(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            output.register_hook(keep)  # type: ignore[no-untyped-call]

        return look

    trained = [parameter for parameter in view.model.parameters() if parameter.requires_grad]
    handles = [linear.module.register_forward_hook(watch(linear)) for linear in view.linears()]
    handles.append(view.embedding.register_forward_hook(lambda _module, _args, output: output.requires_grad_()))  # where gradients begin
    mask = inputs.get("attention_mask")
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            hidden, head, transform = hidden_and_head(view.model, inputs)
            chunked_head_loss(
                hidden.reshape(-1, hidden.shape[-1]),
                head,
                OwnLabels(uniform_N),
                keep_N=None if mask is None else mask.reshape(-1).bool(),
                num_items_in_batch=1.0,
                transform=transform,
            ).loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
    return found
