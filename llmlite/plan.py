"""The plan: everything about a recipe that can be found in seconds, without loading a weight, and whose output folder it is."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

from llmlite.adapters.correct import Correct
from llmlite.adapters.settings import added_adapter
from llmlite.config import read_yaml, shorten, to_yaml
from llmlite.context import Run
from llmlite.errors import ConfigError, LlmliteError, LoadError, OutputError, first_line
from llmlite.loading import blockwise_peak, decide_loading, measuring_bytes, needs_whole, not_dispatched, require_dispatchable
from llmlite.recipe import Recipe
from llmlite.report import human_bytes
from llmlite.step import QUANTIZED, UNQUANTIZED, ModelPlan, Step, step_name
from llmlite.storage import require_space, telling, write_text
from llmlite.training.settings import TrainingStep

__all__ = ["Plan", "check", "claim", "made_before_adapter", "plan_of_base", "refused", "size_line"]

_MOST_LAYERS = 10_000

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a recipe will do, found without loading a weight.

    Attributes:
        rows: the base and each step: name, form, parameters, bytes, tokens, notes. See `ModelPlan`.
        disk_bytes: bytes the run writes at most.
        peak_bytes: peak memory of the hungriest step, on each device of the launch.
        launch: what a launch of several processes means, else empty.
        loading: what is to be said of loading the model in blocks, or of not doing so, else empty.
        evaluation: what will be measured of the base and the reloaded checkpoints, where the recipe asks for that, else empty.
    """

    rows: tuple[dict[str, Any], ...]
    disk_bytes: int
    peak_bytes: int
    launch: str = ""
    loading: str = ""
    evaluation: str = ""


def check(recipe: Recipe, context: Run | None = None) -> Plan:
    """Find everything that can be found in seconds: settings, data, architecture, the output folder, each step against what the one before leaves.

    Args:
        recipe: what to check.
        context: a `Run` of this recipe, to be used on afterwards; it keeps what was read.

    Raises:
        ConfigError: every problem of the steps, together.
        LlmliteError: model, data or output folder that cannot be used.
    """
    context = context or Run(recipe)
    from llmlite.calibration.memory import spilled_bytes
    from llmlite.models.adapted import longest_of
    from llmlite.models.families import family_of
    from llmlite.models.load import require_matching
    from llmlite.models.size import expected_bytes

    if recipe.push_to_hub and not recipe.hub_model_id:
        raise ConfigError(recipe.name, ["push_to_hub needs hub_model_id: where to upload, as owner/name."])
    _refuse_launch(context)
    require_dispatchable(recipe, context)
    _refuse_other_contents(recipe)
    context.check_data()
    config = context.config
    family_of(config)
    _require_buildable(context)
    require_matching(context.tokenizer, config)
    _require_new_tokens(context)
    longest = longest_of(config)
    if longest and recipe.data.max_length > longest:
        raise ConfigError(
            recipe.name, [f"max_length={recipe.data.max_length} should be at most {longest}, the longest sequence that {recipe.model.name} allows."]
        )
    rows, model = _rows(recipe, context, blocks=False)
    why_not = needs_whole(recipe, context)
    in_blocks = rows if why_not else _rows(recipe, context, blocks=True)[0]
    loading = decide_loading(recipe, context, _peak(rows), _peak(in_blocks), why_not)
    rows = in_blocks if context.blockwise else rows
    _require_measurable(recipe, context)
    if recipe.push_to_hub and context.is_main:
        _check_push(recipe, context, model)
    # each step's checkpoint, the held-out distributions, and twice the trained state for the checkpoints of training
    disk = sum(row["disk_bytes"] + 8 * 2 * row["trained_parameters"] for row in rows[1:]) + rows[0]["disk_bytes"] // 2
    disk += rows[0]["disk_bytes"] // 2 if recipe.evaluate else 0  # the distributions once more, until all is measured
    disk += expected_bytes(config, dtype=context.compute_dtype)  # at most: a walk's changed blocks, until its step is complete
    if context.blockwise:
        measured = recipe.data.evaluation_rows * recipe.data.max_length
        disk += max(spilled_bytes(config, context.compute_dtype, row["tokens"], measured) for row in rows)
    require_space(recipe.folder, int(disk))
    return Plan(tuple(rows), int(disk), _peak(rows), context.layout.sentence(context.blockwise), loading, _evaluation(recipe, context))


def plan_of_base(context: Run) -> ModelPlan:
    """The base as the first step finds it, loaded whole or by its `device_map`."""
    from llmlite.models.size import expected_bytes, runtime_bytes, size_of_config

    config = context.config
    form, stored = _stored_form(config)
    weights = expected_bytes(config, dtype=context.compute_dtype, **stored) if context.device_map is None else context.dispatched_bytes
    return ModelPlan(
        config,
        form=form,
        parameters=size_of_config(config).parameters,
        disk_bytes=expected_bytes(config, dtype=context.storage_dtype, **stored),
        peak_bytes=weights + runtime_bytes(context.device) + measuring_bytes(config),
    )


def _rows(recipe: Recipe, context: Run, *, blocks: bool) -> tuple[list[dict[str, Any]], ModelPlan]:
    """The plan's rows for a model that is loaded whole or in blocks, and what the last step leaves.

    Raises:
        ConfigError: every problem of the steps, together.
    """
    from llmlite.models.quick import slow_here
    from llmlite.models.size import runtime_bytes

    model = plan_of_base(context)
    slow = slow_here(context.device, context.compute_dtype, model.form)
    rows = [{**_plan_row("base", model), "notes": (slow,) if slow else ()}]
    if blocks:
        rows[0]["peak_bytes"] = blockwise_peak(model, model, context)
    problems: list[str] = []
    for index, step in enumerate(recipe.steps):
        context.position = index
        name = step_name(step)
        if reason := refused(step, model, context):
            problems.append(f"steps[{index}] {name}: {reason}")
            continue
        if reason := not_dispatched(step, model.form, context):
            problems.append(f"steps[{index}] {name}: {reason}")
        before = model
        try:
            model = step.check(model, context)
        except ConfigError as error:
            problems += [f"steps[{index}] {problem if problem.startswith(name) else f'{name}: {problem}'}" for problem in error.problems]
            continue
        peak = context.layout.peak_bytes(model.peak_bytes, model.trained_parameters, model.parameters, rows[0]["peak_bytes"])
        rows.append({**_plan_row(name, model), "peak_bytes": blockwise_peak(before, model, context) if blocks else peak})
    if problems:
        raise ConfigError(recipe.name, problems)
    if blocks and model.form not in UNQUANTIZED:  # the fresh process that proves the result loads it whole
        rows[-1]["peak_bytes"] = max(rows[-1]["peak_bytes"], model.disk_bytes + runtime_bytes(context.device))
    return rows, model


def refused(step: Step, model: ModelPlan, context: Run) -> str:
    """Why a step takes no such model, as a sentence, before its own `check` is asked; empty when it takes it.

    Args:
        step: what is to be done.
        model: what it would get.
        context: of the run; its launch may split what the step trains.
    """
    if model.form not in step.takes:
        wanted = " or ".join(sorted(step.takes))
        return f"takes a model that is {wanted}; the one that it would get is {model.form}. Prune and distil before quantizing; adapters come last."
    if model.adapters and not step.takes_adapters:
        return "the model already carries an adapter. Put a step 'merge' before this one, or do it before the adapter is trained."
    if context.layout.sharded and isinstance(step, TrainingStep) and (reason := step.no_sharding(model.form, context.layout)):
        return reason
    return step.no_tracker() if isinstance(step, TrainingStep) else ""


def _stored_form(config: Any) -> tuple[str, dict[str, Any]]:
    """How a base's weights are stored (see `ModelPlan.form`), and what `expected_bytes` wants to know of it. A library other than bitsandbytes gives its name,
    which no step takes."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return "dense", {}
    stored = found if isinstance(found, dict) else found.to_dict()
    form = "int8" if stored.get("load_in_8bit") else stored.get("bnb_4bit_quant_type", "fp4") if stored.get("load_in_4bit") else stored.get("quant_method")
    if form not in QUANTIZED:
        return str(form), {}
    return str(form), {"scheme": form, "double_quant": bool(stored.get("bnb_4bit_use_double_quant")), "skip": stored.get("llm_int8_skip_modules") or ()}


def _refuse_launch(context: Run) -> None:
    """Raise ConfigError for a launch that cannot work, or is not the one asked for, before it costs anything."""
    if other := context.layout.not_as_asked():
        raise ConfigError("the launch", [other])
    if context.layout.kind not in {"one", "ddp"}:
        from accelerate.utils import DistributedType

        on_accelerators = context.processes.distributed_type not in {DistributedType.NO, DistributedType.MULTI_CPU}
        problems = context.layout.problems(on_accelerators)
        if problems:
            raise ConfigError("the launch", problems)


def _require_buildable(context: Run) -> None:
    """Build the model once without storage: a config can be read and still describe nothing.

    Raises:
        LoadError: transformers cannot build it.
    """
    from llmlite.models.families import family_of
    from llmlite.models.size import meta_model

    place = context.source.folder / "config.json"
    try:
        layers = family_of(context.config).layers(context.config)
        if not isinstance(layers, int) or not 0 <= layers <= _MOST_LAYERS:
            raise LoadError(f"model: {place} says that the model has {layers!r} layers. Wanted: a whole number up to {_MOST_LAYERS:,}.")
        meta_model(context.config)
    except LlmliteError:
        raise
    except Exception as error:  # whatever a wrong number does in a model's constructor
        raise LoadError(f"model: {place} describes no model that transformers can build ({type(error).__name__}: {shorten(first_line(error), 200)}).") from None


def _require_new_tokens(context: Run) -> None:
    """Raise ConfigError for added tokens that are none, or that a vocabulary will lose."""
    from llmlite.models.load import load_tokenizer

    tokens = context.recipe.model.add_tokens
    if not tokens:
        return
    known = load_tokenizer(context.source, dataclasses.replace(context.recipe.model, add_tokens=())).get_vocab()
    problems = [f"add_tokens: '{token}' is a token of this tokenizer already. Leave it out." for token in tokens if token in known]
    problems += [f"add_tokens: '{token}' is named twice." for token in dict.fromkeys(tokens) if tokens.count(token) > 1]
    if any(step_name(step) == "prune.vocabulary" for step in context.recipe.steps):
        problems.append("add_tokens and prune.vocabulary in one recipe are not built: prune the vocabulary first, then add tokens to that folder.")
    if problems:
        raise ConfigError(context.recipe.name, problems)


def _require_measurable(recipe: Recipe, context: Run) -> None:
    """Raise for an `evaluate` that would fail only when all steps are done."""
    from llmlite.evaluation.reloaded import require_measurable

    if recipe.evaluate is None:
        return
    if context.blockwise:
        raise ConfigError(
            recipe.name,
            [
                "evaluate: the model is loaded one block at a time (load: blocks), and speed, answers and tasks want it whole. Leave evaluate out; afterwards "
                "`llmlite evaluate DIR --each_step`, with --device_map auto where the models need it."
            ],
        )
    require_measurable(recipe.evaluate, context, "evaluate")


def _evaluation(recipe: Recipe, context: Run) -> str:
    """What will be measured behind the steps, as a sentence; empty where the recipe does not ask for it."""
    if recipe.evaluate is None:
        return ""
    names = [step_name(step).rpartition(":")[2] for step in recipe.steps]
    places = set((context.device_map or {}).values())
    return recipe.evaluate.sentence(names, offloaded="disk" in places or ("cpu" in places and context.device.type != "cpu"))


def _check_push(recipe: Recipe, context: Run, result: ModelPlan) -> None:
    """Ask the Hub now for what would fail after hours.

    Raises:
        ConfigError: an adapter whose base nobody else would have.
        HubError: the Hub refuses.
    """
    from llmlite.hub.preflight import preflight

    made_by = made_before_adapter(recipe)
    if result.adapters and made_by:
        raise ConfigError(
            recipe.name,
            [
                f"push_to_hub: the adapter would sit on a model that this run makes itself ({', '.join(made_by)}), which is not on the Hub. Run without "
                "push_to_hub, push the folder of the step before the adapter, then: llmlite push DIR OWNER/NAME --base_model OWNER/BASE"
            ],
        )
    if result.adapters and context.source.hub_id is None:
        log.warning(
            "the base %s is a local folder, so nobody could load the uploaded adapter from the Hub alone; if the base is there, push later with "
            "llmlite push DIR %s --base_model OWNER/NAME",
            context.base_name(),
            recipe.hub_model_id,
        )
    preflight(
        recipe.hub_model_id or "",
        recipe.hub_private_repo,
        recipe.hub_revision,
        base_model=context.source.hub_id,
        accept_license=recipe.hub_accept_license,
    )


def made_before_adapter(recipe: Recipe) -> list[str]:
    """Steps whose result the adapter sits on that the recipe ends with, besides rounding to nearest, which anybody can do again while loading.

    Codes chosen on calibration text are nobody else's: an adapter on them needs them, not those that ``BitsAndBytesConfig`` would give. Steps after the one
    that adds the adapter train it on, and what it sits on stays.
    """
    adding = [index for index, step in enumerate(recipe.steps) if isinstance(step, Correct) or added_adapter(step)]
    found = []
    for step in recipe.steps[: adding[-1] if adding else -1]:
        name = step_name(step)
        if name != "quantize":
            found.append(name)
        elif getattr(step, "chooses_codes", False):
            found.append("quantize with calibrate: true")
    return found


def _peak(rows: list[dict[str, Any]]) -> int:
    return max(int(row["peak_bytes"]) for row in rows)


def _plan_row(name: str, model: ModelPlan) -> dict[str, Any]:
    row = {field.name: getattr(model, field.name) for field in dataclasses.fields(model) if field.name != "config"}
    return {"step": name, **row}


def _refuse_other_contents(recipe: Recipe) -> None:
    """Refuse an output folder that holds something else, or a run with other settings.

    Raises:
        OutputError: saying what is there and what to do; nothing was touched.
    """
    out = recipe.folder
    for place in (out, *out.parents):
        if place.exists() and not place.is_dir():
            raise OutputError(f"output_dir: {place} is a file. Choose another --output_dir.")
    strangers = _contents(out)
    if not strangers:
        return
    if "recipe.yaml" not in strangers:
        raise OutputError(f"output_dir: {out} holds something else ({', '.join(strangers[:5])}). Choose another --output_dir; nothing in it was touched.")
    old, new = read_yaml(out / "recipe.yaml"), recipe.identity()
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if changed and not recipe.overwrite_output_dir:
        raise OutputError(
            f"output_dir: {out} holds a run with other settings ({_differences(old, new, changed)}). "
            "Choose another --output_dir, or --overwrite_output_dir to start afresh in this one."
        )


def _contents(out: Path) -> list[str]:
    return sorted(p.name for p in out.iterdir() if p.name != ".lock") if out.is_dir() else []


def _differences(old: dict[str, Any], new: dict[str, Any], keys: list[str]) -> str:
    found: list[str] = []

    def walk(path: str, before: Any, after: Any) -> None:
        if isinstance(before, dict) and isinstance(after, dict):
            for key in {**before, **after}:
                walk(f"{path}.{key}", before.get(key), after.get(key))
        elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
            for index, (one, other) in enumerate(zip(before, after, strict=True)):
                walk(f"{path}.{index}", one, other)
        elif before != after:
            found.append(f"{path}: {before!r} there, {after!r} now")

    for key in sorted(keys):
        walk(key, old.get(key), new.get(key))
    return "; ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")


def claim(recipe: Recipe) -> None:
    """Make the output folder this recipe's own: note the recipe in it, after removing an older run where that was asked for."""
    out = recipe.folder
    with telling(out):
        if recipe.overwrite_output_dir and _contents(out):
            log.warning("starting afresh in %s", out)
            # the old recipe goes last: while it is there, whatever a kill leaves is known to be a run's and can be cleared by the same command
            for path in sorted((out / name for name in _contents(out)), key=lambda path: path.name == "recipe.yaml"):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        write_text(out / "recipe.yaml", to_yaml(recipe.identity()))


def size_line(plan: Plan) -> str:
    """The plan in one line, and more for a launch of several processes, a model in blocks, or an evaluation behind the steps."""
    line = f"disk {human_bytes(plan.disk_bytes)}, peak memory about {human_bytes(plan.peak_bytes)}"
    return "\n".join(filter(None, (f"{line} on each device" if plan.launch else line, plan.launch, plan.loading, plan.evaluation)))
