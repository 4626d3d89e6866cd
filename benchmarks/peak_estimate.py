"""The peak memory that `--dry_run` tells against the one measured: four recipes with their default shapes, each in a process of its own.

    python benchmarks/peak_estimate.py
    python benchmarks/peak_estimate.py --again     # after a formula was mended: what the plan says now, beside what was measured before

A few optimizer steps, held-out rows and trials stand for all of them: none changes what is in memory at the peak. Prints a table and writes
benchmarks/results/peak_estimate.json. The aim is 25 %.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from llmlite.recipes import distill_whitebox, lora_int4, prune_structured, quantize_nf4  # noqa: E402

FEW = {"evaluation_rows": 4}
CASES = {
    "lora_int4": (lora_int4.LoraInt4, {"max_steps": 4, **FEW}),
    "distill_whitebox": (distill_whitebox.DistillWhiteBox, {"candidates": 1, "max_steps": 4, "max_train_rows": 16, **FEW}),
    "prune_structured": (prune_structured.PruneStructured, {"calibration": "builtin:python-docs", "trials": 2, **FEW}),
    "quantize_nf4": (quantize_nf4.QuantizeNf4, FEW),
}


def estimate(name: str) -> list[int]:
    """What the plan says of the base and of each step, bytes."""
    recipe_class, flags = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        return [int(row["peak_bytes"]) for row in recipe_class.from_options(("flags", {**flags, "output_dir": folder})).check().rows]


def measure(name: str) -> tuple[list[tuple[str, int]], float]:
    """Names and measured peaks of the base and of each step, bytes, and the seconds of the whole run."""
    flags = CASES[name][1]
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", f"llmlite.recipes.{name}", "--output_dir", folder, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        rows = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))["rows"]
    return [(row["name"], int(row["peak_memory_bytes"])) for row in rows], time.perf_counter() - started


def row_of(name: str, measured: list[tuple[str, int]], seconds: float) -> dict[str, Any]:
    """A recipe's row of the file."""
    estimated = estimate(name)
    steps = [{"step": step, "estimated": planned, "measured": peak} for planned, (step, peak) in zip(estimated, measured, strict=True)]
    most = max(peak for _, peak in measured)
    flags = " ".join(f"--{key} {value}" for key, value in CASES[name][1].items())
    return {
        "recipe": name,
        "flags": flags,
        "estimated": max(estimated),
        "measured": most,
        "off_by": max(estimated) / most - 1,
        "steps": steps,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="recipes, separated by commas; the others keep their rows in the file")
    parser.add_argument("--again", action="store_true", help="estimate again and measure nothing")
    parser.add_argument("--out", default=str(HERE / "results" / "peak_estimate.json"))
    args = parser.parse_args()
    path = Path(args.out)
    kept = {row["recipe"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]} if (args.only or args.again) and path.is_file() else {}
    for name in args.only.split(",") if args.only else list(kept) if args.again else CASES:
        before = kept.get(name)
        measured = ([(step["step"], step["measured"]) for step in before["steps"]], before["seconds"]) if args.again and before else measure(name)
        kept[name] = row = row_of(name, *measured)
        print(f"{name:18} estimated {row['estimated'] / 1e9:5.2f} GB, measured {row['measured'] / 1e9:5.2f} GB, off by {row['off_by']:+.0%}", flush=True)
        for step in row["steps"]:
            print(f"    {step['step']:20} {step['estimated'] / 1e9:5.2f} GB {step['measured'] / 1e9:5.2f} GB", flush=True)
        about = {"cpu": platform.processor() or platform.machine(), "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"about": about, "rows": [kept[each] for each in CASES if each in kept]}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
