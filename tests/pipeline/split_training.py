"""A run over two CPU processes that split what they train, broken off and continued, beside a plain run: what the tests of FSDP2 and ZeRO-3 share."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file

from tests.conftest import save_tiny


def run_broken_off(folder: Path, script: str, recipe: str, pairs: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a recipe over two processes, which break off after the first checkpoint and are started again. Returns the launch, with what it printed.

    Args:
        folder: gets the model, one.yaml (for a plain run), two.yaml, two/ (the result) and sizes/ (what each process held).
        script: the file here that lets a launch on CPUs be one that splits.
        recipe: YAML with places for `model`, `pairs` and `batch`.
        pairs: rows to train on.
        environment: of the launch.
    """
    model = save_tiny(folder / "tied", tie_word_embeddings=True)
    for name, batch in (("one", 4), ("two", 2)):
        (folder / f"{name}.yaml").write_text(recipe.format(model=model, pairs=pairs, batch=batch), encoding="utf-8")
    (folder / "sizes").mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(Path(__file__).with_name(script))]
    command = [*torchrun, str(folder / "sizes"), "run", str(folder / "two.yaml"), "--output_dir", str(folder / "two")]
    done = subprocess.run(command, env={**environment, "STOP_AT_STEP": "2"}, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("broken off") == 2
    assert "continuing the training from checkpoint-2" in done.stderr
    return done


def require_halves(folder: Path, step: str) -> None:
    """Want that each process held half of every parameter while `step` trained."""
    for rank in (0, 1):
        sizes = json.loads((folder / "sizes" / f"{step}.work-{rank}.json").read_text(encoding="utf-8"))
        assert len(sizes) > 20
        assert all(2 * local == whole for whole, local in sizes.values())


def require_equal_weights(folder: Path, step: str, file: str) -> None:
    """Want that both runs left the same weights, the tied ones once."""
    one, two = (load_file(folder / name / "steps" / step / file) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert "lm_head.weight" not in two
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
