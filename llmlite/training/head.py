"""Catch what enters the LM head, so that a loss or a measurement can apply the head in chunks instead of holding all logits.

The model runs as ever, through every wrapper around it (peft, DDP, FSDP, offloading hooks); only its LM head is replaced, for the duration
of a block, by one that remembers its input and returns a single zero a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from llmlite.training.token_loss import LogitTransform

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["Captured", "captured_head", "logit_transform"]


@dataclass
class Captured:
    """What entered the LM head in the last forward pass: hidden states, (B, T, D)."""

    hidden: Tensor | None = None

    @property
    def hidden_BTD(self) -> Tensor:  # noqa: N802 - a tensor with its shape suffix
        """The hidden states, after the final norm and whatever the family does before its head."""
        assert self.hidden is not None, "the model did not call its output embeddings"
        return self.hidden


@contextmanager
def captured_head(model: PreTrainedModel) -> Iterator[Captured]:
    """Within the block the model's logits are empty and `hidden_BTD` of the yielded object holds what the head would have seen.

    Apply `model.get_output_embeddings()` and `logit_transform(model.config)` to it to get the logits.
    """
    head = model.get_output_embeddings()
    captured = Captured()

    def forward(hidden_BTD: Tensor) -> Tensor:
        captured.hidden = hidden_BTD
        return hidden_BTD.new_zeros((*hidden_BTD.shape[:-1], 1))

    before = head.__dict__.get("forward")  # a hook of accelerate's, where weights are offloaded
    head.forward = forward
    try:
        yield captured
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def logit_transform(config: PretrainedConfig) -> LogitTransform:
    """What the architecture does to the head's output before it calls it logits: granite divides, cohere multiplies, gemma2 and gemma3 cap."""
    scale = 1.0
    if getattr(config, "logits_scaling", None):
        scale = 1.0 / float(config.logits_scaling)
    elif getattr(config, "logit_scale", None):
        scale = float(config.logit_scale)
    softcap = getattr(config, "final_logit_softcapping", None)
    return LogitTransform(scale, float(softcap) if softcap else None)
