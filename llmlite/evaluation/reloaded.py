"""Everything that is measured of models as they come back from disk, one after the other: quality, tasks, speed, energy, answers.

A model that has collapsed must not look healthy, so perplexity, KL and agreement are always there; tasks come on top. Never are two models in memory. What
each of them was found to be can be kept, so that whoever is stopped between two of them goes on behind the last one.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlite.config import fingerprint, to_mapping
from llmlite.errors import ConfigError, counted
from llmlite.evaluating import Evaluate
from llmlite.evaluation.result import Evaluation
from llmlite.models.adapted import longest_of, tokens_left
from llmlite.models.find import Source, find, weight_bytes, weights_fingerprint
from llmlite.report import Report, environment
from llmlite.storage import damage, file_sums, read_object, write_json, writing_folder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from llmlite.context import Run

__all__ = ["Checkpoint", "Reloaded", "longest_read", "publish", "require_measurable"]

log = logging.getLogger(__name__)

_ENERGY_TOKENS, _ENERGY_PROMPT_TOKENS = 64, 32  # fewer where the model has no position for them


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk that is to be measured.

    Attributes:
        name: what it is called in `Evaluation.models`.
        load: reads it, in eval mode, and lets the run know of tokens that it has lost.
        size: bytes that are needed to load it.
        folder: where its own weights lie.
        step: number and name of the step that left it; empty where no step did.
    """

    name: str
    load: Callable[[], PreTrainedModel]
    size: int
    folder: Path
    step: str = ""


def require_measurable(asked: Evaluate, context: Run, where: str = "evaluate", checkpoints: Sequence[Checkpoint] = ()) -> None:
    """Find what would fail only after models were loaded: a text, a window or tasks that cannot be.

    Args:
        asked: what is to be measured.
        context: the run that knows the base.
        where: what the message begins with.
        checkpoints: what will be measured, where it is there already.

    Raises:
        LlmliteError: what is wrong, and what to do.
    """
    if asked.text is not None:
        from llmlite.evaluation.windows import text_ids

        text_ids(asked.text, context.tokenizer, asked.most_tokens)
        _window(context, asked, longest_read(context, checkpoints))
    elif given := {name: value for name, value in (("window", asked.window), ("stride", asked.stride)) if value is not None}:
        shown = " and ".join(f"{name}={value}" for name, value in given.items())
        raise ConfigError(
            where, [f"{shown}: the sliding window is for a text. Name a file with text, or leave {' and '.join(given)} out: rows are read whole."]
        )
    if asked.tasks:
        from llmlite.evaluation.tasks import check_tasks

        check_tasks(asked.tasks)


def longest_read(context: Run, checkpoints: Sequence[Checkpoint]) -> int | None:
    """Tokens of text that the base and every checkpoint read, a prefix before the text taken off; `None` where no config sets a limit.

    Args:
        context: the run that knows the base.
        checkpoints: stock model or adapter folders. A prefix that leaves nothing counts for nothing: such an adapter does not load.

    Raises:
        LoadError: a folder's config is unreadable.
    """
    from llmlite.models.load import load_config
    from llmlite.models.settings import Model

    found = [context.longest_text]
    for folder in (checkpoint.folder for checkpoint in checkpoints):
        if (folder / "adapter_config.json").is_file():
            before, whole = read_object(folder / "adapter_config.json").get("num_virtual_tokens"), longest_of(context.config)
            if isinstance(before, int) and whole is not None and 0 < before < whole:
                found.append(longest_of(context.config, before))
        else:
            settings = Model(name=str(folder), trust_remote_code=context.recipe.model.trust_remote_code)
            found.append(longest_of(load_config(Source(settings.name, folder, None), settings)))
    return min((longest for longest in found if longest is not None), default=None)


def publish(found: Evaluation, report: Report | None) -> None:
    """Write what was found into its folder, and of a run also into its card and page; say so where the result has collapsed."""
    found.save()
    if warning := found.warning():
        log.warning("%s", warning)
    if report is not None:
        from llmlite.html.page import write_page
        from llmlite.hub.card import write_card

        write_card(report)
        write_page(report)


@dataclass
class Reloaded:
    """All measurements of a base and of what was made of it.

    Attributes:
        context: a run that has loaded nothing yet; the vocabulary is the base's.
        asked: what is measured.
        estimate_energy, grid: see `llmlite.evaluation.energy`.
        keep: a folder for what was found of each model, until `measure` is called again with all of them found; None keeps nothing.
    """

    context: Run
    asked: Evaluate
    estimate_energy: bool = False
    grid: float | None = None
    keep: Path | None = None
    _reference: Any = None
    _base_tasks: list[Any] = field(default_factory=list)

    def measure(self, out: Path, checkpoints: Sequence[Checkpoint]) -> Evaluation:
        """Measure the base, then each checkpoint against it.

        Args:
            out: the folder that is evaluated.
            checkpoints: in order; the last one is the result.
        """
        self.batches, on = _batches(self.context, self.asked, checkpoints)
        found = Evaluation(out, about={**environment(self.context.device.type), "quality_on": on})
        if self.keep is not None:
            found.about["asked"] = self.fingerprint(checkpoints)
        found.models["base"] = self._base()
        for checkpoint in checkpoints:
            found.models[checkpoint.name] = self._of(checkpoint)
        return found

    def forget(self) -> None:
        """Remove what was kept, once it stands elsewhere."""
        if self.keep is not None:
            shutil.rmtree(self.keep, ignore_errors=True)

    def fingerprint(self, checkpoints: Sequence[Checkpoint]) -> str:
        """Changes with anything that is measured or measured on, the machine excepted."""
        return fingerprint(self._asked, [_sums(checkpoint) for checkpoint in checkpoints])

    @cached_property
    def _asked(self) -> list[Any]:
        from llmlite.evaluation.tasks import task_files

        context, asked = self.context, to_mapping(self.asked, defaults=True)
        context.source = find(context.recipe.model, weights=True)
        files = [*task_files(asked["tasks"]), *([Path(asked["text"])] if asked["text"] else [])]
        sums = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        rows = "" if asked["text"] else context.evaluation_data.fingerprint()
        settings = {name: value for name, value in asked.items() if name != "each_step"}  # which models, not what of them
        return [settings, sums, rows, context.recipe.seed, self.estimate_energy, self.grid, weights_fingerprint(context.source.folder)]

    # what is kept ---------------------------------------------------------------------------------------------------------------------

    def _kept(self, name: str, checkpoint: Checkpoint | None = None) -> dict[str, Any] | None:
        """What was found of a model before a stop; None where it is still to be measured, or was measured otherwise."""
        if self.keep is None or damage(self.keep / name) is not None:
            return None
        found: Any = json.loads((self.keep / name / "figures.json").read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("key") != self._key(checkpoint):
            return None
        log.info("%s was measured before", name)
        return dict(found)

    def _save(self, name: str, figures: dict[str, Any], checkpoint: Checkpoint | None = None) -> None:
        if self.keep is None:
            return
        with writing_folder(self.keep / name) as temporary:
            tasks = [] if checkpoint else [dataclasses.asdict(task) for task in self._base_tasks]
            write_json(temporary / "figures.json", {"key": self._key(checkpoint), "figures": figures, "tasks": tasks})
            if checkpoint is None:
                self._reference.save(temporary / "reference.safetensors")

    def _key(self, checkpoint: Checkpoint | None) -> str:
        machine = {name: value for name, value in environment(self.context.device.type).items() if name != "date"}
        return fingerprint(machine, self._asked, _sums(checkpoint) if checkpoint else "base")

    # one model ------------------------------------------------------------------------------------------------------------------------

    def _base(self) -> dict[str, Any]:
        """The base's figures; its distributions and answers are what the others are compared with."""
        from llmlite.evaluation.quality import Reference, reference_of
        from llmlite.evaluation.tasks import TaskResult

        if kept := self._kept("base"):
            assert self.keep is not None
            self._reference = Reference.read(self.keep / "base" / "reference.safetensors")
            self._base_tasks = [TaskResult(**task) for task in kept["tasks"]]
            return dict(kept["figures"])
        log.info("the base: %s", self.context.recipe.model.name)
        model = self.context.load_base()
        self._reference, quality = reference_of(model, self.batches())
        figures = self._rest(model, quality, weight_bytes(self.context.source.folder))
        del model
        gc.collect()
        self._save("base", figures)
        return figures

    def _of(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """A checkpoint's figures."""
        from llmlite.evaluation.quality import measure_quality

        if kept := self._kept(checkpoint.name, checkpoint):
            return dict(kept["figures"])
        log.info("%s: %s", checkpoint.step or "this model", checkpoint.folder)
        model = checkpoint.load()
        quality = measure_quality(model, self.batches(), self.context.over_present_tokens(self._reference))
        figures = {**({"step": checkpoint.step} if checkpoint.step else {}), **self._rest(model, quality, checkpoint.size)}
        del model
        gc.collect()
        self._save(checkpoint.name, figures, checkpoint)
        return figures

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
                sizes, repeats = self.asked.batch_sizes, self.asked.repeats
                latency = [dataclasses.asdict(measure_latency(model, batch, repeats=repeats)) for batch in sizes]
                energy, tokens = self._energy(model)
                rows = self.context.evaluation_data.rows
                answers = [sample(model, self.context.tokenizer, rows, index=index) for index in range(min(self.asked.answers, len(rows.rows)))]
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
        if not self.asked.tasks:
            return []
        from llmlite.evaluation.tasks import flips, run_tasks

        found = run_tasks(model, self.context.tokenizer, self.asked.tasks, limit=self.asked.limit, seed=self.context.recipe.seed)
        changed = [flips(base, this) for base, this in zip(self._base_tasks, found, strict=True)] if self._base_tasks else [None] * len(found)
        self._base_tasks = self._base_tasks or found
        shown = ("task", "metric", "value", "standard_error")
        return [
            {**{name: getattr(task, name) for name in shown}, "questions": len(task.correct) or None, "flips": share}
            for task, share in zip(found, changed, strict=True)
        ]

    def _energy(self, model: PreTrainedModel) -> tuple[Any, int]:
        """Energy of writing some tokens at batch 1, and how many they were."""
        import torch

        from llmlite.evaluation.energy import measured_energy

        tokens = max(1, tokens_left(model, 1, _ENERGY_TOKENS))
        shape = (1, max(1, tokens_left(model, tokens, _ENERGY_PROMPT_TOKENS)))
        prompt_BT = torch.randint(3, min(1000, model.config.vocab_size), shape, generator=torch.Generator().manual_seed(0))
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": self.context.tokenizer.pad_token_id}
        options["tokenizer"] = self.context.tokenizer  # for stop strings that its generation config may name
        alone = not self.context.tensor_parallel  # the other processes of a launch keep still
        with measured_energy(self.context.device.type, estimate=self.estimate_energy, alone=alone) as energy, torch.no_grad():
            prompt_BT = prompt_BT.to(model.get_input_embeddings().weight.device)
            model.generate(input_ids=prompt_BT, attention_mask=torch.ones_like(prompt_BT), **options)
        return energy, tokens


def _sums(checkpoint: Checkpoint) -> list[Any]:
    return [checkpoint.name, file_sums(checkpoint.folder)]


# What quality is measured on ----------------------------------------------------------------------------------------------------------


def _batches(context: Run, asked: Evaluate, checkpoints: Sequence[Checkpoint]) -> tuple[Callable[[], list[dict[str, Tensor]]], str]:
    """What quality is measured on, written in the tokens that the model of the moment has, and that in words."""
    if asked.text is None:
        data = context.evaluation_data
        source = context.recipe.data.evaluation or f"{context.recipe.data.train}, held-out part"
        return context.evaluation_batches, f"Quality on the trained tokens of {counted(data.counts.examples, 'held-out row')} of {source}."
    from llmlite.evaluation.windows import sliding_batches, text_ids

    window, stride = _window(context, asked, longest_read(context, checkpoints))
    ids_T = text_ids(asked.text, context.tokenizer, asked.most_tokens)
    batches = sliding_batches(ids_T, window, stride)
    name = Path(asked.text).name
    return lambda: context.in_present_tokens(batches), f"Quality on {counted(len(ids_T) - 1, 'token')} of {name}, sliding window of {window}, stride {stride}."


def _window(context: Run, asked: Evaluate, longest: int | None) -> tuple[int, int]:
    """Tokens of the sliding window and of its steps, with what was left out and at most what the models read.

    Args:
        context: the run that knows the data.
        asked: window and stride.
        longest: see `longest_read`.

    Raises:
        ConfigError: the models do not read as much at a time, or the stride does not go with that window.
    """
    name = context.recipe.model.name
    reader = f"all that {name} reads at a time"
    if longest != longest_of(context.config):
        reader = f"all that {name} and what was made of it both read at a time, positions of a prefix not counted"
    if asked.window is not None and longest is not None and asked.window > longest:
        raise ConfigError(
            "evaluate", [f"window={asked.window} should be at most {longest}, {reader}. Lower window, or leave it out for that or the data's max_length."]
        )
    width = asked.window or context.recipe.data.max_length
    whose = f"window={width}" if asked.window else f"the window of {width} tokens, the data's max_length"
    if longest is not None and longest < width:
        width, whose = longest, f"the window of {longest} tokens, {reader}"
    step = max(1, width // 2) if asked.stride is None else asked.stride
    if not 1 <= step < width:
        raise ConfigError("evaluate", [f"stride={step} should be at least 1 and below {whose}. Lower stride, or leave it out for half a window."])
    return width, step
