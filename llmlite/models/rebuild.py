"""A fresh stock model from a new config and sliced tensors.

Structured pruning never edits modules in place: attention modules cache numbers of the config they were built from, and a model edited in memory can differ
from its own reload (phi3 by 0.38 in the logits). Building anew from the config is what every later `from_pretrained` does.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from llmlite.errors import UnsupportedModel, counted
from llmlite.models.view import unwrap

__all__ = ["rebuild"]


def rebuild(model: nn.Module, new_config: Any, state_dict: Mapping[str, Tensor]) -> Any:
    """Build the model that `new_config` describes and fill it.

    Tensors that still share memory with `model` are copied, so that training the result never changes the original (which may be the teacher). Every other
    tensor is taken over without a copy.

    Args:
        model: where generation config, attention implementation and train/eval mode come from. Not changed.
        new_config: as the functions of `llmlite.models.slicing` return it.
        state_dict: every parameter of the new model in its dtype and on its device; a tied head may be missing.

    Returns:
        A fresh `...ForCausalLM`; all parameters require gradients.

    Raises:
        ValueError: a tensor is missing, left over or has another shape than the config says.
        UnsupportedModel: tensors offloaded to disk, or spread over several devices.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    old = unwrap(model)
    offloaded = [name for name, tensor in state_dict.items() if tensor.is_meta]
    if offloaded:
        raise UnsupportedModel(
            f"{counted(len(offloaded), 'tensor is', 'tensors are')} not in memory (meta device), first {offloaded[0]}. Load the model without offloading."
        )
    devices = sorted({str(tensor.device) for tensor in state_dict.values()})
    if len(devices) > 1:
        raise UnsupportedModel(f"the tensors are spread over {', '.join(devices)}; a rebuilt model lives on one device. Load the model on one device.")

    # Parameters start on meta, buffers are real: rotary frequencies are not in any state dict and would stay on meta otherwise.
    with init_empty_weights(include_buffers=False):
        fresh = AutoModelForCausalLM.from_config(
            copy.deepcopy(new_config), dtype=getattr(old, "dtype", None), attn_implementation=old.config._attn_implementation
        )
    shared = {parameter.untyped_storage().data_ptr() for parameter in old.parameters()}
    owned = {name: tensor.clone() if tensor.untyped_storage().data_ptr() in shared else tensor for name, tensor in state_dict.items()}
    _load_strictly(fresh, owned)

    for module in fresh.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(devices[0]))
    if getattr(old, "generation_config", None) is not None:
        fresh.generation_config = copy.deepcopy(old.generation_config)
    fresh.requires_grad_(True)
    return fresh.train(old.training)


def _load_strictly(fresh: Any, state_dict: dict[str, Tensor]) -> None:
    """Fill every parameter exactly once; only a tied tensor may be left to its source."""
    wrong = [
        f"{name} has shape {tuple(state_dict[name].shape)}, the config wants {tuple(parameter.shape)}"
        for name, parameter in fresh.named_parameters(remove_duplicate=False)
        if name in state_dict and parameter.shape != state_dict[name].shape
    ]
    if wrong:
        raise ValueError(f"the tensors do not fit the new config: {'; '.join(wrong[:3])}" + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""))
    outcome = fresh.load_state_dict(state_dict, strict=False, assign=True)
    fresh.tie_weights()
    missing = [name for name, parameter in fresh.named_parameters() if parameter.is_meta]
    if missing or outcome.unexpected_keys:
        raise ValueError(f"the tensors do not fit the new config: missing {missing or 'none'}, left over {list(outcome.unexpected_keys) or 'none'}")
