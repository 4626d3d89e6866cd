"""Whole, one decoder block at a time, or over several devices: what decides it, what it takes, and what it refuses.

See `llmlite.models.blockwise` and `llmlite.models.device_map` for how.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from llmlite.calibration.mixture import SELF, parse_mixture
from llmlite.errors import ConfigError
from llmlite.report import human_bytes
from llmlite.step import Step, step_name
from llmlite.training.settings import TrainingStep

if TYPE_CHECKING:
    from llmlite.context import Run
    from llmlite.recipe import Recipe
    from llmlite.step import ModelPlan

__all__ = ["blockwise_peak", "decide_loading", "measuring_bytes", "misplaced", "needs_whole", "not_dispatched", "require_dispatchable"]

_CAN = "prune.weights, prune.heads, prune.ffn, prune.structured (spread: auto, ffn or query_heads+ffn) and quantize (token_weights: equal, tune_epochs: 0)"
_MEASURING_BYTES = 4 * 4 * 256  # for each token of the vocabulary: four tables of logits of the 256 tokens that are measured at a time


def measuring_bytes(config: Any) -> int:
    """What measuring needs beside the model."""
    return _MEASURING_BYTES * int(config.get_text_config().vocab_size)


def blockwise_peak(before: ModelPlan, after: ModelPlan, context: Run) -> int:
    """Peak memory of a step that turns one model into another, a block at a time, and of measuring what comes out."""
    from llmlite.calibration.memory import blockwise_bytes
    from llmlite.models.size import runtime_bytes

    data = context.recipe.data
    measured = data.evaluation_rows * data.max_length
    return blockwise_bytes(before.config, context.compute_dtype, after.tokens, measured) + runtime_bytes(context.device) + measuring_bytes(after.config)


def needs_whole(recipe: Recipe, context: Run) -> list[str]:
    """What keeps a recipe from working on one block at a time, as sentences; nothing when it can."""
    found = [
        f"steps[{index}] {step_name(step)}: load: blocks cannot do this step: {reason}. What can: {_CAN}. Do those in a run of "
        "their own, and the rest on its result."
        for index, step in enumerate(recipe.steps)
        if (reason := step.no_blocks())
    ]
    if recipe.data.calibration and any(source == SELF for _, source in parse_mixture(recipe.data.calibration)):
        found.append(
            "data: load: blocks cannot calibrate on text of the model itself (self), since each token would read the whole model. Name a text instead."
        )
    return found


def decide_loading(recipe: Recipe, context: Run, whole_bytes: int, blocks_bytes: int, why_not: list[str]) -> str:
    """Decide how the model is loaded, tell the run, and say in a sentence what is worth saying.

    Args:
        recipe: says what is asked for.
        context: its `blockwise` is set.
        whole_bytes, blocks_bytes: peak memory either way.
        why_not: from `needs_whole`.

    Raises:
        ConfigError: `load: blocks`, and something needs the whole model.
    """
    from llmlite.memory import free_bytes

    if context.device_map is not None:
        lies = Counter(place if isinstance(place, str) else f"device {place}" for place in _places_of_blocks(context))
        return f"device_map: blocks of the dense base on {', '.join(f'{place} ({count})' for place, count in lies.items())}."
    asked, free = recipe.model.load, free_bytes(context.device.type)
    if asked == "blocks" and why_not:
        raise ConfigError(recipe.name, why_not)
    context.blockwise = context.agreed(asked == "blocks" or (asked == "auto" and not why_not and whole_bytes > free))
    if context.blockwise:
        return f"One decoder block at a time in memory (load: blocks); whole it would be about {human_bytes(whole_bytes)}. Speed and answers are not measured."
    if whole_bytes <= free:
        return ""
    advice = f"With load: blocks it would be {human_bytes(blocks_bytes)}." if not why_not else f"With load: blocks it would be less, but: {why_not[0]}"
    return f"That is more than the {human_bytes(free)} that are free here. {advice}"


def _places_of_blocks(context: Run) -> list[int | str]:
    from llmlite.models.families import family_of

    inside = f"{family_of(context.config).blocks}."
    return [place for name, place in (context.device_map or {}).items() if name.startswith(inside)]


def misplaced(context: Run) -> list[str]:
    """What `device_map` and `max_memory` do not go with, whatever is done with the model, as sentences."""
    model, found = context.recipe.model, []
    if model.device_map == "none":
        return [f"max_memory={model.max_memory} limits what device_map may use, and device_map is none. Set device_map: auto."] if model.max_memory else []
    if context.layout.processes > 1:
        found.append(
            f"device_map={model.device_map} spreads one model over all devices from one process; this launch has {context.layout.processes} with one each. "
            "Start it without accelerate or torchrun."
        )
    if model.add_tokens:
        found.append("device_map and add_tokens together are not built.")
    return found


def require_dispatchable(recipe: Recipe, context: Run) -> None:
    """Raise ConfigError for a `device_map` that does not go with the rest of a recipe, all of it together."""
    model, found = recipe.model, misplaced(context)
    if model.device_map != "none" and model.load != "whole":
        found.append(f"device_map={model.device_map} and load={model.load} are two ways to load a model that is too large. Choose one.")
    if model.device_map != "none" and recipe.data.calibration and any(source == SELF for _, source in parse_mixture(recipe.data.calibration)):
        found.append("data: with device_map the model cannot write its calibration text (self): each token would go through all devices. Name a text instead.")
    if found:
        raise ConfigError(recipe.name, found)


def not_dispatched(step: Step, form: str, context: Run) -> str:
    """Why a step cannot work on the base as its `device_map` lays it out, and what can, as a sentence; empty when it can."""
    reason = step.no_dispatch(form) if context.device_map is not None else ""
    if not reason:
        return ""
    instead, no_blocks = "Do it on a device that holds the model.", step.no_blocks()
    if isinstance(step, TrainingStep):
        instead = "Train on what `quantize` makes of it, which one device holds."
    elif not no_blocks:
        instead = "load: blocks does this step, one block at a time."
    elif no_blocks not in {Step.no_blocks(step), reason}:
        instead = f"load: blocks does this step with other settings: {no_blocks}."
    return f"device_map={context.recipe.model.device_map}: {reason}. {instead}"
