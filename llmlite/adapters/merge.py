"""Merge an adapter into the base it was trained against, in 16 bit.

    W' = dequantize(Q(W)) + (alpha / r) B A

On a 4- or 8-bit base the addition is made to the dequantized weights, which are what the adapter was trained against; adding to the
original weights would be another model, and rounding the sum back to 4 bits would lose most of what was learnt.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmlite.run import Run

__all__ = ["merged", "write_merged"]


@torch.no_grad()
def merged(model: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A dense stock model with the adapter added. The given model is left as it was.

    Args:
        model: a peft model, on a dense or bitsandbytes base.
        dtype: type of the merged weights. The sum is made in float32.
    """
    from llmlite.models.rebuild import rebuild

    base = model.get_base_model()
    adapter = model.active_adapter
    state: dict[str, torch.Tensor] = {}
    targets = {name: module for name, module in base.named_modules() if hasattr(module, "get_base_layer")}
    for name, module in base.named_modules():
        if any(name.startswith(f"{target}.") for target in targets):
            continue
        layer = module.get_base_layer() if name in targets else module
        weight = getattr(layer, "weight", None)
        if weight is None:
            continue
        dense = dequantized(layer).float()
        if name in targets:
            dense = dense + module.get_delta_weight(adapter).to(dense)
        state[f"{name}.weight"] = dense.to(dtype)
        if getattr(layer, "bias", None) is not None:
            state[f"{name}.bias"] = layer.bias.detach().to(dtype)
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return rebuild(base, config, state)


def dequantized(layer: Any) -> torch.Tensor:
    """The weights a layer computes with, as a dense tensor of its own shape."""
    import bitsandbytes as bnb

    weight: Any = layer.weight
    dense: torch.Tensor
    if isinstance(layer, bnb.nn.Linear4bit):
        dense = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    elif isinstance(layer, bnb.nn.Linear8bitLt):
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        codes = weight.CB if getattr(weight, "CB", None) is not None else weight.data
        dense = codes.float() * (scales.float() / 127.0)[:, None]
    else:
        dense = weight.detach()
    return dense


def write_merged(model: Any, run: Run) -> None:
    """Write the merged model beside the adapter, as ``merged/``, and note what merging does to the perplexity."""
    from llmlite.evaluation.quality import measure_quality

    folder = run.scratch / "keep" / "merged"
    dense = merged(model, torch.bfloat16)
    dense.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    before = measure_quality(model, run.evaluation_batches())
    after = measure_quality(dense.to(run.compute_dtype).to(run.device), run.evaluation_batches())
    run.note(perplexity_before_merge=before.perplexity, perplexity_merged=after.perplexity)
