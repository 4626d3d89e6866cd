"""What a method costs as a whole process, seen from outside: seconds, processor seconds, peak resident memory."""

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


@dataclass(frozen=True)
class Cost:
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    answer: dict[str, Any]


def measure(script: Path, arguments: list[str], threads: int) -> Cost:
    """Run a method's script in a fresh process; it writes its answer as JSON to the path given as its first argument."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, str(script), str(answer), *arguments], env=environment, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise SystemExit(f"{script.name} failed with exit code {done.returncode}")
        values = json.loads(answer.read_text())
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return Cost(time.perf_counter() - started, cpu, int(values.pop("peak_bytes")), values)
