"""Models that carry a peft adapter: how to tell, which of their parameters are the adapter's, and how much text they leave room for."""

from __future__ import annotations

from typing import Any

__all__ = ["MARKS", "adapter_parameters", "is_adapted", "is_adapter_parameter", "longest_of", "longest_text", "tokens_left"]

MARKS = ("lora_", "ia3_", "bottleneck_", "prompt_encoder", "modules_to_save", "trainable_tokens_")
"""Parts of the names that peft, and llmlite's own bottleneck adapters, give to what they add."""


def is_adapted(model: Any) -> bool:
    """Whether a peft model stands around the transformers model."""
    return hasattr(model, "peft_config") and hasattr(model, "base_model")


def longest_of(config: Any, virtual_tokens: int = 0) -> int | None:
    """Tokens of text that a model of this config reads at most; `None` where the config says nothing.

    Args:
        config: of transformers.
        virtual_tokens: of a prefix, which takes positions of the text behind it.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if longest is None else int(longest) - virtual_tokens


def longest_text(model: Any) -> int | None:
    """`longest_of` the model as it stands, with the virtual tokens of its adapters."""
    adapters = model.peft_config.values() if is_adapted(model) else ()
    return longest_of(model.config, max((getattr(adapter, "num_virtual_tokens", None) or 0 for adapter in adapters), default=0))


def tokens_left(model: Any, read: int, wanted: int) -> int:
    """How many of `wanted` new tokens fit behind `read` tokens of text: all where the config sets no limit, 0 where the text takes every position."""
    longest = longest_text(model)
    return wanted if longest is None else max(0, min(wanted, longest - read))


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter of that dotted name belongs to an adapter rather than to its base."""
    return any(mark in name for mark in MARKS)


def adapter_parameters(model: Any) -> int:
    """Numbers that all adapters on a model hold together."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if is_adapter_parameter(name))
