"""`llmlite evaluate` measures a run beside its base, with tasks that run offline, and agrees with what the run itself found."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmlite
from llmlite.cli import main
from llmlite.data.text import Rows
from llmlite.errors import ConfigError, LoadError, OutputError
from llmlite.evaluation.sample import sample
from llmlite.evaluation.tasks import TaskResult, check_tasks, flips, run_tasks
from llmlite.hub.card import model_card
from llmlite.report import Report
from tests.conftest import build_tiny, build_tokenizer, save_sums_task


@pytest.fixture(scope="module")
def run(model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A tiny model with three quarters of its channels."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    steps = [llmlite.PruneFfn(keep=0.5, score="magnitude", reconstruct=False)]
    options: dict[str, Any] = {"max_length": 64, "evaluation_rows": 6, "calibration_sequences": 4, "calibration": str(pairs_file)}
    return llmlite.Recipe(model=str(model_folder), data=str(pairs_file), output_dir=str(out), steps=steps, **options).run()


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sums_task(tmp_path_factory.mktemp("task") / "sums.yaml")


def test_a_run_is_measured_as_it_measured_itself_and_tasks_run_offline(run: Report, task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", str(run.path), "--tasks", str(task), "--repeats", "2", "--batch_sizes", "1,2", "--answers", "2"])
    told = capsys.readouterr().out
    assert "TTFT ms, p50 / p95" in told
    assert "tiny_sums: answers flipped" in told
    found = json.loads((run.path / "evaluation.json").read_text())
    base, this = found["models"]["base"], found["models"]["this"]
    assert this["perplexity"] == pytest.approx(run.rows[1].perplexity, rel=1e-4)
    assert this["kl"] == pytest.approx(run.rows[1].kl, rel=1e-3)
    assert base["perplexity"] == pytest.approx(run.rows[0].perplexity, rel=1e-4)
    assert base["tasks"][0]["flips"] is None
    assert 0 <= this["tasks"][0]["flips"] <= 1
    assert this["tasks"][0]["standard_error"] > 0
    assert [one["batch"] for one in this["latency"]] == [1, 2]
    assert all(one["ttft_p50"] <= one["ttft_p95"] and one["tpot_p50"] <= one["tpot_p95"] for one in this["latency"])
    assert this["joules_per_1000_tokens"] is None or this["energy"]["kind"] == "measured"
    assert len(this["answers"]) == 2
    assert str(run.path) not in json.dumps(found)


def test_a_text_is_measured_by_a_stated_window(run: Report, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("What is the answer? It is the answer of the question. " * 40)
    found = llmlite.evaluate(run.path, text=str(tmp_path / "text.txt"), window=32, batch_sizes=(1,), repeats=1, answers=0)
    assert "sliding window of 32, stride 16" in found.about["quality_on"]
    assert found.models["this"]["tokens"] == found.models["base"]["tokens"] > 100


def test_a_collapse_is_said_when_it_is_measured_and_stands_in_the_card(
    model_folder: Path, pairs_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.lm_head.weight.data *= -200
    model.save_pretrained(tmp_path)
    found = llmlite.evaluate(tmp_path, base=str(model_folder), data=str(pairs_file), batch_sizes=(1,), repeats=1, answers=0)
    (told,) = [message for message in caplog.messages if "far from its base" in message]
    assert told == found.warning()
    assert "top-1 agreement with the base" in told
    card = model_card(None, tmp_path)
    assert "**This model is far from its base: perplexity" in card
    how = "Speed of the reloaded models: 1 repeat after one that warms up, prompts of 112 random tokens and 16 more"
    assert how in card
    assert how in str(found.table().caption)
    assert dataclasses.replace(found, models=found.models | {"this": found.models["base"]}).warning() == ""


def test_a_folder_that_is_no_run_needs_its_base_named(model_folder: Path, run: Report, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--base MODEL compares it with its base"):
        llmlite.evaluate(model_folder)
    with pytest.raises(LoadError, match="neither a finished run nor a model folder"):
        llmlite.evaluate(tmp_path)
    with pytest.raises(LoadError, match="no folder"):
        llmlite.evaluate(tmp_path / "nowhere")


def test_tasks_are_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "no_task.yaml").write_text("dataset_path: json\n")
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    wrong = {"hellaswagg": "Did you mean .hellaswag", str(tmp_path / "a.yaml"): "no file", str(tmp_path / "no_task.yaml"): "has no .task: NAME."}
    wrong[str(tmp_path / "deep.yaml")] = "is not a task's YAML"
    for name, message in wrong.items():
        with pytest.raises(ConfigError, match=message):
            check_tasks([name])


def test_a_folder_that_takes_no_figures_is_refused_before_anything_is_loaded(run: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("llmlite.context.Run.load_base", lambda _: pytest.fail("loaded"))
    monkeypatch.setattr("llmlite.storage.tempfile.NamedTemporaryFile", refuse)
    with pytest.raises(OutputError, match=r"out: cannot be written \(Read-only file system\). The figures go there: copy the folder to where you can write"):
        llmlite.evaluate(run.path)


def test_tasks_are_asked_without_a_word_of_the_working_folder(
    run: Report, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from lm_eval import evaluator

    before = evaluator.get_git_commit_hash, evaluator.add_env_info
    monkeypatch.chdir(tmp_path)  # no repository, of which git would complain
    (found,) = run_tasks(AutoModelForCausalLM.from_pretrained(run.path), AutoTokenizer.from_pretrained(run.path), [str(task)], limit=2)
    assert len(found.correct) == 2
    assert "git" not in capfd.readouterr().err
    assert (evaluator.get_git_commit_hash, evaluator.add_env_info) == before


def test_tasks_of_both_kinds_are_refused_before_anything_is_loaded(task: Path) -> None:
    with pytest.raises(ConfigError, match="go into two calls"):
        check_tasks([str(task), "hellaswag"])


def test_a_task_of_one_s_own_that_lm_eval_would_read_otherwise_is_refused_at_once(tmp_path: Path) -> None:
    task = save_sums_task(tmp_path / "sums.yaml")
    check_tasks([str(task)])
    shutil.copy(task, tmp_path / "a_copy.yaml")
    with pytest.raises(ConfigError, match=r"sums.yaml and .*a_copy.yaml are both called 'tiny_sums', and lm-eval would read the second"):
        check_tasks([str(task)])
    (tmp_path / "a_copy.yaml").unlink()
    check_tasks([str(task)])
    task.with_suffix(".jsonl").unlink()
    with pytest.raises(ConfigError, match=r"sums.yaml: no file .*sums.jsonl, which its data_files name"):
        check_tasks([str(task)])
    with pytest.raises(ConfigError, match=r"lm-eval does not take .*sums.yml for a task. Its name should end in .yaml"):
        check_tasks([str(task.rename(tmp_path / "sums.yml"))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 70}, r"stride=70 should be at least 1 and below the window of 64 tokens, the data's max_length\. Lower stride"),
        ({"stride": 32, "window": 32}, "stride=32 should be at least 1 and below window=32"),
        ({"stride": 128, "window": 4096}, "window=4096 should be at most 128, all that .*tiny-llama reads at a time. Lower window"),
        ({"stride": 0}, "stride=0 should be at least 1"),
        ({"text": None, "window": 32}, "window=32: the sliding window is for a text. Name a file with text, or leave window out"),
        ({"text": None, "stride": 8, "window": 32}, "window=32 and stride=8: the sliding window is for a text"),
    ],
)
def test_a_window_that_cannot_slide_is_refused_before_anything_is_loaded(
    run: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "text.txt").write_text("What is the answer? It is the answer of the question. " * 40)
    monkeypatch.setattr("llmlite.context.Run.load_base", lambda _: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=message):
        llmlite.evaluate(run.path, **{"text": str(tmp_path / "text.txt"), **options})


def test_flips_count_changes_in_both_directions() -> None:
    def result(*correct: bool) -> TaskResult:
        return TaskResult("t", "acc", 0.5, None, {str(index): value for index, value in enumerate(correct)})

    assert flips(result(True, False, True, False), result(False, True, True, False)) == 0.5  # the same accuracy, half the answers changed
    assert flips(result(), result()) is None


def test_a_chat_that_begins_with_the_answer_asks_nothing() -> None:
    rows = Rows("chat", [{"messages": [{"role": "assistant", "content": "Hello."}]}], ["here"], "here", None, "messages", 1)
    assert sample(build_tiny("llama", vocab_size=320), build_tokenizer(), rows) == {"prompt": "", "expected": "Hello.", "answer": ""}
