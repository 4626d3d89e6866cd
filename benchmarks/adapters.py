"""Kinds of adapters on the same base, rows and steps: numbers trained, memory, time, held-out perplexity, beside full finetuning.

    python benchmarks/adapters.py

Every row is a whole run of the offline model on the Python documentation in a fresh process; ratios are to LoRA at rank 16, of processor seconds, since the
machine is shared. About 25 minutes of one processor for all rows; with --rows some of them again, beside LoRA at rank 16 in the same run.
Writes benchmarks/results/adapters.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from metrics.process import measure

HERE = Path(__file__).parent
BATCH = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"}
ROWS: dict[str, dict[str, Any]] = {
    "lora, r 16": {"step": "lora", "r": 16},
    "lora, r 4": {"step": "lora", "r": 4, "lora_alpha": 8},
    "lora, r 64": {"step": "lora", "r": 64, "lora_alpha": 128},
    "lora+, r 16": {"step": "lora", "r": 16, "loraplus_lr_ratio": 16, "learning_rate": 2e-4},
    "rslora, r 64": {"step": "lora", "r": 64, "lora_alpha": 16, "use_rslora": True},
    "dora, r 16": {"step": "lora", "r": 16, "use_dora": True},
    "ia3": {"step": "ia3"},
    "prefix, 16 tokens": {"step": "prefix", "num_virtual_tokens": 16, "gradient_accumulation_steps": 7},  # a row each: as many steps as of packed rows
    "bottleneck, pfeiffer": {"step": "bottleneck"},
    "bottleneck, houlsby": {"step": "bottleneck", "placement": "houlsby", "bottleneck_size": 32},
    "bottleneck, parallel": {"step": "bottleneck", "placement": "parallel"},
    "all weights": {"step": "finetune"},
}
_PASSED = ("examples", "evaluation_rows", "seed")


def one(args: argparse.Namespace) -> None:
    """One row in this process."""
    import llmlite
    from llmlite.step import parse_step

    step, problems = parse_step({**BATCH, **ROWS[args.row]}, 0)
    assert step is not None, problems
    apply, spent = type(step).apply, []

    def timed(*arguments: Any) -> Any:
        started = time.process_time()
        model = apply(*arguments)
        spent.append(time.process_time() - started)
        return model

    type(step).apply = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        packing = not args.row.startswith("prefix")  # a prefix belongs to one text
        data = llmlite.Data(max_train_rows=args.examples, evaluation_rows=args.evaluation_rows, packing=packing)
        report = llmlite.Recipe(steps=[step], output_dir=folder, seed=args.seed, data=data).run()
    base, row = report.rows
    answer = {
        "trained_tokens": row.details["trained_tokens"],
        "optimizer_steps": row.details["optimizer_steps"],
        "numbers": row.parameters - base.parameters or row.parameters,
        "perplexity_before": base.perplexity,
        "perplexity": row.perplexity,
        "train_cpu_seconds": spent[0],
        "peak_bytes": row.peak_memory_bytes,
    }
    Path(args.answer).write_text(json.dumps(answer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answer", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)  # in this process
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS), help="only these, and LoRA at rank 16; the others stay as they were measured")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--evaluation_rows", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.row:
        one(args)
        return
    out = HERE / "results" / "adapters.json"
    settings = {key: getattr(args, key) for key in (*_PASSED, "threads")}
    known = json.loads(out.read_text()) if out.exists() else {"table": {}}
    asked = {"lora, r 16", *args.rows}
    table: dict[str, dict[str, Any]] = {name: row for name, row in known["table"].items() if name not in asked}
    if table and any(known.get(key) != value for key, value in settings.items()):
        sys.exit(f"{out} holds rows of other settings. Run all of them, or move it away.")
    for name in [name for name in ROWS if name in asked]:
        cost = measure(Path(__file__), ["--row", name, *(word for key in _PASSED for word in (f"--{key}", str(getattr(args, key))))], args.threads)
        table[name] = cost.answer
        first = table["lora, r 16"]
        table[name] |= {
            "cpu_ratio": table[name]["train_cpu_seconds"] / first["train_cpu_seconds"],
            "memory_ratio": table[name]["peak_bytes"] / first["peak_bytes"],
        }
        print(f"{name:22s}", json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in table[name].items()}), flush=True)
        rows = {name: table[name] for name in ROWS if name in table}
        result = {"machine": platform.machine(), "python": platform.python_version(), **settings, "table": rows}
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
