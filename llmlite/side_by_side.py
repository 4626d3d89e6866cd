"""Measure a result beside its base, or every step of a run, all loaded from disk. What `llmlite evaluate DIR` does.

What is measured is in `llmlite.evaluation.reloaded`; a recipe's `evaluate` does the same at the end of a run. Everything is written to
`DIR/evaluation.json`, and into card and page when the folder is a run's.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlite.config import validate
from llmlite.errors import ConfigError, LoadError
from llmlite.evaluating import Evaluate
from llmlite.evaluation.reloaded import Checkpoint, Reloaded, longest_read, publish, require_measurable
from llmlite.evaluation.result import Evaluation
from llmlite.kept import KEPT_FIGURES
from llmlite.models.find import weight_bytes
from llmlite.paths import require_path
from llmlite.report import Report
from llmlite.storage import damage, folder_bytes, locked, read_object, require_writable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmlite.context import Run

__all__ = ["evaluate"]

log = logging.getLogger(__name__)

_LEAST_LENGTH = 16  # of data.max_length


def evaluate(
    folder: Path | str,
    *,
    each_step: bool = False,
    base: str | None = None,
    data: str | None = None,
    text: str | None = None,
    window: int | None = None,
    stride: int | None = None,
    most_tokens: int = 16384,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    batch_sizes: Sequence[int] = (1, 8),
    repeats: int = 5,
    answers: int = 3,
    estimate_energy: bool = False,
    grid_grams_per_kwh: float | None = None,
    device_map: str = "none",
    max_memory: str | None = None,
    tp_plan: str = "none",
) -> Evaluation:
    """Measure a result and its base, one after the other.

    Args:
        folder: a finished run, or any stock model or adapter folder (then `base` says what it was made of).
        each_step: of a run, measure what every step left. Models that were measured before a stop are not measured again by the same call.
        base: Hub id or folder of the base; left out, the run's own.
        data: whose held-out rows are measured; left out, the run's own.
        text: a plain text file; measured by a sliding window instead of the data's rows.
        window, stride: tokens of that window (left out: the data's max_length) and of its steps (half a window).
        most_tokens: tokens of the text that are read.
        tasks: lm-eval tasks or YAML files of them.
        limit: questions of each task.
        batch_sizes: prompts at a time in the speed measurement.
        repeats: of the speed measurement, after one that warms up.
        answers: held-out prompts that every model answers.
        estimate_energy: let codecarbon estimate where the machine has no counter.
        grid_grams_per_kwh: grams of CO2 for each kilowatt hour of your grid; without it no CO2 is stated.
        device_map, max_memory: where dense weights lie; see `llmlite.models.settings.Model`. Of a model that is brought in part by part for each forward pass
            speed, energy and answers are not measured.
        tp_plan: "auto": every process of a torchrun launch holds a slice of both models, and all of them call this alike; the first one writes.

    Raises:
        LlmliteError: whatever is not there or cannot be measured, before anything is loaded where possible.
    """
    folder = require_path(folder, "evaluate", "DIR")
    if grid_grams_per_kwh is not None and not 0 <= grid_grams_per_kwh < math.inf:
        raise ConfigError("evaluate", [f"grid_grams_per_kwh={grid_grams_per_kwh:g} should be a number of at least 0."])
    wanted = {"each_step": each_step, "text": text, "window": window, "stride": stride, "most_tokens": most_tokens, "tasks": tasks, "limit": limit}
    asked, problems = validate(Evaluate, {**wanted, "batch_sizes": list(batch_sizes), "repeats": repeats, "answers": answers}, "")
    if asked is None:
        raise ConfigError("evaluate", problems)
    report = Report.read(folder) if (folder / "report.json").is_file() else None
    layout = {name: value for name, value in (("device_map", device_map), ("max_memory", max_memory)) if value not in ("none", None)}
    checkpoints, context = _subjects(folder, each_step, base, data, layout, tp_plan == "auto")
    _require_layout([checkpoint.folder for checkpoint in checkpoints], context, asked)
    require_measurable(asked, context, checkpoints=checkpoints)
    _cut_rows(checkpoints, context)
    if context.is_main:
        require_writable(folder, "The figures go there: copy the folder to where you can write, and evaluate the copy.")
    keep = folder / "steps" / KEPT_FIGURES if each_step and not context.tensor_parallel else None
    measuring = Reloaded(context, asked, estimate_energy, grid_grams_per_kwh, keep)
    with nullcontext() if keep is None else locked(folder, movable=False):
        found = measuring.measure(folder, checkpoints)
        if context.is_main:
            publish(found, report)
            measuring.forget()
    return found


def _subjects(folder: Path, each_step: bool, base: str | None, data: str | None, layout: dict[str, Any], tensor_parallel: bool) -> tuple[list[Checkpoint], Run]:
    """The models to measure, and the run that knows their base and data.

    Args:
        folder, each_step, base, data: see `evaluate`.
        layout: `device_map` and `max_memory` where they were given.
        tensor_parallel: see `Run.tensor_parallel`.
    """
    from llmlite.context import Run
    from llmlite.data.settings import Data
    from llmlite.kept import Kept, load_result
    from llmlite.models.load import load_model
    from llmlite.models.settings import Model
    from llmlite.recipe import Recipe

    if not folder.is_dir():
        raise LoadError(f"evaluate: no folder {folder}. Give a run's output folder, or a model's.")
    if (folder / "recipe.yaml").is_file() and (folder / "report.json").is_file():
        own = recipe = Recipe.from_file(folder / "recipe.yaml", output_dir=str(folder), **layout)
        if base is not None:
            recipe = dataclasses.replace(recipe, model=Model(name=base, **layout))
        if data is not None:
            recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, train=data, evaluation=None))
        context = Run(recipe, tensor_parallel=tensor_parallel)
        if each_step:
            steps = Kept(own, Run(own, tensor_parallel=tensor_parallel), folder).checkpoints(context)
            _require_whole(steps)
            return steps, context

        def load_run() -> PreTrainedModel:
            model = load_result(folder, tensor_parallel, **layout)[0]
            context.take_vocabulary(folder)
            return model

        return [Checkpoint("this", load_run, _bytes(folder, context), folder)], context
    if each_step:
        raise ConfigError("evaluate", [f"each_step: {folder} is no finished run of llmlite, so there are no steps to measure. Leave it out."])
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        named = read_object(adapter).get("base_model_name_or_path")
        base = base or (named if isinstance(named, str) else None)
    elif not (folder / "config.json").is_file():
        raise LoadError(f"evaluate: {folder} is neither a finished run nor a model folder (no config.json, no adapter_config.json).")
    if base is None:
        raise ConfigError("evaluate", [f"{folder} is no run of llmlite, so it does not say what it was made of: --base MODEL compares it with its base."])
    recipe = Recipe(model=Model(name=base, **layout), data=Data(train=data) if data else Data(), output_dir=str(folder))
    context = Run(recipe, tensor_parallel=tensor_parallel)

    def load() -> PreTrainedModel:
        from llmlite.adapters.load import load_adapter

        if adapter.is_file():
            return load_adapter(context.load_base(), folder).eval()
        model = load_model(folder, context.recipe.model, context.device, tensor_parallel=tensor_parallel)
        context.take_vocabulary(folder)
        return model

    return [Checkpoint("this", load, _bytes(folder, context), folder)], context


def _require_whole(steps: Sequence[Checkpoint]) -> None:
    """Raise LoadError for a step whose folder has gone or was changed, before anything is measured."""
    for step in steps:
        if reason := damage(step.folder):
            raise LoadError(f"evaluate: {step.folder} is not as step {step.step} left it ({reason}). Leave --each_step out, or run the recipe again.")


def _require_layout(folders: Sequence[Path], context: Run, asked: Evaluate) -> None:
    """Raise ConfigError where models cannot be laid out as asked, before any is loaded."""
    from transformers import AutoConfig

    from llmlite.loading import misplaced
    from llmlite.models.tensor_parallel import indivisible
    from llmlite.quantization.bnb import Quantize

    adapters = [folder for folder in folders if (folder / "adapter_config.json").is_file()]
    problems = misplaced(context)
    if not context.tensor_parallel:
        if context.layout.processes > 1:
            problems.append(
                f"this launch has {context.layout.processes} processes, and each would measure the same. Start it in one, or with --tp_plan auto, which cuts "
                "the models over them."
            )
        elif adapters and context.device_map is not None and not any(isinstance(step, Quantize) for step in context.recipe.steps):
            problems.append("an adapter cannot be put on a model whose blocks lie on several devices. Merge it (step merge), and evaluate that folder.")
    else:
        if asked.tasks:
            problems.append("tasks are not built for tp_plan=auto. Measure them in one process, with --device_map auto where the model needs it.")
        if adapters:
            problems.append("an adapter cannot be put on a model that is cut over processes. Merge it (step merge), and evaluate that folder.")
        configs = [context.config, *(AutoConfig.from_pretrained(folder) for folder in folders if folder not in adapters)]
        problems += dict.fromkeys(problem for config in configs for problem in indivisible(config, context.layout.processes))
    if problems:
        raise ConfigError("evaluate", problems)


def _cut_rows(checkpoints: Sequence[Checkpoint], context: Run) -> None:
    """Let held-out rows be no longer than all models read. A recipe's check has seen to that for a run's own base; here nobody has asked for a length."""
    longest, data = longest_read(context, checkpoints), context.recipe.data
    if longest is not None and longest < data.max_length:
        log.info("the models read %d tokens at a time, so held-out rows are cut there", longest)
        context.recipe = dataclasses.replace(context.recipe, data=dataclasses.replace(data, max_length=max(_LEAST_LENGTH, longest)))


def _bytes(folder: Path, context: Run) -> int:
    if not (folder / "adapter_config.json").is_file():
        return weight_bytes(folder)
    steps = context.recipe.steps
    if (folder / "report.json").is_file() and len(steps) > 1:
        return Report.read(folder).rows[-1].bytes_on_disk
    return folder_bytes(folder) + weight_bytes(context.source.folder)
