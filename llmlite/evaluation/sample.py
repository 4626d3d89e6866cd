"""One held-out question, answered greedily: figures alone hide a model that answers nonsense."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from llmlite.quantization.safety import packed_generation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmlite.run import Run

__all__ = ["sample"]
