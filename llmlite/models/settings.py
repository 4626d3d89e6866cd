"""Which model, and how it is loaded: the settings, without anything that acts on them."""

from __future__ import annotations

from typing import Literal

from llmlite.config import settings
from llmlite.models.device_map import MemoryLimits
from llmlite.paths import PathText
from llmlite.step import Names

__all__ = ["DEFAULT_MODEL", "Model"]

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@settings
class Model:
    """Which model, and how it is loaded."""

    name: PathText = DEFAULT_MODEL
    """Hub id, local folder, or path of a .gguf file."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type the weights are computed in. auto: bfloat16 on accelerators that have it, else float32 (the fastest on most CPUs)."""
    attn_implementation: str | None = None
    """Attention kernel, as transformers names it (sdpa, eager, flash_attention_2). None: transformers' choice."""
    load: Literal["whole", "blocks", "auto"] = "whole"
    """blocks: one decoder block at a time is in memory, read from the files and written to new ones, for models larger than memory. prune.weights, prune.heads,
    prune.ffn, prune.structured (without trials) and quantize (without what goes backward) can. auto: blocks when the whole model does not fit and every step
    can. With both, the calibration text is the training text unless data.calibration says otherwise: a model in blocks cannot write its own."""
    device_map: Literal["none", "auto", "balanced", "sequential"] = "none"
    """Where the decoder blocks of a dense model lie that one device does not hold: over all accelerators alike (auto, balanced) or one after the other
    (sequential), then in main memory, then on disk, in the files that are there. For measuring, teachers, and `quantize` as the first step; what it makes lies
    on one device again. Nothing can be written into such a model: load: blocks prunes and quantizes larger ones."""
    max_memory: MemoryLimits = None
    """device_map only: bytes that weights may take, by device: 0=20GB,cpu=60GB. Devices that are not named are not used. None: nine tenths of what is free."""
    trust_remote_code: bool = False
    """Run Python code that the model repository carries. Only for authors you trust."""
    add_tokens: Names = ()
    """Tokens that tokenizer and embedding get besides their own, such as <tool>,</tool>; each starts as the mean of the pieces it was written in before."""
