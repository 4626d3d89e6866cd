"""A Recipe: which model, which data, which steps in which order, and where the result goes. A dataclass that lists Steps.

Presets are subclasses with other defaults. Options come from the class, then a YAML file, then flags, each winning over the one before;
they are merged as plain values and validated once, so that every problem is reported together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

import pydantic

from llmlite.config import near, read_yaml, settings, shorten, to_mapping, unknown_option, validate
from llmlite.data.settings import Data
from llmlite.errors import ConfigError, counted
from llmlite.evaluating import EvaluateSettings
from llmlite.expected import Expected, ExpectedSettings
from llmlite.gate import Gate, GateSettings
from llmlite.models.settings import Model
from llmlite.paths import PathText
from llmlite.step import Step, name_of_step, parse_step, step_class

if TYPE_CHECKING:
    from llmlite.report import Report

__all__ = ["NOT_IN_IDENTITY", "DataSettings", "ModelSettings", "Recipe", "Steps"]

R = TypeVar("R", bound="Recipe")

_PARTS: dict[str, tuple[type[Any], str]] = {"model": (Model, "name"), "data": (Data, "train")}

# What may change between a run and its continuation without changing what comes out.
NOT_IN_IDENTITY = frozenset(
    {"gate", "expected", "evaluate", "estimate_energy", "grid_grams_per_kwh", "dry_run", "overwrite_output_dir", "output_dir"}
    | {"push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "hub_accept_license"}
    | {"report_to"}  # who is told, not what is done
    | {"api_key_env", "concurrency", "max_retries", "request_timeout"}  # how a teacher's API is asked, not what
    | {"device_map", "max_memory", "teacher_device_map", "teacher_max_memory", "teacher_tp_plan"}  # where weights lie
)


def _model_of(value: Any) -> Any:
    return Model(name=str(value)) if isinstance(value, str | Path) else value


def _data_of(value: Any) -> Any:
    return Data(train=str(value)) if isinstance(value, str | Path) else value


def _steps_of(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


ModelSettings = Annotated[Model, pydantic.BeforeValidator(_model_of)]
"""A `Model`, or a name for one."""
DataSettings = Annotated[Data, pydantic.BeforeValidator(_data_of)]
"""A `Data`, or a name for its training text."""
Steps = Annotated[tuple[Step, ...], pydantic.BeforeValidator(_steps_of)]
"""A list of steps."""


@settings
class Recipe:
    """A whole compression: a model, data, steps in order, and a folder for the result."""

    name: ClassVar[str] = "recipe"
    """Names the default output folder."""

    model: ModelSettings = Model()
    """Hub id, local folder or .gguf file. Left out: SmolLM2-135M-Instruct from the cache or the installed package, offline."""
    data: DataSettings = Data()
    """Hub id, JSON/JSONL/Parquet/CSV/TXT file or folder. Left out: the Python documentation inside every interpreter, offline."""
    steps: Steps = ()
    """What is done, in order."""
    output_dir: PathText | None = None
    """Folder for the result. Left out: outputs/ and the recipe's name."""
    seed: Annotated[int, pydantic.Field(ge=0)] = 0
    """Seed of everything random."""
    max_steps: Annotated[int, pydantic.Field(ge=1)] | None = None
    """Optimizer steps of every training step, instead of what the steps say."""
    gate: GateSettings = Gate()
    """Limits that stop the run (exit code 3) when a step's result crosses one, for instance {perplexity_increase: 0.05, kl: 0.1, agreement: 0.9}. With
    {when: end} only the last step's result is held against them. A step's own gate replaces it. It may be changed when a stopped run is continued."""
    expected: ExpectedSettings = Expected()
    """Figures that `llmlite shrink` foretold of the result; the report has them beside what was obtained. They change nothing."""
    evaluate: EvaluateSettings = None
    """Measure what every step left, loaded from disk, when all are done, as `llmlite evaluate DIR --each_step` does: true, or a mapping of its options, such as
    {tasks: [my_task.yaml], batch_sizes: [1, 8], repeats: 5}. A finished run is only measured. Left out: each step gets a short look in memory."""
    estimate_energy: bool = False
    """Let codecarbon estimate the energy of each step where the machine has no counter (llmlite[energy]). Counters are read anyway."""
    grid_grams_per_kwh: Annotated[float, pydantic.Field(ge=0)] | None = None
    """Grams of CO2 for each kilowatt hour of your grid. Left out: energy is reported and no CO2."""
    dry_run: bool = False
    """Print the plan (parameters, bytes, memory, tokens, disk) and stop; no weights are loaded."""
    overwrite_output_dir: bool = False
    """Start afresh in an output folder that holds another run. Left out: such a folder is refused, the same run is continued."""
    push_to_hub: bool = False
    """Upload the result at the end. Nothing is uploaded unasked."""
    hub_model_id: str | None = None
    """Where to upload: owner/name."""
    hub_private_repo: bool = True
    """Whether only you can see the uploaded repository. An existing one of the other kind is refused, before anything is computed."""
    hub_revision: str | None = None
    """Branch to upload to; made when it is not there. Left out: the repository's default branch."""
    hub_accept_license: bool = False
    """Publish what is made of a gated or non-commercial base: you have read its terms. Private uploads need no such word."""

    @classmethod
    def expand_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Let ``LoraInt4(r=8, max_length=256)`` reach the options of the recipe's steps, data and model."""
        own = _own_fields(cls)
        if all(name in own for name in options):
            return options
        recipe = cls.from_options((f"{cls.__name__}(...)", {name: _plain(value, name) for name, value in options.items()}))
        return {name: getattr(recipe, name) for name in own}

    @classmethod
    def from_options(cls: type[R], *layers: tuple[str, Mapping[str, Any]]) -> R:
        """Build a recipe from layers of options, later ones winning.

        Args:
            layers: pairs of where the options stand (a file name, ``flags``) and the options. Keys are the recipe's own fields, the fields of
                its model, data and steps without further path where that is unambiguous (``r``, ``max_length``), or dotted paths
                (``steps.0.keep``, ``data.packing``).

        Raises:
            ConfigError: every unknown, ill-typed or contradictory option of every layer.
        """
        merged: dict[str, Any] = {name: _plain(getattr(cls, name, None), name) for name in _own_fields(cls)}
        problems: list[str] = []
        for where, options in layers:
            for key, value in sorted(options.items(), key=lambda item: (str(item[0]) not in {"model", "data", "steps"}, "." in str(item[0]))):
                problem = _assign(merged, str(key), value)
                if problem:
                    problems.append(f"{where}: {problem}" if len(layers) > 1 else problem)
        where = " + ".join(place for place, options in layers if options) or cls.__name__
        recipe, more = cls._validated(merged)
        if problems or more or recipe is None:
            raise ConfigError(where, problems + more)
        return recipe

    @classmethod
    def from_file(cls: type[R], path: Path | str, **options: Any) -> R:
        """Read a recipe from YAML; keyword options win over the file.

        Raises:
            ConfigError: see `from_options` and `read_yaml`.
        """
        return cls.from_options((str(path), read_yaml(path)), ("options", options))

    @classmethod
    def _validated(cls: type[R], merged: dict[str, Any]) -> tuple[R | None, list[str]]:
        problems: list[str] = []
        values = dict(merged)
        for name, (part, _) in _PARTS.items():
            value = values[name]
            if not isinstance(value, Mapping):
                problems.append(f"{name}={value!r} should be a name, or a mapping of options.")
                values[name] = part()
                continue
            built, more = validate(part, value, name)
            problems += more
            values[name] = built if built is not None else part()
        steps = values["steps"]
        if not isinstance(steps, Sequence) or isinstance(steps, str):
            problems.append(f"steps={steps!r} should be a list of steps.")
            steps = []
        elif not steps:
            problems.append("'steps' is empty. A recipe has at least one step; `llmlite steps` lists them.")
        parsed = [parse_step(step, index) for index, step in enumerate(steps)]
        for _, more in parsed:
            problems += more
        values["steps"] = tuple(step for step, _ in parsed if step is not None)
        problems += [
            f"steps[{index}].gate: when=end is of the recipe's gate; a step's own is for its own result. Leave 'when' out, or move it to the recipe's."
            for index, (step, _) in enumerate(parsed)
            if step is not None and step.gate.when == "end"
        ]
        recipe, more = validate(cls, values, "")
        return recipe, problems + more

    def to_mapping(self, defaults: bool = True) -> dict[str, Any]:
        """Plain values, every default written out."""
        mapping: dict[str, Any] = to_mapping(self, name_of_step, defaults)
        return mapping

    def identity(self) -> dict[str, Any]:
        """The plain values that could change the result: what `recipe.yaml` in the output folder holds, and what a continuation must agree with."""

        def kept(part: Mapping[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in part.items() if key not in NOT_IN_IDENTITY}

        mapping = kept(self.to_mapping())
        return mapping | {"model": kept(mapping["model"]), "steps": [kept(step) for step in mapping["steps"]]}

    @property
    def folder(self) -> Path:
        """Where the result goes."""
        return Path(self.output_dir) if self.output_dir else Path("outputs") / self.name

    def check(self) -> Any:
        """The plan, in seconds and without weights. See `llmlite.plan.check`."""
        from llmlite.plan import check

        return check(self)

    def run(self, output_dir: Path | str | None = None) -> Report:
        """Do it. See `llmlite.pipeline.run`."""
        from llmlite.pipeline import run

        return run(self if output_dir is None else dataclasses.replace(self, output_dir=str(output_dir)))


def _own_fields(cls: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _plain(value: Any, name: str) -> Any:
    plain = to_mapping(value, name_of_step, defaults=True)
    return list(plain) if name == "steps" and isinstance(plain, list | tuple) else plain


def _assign(merged: dict[str, Any], key: str, value: Any) -> str | None:
    """Put one option where it belongs in the merged plain values. Returns the problem, if there is one."""
    if key in _PARTS and isinstance(value, str | Mapping):
        # another model or text starts from the defaults: what a preset sets for its own text (how many rows, say) is not meant for yours
        part, shorthand = _PARTS[key]
        merged[key] = _plain(part(), key) | (dict(value) if isinstance(value, Mapping) else {shorthand: value})
    elif key == "evaluate" and value is True and isinstance(merged[key], dict):
        pass  # a flag without a value switches on what the file says
    elif key in merged:
        merged[key] = value
    elif "." in key:
        return _assign_path(merged, key.split("."), value)
    else:
        return _assign_short(merged, key, value)
    return None


def _assign_path(merged: dict[str, Any], path: list[str], value: Any) -> str | None:
    if path[0] == "evaluate" and not isinstance(given := merged["evaluate"], dict):
        if not (given is None or isinstance(given, bool)):
            return f"evaluate={shorten(repr(given))} should be true, false or a mapping of its options, {'.'.join(path)} among them."
        merged["evaluate"] = {}  # an option of it switches it on
    place: Any = merged
    for depth, part in enumerate(path[:-1]):
        so_far = ".".join(path[: depth + 1])
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                return f"no step '{so_far}'. The recipe has {counted(len(place), 'step')}, numbered from 0."
            step = place[int(part)]
            place[int(part)] = place = {"step": step} if isinstance(step, str) else step
            if isinstance(place, dict) and path[depth + 1] == "gate":
                place.setdefault("gate", {})  # a mapping that YAML seldom writes out
        elif isinstance(place, dict) and isinstance(place.get(part), dict | list):
            place = place[part]
        else:
            guess = near(part, [key for key in place if isinstance(place[key], dict | list)]) if isinstance(place, dict) else None
            return f"no option '{'.'.join(path)}'." + (f" Did you mean '{'.'.join([*path[:depth], guess, *path[depth + 1 :]])}'?" if guess else "")
    if not isinstance(place, dict):
        return f"no option '{'.'.join(path)}'."
    place[path[-1]] = value
    return None


def _assign_short(merged: dict[str, Any], key: str, value: Any) -> str | None:
    steps = merged["steps"] if isinstance(merged["steps"], list) else []
    homes = [index for index, step in enumerate(steps) if key in _options_of_step(step)]
    if len(homes) > 1:
        paths = [f"steps.{index}.{key}" for index in homes]
        return f"'{key}' is an option of several steps. Say which: {', '.join(paths)}."
    if homes:
        step = steps[homes[0]]
        steps[homes[0]] = (step if isinstance(step, dict) else {"step": step}) | {key: value}
        return None
    for name in ("data", "model"):
        if key in _own_fields(_PARTS[name][0]):
            if isinstance(merged[name], dict):  # else the whole of it is a problem of its own
                merged[name][key] = value
            return None
    known = {*merged, *_own_fields(Data), *_own_fields(Model), *(name for step in steps for name in _options_of_step(step))} - {"name", "train"}
    return unknown_option(key, known)


def _options_of_step(step: Any) -> list[str]:
    """Names of the options of a step as YAML gives it; none for one that is not known."""
    name = step.get("step") if isinstance(step, Mapping) else step
    try:
        return _own_fields(step_class(name)) if isinstance(name, str) else []
    except ValueError:
        return []
