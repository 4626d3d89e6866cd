"""What is measured of the models that the steps leave, each as it comes back from disk. A recipe carries it; `llmlite evaluate` has the same as flags."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic

from llmlite.config import from_mapping, settings
from llmlite.errors import counted
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

    def sentence(self, steps: Sequence[str], offloaded: bool = False) -> str:
        """Which models will be measured, and what of them, for a plan.

        Args:
            steps: names of the recipe's steps, in order.
            offloaded: part of the base is brought in for each forward pass, so that it is neither timed nor asked.
        """
        models = [f"{index + 1}. {name}" for index, name in enumerate(steps)][0 if self.each_step else -1 :]
        tasks = ", ".join(Path(task).name for task in self.tasks)
        found = [
            f"perplexity, KL and agreement on {'the held-out rows' if self.text is None else Path(self.text).name}",
            tasks and f"{'task' if len(self.tasks) == 1 else 'tasks'} {tasks}" + (f", at most {counted(self.limit, 'question')} each" if self.limit else ""),
            f"speed at batch {' and '.join(map(str, self.batch_sizes))}, {counted(self.repeats, 'repeat')} each",
            "energy",
            counted(self.answers, "answer") if self.answers else "",
        ]
        return (
            f"evaluate: when the steps are done, the base and {counted(len(models), 'reloaded checkpoint')} ({', '.join(models)}) are measured, one after the "
            f"other: {'; '.join(filter(None, found))}."
            + (" Of the base, part of which is brought in for each forward pass, neither speed nor energy nor answers." if offloaded else "")
        )


EvaluateSettings = Annotated[Evaluate | None, from_mapping(Evaluate, switched=True)]
"""An `Evaluate`, a mapping of its options, true for its defaults; None or false for no such measurement."""
