"""The documentation's links lead somewhere, and every recipe in it is one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmlite.config import parse_flag
from llmlite.recipe import Recipe
from llmlite.step import parse_step

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_linked_files_exist(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_recipes_and_steps_on_the_page_are_understood(page: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        values = parse_flag(block, takes_text=False)
        if isinstance(values, dict) and "steps" in values:
            Recipe.from_options((page.name, values))
        elif isinstance(values, list):
            assert not [problem for index, step in enumerate(values) for problem in parse_step(step, index)[1]], block


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md" and f"({page.name})" not in index]
