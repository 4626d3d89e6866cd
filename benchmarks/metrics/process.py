"""What a method costs as a whole process, seen from outside: seconds and processor seconds, with what the method says itself."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Failed(SystemExit):
    """A method's process ended with an error; its last words, where they were kept."""


@dataclass(frozen=True)
class Cost:
    seconds: float
    cpu_seconds: float
    answer: dict[str, Any]


def measure(script: Path, arguments: list[str], threads: int, *, python: str = sys.executable, quiet: bool = False, **environment: str) -> Cost:
    """Run a method's script in a fresh process; it writes its answer as JSON to the path given as its first argument.

    Args:
        script: the method.
        arguments: further ones.
        threads: for the libraries that compute.
        python: of the method's own environment.
        quiet: keep what it prints; its last line is said if it fails.
        environment: further variables.

    Raises:
        Failed: the script ended with an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", **environment}
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        with log.open("w") as kept:
            out = kept if quiet else None
            done = subprocess.run([python, str(script), str(answer), *arguments], env=variables, stdout=out, stderr=out, check=False)
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise Failed((log.read_text().strip().splitlines() or [f"{script.name} failed with exit code {done.returncode}"])[-1][:200])
        return Cost(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, json.loads(answer.read_text()))
