"""The command line: `llmlite ...` and `python -m llmlite.recipes.NAME`. Options are the settings' fields; their docs are the help.

Nothing here imports torch: help, typing errors and unknown options answer at once.
"""

from __future__ import annotations

import dataclasses
import logging
import shlex
import sys
import time
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from llmlite import __version__
from llmlite.config import default_of, field_doc, near, parse_flag, read_yaml, to_mapping, to_yaml
from llmlite.data.settings import Data
from llmlite.errors import ConfigError, Interrupted, LlmliteError
from llmlite.models.load import Model
from llmlite.recipe import Recipe
from llmlite.step import STEPS, Step, name_of_step, step_class

__all__ = ["main", "recipe_main"]

_HIDDEN = frozenset({"steps"})
# torchrun takes every option that begins like one of its own, even behind the module's name: `--r` would be its --role or --redirects.
_ALIASES = {"r": ("--lora_r",)}
Section = tuple[str, list[click.Option]]


# Options from fields ------------------------------------------------------------------------------------------------------------------


def _options_of(cls: type[Any], defaults: Any, taken: set[str], skip: frozenset[str] = frozenset()) -> list[click.Option]:
    """Click options for a settings class, help and default taken from its fields; names in `taken` are left out and new ones added."""
    options = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in taken or field.name in skip:
            continue
        taken.add(field.name)
        value = default_of(field) if defaults is cls else getattr(defaults, field.name)
        bare: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if _admits(hints[field.name], bool) else {}
        shown = _shown(value)
        options.append(
            click.Option(
                [f"--{field.name}", *_ALIASES.get(field.name, ()), field.name],
                help=field_doc(cls, field.name) + (f"  [default: {shown}]" if shown else ""),
                metavar=_metavar(hints[field.name]),
                type=click.UNPROCESSED,
                **bare,
            )
        )
    return options


def _shown(value: Any) -> str:
    if value is None or value == {} or isinstance(value, Model | Data):
        return ""
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _metavar(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _metavar(arguments[0])
    if origin is typing.Literal:
        return "|".join(map(str, arguments))
    if origin in {typing.Union, types.UnionType}:
        return _metavar(next(a for a in arguments if a is not type(None)))
    return {bool: "BOOL", int: "N", float: "X", str: "TEXT", Model: "MODEL", Data: "DATA"}.get(hint, "LIST")


def _admits(hint: Any, kind: type) -> bool:
    return hint is kind or any(_admits(argument, kind) for argument in typing.get_args(hint))


def _takes_text(recipe: type[Recipe]) -> Callable[[str], bool]:
    """Whether an option keeps numbers and words as text, by its name without path."""
    hints: dict[str, Any] = {}
    for cls in (*{type(step) for step in recipe.steps}, Data, Model, recipe):
        hints.update(typing.get_type_hints(cls))
    return lambda name: _admits(hints.get(name.rpartition(".")[2]), str) or name in {"model", "data"}


class _RecipeCommand(click.Command):
    """A command whose help has one section for each part of the recipe."""

    def __init__(self, sections: Sequence[Section], **kwargs: Any) -> None:
        super().__init__(params=[option for _, options in sections for option in options], **kwargs)
        self.sections = sections

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Called by click."""
        for title, options in self.sections:
            records = [record for option in options if (record := option.get_help_record(ctx))]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)
        with formatter.section("Any option of any part, by its path"):
            formatter.write_dl([("--steps.0.NAME, --data.NAME, --model.NAME", "For instance --model.revision main.")])


def _sections(recipe: type[Recipe]) -> list[Section]:
    taken: set[str] = set()
    config = click.Option(["--config"], metavar="FILE", help="YAML file with the same options; flags win over it.")
    sections: list[Section] = [("Recipe", [config, *_options_of(recipe, recipe, taken, _HIDDEN)])]
    for index, step in enumerate(recipe.steps):
        title = f"Step {index + 1}: {name_of_step(type(step))} - {(type(step).__doc__ or '').strip().splitlines()[0]}"
        sections.append((title, _options_of(type(step), step, taken)))
    sections.append(("Data", _options_of(Data, recipe.data, taken, frozenset({"train"}))))
    sections.append(("Model", _options_of(Model, recipe.model, taken, frozenset({"name"}))))
    return sections


# Running ------------------------------------------------------------------------------------------------------------------------------


def recipe_main(recipe: type[Recipe], arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m llmlite.recipes.NAME``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = f"python -m llmlite.recipes.{recipe.name}"
    sections = _sections(recipe)

    def callback(**flags: Any) -> None:
        context = click.get_current_context()
        file = flags.pop("config", None)
        given = {name: value for name, value in flags.items() if value is not None}
        more, problems = _dotted(context.args, [option.name or "" for _, options in sections for option in options])
        text = _takes_text(recipe)
        layers: list[tuple[str, Mapping[str, Any]]] = []
        try:
            if file:
                layers.append((file, read_yaml(file)))
            layers.append(("flags", {name: parse_flag(value, text(name)) for name, value in {**given, **more}.items()}))
            built = recipe.from_options(*layers)
        except ConfigError as error:
            raise ConfigError(error.where, [*problems, *error.problems]) from None
        if problems:
            raise ConfigError("the command line", problems)
        _run(built)

    description = (recipe.__doc__ or "").strip()
    shell = _RecipeCommand(
        sections,
        name=recipe.name,
        callback=callback,
        help=description,
        epilog=f"Several devices: accelerate launch -m llmlite.recipes.{recipe.name} [OPTIONS]",
        context_settings=_CONTEXT,
    )
    with _exits(_continuing(command, arguments)):
        shell.main(arguments, prog_name=command, standalone_mode=False)


_CONTEXT: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("-", "_"),
    "ignore_unknown_options": True,
    "allow_extra_args": True,
    "max_content_width": 120,
}


def _dotted(arguments: Sequence[str], known: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Options that click did not know: paths like ``--steps.0.keep 0.5``, and mistakes as sentences."""
    options: dict[str, str] = {}
    problems: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            problems.append(f"'{word}' stands alone; options are written --name value.")
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        if "." in name or not known:
            options[name] = value
        else:
            problems.append(_unknown_flag(name, known))
    return options, problems


def _unknown_flag(name: str, known: Sequence[str]) -> str:
    guess = near(name, known)
    return f"no option --{name}." + (f" Did you mean --{guess}?" if guess else " --help lists them.")


def _run(recipe: Recipe) -> None:
    from rich.console import Console

    from llmlite.pipeline import run
    from llmlite.plan import check, size_line
    from llmlite.report import plan_table
    from llmlite.run import Run

    quiet = not _is_main()
    logging.basicConfig(level=logging.ERROR if quiet else logging.INFO, format="%(message)s", stream=sys.stderr)
    _hush()
    console = Console(quiet=quiet, highlight=False)
    context = Run(recipe)
    plan = check(recipe, context)
    console.print(plan_table(plan.rows))
    console.print(size_line(plan))
    if recipe.dry_run:
        console.print("Dry run: nothing was loaded or written.")
        return
    data = context.evaluation_data
    console.print(f"\n{data.echo}\n", markup=False)
    console.print(f"One example; what is trained stands in ⟦ ⟧:\n{data.preview}\n", markup=False)
    report = run(recipe, context)
    if quiet:
        return
    _show_samples(console, report)
    console.print(report.table())
    merged = report.rows[-1].details.get("perplexity_merged")
    if merged is not None:
        before = report.rows[-1].details["perplexity_before_merge"]
        console.print(
            f"Merged into 16-bit weights in {report.path / 'merged'}: perplexity {before:.4g} -> {merged:.4g} ({merged / before - 1:+.2%})", soft_wrap=True
        )
    console.print(f"\nThe result is in {report.path}; a fresh process loaded it with the same logits (largest difference {report.reload_difference:.1e}):\n")
    console.print(report.loading + "\n", markup=False, soft_wrap=True)


def _show_samples(console: Any, report: Any) -> None:
    samples = [(row.name, row.details.get("sample")) for row in report.rows if row.details.get("sample")]
    if len(samples) < 2:
        return
    console.print("\nA held-out question, answered by the base and by the result:", markup=False)
    console.print(f"  question  {samples[0][1]['prompt']}", markup=False)
    for name, sample in (samples[0], samples[-1]):
        console.print(f"  {name:9s} {sample['answer']}", markup=False)
    console.print(f"  expected  {samples[0][1]['expected']}\n", markup=False)


def _continuing(command: str, arguments: Sequence[str]) -> str:
    """The command that continues a run: the one given, without the flag that would start it afresh."""
    kept: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word.partition("=")[0].replace("-", "_") != "__overwrite_output_dir":
            kept.append(word)
        elif "=" not in word and rest and not rest[0].startswith("--"):
            rest.pop(0)
    return f"{command} {shlex.join(kept)}".rstrip()


def _is_main() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"


def _speaker() -> str:
    """Who speaks, where there are several processes."""
    import os

    return f"[process {os.environ.get('RANK', '0')}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def _lost_another_process(error: Exception) -> bool:
    """Whether an error only says that another process of this launch has gone: its own message is the one to read."""
    text = str(error)
    return bool(_speaker()) and any(sign in text for sign in ("Connection closed by peer", "Connection reset by peer", "remote process exited"))


def _hush_loggers() -> None:
    """Silence what other libraries log harmlessly: each request, and of bitsandbytes a kernel that it cannot fetch."""
    for name in ("bitsandbytes", "httpx", "httpx2", "httpcore", "httpcore2", "filelock", "urllib3", "fsspec"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _hush() -> None:
    """Silence other libraries' harmless messages, warnings and bars; the Trainer's bar stays."""
    _hush_loggers()
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"(peft|transformers|bitsandbytes|torch)\.")


@contextmanager
def _exits(command: str) -> Iterator[None]:
    """End the process as the errors say: one message and the exit code for ours, click's own for the command line, a traceback for bugs."""
    try:
        yield
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        click.echo(f"Error: {error.format_message()}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo(f"\nInterrupted. What was complete is kept. To continue:\n  {command}", err=True)
        sys.exit(130)
    except LlmliteError as error:
        if error.exit_code == 2 and not _is_main():
            time.sleep(3)  # the main process finds the same in the settings, says it, and the launcher then ends this one
        click.echo(f"{_speaker()}{type(error).__name__}: {error}", err=True)
        if isinstance(error, Interrupted):
            click.echo(f"To continue:\n  {command}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        if _lost_another_process(error):
            click.echo(f"{_speaker()}stopped, because another process of the launch has ended; the reason stands above. What was complete is kept.", err=True)
            sys.exit(1)
        traceback.print_exc()
        click.echo(f"\n{_speaker()}This is a bug in llmlite {__version__}. What was complete is kept; the same command continues.", err=True)
        sys.exit(1)


# llmlite ... --------------------------------------------------------------------------------------------------------------------------


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="llmlite")
def _group() -> None:
    """Make Hugging Face language models smaller: prune, distil, quantize, finetune. Stock checkpoints in, stock checkpoints out.

    \b
    A preset:       python -m llmlite.recipes.lora_int4 --help
    A whole recipe: llmlite run recipes/lora_int4.yaml
    """


def _file_recipe(file: str, arguments: Sequence[str]) -> Recipe:
    options, problems = _dotted(arguments, [])
    mapping = read_yaml(file)
    text = _takes_text(Recipe)
    try:
        recipe = Recipe.from_options((file, mapping), ("flags", {name: parse_flag(value, text(name)) for name, value in options.items()}))
    except ConfigError as error:
        raise ConfigError(error.where, [*problems, *error.problems]) from None
    if problems:
        raise ConfigError("the command line", problems)
    if recipe.output_dir is None:
        recipe = dataclasses.replace(recipe, output_dir=str(Path("outputs") / Path(file).stem))
    return recipe


@_group.command("run", context_settings={**_CONTEXT, "token_normalize_func": None})
@click.argument("file", metavar="FILE")
@click.pass_context
def _run_command(context: click.Context, file: str) -> None:
    """Run the recipe in a YAML file. Any option can follow: --seed 1, --steps.0.r 8, --data.max_length 1024, --dry_run."""
    _run(_file_recipe(file, context.args))


@_group.command("check", context_settings={**_CONTEXT, "token_normalize_func": None})
@click.argument("file", metavar="FILE")
@click.pass_context
def _check_command(context: click.Context, file: str) -> None:
    """Check a recipe and print its plan, in seconds and without loading weights."""
    _run(dataclasses.replace(_file_recipe(file, context.args), dry_run=True))


@_group.command("evaluate", context_settings={"token_normalize_func": lambda name: name.replace("-", "_"), "max_content_width": 120})
@click.argument("folder", metavar="DIR")
@click.option("--base", metavar="MODEL", help="Hub id or folder of the base. Left out: the run's own.")
@click.option("--data", metavar="DATA", help="Whose held-out rows are measured. Left out: the run's own.")
@click.option("--text", metavar="FILE", help="Plain text, measured by a sliding window instead of the data's rows.")
@click.option("--window", type=click.IntRange(2), help="Tokens of that window.  [default: the data's max_length]")
@click.option("--stride", type=click.IntRange(1), help="New tokens in each window.  [default: half a window]")
@click.option("--most_tokens", type=click.IntRange(2), default=16384, show_default=True, help="Tokens of the text that are read.")
@click.option("--tasks", metavar="NAMES", help="lm-eval tasks, or YAML files of them, separated by commas. Needs llmlite[eval].")
@click.option("--limit", type=click.IntRange(1), help="Questions of each task.  [default: all]")
@click.option("--batch_sizes", default="1,8", show_default=True, metavar="NUMBERS", help="Prompts at a time in the speed measurement.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Of the speed measurement, after one that warms up.")
@click.option("--answers", type=click.IntRange(0), default=3, show_default=True, help="Held-out prompts that both answer.")
@click.option("--estimate_energy", is_flag=True, help="Let codecarbon estimate where the machine has no energy counter. Needs llmlite[energy].")
@click.option("--grid_grams_per_kwh", type=click.FloatRange(0), metavar="G", help="CO2 of your grid; without it no CO2 is stated.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def _evaluate_command(folder: str, tasks: str | None, batch_sizes: str, as_json: bool, **options: Any) -> None:
    """Measure a result beside its base: quality, tasks, speed, memory, energy, answers side by side.

    Both are loaded from disk, one after the other. The figures go into DIR/evaluation.json, and into the card when DIR is a run's.
    """
    import json

    from rich.console import Console

    from llmlite.side_by_side import evaluate

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    _hush_loggers()
    try:
        sizes = tuple(int(size) for size in batch_sizes.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise ConfigError("llmlite evaluate", [f"--batch_sizes {batch_sizes!r} should be numbers from 1, separated by commas, such as 1,8."])
    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    found = evaluate(folder, tasks=names, batch_sizes=sizes, **options)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False)
    console.print(found.table())
    for base, this in zip(found.models["base"]["answers"], found.models["this"]["answers"], strict=True):
        console.print(f"\n  question  {base['prompt']}\n  base      {base['answer']}\n  this      {this['answer']}", markup=False)
    console.print(f"\nThe figures: {found.path / 'evaluation.json'}", markup=False)


class _Bytes(click.ParamType[float]):
    """60MB, 1.5 GB, 500000: a million bytes are a MB."""

    name = "BYTES"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        units = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
        text = str(value).strip().lower()
        number = text.rstrip("kmgtb ")
        try:
            return float(number) * units[text[len(number) :].strip()]
        except (ValueError, KeyError):
            self.fail(f"{value!r} should be a number of bytes, such as 60MB or 1.5GB.", param, ctx)


@_group.command("shrink", context_settings={"token_normalize_func": lambda name: name.replace("-", "_"), "max_content_width": 120})
@click.argument("model", required=False)
@click.option("--target", type=float, help="Share of the 16-bit size that the files may have: 0.5 is half.")
@click.option("--max_bytes", type=_Bytes(), help="Bytes that the files may have: 60MB.")
@click.option("--max_memory", type=_Bytes(), help="Bytes that the weights may need in memory.")
@click.option("--min_speedup", type=float, help="Decoding speed wanted, against the base's on this machine: 1.5.")
@click.option("--max_perplexity_increase", type=click.FloatRange(0), help="Most that perplexity may rise, as a share: 0.2.")
@click.option("--data", metavar="DATA", help="Text to measure, calibrate and heal on. Left out: the Python documentation, offline.")
@click.option("--keeps", default="0.9,0.8,0.7,0.6", show_default=True, help="Shares of the decoder's parameters that are tried.")
@click.option("--heal_steps", type=click.IntRange(0), default=40, show_default=True, help="Optimizer steps of distillation behind pruning.")
@click.option("--max_length", type=click.IntRange(2), help="Tokens of a row.")
@click.option("--calibration_sequences", type=click.IntRange(1), help="Calibration rows.")
@click.option("--evaluation_rows", type=click.IntRange(1), help="Held-out rows that are measured.")
@click.option("--output_dir", metavar="DIR", help="For shrink.yaml, the figures and the result.  [default: outputs/shrink]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--run", "run_it", is_flag=True, help="Run the recipe that was found, into DIR/result.")
def _shrink_command(model: str | None, keeps: str, run_it: bool, output_dir: str | None, seed: int, **options: Any) -> None:
    """Make a model as small as asked: measure what each way costs once, find the best combination, write it as a recipe.

    Ways to prune (the decoder to some share of its parameters, healed by distillation) and to store (8 bit, calibrated 4 bit, low-rank correction) are measured
    alone; their combinations are computed. Measurements are kept in DIR, so other targets cost seconds, and the same command continues after a stop.
    """
    from rich.console import Console

    from llmlite.shrink.shrink import shrink

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    _hush_loggers()
    try:
        shares = tuple(float(keep) for keep in keeps.split(","))
    except ValueError:
        raise ConfigError("llmlite shrink", [f"--keeps {keeps!r} should be numbers between 0 and 1, separated by commas, such as 0.9,0.7."]) from None
    about = {"model": model, "seed": seed, "output_dir": output_dir or "outputs/shrink"}
    about |= {name: options.pop(name) for name in ("data", "max_length", "calibration_sequences", "evaluation_rows")}
    given = {name: value for name, value in about.items() if value is not None}
    recipe = Recipe.from_options(("flags", {"steps": [{"step": "quantize"}], **given}))
    found = shrink(recipe, keeps=shares, run=run_it, **options)
    console = Console(highlight=False)
    console.print(found.table())
    if found.report is not None:
        console.print(found.report.table())
        console.print(found.report.expectation(), markup=False)
        console.print(f"\nThe result is in {found.report.path}:\n\n{found.report.loading}", markup=False)
    elif found.chosen.steps:
        console.print(f"\nThe recipe: {found.folder / 'shrink.yaml'}. To run it:\n  llmlite run {found.folder / 'shrink.yaml'}", markup=False)
    else:
        console.print("\nThe model is small enough as it is.", markup=False)


@_group.command("compare")
@click.argument("folders", metavar="DIR DIR ...", nargs=-1, required=True)
@click.option("--html", metavar="FILE", help="Also write a page with plots.")
def _compare_command(folders: tuple[str, ...], html: str | None) -> None:
    """Put finished runs side by side: quality against bytes and speed, with the Pareto front."""
    from rich.console import Console

    from llmlite.html.compare import compare
    from llmlite.storage import write_text

    found = compare(folders)
    console = Console(highlight=False)
    for warning in found.warnings:
        console.print(f"Note: {warning}", markup=False)
    console.print(found.table())
    if html:
        write_text(Path(html), found.page())
        console.print(f"The page with plots: {html}", markup=False)


@_group.command("steps")
@click.argument("name", required=False)
def _steps_command(name: str | None) -> None:
    """List the steps, or the options of one as YAML with their meaning."""
    if name is None:
        width = max(map(len, STEPS))
        for short in STEPS:
            click.echo(f"{short:{width}}  {(step_class(short).__doc__ or '').strip().splitlines()[0]}")
        return
    try:
        cls = step_class(name)
    except ValueError as error:
        raise ConfigError("llmlite steps", [str(error)]) from None
    click.echo(_step_help(name, cls))


def _step_help(name: str, cls: type[Step]) -> str:
    lines = [f"# {(cls.__doc__ or '').strip().splitlines()[0]}", f"- step: {name}"]
    for field in sorted(dataclasses.fields(cls), key=lambda field: field.name == "gate"):
        value = to_yaml({field.name: to_mapping(default_of(field))}).strip()
        lines.append(f"  {value.replace(chr(10), ' ')}  # {field_doc(cls, field.name)}")
    return "\n".join(lines)


@_group.command("families")
@click.argument("model", required=False)
def _families_command(model: str | None) -> None:
    """List the known architectures, or what is known of one model (Hub id or folder)."""
    from llmlite.models.families import FAMILIES, family_of

    if model is None:
        for family in sorted(FAMILIES.values(), key=lambda family: family.model_type):
            click.echo(f"{family.model_type:14s} {'heads, FFN, layers' if not family.no_heads else 'FFN, layers (heads: ' + family.no_heads + ')'}")
        return
    from llmlite.models.load import find, load_config

    settings = Model(name=model)
    config = load_config(find(settings, weights=False), settings)
    family = family_of(config)
    for field in dataclasses.fields(family):
        click.echo(f"{field.name}: {getattr(family, field.name)}")


@_group.command("push", context_settings={"token_normalize_func": lambda name: name.replace("-", "_"), "max_content_width": 120})
@click.argument("folder", metavar="DIR")
@click.argument("repository", metavar="REPO")
@click.option("--public", is_flag=True, help="Let everybody see it. Left out: private. An existing repository of the other kind is refused.")
@click.option("--revision", metavar="BRANCH", help="Branch to upload to; made when it is not there.")
@click.option("--create_pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--base_model", metavar="OWNER/NAME", help="Hub id of the base, where the run only knew a folder.")
@click.option("--replace", is_flag=True, help="Delete weights in the repository that this result does not have, in the same commit.")
@click.option("--accept_license", is_flag=True, help="With --public: you have read the terms of a gated or non-commercial base.")
@click.option("--verify", is_flag=True, help="Afterwards load folder and repository in a fresh process and compare their logits.")
def _push_command(folder: str, repository: str, public: bool, **options: Any) -> None:
    """Upload a result (a run's folder, or any stock model or adapter) to the Hub: one commit, private unless --public.

    Nothing that is there already is sent again, so the same command continues after a failure. The token comes from `hf auth login` or HF_TOKEN.
    """
    from llmlite.hub.push import push
    from llmlite.report import human_bytes

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    _hush_loggers()
    pushed = push(folder, repository, private=not public, **options)
    kind = "private" if pushed.private else "public"
    click.echo(f"{pushed.url}\n{len(pushed.files)} files, {human_bytes(pushed.bytes)}, {kind}; every file there has the size and hash of the one here.")
    if pushed.difference is not None:
        click.echo(f"A fresh process loaded it from the Hub; the largest difference of a logit is {pushed.difference:.1e}.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script `llmlite`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with _exits(_continuing("llmlite", arguments)):
        _group.main(arguments, prog_name="llmlite", standalone_mode=False)
