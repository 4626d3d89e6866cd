"""Models that carry a peft adapter: how to tell, and which of their parameters are the adapter's."""

from __future__ import annotations

from typing import Any

__all__ = ["MARKS", "adapter_parameters", "is_adapted", "is_adapter_parameter"]

MARKS = ("lora_", "ia3_", "bottleneck_", "prompt_encoder", "modules_to_save", "trainable_tokens_")
"""Parts of the names that peft, and llmlite's own bottleneck adapters, give to what they add."""


def is_adapted(model: Any) -> bool:
    """Whether a peft model stands around the transformers model."""
    return hasattr(model, "peft_config") and hasattr(model, "base_model")


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter of that dotted name belongs to an adapter rather than to its base."""
    return any(mark in name for mark in MARKS)


def adapter_parameters(model: Any) -> int:
    """Numbers that all adapters on a model hold together."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if is_adapter_parameter(name))
