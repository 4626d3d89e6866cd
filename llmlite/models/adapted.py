"""Models that carry a peft adapter: how to tell, which of their parameters are the adapter's, and how much text they leave room for."""

from __future__ import annotations

from typing import Any

__all__ = ["MARKS", "adapter_parameters", "is_adapted", "is_adapter_parameter", "longest_text"]

MARKS = ("lora_", "ia3_", "bottleneck_", "prompt_encoder", "modules_to_save", "trainable_tokens_")
"""Parts of the names that peft, and llmlite's own bottleneck adapters, give to what they add."""


def is_adapted(model: Any) -> bool:
    """Whether a peft model stands around the transformers model."""
    return hasattr(model, "peft_config") and hasattr(model, "base_model")


def longest_text(model: Any) -> int | None:
    """Tokens that the model reads at most: what its config says, less those of a prefix before them; `None` where the config says nothing."""
    longest = getattr(model.config, "max_position_embeddings", None)
    adapters = model.peft_config.values() if is_adapted(model) else ()
    before = max((getattr(adapter, "num_virtual_tokens", None) or 0 for adapter in adapters), default=0)
    return None if longest is None else int(longest) - before


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter of that dotted name belongs to an adapter rather than to its base."""
    return any(mark in name for mark in MARKS)


def adapter_parameters(model: Any) -> int:
    """Numbers that all adapters on a model hold together."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if is_adapter_parameter(name))
