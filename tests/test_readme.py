"""The README's commands work as they stand there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import click
import pytest

import llmlite
from llmlite.cli import main, recipe_main
from llmlite.commands import group
from llmlite.recipes.lora_int4 import LoraInt4
from tests.conftest import save_sums_task, save_tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith(("make ", "python ", "llmlite ", "accelerate "))
]


def test_the_first_two_commands_are_make_run_and_make_test() -> None:
    assert COMMANDS[:2] == ["make run", "make test"]
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M)
    assert {"run", "test"} <= set(targets)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(("python ", "accelerate "))])
def test_a_recipes_command_is_understood(command: str, model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    words = shlex.split(command)
    assert words[words.index("-m") + 1] == "llmlite.recipes.lora_int4"
    flags = words[words.index("-m") + 2 :]
    recipe_main(LoraInt4, [*flags, "--model", str(model_folder), "--data", str(pairs_file), "--output_dir", str(tmp_path), "--max_length", "64", "--dry_run"])


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("llmlite ")])
def test_an_llmlite_command_works(command: str, model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)[1:]
    if words[0] in {"evaluate", "compare", "export", "shrink"}:  # they want finished runs: run further down, here they are understood
        with click.Context(group, info_name="llmlite") as context:
            name, found, rest = group.resolve_command(context, words)
            assert found is not None
            found.make_context(name, list(rest))
        return
    monkeypatch.chdir(ROOT)
    if words[0] in {"run", "check"}:
        words += ["--model", str(model_folder), "--data", str(pairs_file), "--output_dir", str(tmp_path), "--max_length", "64", "--dry_run"]
    main(words)


def the(name: str) -> list[str]:
    (command,) = (command for command in COMMANDS if command.startswith(f"llmlite {name} "))
    return shlex.split(command)[1:]


def test_commands_on_finished_runs_work(model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"max_length": 64, "evaluation_rows": 4, "calibrate": False, "report_sequences": 0, "max_steps": 1, "r": 2}
    report = LoraInt4(model=str(model_folder), data=str(pairs_file), output_dir="outputs/lora_int4", **options).run()
    for place in ("shrink/result", "sql", "chat"):
        shutil.copytree(report.path, tmp_path / "outputs" / place, symlinks=False)
    save_sums_task(tmp_path / "my_task.yaml")
    main([*the("evaluate"), "--limit", "2", "--repeats", "1", "--batch_sizes", "1", "--answers", "0"])
    assert json.loads(Path("outputs/shrink/result/evaluation.json").read_text())["models"]["this"]["tasks"][0]["task"] == "tiny_sums"
    main(the("compare"))
    assert "<svg" in Path("compare.html").read_text()
    main(the("export"))
    assert {path.name for path in Path("outputs/both").iterdir()} >= {"sql", "chat", "adapters.json"}


@pytest.mark.slow
def test_shrink_works(pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = save_tiny(tmp_path / "tiny-wide", intermediate_size=512)
    given = {"--data": pairs_file, "--max_length": 64, "--evaluation_rows": 4, "--calibration_sequences": 4, "--heal_steps": 0, "--keeps": 0.6}
    main([*the("shrink"), str(model), *(str(word) for pair in given.items() for word in pair)])
    assert (tmp_path / "outputs" / "shrink" / "result" / "model.safetensors").is_file()


def test_the_python_block_runs(model_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(tmp_path)
    exec(block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(model_folder)), {})
    assert "PeftModel.from_pretrained" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted({*re.findall(r"\]\(([\w./-]+)\)", README)}))
def test_linked_files_exist(name: str) -> None:
    assert (ROOT / name).exists()


@pytest.mark.parametrize("name", ["README.md", "README.ko.md"])
def test_the_drawing_of_the_layers_has_every_part_once(name: str) -> None:
    (drawing,) = re.findall(r"```\n(recipes .*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)
    drawn = [word for line in drawing.splitlines() for word in re.split(r"\s{3,}", line.strip())[0].split()]
    places = [path for path in (ROOT / "llmlite").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    assert sorted(drawn) == sorted(path.stem for path in places if not path.stem.startswith("__"))


def test_every_preset_has_a_row_in_the_table() -> None:
    for name in llmlite.recipes.PRESETS.values():
        assert f"| `{name}` |" in README


def test_the_korean_readme_has_the_same_commands_recipes_and_links() -> None:
    korean = (ROOT / "README.ko.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:python)?\n(.*?)```", README, re.S)
    theirs = re.findall(r"```(?:python)?\n(.*?)```", korean, re.S)
    commands = re.compile(r"^(?:make |python |llmlite |accelerate ).*$", re.M)
    assert [commands.findall(block) for block in theirs] == [commands.findall(block) for block in blocks]
    assert re.findall(r"^\| `(\w+)` \|", korean, re.M) == re.findall(r"^\| `(\w+)` \|", README, re.M)
    assert set(re.findall(r"\]\(([\w./-]+)\)", korean)) == set(re.findall(r"\]\(([\w./-]+)\)", README)) - {"README.ko.md"} | {"README.md"}
