"""`evaluate` in a recipe: what it may be, what is refused before anything is loaded, and what the plan promises."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import llmlite
from llmlite.cli import main
from llmlite.config import to_yaml
from llmlite.errors import ConfigError, DataError
from llmlite.evaluating import Evaluate
from tests.conftest import save_sums_task
from tests.evaluation.each_step import LORA, PRUNED, options, recipe_of


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sums_task(tmp_path_factory.mktemp("task") / "sums.yaml")


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({}, None),
        ({"evaluate": False}, None),
        ({"evaluate": None}, None),
        ({"evaluate": True}, Evaluate()),
        ({"evaluate": {}}, Evaluate()),
        ({"evaluate": {"tasks": ["a", "b"], "batch_sizes": [4]}}, Evaluate(tasks=("a", "b"), batch_sizes=(4,))),
        ({"evaluate.tasks": "a,b", "evaluate.batch_sizes": "1,16"}, Evaluate(tasks=("a", "b"), batch_sizes=(1, 16))),
        ({"evaluate.batch_sizes": 2, "evaluate": True}, Evaluate(batch_sizes=(2,))),
        ({"evaluate": {"limit": 3}, "evaluate.each_step": False}, Evaluate(limit=3, each_step=False)),
        ({"evaluate": False, "evaluate.limit": 3}, Evaluate(limit=3)),
    ],
)
def test_the_option_is_a_word_or_a_mapping_or_paths_to_its_options(given: dict[str, Any], asked: Evaluate | None) -> None:
    recipe = llmlite.Recipe.from_options(("options", {"steps": ["quantize"], **given}))
    assert recipe.evaluate == asked
    assert llmlite.Recipe.from_options(("options", recipe.to_mapping())).evaluate == asked
    assert recipe.identity() == llmlite.Recipe.from_options(("options", {"steps": ["quantize"]})).identity()


def test_the_bare_word_switches_on_what_the_file_asks_for() -> None:
    file = ("file", {"steps": ["quantize"], "evaluate": {"tasks": ["a"], "repeats": 2}})
    assert llmlite.Recipe.from_options(file, ("flags", {"evaluate": True})).evaluate == Evaluate(tasks=("a",), repeats=2)
    assert llmlite.Recipe.from_options(file, ("flags", {"evaluate": False})).evaluate is None
    assert llmlite.Recipe.from_options(file, ("flags", {"evaluate": {}})).evaluate == Evaluate()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"evaluate": {"task": ["a"]}}, "no option 'task'. Did you mean 'tasks'?"),
        ({"evaluate": {"batch_sizes": [0]}}, "batch_sizes.0=0 should be at least 1"),
        ({"evaluate": {"batch_sizes": []}}, "batch_sizes"),
        ({"evaluate": {"repeats": "many"}}, "repeats='many' should be a whole number"),
        ({"evaluate": "yes"}, "evaluate='yes' should be true, false or a mapping of its options. Measure"),
        ({"evaluate": 3}, "evaluate=3 should be true, false or a mapping of its options. Measure"),
        ({"evaluate": []}, "evaluate=[] should be true, false or a mapping of its options. Measure"),
        ({"evaluate": 3, "evaluate.limit": 2}, "evaluate=3 should be true, false or a mapping of its options, evaluate.limit among them"),
        ({"evaluate": {"repeats": 0}}, "repeats=0 should be at least 1. Of the speed measurement, after one that warms up. Measure"),
    ],
)
def test_its_mistakes_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as found:
        llmlite.Recipe.from_options(("options", {"steps": ["quantize"], **given}))
    assert message in str(found.value)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"tasks": ["hellaswagg"]}, ConfigError, "no task 'hellaswagg'. Did you mean 'hellaswag"),
        ({"tasks": ["nowhere.yaml"]}, ConfigError, "no file nowhere.yaml"),
        ({"text": "nowhere.txt"}, DataError, "text: nowhere.txt cannot be read"),
        ({"stride": 8}, ConfigError, "stride=8: the sliding window is for a text"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_loaded(
    asked: dict[str, Any], error: type[Exception], message: str, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message.replace("?", r"\?")):
        recipe_of(model_folder, pairs_file, tmp_path / "out", PRUNED, evaluate=asked).check()
    assert not (tmp_path / "out").exists()


def test_tasks_without_lm_eval_and_models_in_blocks_are_refused_before_anything_is_loaded(
    model_folder: Path, pairs_file: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="evaluate: the model is loaded one block at a time"):
        recipe_of(model_folder, pairs_file, tmp_path / "out", PRUNED, evaluate=True, load="blocks").check()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r"pip install 'llmlite\[eval\]'"):
        recipe_of(model_folder, pairs_file, tmp_path / "out", PRUNED, evaluate={"tasks": [str(task)]}).check()


def test_the_plan_says_what_will_be_measured_of_which_models(
    model_folder: Path, pairs_file: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(to_yaml(options(model_folder, pairs_file, out, [*PRUNED, LORA], evaluate={"tasks": [str(task)], "limit": 1, "repeats": 1})))

    def told(*flags: str) -> str:
        main(["check", str(file), *flags])
        return " ".join(capsys.readouterr().out.split())

    assert (
        "evaluate: when the steps are done, the base and 3 reloaded checkpoints (1. prune.ffn, 2. prune.weights, 3. lora) are measured, one after the other: "
        "perplexity, KL and agreement on the held-out rows; task sums.yaml, at most 1 question each; speed at batch 1 and 8, 1 repeat each; energy; 3 answers."
    ) in told()
    (tmp_path / "text.txt").write_text("What is the answer? It is the answer of the question. " * 20)
    assert (
        "the base and 1 reloaded checkpoint (3. lora) are measured, one after the other: perplexity, KL and agreement on text.txt; speed at batch 4, 2 repeats "
        "each; energy. Dry run"
    ) in told(
        *("--evaluate", "{each_step: false, batch_sizes: 4, repeats: 2, answers: 0}"),
        *("--evaluate.text", str(tmp_path / "text.txt"), "--evaluate.window", "16"),
    )
    assert "evaluate:" not in told("--evaluate", "false")
    assert not out.exists()


def test_of_a_base_in_parts_the_plan_promises_no_speed() -> None:
    assert Evaluate().sentence(["quantize"], offloaded=True).endswith("3 answers. Of the base, part of which is brought in for each forward pass, neither "
        "speed nor energy nor answers.")  # fmt: skip
