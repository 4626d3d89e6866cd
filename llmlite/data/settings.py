"""Which text a run reads, and how rows become tokens."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from llmlite.config import settings

__all__ = ["Data"]


@settings
class Data:
    """Where text comes from: training, held-out evaluation and calibration."""

    train: str = "builtin:python-docs"
    """Hub id, JSON/JSONL/Parquet/CSV/TXT file or folder, or builtin:python-docs: questions about the documentation inside every Python, without any
    download (builtin:python-docs-prose: its running text)."""
    evaluation: str | None = None
    """Held-out text for perplexity, KL and agreement. None: a part of `train` that is never trained on, chosen by a stable hash."""
    calibration: str | None = None
    """Text whose activations guide pruning and quantization: a source like `train`, `self` (sampled from the model, cached), or a mixture such as
    `0.5*self + 0.5*wiki.txt`. None: half `self`, half a part of `train` kept apart from both others."""
    text_column: str | None = None
    """Column with plain text. None: found by its usual names."""
    prompt_column: str | None = None
    """Column with the prompt (not trained). None: found by its usual names."""
    completion_column: str | None = None
    """Column with the answer (trained). None: found by its usual names."""
    messages_column: str | None = None
    """Column with chat messages. None: found by its usual names."""
    max_length: Annotated[int, Field(ge=16)] = 512
    """Tokens in one row; longer rows are cut, counted and reported."""
    packing: bool = True
    """Fill each row with several examples that cannot see each other, where the model allows it; False pads instead."""
    max_train_rows: Annotated[int, Field(ge=1)] | None = None
    """Read at most this many training rows."""
    evaluation_rows: Annotated[int, Field(ge=1)] = 64
    """Held-out rows that perplexity, KL and agreement are measured on."""
    calibration_sequences: Annotated[int, Field(ge=1)] = 128
    """Calibration rows of `max_length` tokens."""
