"""Options that messages, hints and help name are options that there are, in the command that says so."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import llmlite
from llmlite.cli import _sections
from llmlite.commands import group
from llmlite.data.settings import Data
from llmlite.errors import counted
from llmlite.evaluating import Evaluate
from llmlite.gate import Gate
from llmlite.models.settings import Model
from llmlite.recipe import Recipe
from llmlite.recipes import PRESETS
from llmlite.step import STEPS, step_class

PACKAGE = Path(llmlite.__file__).parent
SAID_BY = {"side_by_side.py": "evaluate", "shrink": "shrink", "multi_adapter.py": "export", "hub/push.py": "push", "hub/preflight.py": "push"}
"""Where messages come from one command and no recipe."""
PRETENDED = {"html", "commands.py", "distillation/api/serve.py"}
"""Names of CSS, the declarations themselves, and the words of another program's command line."""
OF_OTHERS = {"no_deps", "nproc_per_node", "max_restarts", "num_processes", "config_file", "cpu"}
"""Of pip, torchrun and accelerate."""
WORDS = {"name", "lora_r"}
"""The command line's own: any option, and what stands in for a letter that torchrun takes."""
_OPTION = re.compile(r"(?<![\w-])--([a-z][a-z0-9_-]*)(?![a-z0-9_.-])")


def options_of_preset(preset: str) -> set[str]:
    recipe = getattr(importlib.import_module(f"llmlite.recipes.{PRESETS[preset]}"), preset)
    return {"help"} | {name.removeprefix("--") for _, options in _sections(recipe) for option in options for name in option.opts}


OF_PRESETS = {preset: options_of_preset(preset) for preset in PRESETS}
OF_EVERY_PRESET = set.intersection(*OF_PRESETS.values())


def options_of_command(name: str) -> set[str]:
    command = group.commands[name]
    own = {option.removeprefix("--") for parameter in command.params if isinstance(parameter, click.Option) for option in parameter.opts}
    return {"help", *own, *(OF_EVERY_PRESET if name in {"run", "check"} else ())}


def texts(file: Path) -> Iterator[tuple[int, str]]:
    """What a module may say: its texts, values in them left out, and the lines that they begin at."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.lineno, node.value


def unknown_options(file: Path) -> list[str]:
    """Options that a module names and that are none, where it is read."""
    place = file.relative_to(PACKAGE).as_posix()
    preset = next((preset for preset, module in PRESETS.items() if place == f"recipes/{module}.py"), None)
    command = next((command for start, command in SAID_BY.items() if place.startswith(start)), None)
    known = OF_PRESETS[preset] if preset else options_of_command(command) if command else OF_EVERY_PRESET
    wrong = []
    for line, text in texts(file):
        for found in _OPTION.finditer(text):
            named = re.findall(r"llmlite (\w+) ", text[: found.start()])
            own = options_of_command(named[-1]) if named and named[-1] in group.commands else known
            if found[1].replace("-", "_") not in own | known | OF_OTHERS | WORDS:
                wrong.append(f"{place}:{line}: --{found[1]}")
    return wrong


def test_every_option_that_is_named_is_one_of_the_command_that_names_it() -> None:
    files = [file for file in sorted(PACKAGE.rglob("*.py")) if not any(file.relative_to(PACKAGE).as_posix().startswith(place) for place in PRETENDED)]
    assert [wrong for file in files for wrong in unknown_options(file)] == []


def test_an_option_that_there_is_not_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_hints.PACKAGE", tmp_path)
    file = tmp_path / "any.py"
    file.write_text('"""--output_dir"""\nx = f"{1}: add --text FILE"\ny = "llmlite evaluate DIR --text FILE"\nz = "--steps.0.keep 1 and a--b --seed"\n')
    assert unknown_options(file) == ["any.py:2: --text"]
    (tmp_path / "side_by_side.py").write_text('x = "--each_step, --output_dir"')
    assert unknown_options(tmp_path / "side_by_side.py") == ["side_by_side.py:1: --output_dir"]


@pytest.mark.parametrize(
    ("number", "one", "many", "said"),
    [
        (1, "row", None, "1 row"),
        (0, "row", None, "0 rows"),
        (1000, "row is", "rows are", "1,000 rows are"),
        (1, "row is", "rows are", "1 row is"),
        ("?", "core", None, "? cores"),
    ],
)
def test_what_is_counted_agrees_with_its_number(number: int | str, one: str, many: str | None, said: str) -> None:
    assert counted(number, one, many) == said


SETTINGS = [Recipe, Model, Data, Evaluate, Gate, *map(step_class, STEPS)]
NAMES = {field.name for cls in SETTINGS for field in dataclasses.fields(cls)} | {"step"}
_ADVICE = re.compile(r"\b(?:[Ss]et|[Uu]se|[Tt]ake|[Tt]ry|[Ll]ower) ([a-z][a-z0-9_]*): [a-z0-9{]")


def test_every_option_that_is_to_be_set_is_one() -> None:
    files = [file for file in sorted(PACKAGE.rglob("*.py")) if not file.relative_to(PACKAGE).as_posix().startswith("html")]
    found = [(file.name, line, name) for file in files for line, text in texts(file) for name in _ADVICE.findall(text) if name != "cleaned"]  # a docstring
    assert len(found) > 20
    assert [one for one in found if one[2] not in NAMES | {"fsdp_version"}] == []  # of accelerate's files


PAGES = [*sorted((PACKAGE.parent / "docs").glob("*.md")), *sorted(PACKAGE.parent.glob("*.md")), *sorted((PACKAGE.parent / "recipes").rglob("*.yaml"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_on_a_page_is_one_of_some_command(page: Path) -> None:
    known = set().union(*OF_PRESETS.values(), *map(options_of_command, group.commands), OF_OTHERS, WORDS)
    known |= {"port", "max_logprobs", "logdir", "strict", "threads"}  # of servers, tensorboard, mypy and the benchmarks
    assert sorted({name.replace("-", "_") for name in _OPTION.findall(page.read_text(encoding="utf-8"))} - known) == []
