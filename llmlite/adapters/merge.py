"""Merge an adapter into the base it was trained against, in 16 bit.

    W' = dequantize(Q(W)) + (alpha / r) B A

On a 4- or 8-bit base the addition is made to the dequantized weights, which are what the adapter was trained against; adding to the
original weights would be another model, and rounding the sum back to 4 bits loses part of what was learnt (a step `quantize` behind the step `merge`
does it with calibration, and the report shows what it costs). The sum itself is peft's own, for every method that has one.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from llmlite.config import settings
from llmlite.errors import ConfigError
from llmlite.step import QUANTIZED, UNQUANTIZED, ModelPlan, Step

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from llmlite.context import Run

__all__ = ["Merge", "merged", "write_merged"]


@settings
class Merge(Step):
    """Merge the adapter into its base; what comes out is a dense stock model, which can be quantized again."""

    takes: ClassVar[frozenset[str]] = UNQUANTIZED | QUANTIZED
    takes_adapters: ClassVar[bool] = True
    advice: ClassVar[str] = "keep the adapter beside its base"
    memory_advice: ClassVar[str] = "Keep the adapter beside its base, which takes no dense weights"

    def check(self, model: ModelPlan, run: Run) -> ModelPlan:
        """See `Step.check`.

        Raises:
            ConfigError: there is no adapter, or one that cannot be merged.
        """
        from llmlite.adapters.settings import added_adapter
        from llmlite.models.size import expected_bytes, runtime_bytes, size_of_config

        if not model.adapters:
            raise ConfigError("merge", ["there is no adapter to merge: no step before this one makes one."])
        made = [adapter for step in run.recipe.steps[: run.position] if (adapter := added_adapter(step))][-1:]  # one behind this step is another adapter
        if made and not made[0].mergeable:
            raise ConfigError("merge", [f"what {made[0].label} learns is no change of weights, so it cannot be merged. Keep the adapter beside the base."])
        dense = expected_bytes(model.config, dtype=run.compute_dtype)
        return dataclasses.replace(
            model,
            form="sparse" if model.form == "sparse" else "dense",
            adapters=False,
            parameters=size_of_config(model.config).parameters,
            trained_parameters=0,
            disk_bytes=expected_bytes(model.config, dtype=run.storage_dtype),
            peak_bytes=3 * dense + runtime_bytes(run.device),
            tokens=0,
            notes=("into the weights that the adapter was trained against",),
        )

    def apply(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """The dense model, in the type this run computes in."""
        return merged(model, run.compute_dtype).to(run.device)


def merged(model: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A dense stock model with the active adapter added. The given model is left as it was.

    Args:
        model: a peft model, on a dense or bitsandbytes base.
        dtype: type of the merged weights. The sum is made in float32.
    """
    import peft
    import torch

    adapter = model.active_adapter
    with torch.no_grad():
        anew = peft.get_peft_model(_dense_base(model), copy.deepcopy(model.peft_config[adapter]))
        peft.set_peft_model_state_dict(anew, peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False))
        dense: PreTrainedModel = anew.merge_and_unload()
    if hasattr(dense, "peft_config"):
        del dense.peft_config
    dense.config.dtype = dtype
    dense.requires_grad_(False)
    return dense.to(dtype).eval()


def _dense_base(model: Any) -> PreTrainedModel:
    """The base without adapters and without quantization, in float32, built afresh."""
    import torch
    from torch import nn

    from llmlite.models.adapted import is_adapter_parameter
    from llmlite.models.dequantize import dequantized
    from llmlite.models.rebuild import rebuild
    from llmlite.models.view import base_layer

    base = model.get_base_model()
    state: dict[str, torch.Tensor] = {}
    for name, module in base.named_modules():
        if is_adapter_parameter(f"{name}.") or ".base_layer" in f".{name}" or ".original_module" in f".{name}" or "token_adapter" in name:
            continue
        layer = base_layer(module)
        if isinstance(getattr(layer, "weight", None), torch.Tensor):
            state[f"{name}.weight"] = dequantized(layer).float()
        if isinstance(getattr(layer, "bias", None), nn.Parameter):
            state[f"{name}.bias"] = layer.bias.detach().float()
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    return rebuild(base, config, state)


def write_merged(model: Any, run: Run) -> None:
    """Write the merged model beside the adapter, as ``merged/``, and note what merging does to the perplexity."""
    import torch

    from llmlite.evaluation.quality import measure_quality

    folder = run.scratch / "keep" / "merged"
    dense = merged(model, torch.bfloat16)
    dense.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    before = measure_quality(model, run.evaluation_batches())
    after = measure_quality(dense.to(run.compute_dtype).to(run.device), run.evaluation_batches())
    run.note(perplexity_before_merge=before.perplexity, perplexity_merged=after.perplexity)
