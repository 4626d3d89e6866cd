"""Presets, each runnable as ``python -m llmlite.recipes.NAME``. Exported lazily: an eager import would make every class exist twice under -m."""

from __future__ import annotations

import importlib
from typing import Any

PRESETS = {
    "BottleneckAdapter": "bottleneck_adapter",
    "LoraInt4": "lora_int4",
    "LoraInt8": "lora_int8",
    "Lora": "lora",
    "DistillWhiteBox": "distill_whitebox",
    "DistillBlackBox": "distill_blackbox",
    "PruneHeads": "prune_heads",
    "PruneStructured": "prune_structured",
    "PruneUnstructured": "prune_unstructured",
    "QuantizeInt8": "quantize_int8",
    "QuantizeNf4": "quantize_nf4",
}

__all__ = ["PRESETS", *PRESETS]


def __getattr__(name: str) -> Any:
    if name in PRESETS:
        return getattr(importlib.import_module(f"{__name__}.{PRESETS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
