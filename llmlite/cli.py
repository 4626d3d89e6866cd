"""The command line: `llmlite ...` and `python -m llmlite.recipes.NAME`. Options are the settings' fields; their docs are the help.

Nothing here imports torch: help, typing errors and unknown options answer at once.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shlex
import sys
import time
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

from llmlite import __version__
from llmlite.config import default_of, field_doc, near, parse_flag, read_yaml
from llmlite.data.settings import Data
from llmlite.errors import ConfigError, Interrupted, LlmliteError
from llmlite.evaluating import Evaluate
from llmlite.models.settings import Model
from llmlite.recipe import Recipe
from llmlite.step import step_name

__all__ = ["main", "recipe_main"]

_SWITCHED = (bool, Evaluate)  # options whose bare name means true
_HIDDEN = frozenset({"steps", "expected"})
# torchrun takes every option that begins like one of its own, even behind the module's name: `--r` would be its --role or --redirects.
_ALIASES = {"r": ("--lora_r",)}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and new line
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
        bare: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if any(_admits(hints[field.name], kind) for kind in _SWITCHED) else {}
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
    return {bool: "BOOL", Evaluate: "BOOL", int: "N", float: "X", str: "TEXT", Model: "MODEL", Data: "DATA"}.get(hint, "LIST")


def _admits(hint: Any, kind: type) -> bool:
    return hint is kind or any(_admits(argument, kind) for argument in typing.get_args(hint))


def takes_text(recipe: type[Recipe]) -> Callable[[str], bool]:
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
        title = f"Step {index + 1}: {step_name(step)} - {(type(step).__doc__ or '').strip().splitlines()[0]}"
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
        more, problems = dotted_options(context.args, [option.name or "" for _, options in sections for option in options])
        text = takes_text(recipe)
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
        run_recipe(built)

    description = (recipe.__doc__ or "").strip()
    shell = _RecipeCommand(
        sections,
        name=recipe.name,
        callback=callback,
        help=description,
        epilog=f"Several devices: accelerate launch -m llmlite.recipes.{recipe.name} [OPTIONS]",
        context_settings=CONTEXT,
    )
    with _exits(_continuing(command, arguments)):
        shell.main(arguments, prog_name=command, standalone_mode=False)


CONTEXT: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("-", "_"),
    "ignore_unknown_options": True,
    "allow_extra_args": True,
    "max_content_width": 120,
}


def dotted_options(arguments: Sequence[str], known: Sequence[str]) -> tuple[dict[str, str], list[str]]:
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


def run_recipe(recipe: Recipe) -> None:
    """Check a recipe, run it unless it is a dry run, and print plan, data, answers, figures and the lines that load the result; only the main process speaks.

    Raises:
        LlmliteError: whatever cannot work.
    """
    quiet = not is_main()
    if quiet:
        keep_still()
    from llmlite.context import Run
    from llmlite.evaluation.result import Evaluation
    from llmlite.pipeline import run
    from llmlite.plan import check, size_line
    from llmlite.report import plan_table

    log_plainly()
    _hush()
    console = plain_console(quiet)
    context = Run(recipe)
    plan = check(recipe, context)
    console.print(plan_table(plan.rows))
    console.print(size_line(plan))
    if recipe.dry_run:
        console.print("Dry run: nothing was loaded or written.")
        return
    data = context.evaluation_data
    console.print(f"\n{data.echo}\n")
    console.print(f"One example; what is trained stands in ⟦ ⟧:\n{data.preview}\n")
    report = run(recipe, context)
    if quiet:
        return
    _show_samples(console, report)
    console.print(report.table())
    if expectation := report.expectation():
        console.print(expectation, soft_wrap=True)
    for reason in dict.fromkeys(row.details["not_measured"] for row in report.rows if row.details.get("not_measured")):
        console.print(f"Not measured: {reason}.", soft_wrap=True)
    merged = report.rows[-1].details.get("perplexity_merged")
    if merged is not None:
        before = report.rows[-1].details["perplexity_before_merge"]
        console.print(
            f"Merged into 16-bit weights in {report.path / 'merged'}: perplexity {before:.4g} -> {merged:.4g} ({merged / before - 1:+.2%})", soft_wrap=True
        )
    if recipe.evaluate is not None and (found := Evaluation.read(report.path)) is not None:
        show_evaluation(console, found)
    console.print(f"\nThe result is in {report.path}; a fresh process loaded it with the same logits (largest difference {report.reload_difference:.1e}):\n")
    console.print(report.loading + "\n", soft_wrap=True)


def plain_console(quiet: bool = False) -> Any:
    """A terminal that prints what it is given and obeys none of it: `[v2]` in the name of a folder is no colour, `[/v2]` no mistake, `:x:` no picture, and an
    escape sequence in a model's answer or in a row of data, which could clear the screen or fill the clipboard, is written out."""
    from rich.console import Console

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(_CONTROL.sub(lambda found: repr(found[0])[1:-1], text), **options)

    return Plain(quiet=quiet, highlight=False, markup=False, emoji=False)


def _show_samples(console: Any, report: Any) -> None:
    """Print what the base and the result answered; a base of which part is brought in for each forward pass was not asked."""
    base, result = ((row.name, row.details.get("sample")) for row in (report.rows[0], report.rows[-1]))
    if len(report.rows) < 2 or not result[1]:
        return
    console.print(f"\nA held-out question, answered by {'the base and by ' if base[1] else ''}the result:")
    console.print(f"  question  {result[1]['prompt']}")
    for name, sample in (base, result):
        if sample:
            console.print(f"  {name:9s} {sample['answer']}")
    console.print(f"  expected  {result[1]['expected']}\n")


def show_evaluation(console: Any, found: Any) -> None:
    """Print what an `Evaluation` holds: the table, then the answers below each other."""
    console.print(found.table())
    for asked, given in found.answers():
        width = max(len(name) for name, _ in given)
        answers = "".join(f"\n  {name:{max(width, 8)}}  {answer}" for name, answer in given)
        console.print(f"\n  {'question':{max(width, 8)}}  {asked['prompt']}{answers}")
    console.print(f"\nThe figures: {found.path / 'evaluation.json'}")


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


def is_main() -> bool:
    """Whether this process speaks, told without torch."""
    return os.environ.get("RANK", "0") == "0"


def _speaker() -> str:
    """Who speaks, where there are several processes."""
    return f"[process {os.environ.get('RANK', '0')}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def _lost_another_process(error: Exception) -> bool:
    """Whether an error only says that another process of this launch has gone: its own message is the one to read."""
    text = str(error)
    return bool(_speaker()) and any(sign in text for sign in ("Connection closed by peer", "Connection reset by peer", "remote process exited"))


def _told_to_all(error: BaseException | None) -> bool:
    """Whether an error comes from a checkpoint that all write together, of which torch tells each process; see `llmlite.training.sharded.plain_errors`."""
    while error is not None and type(error).__name__ != "CheckpointException":
        error = error.__cause__
    return error is not None


def keep_still() -> None:
    """In a process that is not the main one: no bar and no warning of any library. To be called before they are imported; what fails still speaks."""
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.simplefilter("ignore")


QUIET = ("accelerate", "bitsandbytes", "httpx", "httpx2", "httpcore", "httpcore2", "filelock", "urllib3", "fsspec", "lm_eval")
"""Libraries that log what harms nobody: each request, and of bitsandbytes a kernel that it cannot fetch and what its 8-bit layers cast."""


def log_plainly() -> None:
    """Log to the terminal without decoration, on the main process only, and not what other libraries log harmlessly."""
    logging.basicConfig(level=logging.INFO if is_main() else logging.ERROR, format="%(message)s", stream=sys.stderr)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)


def _hush() -> None:
    """Silence other libraries' harmless warnings and bars; the Trainer's bar stays."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"(peft|transformers|bitsandbytes|torch)\.")


def _printable(text: str) -> str:
    """A message in which names that somebody gave us can neither fail to be printed nor command the terminal: what is no letter is escaped."""
    return "".join(letter if letter.isprintable() or letter in "\n\t\xa0" else ascii(letter)[1:-1] for letter in text)


def _end_bars() -> None:
    """Close the bars that are under way, so that what is said next does not stand behind one."""
    if "tqdm" in sys.modules:
        for bar in list(sys.modules["tqdm"].tqdm._instances):
            bar.close()


def _say(text: str) -> None:
    _end_bars()
    click.echo(_printable(text), err=True)


@contextmanager
def _exits(command: str) -> Iterator[None]:
    """End the process as the errors say: one message and the exit code for ours, click's own for the command line, a traceback for bugs."""
    try:
        yield
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _say(f"Error: {error.format_message()}")
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        _say(f"\nInterrupted. What was complete is kept. To continue:\n  {command}")
        sys.exit(130)
    except LlmliteError as error:
        if error.exit_code == 2 and not is_main():
            time.sleep(30 if _told_to_all(error) else 3)  # the main process finds the same, says it, and the launcher then ends this one
        _say(f"{_speaker()}{type(error).__name__}: {error}")
        if isinstance(error, Interrupted):
            _say(f"To continue:\n  {command}")
        sys.exit(error.exit_code)
    except Exception as error:
        if _lost_another_process(error):
            _say(f"{_speaker()}stopped, because another process of the launch has ended; the reason stands above. What was complete is kept.")
            sys.exit(1)
        _end_bars()
        traceback.print_exc()
        _say(f"\n{_speaker()}This is a bug in llmlite {__version__}. What was complete is kept; the same command continues.")
        sys.exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script `llmlite`."""
    from llmlite.commands import group

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with _exits(_continuing("llmlite", arguments)):
        group.main(arguments, prog_name="llmlite", standalone_mode=False)
