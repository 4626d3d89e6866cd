"""Every recipe, and every step that no recipe has, under `accelerate launch` (recipes under `torchrun` too) on two CPU processes over gloo.

Recipes and steps are found, not listed: a new one is covered at once, with its defaults. What two processes make is what one makes with the same global batch.
All of that is slow. The quick suite has two recipes in one launch, which imports once for all.
"""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from llmlite import recipes
from llmlite.cli import main, recipe_main
from llmlite.evaluation.speed import Speed
from llmlite.recipe import Recipe
from llmlite.report import Report
from llmlite.step import STEPS, name_of_step
from llmlite.training.settings import TrainingStep
from tests.conftest import save_tiny
from tests.distillation.fake_api import FakeApi, serving

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo over loopback as CI has it")

ROOT = Path(__file__).parents[2]
MODULES = sorted(module.name for module in pkgutil.iter_modules(recipes.__path__))
QUICK = ["distill_blackbox", "lora_int4"]
SHORT = ["--max_length", "64", "--evaluation_rows", "6", "--max_train_rows", "18", "--calibration_sequences", "4", "--max_steps", "2"]
OWN = {"prune_heads": ["--keep", "0.5"], "prune_structured": ["--multiple_of", "16"]}
"""What so small a model needs said."""

# Steps of no recipe, in as few runs as they go together in.
CHAINS: dict[str, list[dict[str, object]]] = {
    "cut": [
        {"step": "prune.vocabulary", "multiple_of": 16},
        {"step": "prune.hidden", "multiple_of": 16},
        {"step": "prune.ffn", "multiple_of": 16},
        {"step": "finetune"},
    ],
    "corrected": [{"step": "quantize", "scheme": "nf4", "calibrate": False, "report_sequences": 0}, {"step": "correct", "r": 4}],
    "scaled": [{"step": "ia3", "learning_rate": 0.01}, {"step": "merge"}, {"step": "prefix", "num_virtual_tokens": 4}],
}


def preset(module: str) -> type[Recipe]:
    found: type[Recipe] = getattr(recipes, {place: name for name, place in recipes.PRESETS.items()}[module])
    return found


IN_RECIPES = {name_of_step(type(step)) for module in MODULES for step in preset(module)().steps}
IN_CHAINS = {step["step"] for chain in CHAINS.values() for step in chain}
CHAINS |= {name: [{"step": name}] for name in STEPS if name not in IN_RECIPES | IN_CHAINS}


@pytest.fixture(scope="module", autouse=True)
def _same_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the model writes to be calibrated on costs more than the rest, and is the same for all. In this process only the weights matter."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LLMLITE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patched.setattr("llmlite.evaluation.reload.require_reload", lambda model, lines: 0.0)
        patched.setattr("llmlite.evaluation.speed.measure_speed", lambda model: Speed(1.0, 1.0))
        patched.setattr("llmlite.evaluation.sample.sample", lambda *_: {"prompt": "", "expected": "", "answer": ""})
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeApi]:
    """A teacher on loopback that answers every sum alike."""
    with serving(FakeApi(save_tiny(tmp_path_factory.mktemp("teacher") / "tiny"))) as api:
        api.answer_with = lambda body: ("The answer follows from adding both numbers.", "stop")
        yield api


# What `-m MODULE ARGUMENTS` does, for several modules.
SEVERAL = """
import json, runpy, sys
from llmlite.evaluation import sample, speed

for module, arguments in json.loads(sys.argv[1]):
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    speed.measure_speed, sample.sample = lambda model: speed.Speed(1.0, 1.0), lambda *_: {"prompt": "", "expected": "", "answer": ""}
"""


def launch(*command: str, launcher: str = "accelerate") -> subprocess.CompletedProcess[str]:
    """`accelerate launch` with the file that the recipes bring for two CPU processes, or torchrun."""
    starts = {
        "accelerate": ["accelerate.commands.accelerate_cli", "launch", "--config_file", str(ROOT / "recipes/accelerate/cpu2.yaml"), "--main_process_port", "0"],
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", *starts[launcher], *command], env=environment, capture_output=True, text=True, check=False, timeout=600)


def require_as_one(done: subprocess.CompletedProcess[str], one: Path, two: Path, runs: int = 1) -> None:
    """Want a launch that ended well, of so many runs, and a result that reloads and is that of one process."""
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The plan") == runs
    assert "2 processes, DDP" in done.stdout
    report = Report.read(two)
    assert report.reload_difference == 0.0
    assert [row.name for row in report.rows] == [row.name for row in Report.read(one).rows]
    files = sorted(file.name for file in one.glob("*.safetensors"))
    assert files
    assert files == sorted(file.name for file in two.glob("*.safetensors"))
    for file in files:
        first, second = load_file(one / file), load_file(two / file)
        assert first.keys() == second.keys()
        differences = {name: float((first[name].double() - second[name].double()).abs().max()) for name in first}
        assert max(differences.values()) < 1e-5, differences
    for mine, theirs in zip(Report.read(one).rows, report.rows, strict=True):
        assert theirs.perplexity == pytest.approx(mine.perplexity, rel=1e-5)


def flags_of(module: str, model: Path, rows: Path, teacher: FakeApi) -> list[str]:
    flags = ["--model", str(model), "--data", str(rows), *SHORT, *OWN.get(module, [])]
    if module == "distill_blackbox":
        flags += ["--teacher", "tiny", "--base_url", teacher.url, "--keep", "0.67"]
    return flags


def trained_with(module: str, rows: int) -> Sequence[str]:
    """Rows of a forward pass, for recipes that train."""
    return ["--per_device_train_batch_size", str(rows)] if any(isinstance(step, TrainingStep) for step in preset(module)().steps) else []


def test_two_recipes_on_two_processes_leave_what_they_leave_on_one(model_folder: Path, pairs_file: Path, teacher: FakeApi, tmp_path: Path) -> None:
    flags = {module: flags_of(module, model_folder, pairs_file, teacher) for module in QUICK}
    commands = [(f"llmlite.recipes.{module}", [*flags[module], "--output_dir", str(tmp_path / "two" / module), *trained_with(module, 1)]) for module in QUICK]
    (tmp_path / "several.py").write_text(SEVERAL, encoding="utf-8")
    done = launch(str(tmp_path / "several.py"), json.dumps(commands))
    assert done.returncode == 0, done.stderr[-3000:]
    for module in QUICK:
        recipe_main(preset(module), [*flags[module], "--output_dir", str(tmp_path / "one" / module), *trained_with(module, 2)])
        require_as_one(done, tmp_path / "one" / module, tmp_path / "two" / module, len(QUICK))


@pytest.mark.slow
@pytest.mark.parametrize(("module", "launcher"), [(module, launcher) for launcher in ("accelerate", "torchrun") for module in MODULES])
def test_a_recipe_on_two_processes_leaves_what_it_leaves_on_one(
    module: str, launcher: str, model_folder: Path, pairs_file: Path, teacher: FakeApi, tmp_path: Path
) -> None:
    flags = flags_of(module, model_folder, pairs_file, teacher)
    done = launch("-m", f"llmlite.recipes.{module}", *flags, "--output_dir", str(tmp_path / "two"), *trained_with(module, 1), launcher=launcher)
    recipe_main(preset(module), [*flags, "--output_dir", str(tmp_path / "one"), *trained_with(module, 2)])
    require_as_one(done, tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_steps_of_no_recipe_on_two_processes_leave_what_they_leave_on_one(name: str, model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    for count, batch in (("one", 4), ("two", 2)):
        steps = [{**step, **({"per_device_train_batch_size": batch} if step["step"] in {"finetune", "ia3", "prefix"} else {})} for step in CHAINS[name]]
        data = {"train": str(pairs_file), "max_length": 64, "evaluation_rows": 6, "max_train_rows": 18, "calibration_sequences": 4}
        options = {"model": str(model_folder), "data": {**data, "packing": name != "scaled"}, "max_steps": 2, "steps": steps}
        (tmp_path / f"{count}.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    done = launch("-m", "llmlite", "run", str(tmp_path / "two.yaml"), "--output_dir", str(tmp_path / "two"))
    main(["run", str(tmp_path / "one.yaml"), "--output_dir", str(tmp_path / "one")])
    require_as_one(done, tmp_path / "one", tmp_path / "two")
