"""What is measured of the models that the steps leave, each as it comes back from disk. A recipe carries it; `llmlite evaluate` has the same as flags."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic

from llmlite.config import from_mapping, settings
from llmlite.paths import PathText
from llmlite.step import Names

__all__ = ["Evaluate", "EvaluateSettings"]


def _sizes_of(value: Any) -> Any:
    if isinstance(value, str):
        words = [word.strip() for word in value.split(",")]
        return tuple(int(word) for word in words) if all(word.isdecimal() for word in words) else value
    return (value,) if type(value) is int else tuple(value) if isinstance(value, list) else value


Positive = Annotated[int, pydantic.Field(ge=1)]
Sizes = Annotated[tuple[Positive, ...], pydantic.Field(min_length=1), pydantic.BeforeValidator(_sizes_of)]
"""Numbers from 1, as a list in YAML or Python; on the command line also `1,8`."""


@settings
class Evaluate:
    """Perplexity, KL and agreement, lm-eval tasks with answer flips, speed, memory, energy and answers of reloaded checkpoints."""

    each_step: bool = True
    """Measure what every step left. false: the base and the last step's result only."""
    text: PathText | None = None
    """Plain text file, measured by a sliding window instead of the data's held-out rows."""
    window: Annotated[int, pydantic.Field(ge=2)] | None = None
    """Tokens of that window. Left out: the data's max_length."""
    stride: Positive | None = None
    """New tokens in each window. Left out: half a window."""
    most_tokens: Annotated[int, pydantic.Field(ge=2)] = 16384
    """Tokens of the text that are read."""
    tasks: Names = ()
    """lm-eval tasks by name, or YAML files of your own, which run offline. They need llmlite[eval]."""
    limit: Positive | None = None
    """Questions of each task. Left out: all."""
    batch_sizes: Sizes = (1, 8)
    """Prompts at a time in the speed measurement."""
    repeats: Positive = 5
    """Of the speed measurement, after one that warms up."""
    answers: Annotated[int, pydantic.Field(ge=0)] = 3
    """Held-out prompts that every model answers."""


EvaluateSettings = Annotated[Evaluate | None, from_mapping(Evaluate, switched=True)]
"""An `Evaluate`, a mapping of its options, true for its defaults; None or false for no such measurement."""
