"""Broken flags and arguments of every command: one message, exit code 2, nothing written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmlite.cli import main, recipe_main
from llmlite.errors import ConfigError
from llmlite.paths import path_problem, require_path
from llmlite.recipes.lora import Lora

NAMES = {
    "a name of 256 bytes": "a" * 256,
    "a name of 5,000 bytes": "b" * 5000,
    "100 letters of three bytes": "가" * 100,
    "a long name inside": f"some/{'c' * 300}/file.jsonl",
    "a long path": "/".join(["d" * 200] * 25),
    "a NUL byte": "a\0b",
    "a NUL byte alone": "\0",
    "no UTF-8": "caf\udce9",
    "half a surrogate": "\ud800",
    "nobody's home": "~nobody-is-called-so/model",
}
# A command with DIR where the broken name goes, GOOD where a model folder does, OTHER where something harmless does.
COMMANDS = [
    "lora --model DIR --dry_run",
    "lora --model GOOD --data DIR --dry_run",
    "lora --model GOOD --evaluation DIR --dry_run",
    "lora --model GOOD --calibration DIR --dry_run",
    "lora --model GOOD --output_dir DIR --dry_run",
    "lora --model GOOD --output_dir DIR",
    "lora --config DIR",
    "run DIR",
    "check DIR",
    "evaluate DIR",
    "evaluate GOOD --base DIR",
    "evaluate GOOD --base GOOD --data DIR",
    "evaluate GOOD --base GOOD --text DIR",
    "evaluate GOOD --base GOOD --tasks DIR.yaml",
    "compare DIR",
    "compare OTHER DIR",
    "push DIR me/name",
    "push GOOD DIR",
    "export DIR GOOD --output_dir out",
    "export GOOD OTHER --output_dir DIR",
    "shrink DIR --target 0.5",
    "shrink GOOD --target 0.5 --data DIR",
    "shrink GOOD --target 0.5 --calibration DIR",
    "shrink GOOD --target 0.5 --output_dir DIR",
    "families DIR",
    "steps DIR",
]


def ended(command: str, words: dict[str, str], said: pytest.CaptureFixture[str]) -> str:
    """What a command that is refused says. Any other end is a failure of the test."""
    name, *rest = [next((word.replace(short, long) for short, long in words.items() if short in word), word) for word in command.split()]
    with pytest.raises(SystemExit) as exited:
        recipe_main(Lora, rest) if name == "lora" else main([name, *rest])
    err = said.readouterr().err
    assert exited.value.code == 2, err
    assert err.strip()
    assert "Traceback" not in err
    assert "\0" not in err
    assert len(err) < 4000
    return err


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in; in the end it is empty still."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LLMLITE_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    yield place
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_no_file_can_have_is_refused_wherever_one_is_given(
    command: str, name: str, here: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended(command, {"DIR": NAMES[name], "GOOD": str(model_folder), "OTHER": str(here.parent)}, capsys)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=20) | st.text(min_size=240, max_size=400) | st.lists(st.text(max_size=250), max_size=30).map("/".join))
def test_a_name_that_is_not_refused_can_be_asked_for(text: str, tmp_path: Path) -> None:
    """The system itself decides: what `path_problem` lets through raises nothing when it is looked for."""
    if not path_problem(text):
        Path(text).expanduser().exists()
        (tmp_path / text.lstrip("/")).exists()
    else:
        with pytest.raises(ConfigError) as refused:
            require_path(text, "here", "DIR")
        assert len(str(refused.value)) < 400


@pytest.mark.parametrize("name", ["a" * 255, "가" * 85, "with blanks and + signs", "~/model", ".", "", "a/../b"])
def test_ordinary_names_are_fine(name: str) -> None:
    assert path_problem(name) == ""


def test_the_longest_name_that_a_folder_can_have_can_be_written(tmp_path: Path) -> None:
    from llmlite.storage import damage, writing_folder

    folder = tmp_path / ("a" * 255)
    for content in ("first", "second"):
        with writing_folder(folder) as temporary:
            (temporary / "file").write_text(content)
    assert damage(folder) is None
    assert (folder / "file").read_text() == "second"


@pytest.mark.parametrize(
    "command",
    [
        "lora --model GOOD --data ROWS --max_length 32 --evaluation_rows 2 --output_dir DIR",
        "shrink GOOD --data ROWS --target 0.9 --max_length 32 --output_dir DIR",
    ],
)
def test_an_output_folder_inside_of_a_file_is_refused(
    command: str, here: Path, model_folder: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"DIR": str(pairs_file / "out"), "GOOD": str(model_folder), "ROWS": str(pairs_file)}
    assert "pairs.jsonl" in ended(command, words, capsys)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "0.5x", ""])
@pytest.mark.parametrize(
    "command",
    [f"shrink GOOD --{name}=VALUE" for name in ("target", "max_bytes", "max_memory", "min_speedup", "keeps")]
    + ["shrink GOOD --target 0.5 --max_perplexity_increase=VALUE", "shrink GOOD --target 0.5 --heal_steps=VALUE", "evaluate GOOD --grid_grams_per_kwh=VALUE"]
    + [
        f"lora --model GOOD --{name}=VALUE --dry_run" for name in ("num_train_epochs", "learning_rate", "lora_alpha", "warmup_steps", "grid_grams_per_kwh", "r")
    ],
)
def test_a_number_that_is_none_is_refused(command: str, value: str, here: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = command.replace("VALUE", value)
    ended(command, {"GOOD": str(model_folder)}, capsys)


def test_each_of_these_tests_has_a_time_limit(request: pytest.FixtureRequest) -> None:
    limit = request.node.get_closest_marker("timeout")
    assert limit is not None
    assert 0 < limit.args[0] <= 300
