"""The command line as people use it: what it says, what it exits with, and that it answers before torch is imported."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.table import Table
from tqdm import tqdm

from llmlite.cli import main, plain_console, recipe_main
from llmlite.recipes.lora_int4 import LoraInt4
from llmlite.report import Report, Row

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def lora_int4(capsys: pytest.CaptureFixture[str], model_folder: Path, pairs_file: Path, tmp_path: Path) -> Run:
    """Run the preset's command line in this process; returns exit code, output and messages. Later flags win."""

    def run(*flags: str, model: Path | str = model_folder, data: Path | str = pairs_file) -> tuple[int, str, str]:
        arguments = ["--model", str(model), "--data", str(data), "--output_dir", str(tmp_path / "out"), "--max_length", "64", "--dry_run", *flags]
        code = 0
        try:
            recipe_main(LoraInt4, arguments)
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_dry_run_prints_the_plan_and_writes_nothing(lora_int4: Run, tmp_path: Path) -> None:
    code, out, _ = lora_int4("--r", "8")
    assert code == 0
    assert "quantize" in out
    assert "rank 8 on 21 layers" in out
    assert not (tmp_path / "out").exists()


def test_dashes_and_underscores_and_equals_signs_are_the_same(lora_int4: Run) -> None:
    assert lora_int4("--learning-rate", "1e-4", "--per_device-train_batch_size=3", "--steps.1.r", "2")[0] == 0


def test_every_mistake_on_the_command_line_is_reported_at_once(lora_int4: Run) -> None:
    code, _, err = lora_int4("--lerning_rate", "1", "--r", "many", "--steps.0.schem", "x", "--seed", "-3", "stray")
    assert code == 2
    for part in (
        "5 problems",
        "no option --lerning_rate. Did you mean --learning_rate?",
        "r='many' should be a whole number",
        "steps[0] quantize: no option 'schem'. Did you mean 'scheme'?",
        "seed=-3 should be at least 0",
        "'stray' stands alone",
    ):
        assert part in err


def test_a_misspelled_key_in_the_file_is_named_with_the_file(lora_int4: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("learning_rat: 1e-4\n")
    code, _, err = lora_int4("--config", str(file))
    assert code == 2
    assert "mine.yaml" in err
    assert "Did you mean 'learning_rate'?" in err


def broken_folder(kind: str, model_folder: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "no such architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "llamma"}))
    elif kind == "not in the table":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}))
    elif kind == "config not JSON":
        (folder / "config.json").write_text("{")
    elif kind == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif kind == "truncated weights":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no config", "has no config.json"),
        ("no such architecture", "llamma"),
        ("not in the table", "mixtral"),
        ("config not JSON", "cannot be read as a transformers config"),
        ("pickle", "Pickles can run any code"),
        ("truncated weights", "is damaged"),
        ("no tokenizer", "no usable tokenizer"),
    ],
)
def test_a_broken_model_folder_says_what_is_wrong(kind: str, message: str, lora_int4: Run, model_folder: Path, tmp_path: Path) -> None:
    code, _, err = lora_int4(model=broken_folder(kind, model_folder, tmp_path))
    assert (code, message in err, "Traceback" in err) == (2, True, False), err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/near/here", "no folder"),
        ("nobody/no-such-model-xyz", "Looked in"),
        ("truncated.gguf", "truncated or damaged"),
        ("missing.gguf", "no file"),
    ],
)
def test_a_model_that_is_not_there_says_where_it_was_looked_for(
    name: str, message: str, lora_int4: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("truncated.gguf").write_bytes(b"GGUF" + bytes(20))
    code, _, err = lora_int4(model=name)
    assert (code, message in err, "Traceback" in err) == (2, True, False), err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "empty"),
        ("columns.jsonl", b'{"foo": 1, "bar": 2}\n', "foo"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2"),
        ("latin.txt", b"caf\xe9 au lait\n", "UTF-8"),
    ],
)
def test_data_that_cannot_be_used_says_why_and_where(name: str, content: bytes, message: str, lora_int4: Run, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    code, _, err = lora_int4(data=tmp_path / name)
    assert (code, message in err, "Traceback" in err) == (2, True, False), err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--max_length", "100000"), "max_length=100000 should be at most 128"),
        (("--target_modules", "[q_porj]"), "'q_porj' match no layer of this model. It has:"),
        (("--push_to_hub",), "push_to_hub needs hub_model_id"),
        (("--lora_dropout", "1.5"), "lora_dropout=1.5 should be below 1"),
        (("--config", "nowhere.yaml"), "no such file"),
    ],
)
def test_settings_that_cannot_work_are_refused(flags: tuple[str, ...], message: str, lora_int4: Run) -> None:
    code, _, err = lora_int4(*flags)
    assert (code, message in err, "Traceback" in err) == (2, True, False), err


def test_an_output_folder_with_something_else_is_refused(lora_int4: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "photo.jpg").write_bytes(b"x")
    code, _, err = lora_int4()
    assert code == 2
    assert "holds something else (photo.jpg)" in err


def test_a_disk_too_small_for_the_plan_is_refused(lora_int4: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmlite.storage.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    code, _, err = lora_int4()
    assert code == 2
    assert "GB free" in err


@pytest.mark.parametrize("command", [["steps"], ["steps", "lora"], ["steps", "quantize"], ["families"], ["--help"], ["run", "--help"], ["--version"]])
def test_what_teaches_ends_well(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(command)
    assert len(capsys.readouterr().out) > 10


def test_every_option_of_a_preset_is_in_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    recipe_main(LoraInt4, ["--help"])
    out = capsys.readouterr().out
    for flag in ("config", "model", "data", "output_dir", "seed", "dry_run", "max_steps", "overwrite_output_dir", "push_to_hub", "hub_model_id", "r", "scheme"):
        assert f"--{flag} " in out or f"--{flag}, " in out


@pytest.mark.parametrize(
    "code", ["import llmlite", "import llmlite; llmlite.LoraInt4", "from llmlite.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"]
)
def test_import_and_help_do_not_import_torch(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; assert not {{'torch', 'transformers', 'datasets'}} & set(sys.modules)"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flag", [["--overwrite_output_dir"], ["--overwrite-output-dir", "true"], ["--overwrite_output_dir=true"]])
def test_the_command_that_continues_does_not_start_afresh(flag: list[str]) -> None:
    from llmlite.cli import _continuing

    assert _continuing("llmlite", ["run", "a b.yaml", *flag, "--seed", "1"]) == "llmlite run 'a b.yaml' --seed 1"


def test_torchrun_swallows_no_option_that_has_no_other_name() -> None:
    from torch.distributed.run import get_args_parser

    from llmlite import recipes
    from llmlite.cli import _sections

    taken = [name for name in get_args_parser()._option_string_actions if name.startswith("--")]
    for preset in recipes.PRESETS:
        for option in (option for _, options in _sections(getattr(recipes, preset)) for option in options):
            assert any(not any(own.startswith(name) for own in taken) for name in option.opts), option.opts


def test_running_a_preset_as_a_module_warns_of_nothing() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-m", "llmlite.recipes.lora_int4", "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_stands_on_a_line_of_its_own_and_not_behind_a_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tqdm(total=3, file=sys.stderr) as bar:
        bar.update(1)
        with pytest.raises(SystemExit):
            main(["run", str(tmp_path / "nowhere.yaml")])
    said = capsys.readouterr().err
    assert "| 1/3 [" in said
    assert next(line for line in said.splitlines() if "nowhere.yaml" in line).startswith(("ConfigError: ", "LoadError: "))


def test_a_name_in_brackets_is_printed_as_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = ("[v2]", "[red]a :x:")
    for name in names:
        (tmp_path / name).mkdir()
        Report(tmp_path / name, {}, {}, {}, [Row("base", 1, 9, 20.0), Row("quantize", 1, 5, 21.0, 0.1, 0.9)]).save()
    main(["compare", *(str(tmp_path / name) for name in names)])
    out = capsys.readouterr().out
    assert all(name in out for name in names)
    plain_console().print(Report(Path("out/[/v2]"), {}, {}, {}, [Row("base", 1, 9, 20.0)]).table())
    assert "out/[/v2]" in capsys.readouterr().out


def test_what_a_terminal_would_obey_is_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title="\x1b[2J")
    table.add_column("\x9b0m")
    table.add_row("a\x1b]52;c;eA==\x07")
    plain_console().print(table)
    plain_console().print("two\nlines\x1b[8m")
    out = capsys.readouterr().out
    assert not set(out) & set("\x1b\x07\x9b")
    assert all(part in out for part in (r"\x1b[2J", r"\x9b0m", r"a\x1b]52;c;eA==\x07", "two\nlines" + r"\x1b[8m"))


def test_only_the_console_that_prints_names_as_they_are_is_used() -> None:
    sources = {path.name: path.read_text(encoding="utf-8") for path in (Path(__file__).parent.parent / "llmlite").rglob("*.py")}
    assert [name for name, text in sources.items() if re.search(r"\bConsole\b.*\(|\(Console\)", text)] == ["cli.py"]
