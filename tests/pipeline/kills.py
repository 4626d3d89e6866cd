"""A campaign of `kill -9`: a run is killed at a seeded moment of a seeded phase, started again by the same command, and so on to its end.

Used by the short test here and by benchmarks/kills.py for the long one.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

RECIPE = """
model: {model}
data: {{train: {rows}, calibration: {rows}, calibration_sequences: 8, max_length: 64, evaluation_rows: 6}}
steps:
  - {{step: prune.ffn, keep: 0.5}}
  - {{step: distill.whitebox, max_steps: 12, save_steps: 3, logging_steps: 1, per_device_train_batch_size: 2, learning_rate: 1e-3, cache: none}}
  - {{step: quantize, scheme: nf4}}
"""

# What the run says, and what it then does.
PHASES = {
    "loading and measuring the base": "base: loading",
    "calibration of pruning": "step 1 of 3: prune.ffn",
    "between blocks": "block 1 of",
    "evaluation and save of a step": "took",
    "training": "step 2 of 3: distill.whitebox",
    "a checkpoint of training": "'loss'",
    "calibrated quantization": "step 3 of 3: quantize",
    "the reload of the result": "reloading the result",
}


@dataclass
class Campaign:
    """What happened.

    Attributes:
        kills: (phase, seconds after its first sign) of each kill that hit a running process.
        missed: kills planned for a phase that the run had already behind it.
        runs: processes started.
    """

    kills: list[tuple[str, float]] = field(default_factory=list)
    missed: int = 0
    runs: int = 0


def command(recipe: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "llmlite", "run", str(recipe), "--output_dir", str(out)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def run_killed(argv: Sequence[str], sign: str, delay: float, patience: float = 240) -> str:
    """Start a process, wait for a line with `sign`, then kill it `delay` seconds later. Returns "killed", "finished" or "failed: ..."."""
    process = subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True)
    seen, lines = threading.Event(), []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if sign in line:
                seen.set()
        seen.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    seen.wait(patience)
    time.sleep(delay)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "killed"
    reader.join(10)
    return "finished" if process.returncode == 0 else f"failed: {''.join(lines)[-1500:]}"


def campaign(recipe: Path, out: Path, phases: Sequence[str], seed: int = 0, longest: float = 1.5) -> Campaign:
    """Kill a run once in each of the phases given, in their order, then let it end.

    Raises:
        AssertionError: a run that was not killed ended badly.
    """
    rng, found = random.Random(seed), Campaign()
    for phase in phases:
        delay = rng.uniform(0, longest)
        outcome = run_killed(command(recipe, out), PHASES[phase], delay)
        found.runs += 1
        assert not outcome.startswith("failed"), f"after {found.kills}: {outcome}"
        if outcome == "killed":
            found.kills.append((phase, round(delay, 2)))
        else:
            found.missed += 1
    done = subprocess.run(command(recipe, out), env=environment(), capture_output=True, text=True, check=False)
    found.runs += 1
    assert done.returncode == 0, done.stderr[-3000:]
    return found
