"""The peak memory that `--dry_run` tells against the one measured: four recipes with their default shapes, each in a process of its own.

    python benchmarks/peak_estimate.py

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


def measure(name: str) -> dict[str, object]:
    """Both peaks of each step of a recipe, bytes."""
    recipe_class, flags = CASES[name]
    plan = recipe_class.from_options(("flags", flags)).check()
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", f"llmlite.recipes.{name}", "--output_dir", folder, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        rows = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))["rows"]
    steps = [
        {"step": row["name"], "estimated": int(planned["peak_bytes"]), "measured": int(row["peak_memory_bytes"])}
        for planned, row in zip(plan.rows, rows, strict=True)
    ]
    measured = max(int(step["measured"]) for step in steps)
    return {
        "recipe": name,
        "flags": " ".join(words),
        "estimated": plan.peak_bytes,
        "measured": measured,
        "off_by": plan.peak_bytes / measured - 1,
        "steps": steps,
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="recipes, separated by commas; the others keep their rows in the file")
    parser.add_argument("--out", default=str(HERE / "results" / "peak_estimate.json"))
    args = parser.parse_args()
    path = Path(args.out)
    kept = {row["recipe"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]} if args.only and path.is_file() else {}
    for name in args.only.split(",") if args.only else CASES:
        kept[name] = row = measure(name)
        print(f"{name:18} estimated {row['estimated'] / 1e9:5.2f} GB, measured {row['measured'] / 1e9:5.2f} GB, off by {row['off_by']:+.0%}", flush=True)
        for step in row["steps"]:
            print(f"    {step['step']:20} {step['estimated'] / 1e9:5.2f} GB {step['measured'] / 1e9:5.2f} GB", flush=True)
        about = {"cpu": platform.processor() or platform.machine(), "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"about": about, "rows": [kept[each] for each in CASES if each in kept]}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
