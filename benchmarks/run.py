"""Reproduce the tables of benchmarks/README.md.

    python benchmarks/run.py lora_int4
    python benchmarks/run.py help_time

Each method runs in a fresh process, alternating with the one it is compared with; figures are ratios of one run on one machine. Results go to
benchmarks/results/*.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metrics.process import measure

HERE = Path(__file__).parent


def lora_int4(args: argparse.Namespace) -> dict[str, Any]:
    """llmlite's lora_int4 against a plain script, on the same examples, with the same tokens in an optimizer step."""
    import torch
    from peft import PeftModel

    import llmlite
    from llmlite.context import Run
    from llmlite.data.text import read_splits
    from llmlite.evaluation.quality import measure_quality
    from llmlite.models.safety import make_safe

    model = llmlite.Model()
    run = Run(llmlite.LoraInt4(max_length=args.max_length))
    folder = str(run.source.folder)
    with tempfile.TemporaryDirectory() as place:
        rows = Path(place) / "rows.jsonl"
        chosen = read_splits("builtin:python-docs")["train"].sample(args.examples, args.seed).rows
        rows.write_text("".join(json.dumps({"prompt": row["prompt"], "completion": row["completion"]}) + "\n" for row in chosen), encoding="utf-8")
        variants = {
            "plain": ("lora_int4_plain.py", ["--batch", "8", "--checkpointing", "1"]),
            "plain, no checkpointing": ("lora_int4_plain.py", ["--batch", "8", "--checkpointing", "0"]),
            "llmlite": ("lora_int4_llmlite.py", ["--batch", "1", "--accumulation", "2", "--checkpointing", "0"]),
            "llmlite, checkpointing": ("lora_int4_llmlite.py", ["--batch", "1", "--accumulation", "2", "--checkpointing", "1"]),
        }
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
        for repeat in range(args.repeats):
            for name, (script, flags) in variants.items():
                adapter = Path(place) / f"{name}-{repeat}"
                shared = ["--model", folder, "--rows", str(rows), "--adapter", str(adapter), "--learning-rate", str(args.learning_rate)]
                cost = measure(
                    HERE / "methods" / script, [*shared, "--max-length", str(args.max_length), "--seed", str(args.seed + repeat), *flags], args.threads
                )
                base = llmlite.recipes.LoraInt4().steps[0].load(run)
                make_safe(base)
                adapted = PeftModel.from_pretrained(base, adapter)
                quality = measure_quality(adapted, run.evaluation_batches())
                del base, adapted
                results[name].append({**cost.answer, "perplexity": quality.perplexity, "cpu_seconds": cost.cpu_seconds})
                print(name, results[name][-1], flush=True)
        start = llmlite.recipes.LoraInt4().steps[0].load(run)
        before = measure_quality(start, run.evaluation_batches()).perplexity
    table = {}
    plain = results["plain"]
    for name, rows_of in results.items():
        table[name] = {
            "tokens_per_second_ratio": statistics.median(
                (mine["tokens"] / mine["train_seconds"]) / (other["tokens"] / other["train_seconds"]) for mine, other in zip(rows_of, plain, strict=True)
            ),
            "peak_memory_ratio": statistics.median(mine["peak_bytes"] / other["peak_bytes"] for mine, other in zip(rows_of, plain, strict=True)),
            "perplexity_after": statistics.median(mine["perplexity"] for mine in rows_of),
            "tokens": rows_of[0]["tokens"],
            "steps": rows_of[0]["steps"],
        }
    return {"model": model.name, "perplexity_before": before, "threads": args.threads, "torch": torch.__version__, "table": table, "runs": results}


def help_time(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of `import llmlite` and of `--help`, whole processes, beside an empty Python process."""
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import llmlite": [sys.executable, "-c", "import llmlite; llmlite.LoraInt4"],
        "lora_int4 --help": [sys.executable, "-m", "llmlite.recipes.lora_int4", "--help"],
        "llmlite --help": [sys.executable, "-m", "llmlite", "--help"],
        "import torch": [sys.executable, "-c", "import torch"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(args.repeats + 1):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - started)
    return {"median_seconds": {name: statistics.median(values[1:]) for name, values in seconds.items()}}


TABLES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"lora_int4": lora_int4, "help_time": help_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--examples", type=int, default=128, help="training rows")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a packed row, and the longest example")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result = TABLES[args.table](args)
    result["machine"] = {"cpu": platform.machine(), "python": platform.python_version(), "arguments": {k: v for k, v in vars(args).items() if k != "table"}}
    file = HERE / "results" / f"{args.table}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result.get("table", result), indent=2))


if __name__ == "__main__":
    main()
