"""A model whose decoder blocks lie where there is room: on several devices, in main memory or on disk (`device_map`).

accelerate runs such a model: a block is computed on its own device, and one that lies in main memory or on disk is brought to the first device for each
forward pass. Which block lies where is decided here, whole blocks at a time. What lies outside of the blocks (embeddings, final norm, head) is always whole on
the device that the model is fed on, since every measurement touches it.

    dispatch_map(config, settings, dtype, device)    # {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", ...}
    with brought(block): ...                         # its weights are in memory; what is written into them is forgotten afterwards

A write into a weight that lies elsewhere does nothing, and a backward pass gives gradients to part of the model only, both without a word. So steps that
change or train such weights are refused (`Step.no_dispatch`), and walks and training look again (`is_offloaded`).

Nothing here imports torch before it is asked for: the settings of a model name the devices.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import pydantic

from llmlite.config import shorten
from llmlite.errors import LoadError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llmlite.models.settings import Model
    from llmlite.models.view import ModelView

__all__ = ["SPREADING", "MemoryLimits", "brought", "device_of", "dispatch_map", "feed_device", "held_bytes", "is_offloaded", "memory_limits", "places"]

SPREADING = ("auto", "balanced", "sequential")
"""Values of `device_map` that spread a model over devices."""

Place = int | str
"""Index of an accelerator, ``cpu`` or ``disk``."""

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_LIMIT = re.compile(r"\s*(\w+)\s*[=:]\s*([0-9.]+)\s*([A-Za-z]*)\s*")
_USED = 0.9
"""Share of what is free now that weights may take where nobody says how much; activations take the rest."""


def memory_limits(text: str) -> dict[Place, int]:
    """``0=20GB,cpu=60GB`` as bytes by device, accelerators first.

    Raises:
        ValueError: it is something else; the message ends a sentence that begins with "should".
    """
    limits: dict[Place, int] = {}
    for part in text.split(","):
        found = _LIMIT.fullmatch(part)
        device = found[1] if found else ""
        if not found or not (device.isdigit() or device == "cpu") or found[3].upper() not in _UNITS or found[2].count(".") > 1:
            strange = shorten(part.strip())
            raise ValueError(f"be bytes by device, such as 0=20GB,cpu=60GB ({strange!r} is not). Accelerators have numbers; what is left goes to disk")
        limits[int(device) if device.isdigit() else device] = int(float(found[2]) * _UNITS[found[3].upper()])
    return dict(sorted(limits.items(), key=lambda item: (isinstance(item[0], str), str(item[0]))))


def _limits_of(value: Any) -> Any:
    if isinstance(value, Mapping):
        value = ",".join(f"{device}={size}" for device, size in value.items())
    if isinstance(value, str):
        memory_limits(value)
    return value


MemoryLimits = Annotated[str | None, pydantic.BeforeValidator(_limits_of)]
"""Bytes by device, as text or as a mapping."""


def feed_device(device: torch.device) -> Place:
    """A device as a device map writes it."""
    return "cpu" if device.type == "cpu" else device.index or 0


def dispatch_map(config: Any, settings: Model, dtype: torch.dtype, device: torch.device) -> dict[str, Place] | None:
    """Where each part of a model lies, as `from_pretrained` takes it; None when `device` holds all of it, as it does where nothing else was asked for, and of a
    quantized model.

    Args:
        config: of a family in the table.
        settings: `device_map` and `max_memory` of the model.
        dtype: of the weights.
        device: what the model is fed on; embeddings, final norm and head lie there.

    Raises:
        LoadError: there is no room for what must lie there.
    """
    if settings.device_map == "none" or getattr(config, "quantization_config", None) is not None:
        return None
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    from llmlite.models.size import meta_model
    from llmlite.models.view import ModelView

    view = ModelView(meta_model(config).to(dtype))
    limits = get_max_memory(memory_limits(settings.max_memory) if settings.max_memory else None)
    if not settings.max_memory:
        limits = {place: int(_USED * free) for place, free in limits.items()}
    feed = feed_device(device)
    outside, blocks = _bytes(view.model) - sum(_bytes(block.module) for block in view.blocks), view.model.get_submodule(view.family.blocks)
    needed = outside + max(_bytes(block.module) for block in view.blocks)
    if limits.get(feed, 0) < needed:
        raise LoadError(
            f"model: device_map={settings.device_map} needs {needed / 1e6:,.1f} MB on {_name(feed)}, where the model is fed: embeddings, norm, head, and one "
            f"block while it is computed. {f'max_memory={settings.max_memory}' if settings.max_memory else 'What is free'} gives it "
            f"{limits.get(feed, 0) / 1e6:,.1f} MB."
        )
    limits[feed] -= outside
    kinds = {"no_split_module_classes": [type(view.blocks[0].module).__name__], "dtype": dtype}
    if settings.device_map != "sequential":
        limits = get_balanced_memory(blocks, max_memory=limits, **kinds)
    found = infer_auto_device_map(blocks, max_memory=limits, **kinds)
    of_block = {block.name: found.get(str(block.index), found.get("", feed)) for block in view.blocks}
    return None if set(of_block.values()) == {feed} else places(view, of_block, feed)


def places(view: ModelView, of_block: Mapping[str, Place], feed: Place) -> dict[str, Place]:
    """A device map from the places of the blocks: what lies outside of them goes to one device."""
    inside = tuple(f"{name}." for name in of_block)
    outside = [name for name, module in view.model.named_modules() if name not in of_block and not name.startswith(inside) and not list(module.children())]
    return {**dict.fromkeys(outside, feed), **of_block}


def held_bytes(config: Any, found: Mapping[str, Place], dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of the weights that a device map leaves on a device, and of one block that is brought to it where others lie elsewhere."""
    from llmlite.models.size import meta_model
    from llmlite.models.view import ModelView

    view = ModelView(meta_model(config).to(dtype))
    elsewhere = [_bytes(block.module) for block in view.blocks if found[block.name] != feed_device(device)]
    return _bytes(view.model) - sum(elsewhere) + max(elsewhere, default=0)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _name(place: Place) -> str:
    return place if isinstance(place, str) else f"device {place}"


# models that were loaded so --------------------------------------------------------------------------------------------------------------


def _offloading(module: nn.Module) -> list[Any]:
    """The hooks of accelerate that bring the weights of this very module in for each forward pass."""
    hook: Any = module.__dict__.get("_hf_hook")
    return [each for each in (hook, *getattr(hook, "hooks", ())) if getattr(each, "offload", False)]


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights are not in the memory of a computing device: what is written into them is lost, and gradients stop at them."""
    return any(_offloading(module) for module in model.modules())


def device_of(block: nn.Module) -> torch.device:
    """Where a block is computed."""
    import torch

    for module in block.modules():
        for hook in _offloading(module):
            return torch.device(hook.execution_device)
    return next(block.parameters()).device


@contextmanager
def brought(block: nn.Module) -> Iterator[None]:
    """Within it the weights of an offloaded block are where it is computed; afterwards they are not, and what was changed in them is forgotten. With any
    other block nothing happens."""
    hooks = [(module, hook) for module in block.modules() for hook in _offloading(module)]
    for module, hook in hooks:
        hook.pre_forward(module)
        hook.offload = False  # a forward pass within would let them go
    try:
        yield
    finally:
        for module, hook in hooks:
            hook.offload = True
            hook.post_forward(module, None)
