"""Sensitivities: each way to prune and each way to store, run alone on the model by the ordinary pipeline, and remembered.

A measurement is a recipe of its own, so it is resumed after a kill like any other; when it is complete only its figures are kept.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmlite.config import fingerprint
from llmlite.recipe import Recipe
from llmlite.shrink.search import Option
from llmlite.step import parse_step
from llmlite.storage import write_json

__all__ = ["NOTHING", "measured", "prune_options", "recipe_of", "sizes_of", "store_options"]

log = logging.getLogger(__name__)

NOTHING = Option("")


def prune_options(keeps: Sequence[float], heal_steps: int) -> list[Option]:
    """Shares of the decoder to keep, each healed by distillation from the base when `heal_steps` is not 0; unmeasured."""
    options = []
    for keep in keeps:
        steps: list[dict[str, Any]] = [{"step": "prune.structured", "keep_parameters": keep}]
        if heal_steps:
            steps.append({"step": "distill.whitebox", "max_steps": heal_steps})
        options.append(Option(f"keep {keep:g}{', healed' if heal_steps else ''}", tuple(steps)))
    return options


def store_options(narrow: bool) -> list[Option]:
    """Formats: 8 bit, calibrated 4 bit, and that with a low-rank correction; unmeasured.

    Args:
        narrow: also with embedding and activations in bfloat16, where the run computes in float32.
    """
    kinds: list[tuple[str, list[dict[str, Any]]]] = []
    for dtype in ("auto", "bfloat16") if narrow else ("auto",):
        tail, more = ("", {}) if dtype == "auto" else (", 16-bit rest", {"dtype": dtype})
        nf4 = {"step": "quantize", "scheme": "nf4", **more}
        kinds += [
            (f"int8{tail}", [{"step": "quantize", "scheme": "int8", **more}]),
            (f"nf4{tail}", [nf4]),
            (f"nf4 + rank 16{tail}", [nf4, {"step": "correct", "r": 16}]),
        ]
    return [Option(name, tuple(steps)) for name, steps in kinds]


def recipe_of(recipe: Recipe, steps: Sequence[dict[str, Any]], folder: Path) -> Recipe:
    """The recipe with these steps and this output folder."""
    parsed = []
    for index, values in enumerate(steps):
        step, problems = parse_step(dict(values), index)
        assert step is not None, problems  # they are ours
        parsed.append(step)
    return dataclasses.replace(recipe, steps=tuple(parsed), output_dir=str(folder), overwrite_output_dir=False, dry_run=False)


def measured(recipe: Recipe, option: Option, folder: Path) -> Option:
    """The option with its figures: read from `folder` when it was measured before, else run.

    Args:
        recipe: model, data and seed; its steps do not count.
        option: what to run.
        folder: where figures are remembered.

    Raises:
        LlmliteError: the run cannot be made; what it has done is kept and continued.
    """
    key = fingerprint({**recipe.identity(), "steps": list(option.steps)}, 1)
    file, work = folder / f"{key}.json", folder / f"{key}.run"
    if file.is_file():
        values = json.loads(file.read_text(encoding="utf-8"))
        log.info("%s: measured before, KL %.4f", option.name, values["kl"])
    else:
        log.info("measuring: %s", option.name)
        report = recipe_of(recipe, option.steps, work).run()
        base, last = report.rows[0], report.rows[-1]
        values = {
            "option": option.name,
            "kl": last.kl,
            "perplexity_ratio": last.perplexity / base.perplexity,
            "decode_speedup": (last.decode_tokens_per_second or 1.0) / (base.decode_tokens_per_second or 1.0),
        }
        write_json(file, values)
        shutil.rmtree(work)
    return Option(option.name, option.steps, float(values["kl"]), float(values["perplexity_ratio"]), float(values["decode_speedup"]))


def sizes_of(recipe: Recipe, steps: Sequence[dict[str, Any]], folder: Path) -> tuple[int, int]:
    """Bytes on disk and bytes of the weights in memory after these steps, from the configs alone.

    Raises:
        ConfigError: the steps do not go together, for instance widths that cannot be quantized.
    """
    from llmlite.context import Run
    from llmlite.models.size import expected_bytes

    context = Run(recipe)
    if not steps:
        return expected_bytes(context.config, dtype=context.storage_dtype), expected_bytes(context.config, dtype=context.compute_dtype)
    rows = recipe_of(recipe, steps, folder / "never-made").check().rows
    on_disk = rows[-1]["disk_bytes"] + (rows[-2]["disk_bytes"] if rows[-1]["adapters"] else 0)
    quantized = rows[-1]["form"] in {"int8", "nf4", "fp4"}
    wider = context.compute_dtype.itemsize / context.storage_dtype.itemsize
    return int(on_disk), int(on_disk if quantized else on_disk * wider)
