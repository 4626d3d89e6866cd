"""The documentation's links lead somewhere, and every recipe in it is one."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import click
import pytest

from llmlite.cli import recipe_main
from llmlite.commands import group
from llmlite.config import parse_flag
from llmlite.recipe import Recipe
from llmlite.step import parse_step

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_linked_files_exist(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and myst give a page's headings: lower case, spaces as hyphens, no other punctuation; the second of the same name gets -1."""
    found: dict[str, int] = {}
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for heading in re.findall(r"^#{1,6} (.+)$", text, re.M):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if number == 0 else f"{slug}-{number}" for slug, count in found.items() for number in range(count + 1)}


def dead_anchors(page: Path) -> list[str]:
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8"))
    return [f"{name}#{anchor}" for name, anchor in links if anchor not in anchors(page.parent / name if name else page)]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "README.ko.md"], ids=lambda page: page.stem)
def test_linked_headings_exist(page: Path) -> None:
    assert not dead_anchors(page)


def test_a_dead_anchor_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# `prune.ffn`: a [link](b.md)\n\n## Twice\n\n## Twice\n\n```\n# no heading\n```\n")
    (tmp_path / "b.md").write_text("[1](a.md#pruneffn-a-link) [2](a.md#twice-1) [3](a.md#no-heading) [4](#here)\n\n# Here\n\n[5](a.md#twice-2)\n")
    assert dead_anchors(tmp_path / "b.md") == ["a.md#no-heading", "a.md#twice-2"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_recipes_and_steps_on_the_page_are_understood(page: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        values = parse_flag(block, takes_text=False)
        if isinstance(values, dict) and "steps" in values:
            Recipe.from_options((page.name, values))
        elif isinstance(values, list):
            assert not [problem for index, step in enumerate(values) for problem in parse_step(step, index)[1]], block


COMMANDS = [
    (page.stem, line.partition("  #")[0].strip())
    for page in PAGES
    if page.stem != "tutorial"  # whose lines are all run in their order, by a test of its own
    for block in re.findall(r"```(?:bash)?\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if re.search(r"(^|-m )llmlite", line)
]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_on_the_page_are_understood(
    page: str, command: str, model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    words = [{"Qwen/Qwen3-0.6B": str(model_folder), "M": str(model_folder), "chat.jsonl": str(pairs_file), "D": str(pairs_file)}.get(word, word)
             for word in shlex.split(command)]  # fmt: skip
    if "--config_file" in words:
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    if words[0] == "llmlite" or "llmlite" in words:
        with click.Context(group, info_name="llmlite") as context:
            name, found, rest = group.resolve_command(context, words[words.index("llmlite") + 1 :])
            assert found is not None
            found.make_context(name, list(rest))
        return
    module = importlib.import_module(words[words.index("-m") + 1])
    (preset,) = (getattr(module, name) for name in module.__all__)
    flags = words[words.index("-m") + 2 :]
    given = {} if "--model" in flags else {"--model": str(model_folder)}
    given |= {} if "--data" in flags else {"--data": str(pairs_file)}
    more = [word for pair in {**given, "--output_dir": str(tmp_path), "--max_length": "64"}.items() for word in pair]
    if "--teacher" in flags:  # an API: all of it is understood, and then nobody answers
        with pytest.raises(SystemExit):
            recipe_main(preset, [*flags, *more, "--base_url", "http://127.0.0.1:9/v1", "--dry_run"])
        assert "http://127.0.0.1:9/v1 cannot be reached" in capsys.readouterr().err
        return
    recipe_main(preset, [*flags, *more, "--dry_run"])


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md" and f"({page.name})" not in index]
