"""Write a model so that memory and file hold the same numbers, in the type the base was published in.

Computing happens in 32 bit on CPUs, publishing in 16. A model that is only rounded while it is written would come back as another one, so
it is rounded in memory first; then it is measured, then saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmlite.models.adapted import is_adapter_parameter

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["save_model", "settle", "settle_adapter", "storage_dtype"]


def storage_dtype(config: PretrainedConfig) -> torch.dtype:
    """The type a model's files are kept in: what its config says, float32 when it says nothing."""
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


@torch.no_grad()
def settle(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round the dense weights in memory to what `dtype` can hold, keeping their own type. Adapters and quantized weights stay as they are."""
    _round(_dense_parameters(model).values(), dtype)


@torch.no_grad()
def settle_adapter(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """`settle` for the adapter on a model."""
    _round(_adapter_parameters(model), dtype)


def _round(parameters: Iterable[torch.nn.Parameter], dtype: torch.dtype) -> None:
    for parameter in parameters:
        if parameter.dtype.itemsize > dtype.itemsize:
            parameter.copy_(parameter.to(dtype))


def save_model(model: PreTrainedModel, folder: Path, dtype: torch.dtype, base_name: str | None = None) -> None:
    """Write a stock folder whose dense weights are kept in `dtype`.

    Args:
        model: settled before, so that nothing is lost. An adapter is written by peft, in `dtype` if that holds all of its numbers, else in their own.
        folder: written into.
        dtype: see `storage_dtype`. A model quantized by bitsandbytes keeps its embedding and norms in the type they are computed in.
        base_name: how an adapter names its base; peft would write the folder of this machine.
    """
    if hasattr(model, "peft_config"):
        _save_adapter(model, folder, dtype, base_name)
        return
    if getattr(model, "hf_quantizer", None) is not None:
        # transformers 5.23 computes a checkpoint that is quantized already in the type its norms and embedding are stored in, whatever dtype= says;
        # narrower ones would come back as another model
        model.save_pretrained(folder)
        return
    computed_in = model.config.dtype
    try:
        model.config.dtype = dtype
        with _narrowed(_dense_parameters(model).values(), dtype):
            model.save_pretrained(folder)
    finally:
        model.config.dtype = computed_in


@contextmanager
def _narrowed(parameters: Iterable[torch.nn.Parameter], dtype: torch.dtype) -> Iterator[None]:
    """While it lasts, those that are wider hold their values in `dtype`."""
    wide = [parameter for parameter in parameters if parameter.dtype.itemsize > dtype.itemsize]
    values = [parameter.data for parameter in wide]
    try:
        for parameter in wide:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, value in zip(wide, values, strict=True):
            parameter.data = value


def _save_adapter(model: Any, folder: Path, dtype: torch.dtype, base_name: str | None) -> None:
    added = _adapter_parameters(model)
    lossless = all(bool((parameter == parameter.to(dtype).to(parameter.dtype)).all()) for parameter in added)
    configs = list(model.peft_config.values())
    folders = [config.base_model_name_or_path for config in configs]
    try:
        for config in configs:
            config.base_model_name_or_path = base_name or config.base_model_name_or_path
        with _narrowed(added if lossless else [], dtype):
            model.save_pretrained(folder, save_embedding_layers=False)  # "auto" would ask the Hub whether the vocabulary has grown
    finally:
        for config, name in zip(configs, folders, strict=True):
            config.base_model_name_or_path = name
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty card


def _adapter_parameters(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if is_adapter_parameter(name) and parameter.is_floating_point()]


def _dense_parameters(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Floating-point parameters that are neither an adapter's nor packed by bitsandbytes."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not hasattr(parameter, "quant_state") and not is_adapter_parameter(name)
    }
