"""What several processes make is what one makes: calibration, distillation and evaluation over gloo, and a rank that fails."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmlite.evaluation.speed import Speed
from llmlite.recipe import Recipe
from llmlite.report import Report, Row

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo over loopback as CI has it")

HEAD = """
model: {{name: {model}, load: {load}}}
data: {{train: {pairs}, max_length: 64, evaluation_rows: 18, calibration: {pairs}, calibration_sequences: 8, max_train_rows: 18, packing: false}}
steps:
"""
TAUGHT = """
  - step: quantize
    scheme: nf4
  - step: distill.whitebox
    cache: none
    adapter: {{step: lora, r: 4}}
    max_steps: 3
    per_device_train_batch_size: {batch}
    gradient_accumulation_steps: 2
    logging_steps: 1
    learning_rate: 0.01
"""
QLORA = """
  - {{step: quantize, scheme: nf4}}
  - step: lora
    r: 4
    max_steps: 3
    logging_steps: 1
    per_device_train_batch_size: {batch}
    gradient_accumulation_steps: 2
    learning_rate: 0.01
"""
TRAINED = """
  - {{step: prune.weights, sparsity: 0.5}}
  - {{step: finetune, max_steps: 3, logging_steps: 1, per_device_train_batch_size: {batch}, gradient_accumulation_steps: 2, learning_rate: 0.003}}
"""
IN_BLOCKS = """
  - {{step: prune.weights, sparsity: 0.5}}
  - {{step: quantize, scheme: nf4, token_weights: equal, tune_epochs: 0}}
"""
CUT = """
  - {{step: prune.structured, keep_parameters: 0.8, multiple_of: 16, spread: query_heads+ffn}}
"""
BY_GRADIENTS = """
  - {{step: prune.ffn, keep: 0.5, multiple_of: 16, score: fisher}}
"""
RECIPES = {
    "taught": (TAUGHT, "whole"),
    "qlora": (QLORA, "whole"),
    "trained": (TRAINED, "whole"),
    "in_blocks": (IN_BLOCKS, "blocks"),
    "cut": (CUT + BY_GRADIENTS, "whole"),
    "cut_in_blocks": (CUT, "blocks"),
}
SCRIPT = """
import os, sys, time
from llmlite import pipeline
from llmlite.cli import main
from llmlite.evaluation import reload, sample, speed

find = pipeline.find
def slow_find(*args, **options):
    time.sleep(0.5 * (os.environ["RANK"] == "0"))
    with open(f"{sys.argv[1]}/downloads", "a") as file:
        file.write(os.environ["RANK"])
    return find(*args, **options)
pipeline.find = slow_find

for name in sys.argv[2:]:
    main(["run", f"{sys.argv[1]}/two-{name}.yaml", "--output_dir", f"{sys.argv[1]}/two/{name}"])
    reload.require_reload = lambda model, lines: 0.0  # the first one's result was loaded in a fresh process; each costs seconds
    speed.measure_speed, sample.sample = lambda model: speed.Speed(1.0, 1.0), lambda *_: {"prompt": "", "expected": "", "answer": ""}
"""


def torchrun(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Two CPU processes over gloo."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", **variables}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no_python"]
    own_hashes = ["sh", "-c", 'PYTHONHASHSEED=$((RANK + 2)) exec "$0" "$@"', sys.executable]  # as processes have them: sets of names differ in their order
    return subprocess.run([*start, *own_hashes, *command], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one/ and two/: the same recipes on one process with batch 4, and on two with batch 2. 18 rows do not divide by either."""
    folder = tmp_path_factory.mktemp("parallel")
    for count, batch in (("one", 4), ("two", 2)):
        for name, (steps, load) in RECIPES.items():
            text = (HEAD + steps).format(model=model_folder, pairs=pairs_file, batch=batch, load=load)
            (folder / f"{count}-{name}.yaml").write_text(text, encoding="utf-8")
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    done = torchrun(str(folder / "script.py"), str(folder), *RECIPES)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The plan") == len(RECIPES)
    assert "2 processes, DDP: the whole model" in done.stdout
    assert "2 processes, each of which reads all blocks, one at a time" in done.stdout
    assert done.stderr.count("base: loading") == len(RECIPES)  # one process speaks
    assert done.stderr.count("writing the new shards") == 3  # of three steps, by one of the processes
    assert (folder / "downloads").read_text() == "01" * len(RECIPES)  # the main process first, slow as it is
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("llmlite.evaluation.reload.require_reload", lambda model, lines: 0.0)
        patched.setattr("llmlite.evaluation.speed.measure_speed", lambda model: Speed(1.0, 1.0))
        patched.setattr("llmlite.evaluation.sample.sample", lambda *_: {"prompt": "", "expected": "", "answer": ""})
        for name in RECIPES:
            Recipe.from_file(folder / f"one-{name}.yaml", output_dir=str(folder / "one" / name)).run()
    return folder


def tensors(folder: Path, name: str, step: str = "") -> list[dict[str, torch.Tensor]]:
    """What one process and two have left of a recipe, in its folder or that of a step."""
    places = [folder / count / name / step for count in ("one", "two")]
    return [{key: value for file in sorted(place.glob("*.safetensors")) for key, value in load_file(file).items()} for place in places]


def rows(folder: Path, name: str) -> list[list[Row]]:
    return [Report.read(folder / count / name).rows for count in ("one", "two")]


@pytest.mark.parametrize(
    ("name", "step"),
    [("taught", "steps/01-quantize"), ("trained", "steps/01-prune.weights"), ("in_blocks", "steps/01-prune.weights"), ("in_blocks", "")],
    ids=["nf4", "sparsegpt", "sparsegpt-in-blocks", "nf4-in-blocks"],
)
def test_masks_and_codes_are_those_of_one_process(name: str, step: str, folder: Path) -> None:
    one, two = tensors(folder, name, step)
    assert one.keys() == two.keys()
    for key in one:
        assert torch.equal(one[key] == 0, two[key] == 0)
        if one[key].dtype == torch.uint8 or "norm" in key or "embed" in key:
            assert torch.equal(one[key], two[key])
        else:
            assert torch.allclose(one[key].float(), two[key].float(), atol=1e-5)


def test_several_processes_leave_one_set_of_changed_blocks(folder: Path) -> None:
    shards = [sorted(file.name for file in (folder / count / "in_blocks").glob("*.safetensors")) for count in ("one", "two")]
    assert shards[0] == shards[1]
    assert len(shards[0]) == 4
    assert not [place.name for place in (folder / "two" / "in_blocks").rglob("*") if place.name.startswith(("process-", ".hidden"))]


@pytest.mark.parametrize("name", ["taught", "qlora"])
def test_an_adapter_distilled_or_finetuned_on_four_bits_is_that_of_one_process(name: str, folder: Path) -> None:
    one, two = tensors(folder, name)
    assert one.keys() == two.keys()
    assert max(float(one[key].abs().max()) for key in one if "lora_B" in key) > 1e-3  # it learnt something
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-5


def test_a_correction_of_the_quantization_starts_an_adapter_alike_on_any_number_of_processes(folder: Path) -> None:
    one, two = (found[-1].details["quantization_error_left"] for found in rows(folder, "qlora"))
    assert 0 < one < 1
    assert two == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("name", ["taught", "qlora", "trained"])
def test_losses_are_those_of_one_process_with_the_same_global_batch(name: str, folder: Path) -> None:
    one, two = ([entry["loss"] for entry in found[-1].details["train_loss"]] for found in rows(folder, name))
    assert len(one) == 3
    assert two == pytest.approx(one, abs=1e-5)


def test_all_weights_trained_over_the_end_of_an_epoch_are_those_of_one_process(folder: Path) -> None:
    before, _ = tensors(folder, "trained", "steps/01-prune.weights")
    one, two = tensors(folder, "trained")
    assert max(float((one[name] - before[name]).abs().max()) for name in one) > 1e-3
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5


@pytest.mark.parametrize(
    ("name", "step"),
    [("cut", "steps/01-prune.structured"), ("cut_in_blocks", ""), ("cut", "")],
    ids=["structured", "structured-in-blocks", "fisher"],
)
def test_the_units_that_are_cut_and_what_is_left_are_those_of_one_process(name: str, step: str, folder: Path) -> None:
    one, two = tensors(folder, name, step)
    assert one.keys() == two.keys()
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


@pytest.mark.parametrize("name", ["taught", "in_blocks"])
def test_rows_measured_by_several_processes_give_the_figures_of_one(name: str, folder: Path) -> None:
    for one, two in list(zip(*rows(folder, name), strict=True))[:2]:  # what was trained differs in its last digits
        assert two.perplexity == pytest.approx(one.perplexity, rel=1e-9 if one.name == "base" or name == "taught" else 1e-6)
        assert two.kl == (None if one.kl is None else pytest.approx(one.kl, rel=1e-5))
        assert two.top1_agreement == one.top1_agreement
    first, second = (found[0].details["tokens"] for found in rows(folder, name))
    assert first == second
    one_hidden, two_hidden = tensors(folder, name, "steps/00-base")
    assert torch.equal(one_hidden["hidden"], two_hidden["hidden"])


FAILING = """
import os, time
from pathlib import Path
from llmlite.config import settings
from llmlite.errors import ResourceError
from llmlite.step import Step

@settings
class Fails(Step):
    '''Fails on the second process while the first waits for it.'''

    def check(self, model, run):
        return model

    def apply(self, model, run):
        if not run.is_main:
            Path(os.environ["FAILED_AT"]).write_text(str(time.time()))
            {EXCEPTION}
        run.wait()
        return model
"""


def fail(model: Path, pairs: Path, folder: Path, exception: str) -> tuple[float, str]:
    """A run whose second process raises an exception. Returns the seconds from there to the end of the launch, and what it said."""
    (folder / "failing.py").write_text(FAILING.replace("{EXCEPTION}", exception), encoding="utf-8")
    (folder / "recipe.yaml").write_text(
        f"model: {model}\ndata: {{train: {pairs}, max_length: 64, evaluation_rows: 2}}\nsteps: [{{step: 'failing:Fails'}}]\n", encoding="utf-8"
    )
    path, failed = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]), folder / "failed_at"
    done = torchrun("-m", "llmlite", "run", str(folder / "recipe.yaml"), "--output_dir", str(folder / "out"), PYTHONPATH=path, FAILED_AT=str(failed))
    ended = time.time()
    assert done.returncode != 0
    assert not (folder / "out" / "steps" / "01-Fails").exists()
    return ended - float(failed.read_text()), done.stderr


SECONDS = 30  # a barrier alone would wait for 30 minutes


def test_a_process_that_fails_ends_the_run_at_once_with_its_own_message_first(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    seconds, said = fail(model_folder, pairs_file, tmp_path, 'raise ResourceError("the second device is full. Lower max_length.")')
    assert seconds < SECONDS
    spoken = [line for line in said.splitlines() if line.startswith("[process ")]
    assert spoken[0] == "[process 1] ResourceError: the second device is full. Lower max_length."
    assert all("another process of the launch has ended" in line for line in spoken[1:])
    assert "This is a bug" not in said


def test_a_process_with_a_bug_ends_the_run_at_once_with_its_own_traceback_before_the_launcher_s(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    seconds, said = fail(model_folder, pairs_file, tmp_path, '{}["no such key"]')
    assert seconds < SECONDS
    assert said.index("KeyError: 'no such key'") < said.index("[process 1] This is a bug in llmlite") < said.index("ChildFailedError")
    assert said.count("This is a bug") == 1
