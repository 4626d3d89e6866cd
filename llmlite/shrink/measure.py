"""Sensitivities: each option run alone on the model by the ordinary pipeline, each layer's cost of 4 bits, and the sizes of combinations. All remembered.

A measurement is a recipe of its own, so it is resumed after a kill like any other; when it is complete only its figures are kept. A recipe measures every
option that its first steps are, too. Figures are remembered under what they were measured on, weights and texts included: other ones are measured anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlite.config import fingerprint
from llmlite.errors import ConfigError
from llmlite.plan import refused
from llmlite.recipe import Recipe
from llmlite.report import Report
from llmlite.shrink.search import Option
from llmlite.step import QUANTIZED, ModelPlan, Step, parse_step, step_name
from llmlite.storage import write_json

if TYPE_CHECKING:
    from llmlite.context import Run

__all__ = ["evidence_of", "layer_costs", "measured", "plan_after", "recipe_of", "sizes_of"]

log = logging.getLogger(__name__)

_COST_SEQUENCES = 16  # calibration rows that say which layers are worth 16 bit


def _steps_of(values: Sequence[dict[str, Any]]) -> tuple[Step, ...]:
    parsed = []
    for index, value in enumerate(values):
        step, problems = parse_step(dict(value), index)
        assert step is not None, problems  # they are ours
        parsed.append(step)
    return tuple(parsed)


def recipe_of(recipe: Recipe, steps: Sequence[dict[str, Any]], folder: Path) -> Recipe:
    """The recipe with these steps and this output folder."""
    return dataclasses.replace(recipe, steps=_steps_of(steps), output_dir=str(folder), overwrite_output_dir=False, dry_run=False)


def evidence_of(context: Run) -> str:
    """What tells weights and texts under the same names apart: sixteen digits that change when the base's weights, a row of the training, held-out or
    calibration text, or a token of the held-out text does. All texts are read; weights are there afterwards."""
    from llmlite.calibration.mixture import SELF, parse_mixture
    from llmlite.data.text import read_rows
    from llmlite.models.find import find, weights_fingerprint

    context.source = find(context.recipe.model, weights=True)
    data = context.recipe.data
    sources = [data.train, data.evaluation, *(source for _, source in parse_mixture(context.calibration) if source != SELF)]
    seen = hashlib.sha256()
    for source in dict.fromkeys(filter(None, sources)):
        for row in read_rows(source, None, **context.columns()).rows:
            seen.update(json.dumps(row, sort_keys=True, default=str).encode())
    return fingerprint(weights_fingerprint(context.source.folder), context.evaluation_data.fingerprint(), seen.hexdigest())


def measured(recipe: Recipe, options: Sequence[Option], folder: Path, evidence: str) -> list[Option]:
    """The options with their figures: read from `folder` when they were measured before, else run, the longest first because it measures its beginnings too.

    Args:
        recipe: model, data and seed; its steps do not count.
        options: what to run.
        folder: where figures are remembered.
        evidence: of weights and texts; see `evidence_of`.

    Raises:
        LlmliteError: a run cannot be made; what it has done is kept and continued.
    """

    def file_of(steps: Sequence[dict[str, Any]]) -> Path:
        return folder / f"{fingerprint({**recipe.identity(), 'steps': list(steps)}, evidence, 2)}.json"

    for option in sorted(options, key=lambda option: -len(option.steps)):
        file = file_of(option.steps)
        if not option.steps or file.is_file():
            continue
        log.info("measuring: %s", option.name)
        work = file.with_suffix(".run")
        report = recipe_of(recipe, option.steps, work).run()
        for count in range(len(option.steps), 0, -1):
            write_json(file_of(option.steps[:count]), _figures(report, count))
        shutil.rmtree(work)
    found = []
    for option in options:
        values = json.loads(file_of(option.steps).read_text(encoding="utf-8")) if option.steps else {}
        found.append(dataclasses.replace(option, **values))
        if option.steps:
            log.info("%s: KL %.4f, perplexity %.3fx", option.name, found[-1].kl, found[-1].perplexity_ratio)
    return found


def _figures(report: Report, count: int) -> dict[str, float]:
    base, row = report.rows[0], report.rows[count]
    assert row.kl is not None  # it was compared with the base
    return {
        "kl": row.kl,
        "perplexity_ratio": row.perplexity / base.perplexity,
        "decode_speedup": (row.decode_tokens_per_second or 1.0) / (base.decode_tokens_per_second or 1.0),
    }


def layer_costs(context: Run, folder: Path, evidence: str) -> dict[str, float]:
    """What rounding each projection alone to NF4 costs the prediction; layers that 4 bits cannot hold are left out.

    Args:
        context: of the model and the data.
        folder: where the figures are remembered.
        evidence: of weights and texts; see `evidence_of`.

    Returns:
        Layer -> KL from the base in nats a token, to second order; see `llmlite.calibration.sensitivity.cost_of_changes`.
    """
    file = folder / f"{fingerprint({**context.recipe.identity(), 'steps': ['layer costs']}, evidence, 2)}.json"
    if not file.is_file():
        log.info("measuring: what 4 bits cost in each layer")
        write_json(file, _measured_costs(context))
    costs: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    return costs


def _measured_costs(context: Run) -> dict[str, float]:
    from llmlite.calibration.blocks import batches_of
    from llmlite.calibration.sensitivity import cost_of_changes
    from llmlite.models.quick import quickened
    from llmlite.quantization.calibrate import quantization_windows
    from llmlite.quantization.error import rounding_changes

    model = context.load_base().eval()
    batches = batches_of(quantization_windows(context)[:_COST_SEQUENCES])
    return cost_of_changes(quickened(model), batches, rounding_changes(model), context.recipe.seed)


def plan_after(model: ModelPlan, steps: Sequence[dict[str, Any]], context: Run) -> ModelPlan:
    """What the steps leave behind, from the configs alone; of an adapter `disk_bytes` counts its base too.

    Raises:
        ConfigError: a step takes no such model, or cannot work on it, for instance widths that cannot be quantized.
    """
    for step in _steps_of(steps):
        if reason := refused(step, model, context):
            raise ConfigError("llmlite shrink", [f"{step_name(step)}: {reason}"])
        before, model = model, step.check(model, context)
        if model.adapters:
            model = dataclasses.replace(model, disk_bytes=model.disk_bytes + before.disk_bytes)
    return model


def sizes_of(model: ModelPlan, context: Run) -> tuple[int, int]:
    """Bytes on disk, and bytes of the weights in memory: a quantized model is loaded as it is stored, a dense one in the run's own type."""
    quantized = model.form in QUANTIZED
    wider = 1.0 if quantized else context.compute_dtype.itemsize / context.storage_dtype.itemsize
    return int(model.disk_bytes), int(model.disk_bytes * wider)
