"""The commands of `llmlite`: run, check, evaluate, shrink, compare, export, steps, families, push. Nothing here imports torch before a command asks for it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from llmlite import __version__
from llmlite.cli import CONTEXT, dotted_options, is_main, keep_still, log_plainly, plain_console, run_recipe, show_evaluation, takes_text
from llmlite.config import default_of, field_doc, parse_flag, read_yaml, to_mapping, to_yaml
from llmlite.errors import ConfigError, OutputError, counted
from llmlite.models.device_map import SPREADING
from llmlite.models.settings import Model
from llmlite.recipe import Recipe
from llmlite.step import STEPS, Step, step_class

__all__ = ["group"]

_OPTIONS = {"token_normalize_func": lambda name: name.replace("-", "_"), "max_content_width": 120}
"""How click reads the options of a command that takes a known set of them: --max-memory is --max_memory."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="llmlite")
def group() -> None:
    """Make Hugging Face language models smaller: prune, distil, quantize, finetune. Stock checkpoints in, stock checkpoints out.

    \b
    A preset:       python -m llmlite.recipes.lora_int4 --help
    A whole recipe: llmlite run recipes/lora_int4.yaml
    """


def _file_recipe(file: str, arguments: Sequence[str]) -> Recipe:
    options, problems = dotted_options(arguments, [])
    mapping = read_yaml(file)
    text = takes_text(Recipe)
    try:
        recipe = Recipe.from_options((file, mapping), ("flags", {name: parse_flag(value, text(name)) for name, value in options.items()}))
    except ConfigError as error:
        raise ConfigError(error.where, [*problems, *error.problems]) from None
    if problems:
        raise ConfigError("the command line", problems)
    if recipe.output_dir is None:
        recipe = dataclasses.replace(recipe, output_dir=str(Path("outputs") / Path(file).stem))
    return recipe


@group.command("run", context_settings={**CONTEXT, "token_normalize_func": None})
@click.argument("file", metavar="FILE")
@click.pass_context
def _run_command(context: click.Context, file: str) -> None:
    """Run the recipe in a YAML file. Any option can follow: --seed 1, --steps.0.r 8, --data.max_length 1024, --dry_run."""
    run_recipe(_file_recipe(file, context.args))


@group.command("check", context_settings={**CONTEXT, "token_normalize_func": None})
@click.argument("file", metavar="FILE")
@click.pass_context
def _check_command(context: click.Context, file: str) -> None:
    """Check a recipe and print its plan, in seconds and without loading weights."""
    run_recipe(dataclasses.replace(_file_recipe(file, context.args), dry_run=True))


@group.command("evaluate", context_settings=_OPTIONS)
@click.argument("folder", metavar="DIR")
@click.option("--each_step", is_flag=True, help="Measure what every step of the run left, not only its result; the same command continues after a stop.")
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
@click.option("--answers", type=click.IntRange(0), default=3, show_default=True, help="Held-out prompts that every model answers.")
@click.option("--estimate_energy", is_flag=True, help="Let codecarbon estimate where the machine has no energy counter. Needs llmlite[energy].")
@click.option("--grid_grams_per_kwh", type=click.FloatRange(0), metavar="G", help="CO2 of your grid; without it no CO2 is stated.")
@click.option(
    "--device_map",
    type=click.Choice(["none", *SPREADING]),
    default="none",
    help="Where blocks of a dense model lie that one device does not hold.",
)
@click.option("--max_memory", metavar="BYTES", help="device_map only: bytes by device, such as 0=20GB,cpu=60GB.  [default: nine tenths of what is free]")
@click.option("--tp_plan", type=click.Choice(["none", "auto"]), default="none", help="auto: cut dense models over the processes of torchrun.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def _evaluate_command(folder: str, tasks: str | None, batch_sizes: str, as_json: bool, **options: Any) -> None:
    """Measure a result beside its base: quality, tasks, speed, memory, energy, answers side by side.

    All are loaded from disk, one after the other. The figures go into DIR/evaluation.json, and into card and page when DIR is a run's.
    """
    import json

    if not is_main():
        keep_still()
    from llmlite.side_by_side import evaluate

    log_plainly()
    try:
        sizes = tuple(int(size) for size in batch_sizes.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise ConfigError("llmlite evaluate", [f"--batch_sizes {batch_sizes!r} should be numbers from 1, separated by commas, such as 1,8."])
    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    found = evaluate(folder, tasks=names, batch_sizes=sizes, **options)
    if not is_main():
        return
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
        return
    show_evaluation(plain_console(), found)


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


@group.command("shrink", context_settings=_OPTIONS)
@click.argument("model", required=False)
@click.option("--target", type=float, help="Share of the 16-bit size that the files may have: 0.5 is half.")
@click.option("--max_bytes", type=_Bytes(), help="Bytes that the files may have: 60MB.")
@click.option("--max_memory", type=_Bytes(), help="Bytes that the weights may need in memory; the cache and activations come on top.")
@click.option("--min_speedup", type=float, help="Decoding speed wanted, against the base's on this machine: 1.5.")
@click.option("--max_perplexity_increase", type=click.FloatRange(0), help="Most that perplexity may rise, as a share: 0.2.")
@click.option("--data", metavar="DATA", help="Text to measure, calibrate and heal on. Left out: the Python documentation, offline.")
@click.option("--keeps", default="0.9,0.8,0.7,0.6", show_default=True, help="Shares of the decoder's parameters that are tried.")
@click.option("--heal_steps", type=click.IntRange(0), default=40, show_default=True, help="Optimizer steps of distillation behind pruning.")
@click.option("--vocabulary", is_flag=True, help="Also try to keep only the tokens that the text uses; other text gets longer.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), help="Type that the model computes in.")
@click.option("--max_length", type=click.IntRange(2), help="Tokens of a row.")
@click.option("--calibration", metavar="TEXT", help="What sees the model before it is changed: a file, self, or a mixture such as 0.5*self+0.5*mine.txt.")
@click.option("--calibration_sequences", type=click.IntRange(1), help="Calibration rows.")
@click.option("--evaluation_rows", type=click.IntRange(1), help="Held-out rows that are measured.")
@click.option("--output_dir", metavar="DIR", help="For shrink.yaml, the figures and the result.  [default: outputs/shrink]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--run", "run_it", is_flag=True, help="Run the recipe that was found, into DIR/result.")
def _shrink_command(model: str | None, keeps: str, run_it: bool, output_dir: str | None, seed: int, **options: Any) -> None:
    """Make a model as small as asked: measure what each way costs once, find the best combination, write it as a recipe.

    Ways to prune (the decoder to some share of its parameters, as it is and healed by distillation) and to store (8 bit, calibrated 4 bit, that with the most
    sensitive layers left in 16 bit or with a low-rank correction) are measured alone; their combinations are computed. Measurements are kept in DIR, so other
    targets cost seconds, and the same command continues after a stop.
    """
    from llmlite.shrink.shrink import shrink

    log_plainly()
    try:
        shares = tuple(float(keep) for keep in keeps.split(","))
    except ValueError:
        raise ConfigError("llmlite shrink", [f"--keeps {keeps!r} should be numbers between 0 and 1, separated by commas, such as 0.9,0.7."]) from None
    about = {"model": model, "seed": seed, "output_dir": output_dir or "outputs/shrink"}
    about |= {name: options.pop(name) for name in ("data", "dtype", "max_length", "calibration", "calibration_sequences", "evaluation_rows")}
    given = {name: value for name, value in about.items() if value is not None}
    recipe = Recipe.from_options(("flags", {"steps": [{"step": "quantize"}], **given}))
    found = shrink(recipe, keeps=shares, run=run_it, **options)
    console = plain_console()
    console.print(found.table())
    if found.report is not None:
        console.print(found.report.table())
        console.print(found.report.expectation(), soft_wrap=True)
        console.print(f"\nThe result is in {found.report.path}:\n\n{found.report.loading}", soft_wrap=True)
    elif found.chosen.steps:
        place = found.folder / "shrink.yaml"
        console.print(f"\nThe recipe: {place}. To run it:\n  llmlite run {shlex.quote(str(place))}", soft_wrap=True)
    else:
        console.print("\nThe model is small enough as it is.")


@group.command("compare")
@click.argument("folders", metavar="DIR DIR ...", nargs=-1, required=True)
@click.option("--html", metavar="FILE", help="Also write a page with plots.")
def _compare_command(folders: tuple[str, ...], html: str | None) -> None:
    """Put finished runs side by side: quality against bytes and speed, with the Pareto front."""
    from llmlite.html.compare import compare
    from llmlite.paths import require_path
    from llmlite.storage import write_text

    page = require_path(html, "compare", "--html") if html else None
    found = compare(folders)
    console = plain_console()
    for warning in found.warnings:
        console.print(f"Note: {warning}", soft_wrap=True)
    console.print(found.table())
    if page is not None:
        try:
            write_text(page, found.page())
        except OSError as error:
            raise OutputError(f"compare: --html {page} cannot be written: {error.strerror}. Name a file in a folder that is there.") from None
        console.print(f"The page with plots: {html}")


@group.command("export", context_settings=_OPTIONS)
@click.argument("folders", metavar="DIR DIR ...", nargs=-1, required=True)
@click.option("--output_dir", metavar="DIR", required=True, help="Folder for the adapters: new, empty, or an earlier export.")
@click.option("--names", metavar="NAMES", help="A name for each adapter, separated by commas.  [default: the folders' names]")
def _export_command(folders: tuple[str, ...], output_dir: str, names: str | None) -> None:
    """Put the adapters of finished runs side by side: one folder, one base, switched by name with stock peft. Can be pushed like any result."""
    from llmlite.multi_adapter import export

    log_plainly()
    found = export(folders, output_dir, [name.strip() for name in (names or "").split(",") if name.strip()])
    click.echo(
        f"{counted(len(found.names), 'adapter')} in {found.path}: {', '.join(found.names)}. A fresh process switched to each and got the logits that it gives "
        f"alone (largest difference {found.difference:.1e}):\n\n{found.loading}"
    )


@group.command("steps")
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


@group.command("families")
@click.argument("model", required=False)
def _families_command(model: str | None) -> None:
    """List the known architectures, or what is known of one model (Hub id or folder)."""
    from llmlite.models.families import FAMILIES, family_of

    if model is None:
        for family in sorted(FAMILIES.values(), key=lambda family: family.model_type):
            click.echo(f"{family.model_type:14s} {'heads, FFN, layers' if not family.no_heads else 'FFN, layers (heads: ' + family.no_heads + ')'}")
        return
    from llmlite.models.find import find
    from llmlite.models.load import load_config

    settings = Model(name=model)
    config = load_config(find(settings, weights=False), settings)
    family = family_of(config)
    for field in dataclasses.fields(family):
        click.echo(f"{field.name}: {getattr(family, field.name)}")


@group.command("push", context_settings=_OPTIONS)
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

    log_plainly()
    pushed = push(folder, repository, private=not public, **options)
    kind = "private" if pushed.private else "public"
    click.echo(
        f"{pushed.url}\n{counted(len(pushed.files), 'file')}, {human_bytes(pushed.bytes)}, {kind}; every file there has the size and hash of the one here."
    )
    if pushed.difference is not None:
        click.echo(f"A fresh process loaded it from the Hub; the largest difference of a logit is {pushed.difference:.1e}.")
