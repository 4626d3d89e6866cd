"""A causal LM in two halves: the hidden states that enter its LM head, and how the head makes logits of them.

The chunked losses need the halves apart. Rather than calling the decoder behind the model's back, the model runs as always and the head is
shown a single position: what it was about to be given is kept. So everything around the decoder (PEFT, DDP, `device_map`, generation of masks) works
as it does elsewhere, and no table of families is needed.

What a family does to the logits afterwards is read from its config. Tests hold that for every family of the table; of any other model
`require_known_logits` finds out on one tiny forward that nothing was missed.

Shapes: B sequences, T positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from llmlite.errors import UnsupportedModel
from llmlite.models.view import unwrap
from llmlite.training.token_loss import LogitTransform

__all__ = ["HiddenAndHead", "hidden_and_head", "logit_transform", "require_known_logits"]

_NOT_FOR_HIDDEN = ("labels", "shift_labels", "logits_to_keep", "num_items_in_batch", "use_cache")


class HiddenAndHead(NamedTuple):
    """Everything `chunked_head_loss` wants of a model; `transform(head(hidden))` are its logits."""

    hidden: Tensor  # (B, T, D)
    head: nn.Module
    transform: LogitTransform


def hidden_and_head(model: nn.Module, inputs: Mapping[str, Any]) -> HiddenAndHead:
    """Run a causal LM up to its head, differentiably.

    Args:
        model: a transformers causal LM, bare or wrapped by PEFT, DistributedDataParallel, FSDP2, DeepSpeed or `torch.compile`.
        inputs: its keyword arguments; labels are left out, and no key/value cache is kept.

    Returns:
        Under ZeRO-3 the full logits, and a head that leaves them as they are.

    Raises:
        UnsupportedModel: there is no head, or the model does not call it exactly once.
    """
    bare = unwrap(model)
    head = _head(bare)
    if any(hasattr(parameter, "ds_id") for parameter in head.parameters()):  # ZeRO-3 brings a weight in for its module's own forward and backward pass only
        output = model(**{name: value for name, value in inputs.items() if name not in _NOT_FOR_HIDDEN}, use_cache=False)
        return HiddenAndHead(output.logits, nn.Identity(), LogitTransform())
    with _intercepted(head, lambda hidden: hidden[..., :1, :]) as seen:
        output = model(**{name: value for name, value in inputs.items() if name not in _NOT_FOR_HIDDEN}, use_cache=False)
    hidden = _only(seen, bare)
    if isinstance(model, FSDPModule) and torch.is_grad_enabled():
        # FSDP2 prepares the backward pass when a gradient reaches the model's output, which the loss goes around (torch 2.13 crashes without)
        hidden = hidden + 0 * output.logits.sum().to(hidden.dtype)
    return HiddenAndHead(hidden, head, logit_transform(bare.config))


def logit_transform(config: Any) -> LogitTransform:
    """What the family does to its raw logits, from its config: gemma's softcaps; the scales of granite, cohere, falcon_h1 and hyperclovax."""
    text = config.get_text_config()
    scale = 1.0
    if _number(text, "logits_scaling"):  # hyperclovax multiplies by what granite divides by
        scale *= text.logits_scaling if text.model_type == "hyperclovax" else 1 / text.logits_scaling
    for name in ("logit_scale", "lm_head_multiplier"):
        if _number(text, name):
            scale *= getattr(text, name)
    softcap = next((getattr(text, name) for name in ("final_logit_softcapping", "logits_soft_cap") if _number(text, name)), None)
    return LogitTransform(scale, softcap)


def require_known_logits(model: nn.Module) -> None:
    """Refuse a model whose logits are not `transform(head(hidden))`, found out on a forward of eight tokens.

    Train and eval modes stay as they are (an eval forward can damage bitsandbytes weights), and so does the random state. Ask before wrapping in
    FSDP or DeepSpeed.

    Raises:
        UnsupportedModel: they are others, or there is no head.
    """
    model = unwrap(model)
    difference, allowed = _probe(model)
    if not difference <= allowed:  # written so that NaN fails
        raise UnsupportedModel(f"{_name(model)} changes its logits in a way not known here (difference {difference:.3g}).")


def _probe(model: Any) -> tuple[float, float]:
    """Largest difference between the model's logits and the ones put together here, and what rounding allows."""
    head = _head(model)
    device = model.get_input_embeddings().weight.device
    devices = [device] if device.type not in ("cpu", "meta") else []
    ids_1T = torch.arange(8, device=device)[None] % model.config.get_text_config().vocab_size
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"), torch.no_grad(), _without_dropout(head):
        with _intercepted(head, lambda hidden: hidden) as seen:
            logits_1TV = model(input_ids=ids_1T, use_cache=False).logits.float()
        ours_1TV = logit_transform(model.config)(head(_only(seen, model))).float().to(logits_1TV.device)
    if ours_1TV.shape != logits_1TV.shape:
        return float("inf"), 0.0
    eps = torch.finfo(head_dtype if (head_dtype := seen[0].dtype).is_floating_point else torch.float32).eps
    return float((ours_1TV - logits_1TV).abs().max()), 64 * eps * max(1.0, float(logits_1TV.abs().max()))


@contextmanager
def _intercepted(head: nn.Module, show: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Collect what the head is called with, and let it see `show` of that instead."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(args[0])
        return (show(args[0]), *args[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _without_dropout(head: nn.Module) -> Iterator[None]:
    """A LoRA head in training drops inputs at random, and two calls would differ."""
    active = [module for module in head.modules() if isinstance(module, nn.Dropout) and module.training]
    for module in active:
        module.eval()
    try:
        yield
    finally:
        for module in active:
            module.train()


def _head(model: Any) -> nn.Module:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        raise UnsupportedModel(f"{_name(model)} has no LM head. Load it with AutoModelForCausalLM.")
    return head


def _only(seen: list[Tensor], model: Any) -> Tensor:
    if len(seen) != 1:
        raise UnsupportedModel(f"{_name(model)} called its LM head {len(seen)} times in one forward, wanted once.")
    return seen[0]


def _number(config: Any, name: str) -> bool:
    value = getattr(config, name, None)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _name(model: Any) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
