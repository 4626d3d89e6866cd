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
from collections.abc import Mapping, Sequence
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

UPLOAD = {"the upload": "uploading "}
"""Only of a run that is pushed."""

ALL_IN_ONE = Path(__file__).parents[2] / "recipes" / "prune_distill_nf4.yaml"
"""The recipe that prunes, distils, quantizes and corrects, as users have it; `small` makes it one for a tiny model."""

PHASES_OF_ALL = {
    "loading and measuring the base": "base: loading",
    "trials of where to cut": "gone: calibration loss",
    "between blocks of pruning": "block 1 of",
    "training": "step 2 of 4: distill.whitebox",
    "a checkpoint of training": "'loss'",
    "calibrated quantization": "step 3 of 4: quantize",
    "tuning of the scales": "scales: step",
    "the correction": "step 4 of 4: correct",
    "evaluation and save of the correction": "correct took",
    "the reload of the result": "reloading the result",
}


def small(model: Path, rows: Path) -> list[str]:
    """Flags that make `ALL_IN_ONE` one for a tiny model and its rows."""
    data = {"train": rows, "calibration": rows, "calibration_sequences": 8, "max_length": 64, "evaluation_rows": 6}
    step = {"max_steps": 12, "save_steps": 3, "logging_steps": 1}
    options = {"model": model, **{f"data.{name}": value for name, value in data.items()}, **{f"steps.1.{name}": value for name, value in step.items()}}
    options |= {"steps.0.trial_sequences": 4}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


@dataclass
class Campaign:
    """What happened.

    Attributes:
        kills: (phase, seconds after its first sign) of each kill that hit a running process.
        missed: kills planned for a phase that the run had already behind it.
        runs: processes, or launches, started.
        slowest_end: of several processes: seconds that a launch went on at most after it had lost one.
    """

    kills: list[tuple[str, float]] = field(default_factory=list)
    missed: int = 0
    runs: int = 0
    slowest_end: float = 0.0


def command(recipe: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "llmlite", "run", str(recipe), "--output_dir", str(out)]


def environment() -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "1", **os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


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


def rank_killed(argv: Sequence[str], sign: str, rank: int, delay: float = 0) -> tuple[float | None, str]:
    """Start a launch, wait for a line with `sign`, then kill one of its processes `delay` seconds later.

    Returns the seconds until all of it had ended, None where it ended well before, and what it said.
    """
    run = Watched(argv)
    run.until(sign)
    time.sleep(delay)
    found = [] if run.process.poll() is not None else [child for child in _children(run.process.pid) if _rank(child) == str(rank)]
    if not found and run.process.wait(120) == 0:
        run.reader.join(10)
        return None, "".join(run.lines)
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


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _rank(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK")
    except psutil.Error:  # it has ended meanwhile
        return None


def campaign_of_two(recipe: Path, out: Path, phases: Sequence[str], seed: int = 0, longest: float = 1.5) -> Campaign:
    """As `campaign`, on two processes: in each phase one of them, drawn by the seed, is killed, and the other has to end by itself.

    Raises:
        AssertionError: a launch that was not killed ended badly, or one that lost a process went on for a minute.
    """
    rng, found = random.Random(seed), Campaign()
    for phase in phases:
        rank, delay = rng.randrange(2), rng.uniform(0, longest)
        seconds, said = rank_killed(launch(recipe, out), PHASES[phase], rank, delay)
        found.runs += 1
        assert "This is a bug" not in said, said[-3000:]
        if seconds is None:
            found.missed += 1
        else:
            assert seconds < 60
            found.kills.append((f"{phase}, process {rank}", round(delay, 2)))
            found.slowest_end = max(found.slowest_end, seconds)
    done = subprocess.run(launch(recipe, out), env=environment(), capture_output=True, text=True, check=False)
    found.runs += 1
    assert done.returncode == 0, done.stderr[-3000:]
    return found


def campaign(
    recipe: Path,
    out: Path,
    phases: Sequence[str],
    seed: int = 0,
    longest: float = 1.5,
    options: Sequence[str] = (),
    signs: Mapping[str, str] = PHASES | UPLOAD,
) -> Campaign:
    """Kill a run once in each of the phases given, in their order, then let it end. `options` go to each of the commands.

    `signs` are what it says in which phase.

    Raises:
        AssertionError: a run that was not killed ended badly.
    """
    rng, found = random.Random(seed), Campaign()
    for phase in phases:
        delay = rng.uniform(0, longest)
        outcome = run_killed([*command(recipe, out), *options], signs[phase], delay)
        found.runs += 1
        assert not outcome.startswith("failed"), f"after {found.kills}: {outcome}"
        if outcome == "killed":
            found.kills.append((phase, round(delay, 2)))
        else:
            found.missed += 1
    done = subprocess.run([*command(recipe, out), *options], env=environment(), capture_output=True, text=True, check=False)
    found.runs += 1
    assert done.returncode == 0, done.stderr[-3000:]
    return found
