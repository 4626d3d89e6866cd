"""Every step's checkpoint measured as it comes back from disk: by the run itself where its recipe asks, or afterwards by `llmlite evaluate DIR --each_step`."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import llmlite
from llmlite.cli import main
from llmlite.config import to_yaml
from llmlite.context import Run
from llmlite.errors import ConfigError, LoadError, OutputError
from llmlite.evaluating import Evaluate
from llmlite.evaluation.reloaded import Reloaded
from llmlite.evaluation.result import Evaluation
from llmlite.evaluation.tasks import TaskResult, flips, run_tasks
from llmlite.hub.card import model_card
from llmlite.pipeline import _Pipeline
from llmlite.pipeline import run as run_pipeline
from llmlite.report import Report, human_bytes
from llmlite.storage import locked, writing_folder
from tests.conftest import save_sums_task
from tests.evaluation.each_step import LORA, PRUNED, options, recipe_of

QUICK: dict[str, Any] = {"batch_sizes": [1], "repeats": 2, "answers": 1}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sums_task(tmp_path_factory.mktemp("task") / "sums.yaml")


@pytest.fixture(scope="module")
def run(model_folder: Path, pairs_file: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[llmlite.Recipe, Report]:
    """Two steps that prune and one that puts an adapter on, measured by the run itself."""
    out = tmp_path_factory.mktemp("each") / "out"
    recipe = recipe_of(model_folder, pairs_file, out, [*PRUNED, LORA], evaluate={**QUICK, "tasks": [str(task)]})
    return recipe, recipe.run()


@pytest.fixture(scope="module")
def plain(model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps that has measured nothing reloaded."""
    out = tmp_path_factory.mktemp("plain") / "out"
    recipe_of(model_folder, pairs_file, out, PRUNED).run()
    return out


def copy_of(folder: Path, place: Path) -> Path:
    """A run of one's own, as nobody has evaluated it."""
    return Path(shutil.copytree(folder, place, ignore=shutil.ignore_patterns("evaluation.json")))


@pytest.fixture
def _no_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that do not prove their result in another process, which takes most of their time."""
    monkeypatch.setattr("llmlite.evaluation.reload.require_reload", lambda *_: 0.0)


def found_in(folder: Path) -> Evaluation:
    found = Evaluation.read(folder)
    assert found is not None
    return found


def test_a_run_that_was_asked_to_measures_what_every_step_left_as_it_measured_it_in_memory(run: tuple[llmlite.Recipe, Report]) -> None:
    report, found = run[1], found_in(run[1].path)
    assert list(found.models) == ["base", "01-prune.ffn", "02-prune.weights", "this"]
    assert found.headings() == ["base", "1. prune.ffn", "2. prune.weights", "3. lora = this"]
    for row, model in zip(report.rows, found.models.values(), strict=True):
        assert model["perplexity"] == pytest.approx(row.perplexity, rel=1e-4)
        assert model["kl"] == (None if row.kl is None else pytest.approx(row.kl, rel=1e-3))
        assert model["bytes_on_disk"] == row.bytes_on_disk
        assert [(one["batch"], one["repeats"]) for one in model["latency"]] == [(1, 2)]
        assert len(model["answers"]) == 1
    assert not (report.path / "steps" / "evaluation.work").exists()


def test_answers_flip_against_the_base_at_every_step(run: tuple[llmlite.Recipe, Report], model_folder: Path, task: Path) -> None:
    models = found_in(run[1].path).models

    def answered(folder: Path) -> TaskResult:
        (found,) = run_tasks(AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(model_folder), [str(task)])
        return found

    base = answered(model_folder)
    assert models["base"]["tasks"][0]["flips"] is None
    for name in ("01-prune.ffn", "02-prune.weights"):
        assert models[name]["tasks"][0]["flips"] == flips(base, answered(run[1].path / "steps" / name))
    assert any(model["tasks"][0]["flips"] for model in list(models.values())[1:])  # else nothing was compared


def test_page_and_card_have_a_column_for_every_step(run: tuple[llmlite.Recipe, Report]) -> None:
    report = run[1]
    page, card = (report.path / "report.html").read_text().replace("\u200b", ""), (report.path / "README.md").read_text()
    assert "<h2>Measured afterwards, each loaded from disk</h2>" in page
    columns = ("base", "1. prune.ffn", "2. prune.weights", "3. lora = this")
    assert "".join(f'<th scope="col">{name}</th>' for name in ("", *columns)) in page
    assert page.count(f'<p class="soft">{columns[2]}</p>') == 1  # above its answer
    assert f"|  | {' | '.join(columns)} |\n|---|---:|---:|---:|---:|\n| on disk |" in card
    assert "of so few first tokens nearly the slowest" in page
    assert "of so few first tokens nearly the slowest" in card


def test_a_run_that_is_complete_and_measured_does_nothing_again_and_one_asked_otherwise_only_measures(
    run: tuple[llmlite.Recipe, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = run[0], tmp_path / "out"
    shutil.copytree(run[1].path, out)
    recipe = dataclasses.replace(recipe, output_dir=str(out))
    written = (out / "evaluation.json").stat().st_mtime_ns
    with monkeypatch.context() as patched:
        patched.setattr("llmlite.context.Run.load", lambda *_, **__: pytest.fail("loaded"))
        recipe.run()
    assert (out / "evaluation.json").stat().st_mtime_ns == written
    monkeypatch.setattr("llmlite.pipeline._Pipeline._step", lambda *_: pytest.fail("a step was done again"))
    dataclasses.replace(recipe, evaluate=Evaluate(each_step=False, batch_sizes=(2,), repeats=1, answers=0)).run()
    found = found_in(out)
    assert list(found.models) == ["base", "this"]
    assert found.models["this"]["latency"][0]["batch"] == 2
    assert found.title() == "Measured afterwards, both loaded from disk"


def test_a_run_that_is_killed_while_it_measures_goes_on_behind_what_it_has_measured(
    model_folder: Path, pairs_file: Path, task: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copy_of(plain, tmp_path / "out")
    recipe = recipe_of(model_folder, pairs_file, out, PRUNED, evaluate={**QUICK, "tasks": [str(task)]})
    measured: list[str] = []
    rest = Reloaded._rest

    def counted(self: Reloaded, model: PreTrainedModel, quality: Any, size: int, stop_at: int) -> dict[str, Any]:
        if len(measured) == stop_at:
            raise KeyboardInterrupt
        measured.append(str(model.config.intermediate_size))
        return rest(self, model, quality, size)

    for stop_at, so_far in ((1, ["base"]), (2, ["01-prune.ffn", "base"])):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Reloaded, "_rest", lambda self, *given, stop_at=stop_at: counted(self, *given, stop_at=stop_at))
            recipe.run()
        assert not (out / "evaluation.json").exists()
        assert sorted(path.name for path in (out / "steps" / "evaluation.work").iterdir()) == so_far
    with monkeypatch.context() as patched:
        patched.setattr(Reloaded, "_rest", lambda self, *given: counted(self, *given, stop_at=-1))
        patched.setattr("llmlite.context.Run.load_base", lambda _: pytest.fail("the base was measured already"))
        recipe.run()
    assert len(measured) == 3  # each of the models once, over three starts
    assert not (out / "steps" / "evaluation.work").exists()
    at_once = llmlite.evaluate(plain, each_step=True, tasks=[str(task)], **QUICK)
    for name, model in at_once.models.items():
        again = found_in(out).models[name]
        assert {key: again[key] for key in ("perplexity", "kl", "tasks", "answers")} == {key: model[key] for key in ("perplexity", "kl", "tasks", "answers")}


def test_what_was_measured_otherwise_or_of_another_base_is_measured_anew(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = copy_of(plain, tmp_path / "out")

    def measured(**given: Any) -> int:
        """Models that are measured until the last one stops."""
        rest, count = Reloaded._rest, 0

        def counted(self: Reloaded, model: PreTrainedModel, quality: Any, size: int) -> dict[str, Any]:
            nonlocal count
            count += 1
            if model.config.intermediate_size < 128:
                raise KeyboardInterrupt
            return rest(self, model, quality, size)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Reloaded, "_rest", counted)
            llmlite.evaluate(out, each_step=True, **given)
        return count

    assert measured(**QUICK) == 2  # the base, and the step that stops
    assert measured(**QUICK) == 1
    assert measured(**{**QUICK, "repeats": 1}) == 2
    text = tmp_path / "text.txt"
    text.write_text("What is the answer? It is the answer of the question. " * 20)
    assert measured(**{**QUICK, "text": str(text)}) == 2
    text.write_text("What was the question? It was the question of the answer. " * 20)
    assert measured(**{**QUICK, "text": str(text)}) == 2
    assert measured(**{**QUICK, "text": str(text)}) == 1
    (tmp_path / "own").mkdir()
    own = save_sums_task(tmp_path / "own" / "sums.yaml")
    assert measured(**{**QUICK, "tasks": [str(own)]}) == 2
    assert measured(**{**QUICK, "tasks": [str(own)]}) == 1
    questions = own.with_suffix(".jsonl")
    questions.write_text("".join(questions.read_text().splitlines(keepends=True)[1:]))
    assert measured(**{**QUICK, "tasks": [str(own)]}) == 2


@pytest.mark.usefixtures("_no_fresh_process")
def test_never_are_two_models_in_memory(model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(one), PreTrainedModel) and one.device.type != "meta" for one in gc.get_objects())  # plans keep models without weights

    before: list[int] = []
    counts: list[int] = []
    pipelines: list[_Pipeline] = []
    load, measure, evaluate = Run.load, Reloaded.measure, _Pipeline._evaluate

    def counted(self: Run, *given: Any, **more: Any) -> Any:
        counts.append(alive())
        return load(self, *given, **more)

    def measuring(self: Reloaded, *given: Any) -> Evaluation:
        assert pipelines[0].model is None  # the steps' last one
        before.append(alive())  # what others hold
        monkeypatch.setattr(Run, "load", counted)
        return measure(self, *given)

    monkeypatch.setattr(Reloaded, "measure", measuring)
    monkeypatch.setattr(_Pipeline, "_evaluate", lambda self: (pipelines.append(self), evaluate(self)))
    recipe_of(model_folder, pairs_file, tmp_path / "out", PRUNED, evaluate={**QUICK, "answers": 0}).run()
    assert counts == before * 3


def test_the_command_measures_every_step_of_a_finished_run_and_says_so(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_of(plain, tmp_path / "out")
    main(["evaluate", str(tmp_path / "out"), "--each_step", "--batch_sizes", "1", "--repeats", "1", "--answers", "1"])
    told = capsys.readouterr().out
    for words in ("1. prune.ffn", "TPOT ms, p50 / p95", "\n  2. prune.weights = this  "):
        assert words in told
    assert list(found_in(tmp_path / "out").models) == ["base", "01-prune.ffn", "this"]


def test_steps_that_are_not_there_are_named_before_anything_is_loaded(plain: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmlite.context.Run.load_base", lambda _: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=r"each_step: .*tiny-llama is no finished run of llmlite, so there are no steps to measure"):
        llmlite.evaluate(model_folder, base=str(model_folder), each_step=True)
    copy_of(plain, tmp_path / "out")
    with (tmp_path / "out" / "steps" / "01-prune.ffn" / "model.safetensors").open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(LoadError, match=r"01-prune.ffn is not as step 1. prune.ffn left it \(model.safetensors has changed.*Leave --each_step out"):
        llmlite.evaluate(tmp_path / "out", each_step=True)
    shutil.rmtree(tmp_path / "out" / "steps")
    with pytest.raises(LoadError, match=r"01-prune.ffn is not as step 1. prune.ffn left it \(it was never finished\)"):
        llmlite.evaluate(tmp_path / "out", each_step=True)


def test_a_result_that_was_cut_is_named(plain: Path, model_folder: Path, tmp_path: Path) -> None:
    out = copy_of(plain, tmp_path / "out")
    shutil.copytree(out / "steps" / "02-prune.weights", tmp_path / "stock")
    for weights in (out / "steps" / "02-prune.weights" / "model.safetensors", tmp_path / "stock" / "model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(LoadError, match="02-prune.weights' cannot be loaded"):
        llmlite.evaluate(out, **QUICK)
    with pytest.raises(LoadError, match="stock' cannot be loaded"):
        llmlite.evaluate(tmp_path / "stock", base=str(model_folder), **QUICK)


def test_two_at_once_do_not_take_each_other_s_figures_away(plain: Path, tmp_path: Path) -> None:
    out = copy_of(plain, tmp_path / "out")
    with locked(out), pytest.raises(OutputError, match=r"^another run is working in [^.]*out\. Wait for it\.$"):
        llmlite.evaluate(out, each_step=True, **QUICK)
    assert not (out / "evaluation.json").exists()


@pytest.mark.parametrize(
    "content", ["", "[]", '{"about": [], "models": 3}', '{"about": [], "models": {"base": {}, "this": {}}}', '{"about": {}, "models": {"base": {}}}']
)
def test_figures_that_were_damaged_count_as_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    assert Evaluation.read(tmp_path) is None


def test_kept_figures_of_another_make_are_measured_anew(plain: Path, tmp_path: Path) -> None:
    out = copy_of(plain, tmp_path / "out")
    for content in ("[]", "{}"):
        with writing_folder(out / "steps" / "evaluation.work" / "base") as folder:
            (folder / "figures.json").write_text(content)
        assert llmlite.evaluate(out, each_step=True, **{**QUICK, "answers": 0}).models["base"]["perplexity"] > 1


def test_the_table_of_many_steps_cuts_no_figure_in_a_narrow_terminal() -> None:
    from rich.console import Console

    figures = {"bytes_on_disk": 616_000, "perplexity": 322.12, "kl": 0.0187, "top1_agreement": 0.944, "tokens": 9, "tasks": [], "answers": [], "latency": []}
    models = {name: {**figures, "joules_per_1000_tokens": None} for name in ("base", *(f"0{n}-distill.whitebox" for n in range(1, 7)), "this")}
    screen = io.StringIO()
    console = Console(width=80, file=screen)
    console.print(Evaluation(Path("out"), {"quality_on": "Quality."}, models).table())
    told = screen.getvalue()
    assert "\u2026" not in told
    kl = told[told.index("KL") : told.index("top-1")]
    assert "".join(kl.split()).count("0.018") == len(models)
    assert kl.count("7") == len(models)


@pytest.mark.usefixtures("_no_fresh_process")
def test_figures_of_an_evaluation_that_is_asked_for_no_longer_are_named_and_kept(
    plain: Path, model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = copy_of(plain, tmp_path / "out")
    recipe = recipe_of(model_folder, pairs_file, out, PRUNED, evaluate={**QUICK, "answers": 0})
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Reloaded, "_of", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        recipe.run()
    kept = out / "steps" / "evaluation.work"
    with caplog.at_level("INFO"):
        dataclasses.replace(recipe, evaluate=None).run()
    size = human_bytes(sum(path.stat().st_size for path in kept.rglob("*") if path.is_file()))
    assert f"{kept} holds {size} of an evaluation that was stopped. evaluate in the recipe, or llmlite evaluate {out} --each_step" in caplog.text
    monkeypatch.setattr("llmlite.context.Run.load_base", lambda _: pytest.fail("the base was measured already"))
    llmlite.evaluate(out, each_step=True, **{**QUICK, "answers": 0})
    assert not kept.exists()
    caplog.clear()
    with caplog.at_level("INFO"):
        dataclasses.replace(recipe, evaluate=None).run()
    assert "evaluation that was stopped" not in caplog.text


@pytest.mark.usefixtures("_no_fresh_process")
def test_the_command_line_takes_the_bare_word_and_the_table_after_a_run_names_it(
    model_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(options(model_folder, pairs_file, tmp_path / "out", PRUNED[:1])))
    main(["run", str(file), "--evaluate.repeats", "1", "--evaluate", "--evaluate.answers", "0", "--evaluate.batch_sizes", "1"])
    told = capsys.readouterr().out
    assert "`llmlite evaluate DIR --each_step`, or `evaluate: true` in the recipe" in " ".join(told.split())
    assert "1. prune.ffn = this" in told
    assert found_in(tmp_path / "out").models["this"]["latency"][0]["repeats"] == 1
    main(["evaluate", "--help"])
    assert "--each_step" in capsys.readouterr().out


def test_private_questions_and_places_of_every_step_stay_at_home(run: tuple[llmlite.Recipe, Report]) -> None:
    from llmlite.hub.push import what_is_sent

    report = run[1]
    sent = what_is_sent(report.path, report, "me/x", "me/base")
    public = json.loads(sent["evaluation.json"])
    assert [model["answers"] for model in public["models"].values()] == [[], [], [], []]
    assert found_in(report.path).models["02-prune.weights"]["answers"][0]["prompt"].startswith("What is")
    assert "What is" not in model_card(report, report.path)
    assert not [name for name in sent if "steps" in name]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo over loopback as CI has it")
def test_in_a_launch_of_two_one_process_measures_and_finds_what_one_alone_does(
    model_folder: Path, pairs_file: Path, task: Path, plain: Path, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(options(model_folder, pairs_file, tmp_path / "out", PRUNED, evaluate={**QUICK, "tasks": [str(task)]})))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "llmlite", "run", str(file)]
    two = subprocess.run(torchrun, env=environment, capture_output=True, text=True, check=False)
    assert two.returncode == 0, two.stderr[-3000:]
    assert two.stderr.count("measuring the base and 2 reloaded models") == 1
    alone = llmlite.evaluate(plain, each_step=True, tasks=[str(task)], **QUICK)
    for name, model in alone.models.items():
        assert found_in(tmp_path / "out").models[name]["perplexity"] == pytest.approx(model["perplexity"], rel=1e-4)
        assert found_in(tmp_path / "out").models[name]["tasks"] == model["tasks"]


@pytest.mark.usefixtures("_no_fresh_process")
def test_the_recipe_s_evaluation_runs_before_the_push(model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr("llmlite.pipeline._Pipeline._push", lambda self: seen.append((self.out / "evaluation.json").is_file()))
    recipe = recipe_of(model_folder, pairs_file, tmp_path / "out", PRUNED[:1], evaluate={**QUICK, "answers": 0})
    run_pipeline(recipe)
    run_pipeline(recipe)
    assert seen == [True, True]
