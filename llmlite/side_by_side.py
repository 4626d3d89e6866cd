"""Measure a result beside its base, both loaded from disk: quality, tasks, speed, energy, answers. What `llmlite evaluate DIR` does.

A model that has collapsed must not look healthy, so perplexity, KL and agreement are always there; tasks come on top. Speed and memory are those of
the reloaded checkpoint. Everything is written to `DIR/evaluation.json`, and into the card when the folder is a run's.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlite.errors import ConfigError, LoadError
from llmlite.evaluation.result import Evaluation
from llmlite.models.find import weight_bytes
from llmlite.paths import require_path
from llmlite.report import Report, environment
from llmlite.storage import folder_bytes, read_object

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from llmlite.context import Run

__all__ = ["evaluate"]

log = logging.getLogger(__name__)

_ENERGY_TOKENS = 64


def evaluate(
    folder: Path | str,
    *,
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
    """Measure a result and its base.

    Args:
        folder: a finished run, or any stock model or adapter folder (then `base` says what it was made of).
        base: Hub id or folder of the base; left out, the run's own.
        data: whose held-out rows are measured; left out, the run's own.
        text: a plain text file; measured by a sliding window instead of the data's rows.
        window, stride: tokens of that window (left out: the data's max_length) and of its steps (half a window).
        most_tokens: tokens of the text that are read.
        tasks: lm-eval tasks or YAML files of them.
        limit: questions of each task.
        batch_sizes: prompts at a time in the speed measurement.
        repeats: of the speed measurement, after one that warms up.
        answers: held-out prompts that both answer.
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
    if text is not None:
        require_path(text, "evaluate", "text")
    elif given := [f"{name}={value}" for name, value in (("window", window), ("stride", stride)) if value is not None]:
        raise ConfigError("evaluate", [f"{' and '.join(given)}: the sliding window is for a text. Add --text FILE, or leave it out: rows are read whole."])
    if tasks:
        from llmlite.evaluation.tasks import check_tasks

        check_tasks(tasks)
    report = Report.read(folder) if (folder / "report.json").is_file() else None
    layout = {name: value for name, value in (("device_map", device_map), ("max_memory", max_memory)) if value not in ("none", None)}
    load, context = _subject(folder, base, data, layout, tp_plan == "auto")
    _require_layout(folder, context, tasks)
    batches, on = _batches(context, text, window, stride, most_tokens)
    measure = _Measure(context, batches, tasks, limit, batch_sizes, repeats, answers, estimate_energy, grid_grams_per_kwh)
    found = Evaluation(folder, about={**environment(context.device.type), "quality_on": on})
    found.models["base"] = measure.base()
    found.models["this"] = measure.this(load, _bytes(folder, context))
    if not context.is_main:
        return found
    found.save()
    if warning := found.warning():
        log.warning("%s", warning)
    if report is not None:
        from llmlite.html.page import write_page
        from llmlite.hub.card import write_card

        write_card(report)
        write_page(report)
    return found


def _subject(folder: Path, base: str | None, data: str | None, layout: dict[str, Any], tensor_parallel: bool) -> tuple[Callable[[], PreTrainedModel], Run]:
    """How the model in the folder is loaded, and the run that knows its base and data.

    Args:
        folder, base, data: see `evaluate`.
        layout: `device_map` and `max_memory` where they were given.
        tensor_parallel: see `Run.tensor_parallel`.
    """
    from llmlite.context import Run
    from llmlite.data.settings import Data
    from llmlite.models.load import load_model
    from llmlite.models.settings import Model
    from llmlite.pipeline import load_result
    from llmlite.recipe import Recipe

    if not folder.is_dir():
        raise LoadError(f"evaluate: no folder {folder}. Give a run's output folder, or a model's.")
    if (folder / "recipe.yaml").is_file() and (folder / "report.json").is_file():
        recipe = Recipe.from_file(folder / "recipe.yaml", output_dir=str(folder), **layout)
        if base is not None:
            recipe = dataclasses.replace(recipe, model=Model(name=base, **layout))
        if data is not None:
            recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, train=data, evaluation=None))
        context = Run(recipe, tensor_parallel=tensor_parallel)

        def load_run() -> PreTrainedModel:
            model = load_result(folder, tensor_parallel, **layout)[0]
            context.take_vocabulary(folder)
            return model

        return load_run, context
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

    return load, context


def _require_layout(folder: Path, context: Run, tasks: Sequence[str]) -> None:
    """Raise ConfigError where models cannot be laid out as asked, before any is loaded."""
    from transformers import AutoConfig

    from llmlite.loading import misplaced
    from llmlite.models.tensor_parallel import indivisible
    from llmlite.quantization.bnb import Quantize

    adapter = (folder / "adapter_config.json").is_file()
    problems = misplaced(context)
    if not context.tensor_parallel:
        if context.layout.processes > 1:
            problems.append(
                f"this launch has {context.layout.processes} processes, and each would measure the same. Start it in one, or with --tp_plan auto, which cuts "
                "the models over them."
            )
        elif adapter and context.device_map is not None and not any(isinstance(step, Quantize) for step in context.recipe.steps):
            problems.append("an adapter cannot be put on a model whose blocks lie on several devices. Merge it (step merge), and evaluate that folder.")
    else:
        if tasks:
            problems.append("tasks are not built for tp_plan=auto. Measure them in one process, with --device_map auto where the model needs it.")
        if adapter:
            problems.append("an adapter cannot be put on a model that is cut over processes. Merge it (step merge), and evaluate that folder.")
        configs = [context.config, *([] if adapter else [AutoConfig.from_pretrained(folder)])]
        problems += dict.fromkeys(problem for config in configs for problem in indivisible(config, context.layout.processes))
    if problems:
        raise ConfigError("evaluate", problems)


def _batches(context: Run, text: str | None, window: int | None, stride: int | None, most: int) -> tuple[Callable[[], list[dict[str, Tensor]]], str]:
    """What quality is measured on, written in the tokens that the model of the moment has, and that in words."""
    if text is None:
        data = context.evaluation_data
        source = context.recipe.data.evaluation or f"{context.recipe.data.train}, held-out part"
        return context.evaluation_batches, f"Quality on the trained tokens of {data.counts.examples} held-out rows of {source}."
    from llmlite.evaluation.windows import sliding_batches, text_ids

    window, stride = _window(context, window, stride)
    ids_T = text_ids(text, context.tokenizer, most)
    batches = sliding_batches(ids_T, window, stride)
    return lambda: context.in_present_tokens(
        batches
    ), f"Quality on {len(ids_T) - 1:,} tokens of {Path(text).name}, sliding window of {window}, stride {stride}."


def _window(context: Run, window: int | None, stride: int | None) -> tuple[int, int]:
    """Tokens of the sliding window and of its steps, with what was left out and at most what the model reads.

    Raises:
        ConfigError: the stride does not go with that window.
    """
    longest = getattr(context.config, "max_position_embeddings", None)
    asked = window or context.recipe.data.max_length
    whose = f"window={asked}" if window else f"the window of {asked} tokens, the data's max_length"
    width = min(asked, int(longest)) if longest else asked
    if width < asked:
        whose = f"the window of {width} tokens, all that {context.recipe.model.name} reads at a time"
    step = max(1, width // 2) if stride is None else stride
    if not 1 <= step < width:
        raise ConfigError("evaluate", [f"stride={step} should be at least 1 and below {whose}. Lower --stride, or leave it out for half a window."])
    return width, step


def _bytes(folder: Path, context: Run) -> int:
    if not (folder / "adapter_config.json").is_file():
        return weight_bytes(folder)
    steps = context.recipe.steps
    if (folder / "report.json").is_file() and len(steps) > 1:
        return Report.read(folder).rows[-1].bytes_on_disk
    return folder_bytes(folder) + weight_bytes(context.source.folder)


@dataclass
class _Measure:
    """All measurements of one model, for the base first and then for what was made of it."""

    context: Run
    batches: Callable[[], list[dict[str, Tensor]]]
    tasks: Sequence[str]
    limit: int | None
    batch_sizes: Sequence[int]
    repeats: int
    answers: int
    estimate_energy: bool
    grid: float | None
    reference: Any = None
    base_tasks: list[Any] = field(default_factory=list)

    def base(self) -> dict[str, Any]:
        """The base's figures; its distributions are kept to compare with."""
        from llmlite.evaluation.quality import reference_of

        log.info("the base: %s", self.context.recipe.model.name)
        model = self.context.load_base()
        self.reference, quality = reference_of(model, self.batches())
        found = self._rest(model, quality, weight_bytes(self.context.source.folder))
        del model
        gc.collect()
        return found

    def this(self, load: Callable[[], PreTrainedModel], size: int) -> dict[str, Any]:
        """The result's figures."""
        from llmlite.evaluation.quality import measure_quality

        log.info("this model: %s", self.context.recipe.folder)
        model = load()
        return self._rest(model, measure_quality(model, self.batches(), self.context.over_present_tokens(self.reference)), size)

    def _rest(self, model: PreTrainedModel, quality: Any, size: int) -> dict[str, Any]:
        from llmlite.evaluation.energy import Energy
        from llmlite.evaluation.sample import sample
        from llmlite.evaluation.speed import measure_latency
        from llmlite.models.device_map import is_offloaded
        from llmlite.models.safety import packed_generation

        tasks = self._tasks(model)
        if is_offloaded(model):  # each token would read the model from where it lies
            latency, energy, tokens, answers = [], Energy(source="part of the model was brought in for each forward pass"), 1, []
        else:
            with packed_generation(model) if self.context.device.type == "cpu" else nullcontext():
                latency = [dataclasses.asdict(measure_latency(model, batch, repeats=self.repeats)) for batch in self.batch_sizes]
                energy, tokens = self._energy(model)
                rows = self.context.evaluation_data.rows
                answers = [sample(model, self.context.tokenizer, rows, index=index) for index in range(min(self.answers, len(rows.rows)))]
        per_thousand = None if energy.joules is None else 1000 * energy.joules / tokens
        grams = energy.grams_co2(self.grid)
        return {
            "bytes_on_disk": size,
            "perplexity": quality.perplexity,
            "kl": quality.kl,
            "top1_agreement": quality.top1_agreement,
            "tokens": quality.tokens,
            "tasks": tasks,
            "latency": latency,
            "energy": energy.to_json(),
            "joules_per_1000_tokens": per_thousand,
            "grams_co2_per_1000_tokens": None if grams is None else 1000 * grams / tokens,
            "grid_grams_per_kwh": self.grid,
            "answers": answers,
        }

    def _tasks(self, model: PreTrainedModel) -> list[dict[str, Any]]:
        if not self.tasks:
            return []
        from llmlite.evaluation.tasks import flips, run_tasks

        found = run_tasks(model, self.context.tokenizer, self.tasks, limit=self.limit, seed=self.context.recipe.seed)
        changed = [flips(base, this) for base, this in zip(self.base_tasks, found, strict=True)] if self.base_tasks else [None] * len(found)
        self.base_tasks = self.base_tasks or found
        shown = ("task", "metric", "value", "standard_error")
        return [
            {**{name: getattr(task, name) for name in shown}, "questions": len(task.correct) or None, "flips": share}
            for task, share in zip(found, changed, strict=True)
        ]

    def _energy(self, model: PreTrainedModel) -> tuple[Any, int]:
        """Energy of writing some tokens at batch 1, and how many they were."""
        import torch

        from llmlite.evaluation.energy import measured_energy

        prompt_BT = torch.randint(3, min(1000, model.config.vocab_size), (1, 32), generator=torch.Generator().manual_seed(0))
        options = {"max_new_tokens": _ENERGY_TOKENS, "min_new_tokens": _ENERGY_TOKENS, "do_sample": False, "pad_token_id": self.context.tokenizer.pad_token_id}
        options["tokenizer"] = self.context.tokenizer  # for stop strings that its generation config may name
        with measured_energy(self.context.device.type, estimate=self.estimate_energy) as energy, torch.no_grad():
            prompt_BT = prompt_BT.to(model.get_input_embeddings().weight.device)
            model.generate(input_ids=prompt_BT, attention_mask=torch.ones_like(prompt_BT), **options)
        return energy, _ENERGY_TOKENS
