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

import psutil

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


class Watched:
    """A process in a session of its own, whose lines are read."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
        )
        self.lines: list[str] = []
        self.seen, self.reader = threading.Event(), threading.Thread(target=self._read, daemon=True)
        self.sign = ""

    def until(self, sign: str, patience: float = 240) -> None:
        """Return when a line with `sign` has come, or the process has ended."""
        self.sign = sign
        self.reader.start()
        self.seen.wait(patience)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if self.sign in line:
                self.seen.set()
        self.seen.set()

    def kill(self) -> None:
        """The process and all that it started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run_killed(argv: Sequence[str], sign: str, delay: float) -> str:
    """Start a process, wait for a line with `sign`, then kill it `delay` seconds later. Returns "killed", "finished" or "failed: ..."."""
    run = Watched(argv)
    run.until(sign)
    time.sleep(delay)
    if run.process.poll() is None:
        run.kill()
        return "killed"
    run.reader.join(10)
    return "finished" if run.process.returncode == 0 else f"failed: {''.join(run.lines)[-1500:]}"


def launch(recipe: Path, out: Path) -> list[str]:
    """The same run on two processes over gloo."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command(recipe, out)[1:]]


def rank_killed(argv: Sequence[str], sign: str, rank: int) -> tuple[float, str]:
    """Start a launch, wait for a line with `sign`, then kill one of its processes. Returns the seconds until all of it had ended, and what it said."""
    run = Watched(argv)
    run.until(sign)
    found = [child for child in psutil.Process(run.process.pid).children(recursive=True) if child.environ().get("RANK") == str(rank)]
    assert found, "".join(run.lines)[-1500:]
    killed = time.monotonic()
    found[0].kill()
    try:
        run.process.wait(120)
    finally:
        if run.process.poll() is None:
            run.kill()
    run.reader.join(10)
    return time.monotonic() - killed, "".join(run.lines)


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
