"""The tutorial's commands and Python, in their order, on a tiny model and a loopback Hub."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from llmlite import recipes
from llmlite.cli import main, recipe_main
from tests.hub.conftest import loopback_hub

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(python)?\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"), re.S)
PLAIN = {"evaluate", "compare", "push"}
"""Commands that take a result and no flags of a recipe."""
SMALLER = {"prune_structured": ["--multiple_of", "2", "--spread", "ffn"]}


def tiny(command: str, flags: list[str]) -> None:
    """Run one line of the page as it stands, with what makes it short behind it."""
    words = shlex.split(command)
    if words[0] in {"make", "source"}:  # what the tests themselves stand on
        return
    if words[0] == "llmlite":
        main([*words[1:], *([] if words[1] in PLAIN else flags)])
        return
    assert words[:2] == ["python", "-m"], command
    name = words[2].rpartition(".")[2]
    preset = next(getattr(recipes, cls) for cls, module in recipes.PRESETS.items() if module == name)
    recipe_main(preset, [*words[3:], *flags, *SMALLER.get(name, [])])


def test_every_line_of_the_tutorial_works_in_its_order(model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("recipes", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    flags = ["--model", str(model_folder), "--data", str(pairs_file), "--max_length", "64", "--evaluation_rows", "4", "--calibration_sequences", "8"]
    done = 0
    with loopback_hub(tmp_path / "hub-cache") as hub:
        for language, block in BLOCKS:
            if language:
                exec(block, {})
                continue
            for command in block.splitlines():
                tiny(command, flags)
                done += 1
        assert hub.files("me/small-model").keys() >= {"model.safetensors", "README.md"}
    assert done >= 9
    assert (tmp_path / "outputs" / "small" / "report.html").is_file()
    assert (tmp_path / "compare.html").is_file()
