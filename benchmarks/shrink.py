"""`llmlite shrink` beside each single method at the same bytes: only pruning, only layers, only NF4. What was expected, and what came out.

    python benchmarks/shrink.py --out OUT --dtype bfloat16 --keeps 0.8 0.65 --heal-steps 16

OUT keeps every run, so that a stopped benchmark continues. Pruning and layers are healed with as many steps as shrink may use, and keep as much of the decoder
as the target leaves room for; NF4 has one size. Quality is measured by the runs themselves, on the same held-out rows. Writes benchmarks/results/shrink.json,
where the rows of an earlier call with the same settings stay.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

import llmlite
from llmlite.context import Run
from llmlite.models.size import expected_bytes, size_of_config
from llmlite.report import Report
from llmlite.shrink.measure import recipe_of
from llmlite.shrink.shrink import shrink

HERE = Path(__file__).parent


def figures(report: Report, full: int) -> dict[str, Any]:
    base, row = report.rows[0], report.rows[-1]
    return {"bytes": row.bytes_on_disk, "of_16_bit": row.bytes_on_disk / full, "kl": row.kl, "perplexity_ratio": row.perplexity / base.perplexity}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=llmlite.Model().name)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--data", default=llmlite.Data().train)
    parser.add_argument("--targets", type=float, nargs="*", default=[0.75, 0.5, 0.35])
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--heal-steps", type=int, default=40)
    parser.add_argument("--sequences", type=int, default=16, help="calibration rows")
    parser.add_argument("--evaluation-rows", type=int, default=64)
    parser.add_argument("--vocabulary", action="store_true")
    parser.add_argument("--single-targets", type=float, nargs="*", help="targets of the single methods, where not all are wanted")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    data = llmlite.Data(train=args.data, calibration_sequences=args.sequences, evaluation_rows=args.evaluation_rows)
    settings = llmlite.Model(name=args.model, dtype=args.dtype)
    recipe = llmlite.Recipe(model=settings, data=data, steps=(llmlite.Quantize(),), seed=args.seed, output_dir=str(args.out))
    config = Run(recipe).config
    full, decoder = expected_bytes(config, dtype=torch.bfloat16), 2 * size_of_config(config).decoder
    heal: list[dict[str, Any]] = [{"step": "distill.whitebox", "max_steps": args.heal_steps}]
    file = HERE / "results" / "shrink.json"
    about = {
        "model": args.model,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "dtype": args.dtype,
        "data": args.data,
        "calibration": f"{args.sequences} x {data.max_length} tokens",
        "evaluation_rows": args.evaluation_rows,
        "keeps": args.keeps,
        "heal_steps": args.heal_steps,
        "vocabulary": args.vocabulary,
        "seed": args.seed,
    }

    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    rows: list[dict[str, Any]] = before.pop("rows", [])
    if {name: before.get(name) for name in about} != about:
        before, rows = {}, []

    def add(row: dict[str, Any]) -> None:
        rows[:] = [*(old for old in rows if (old["target"], old["method"]) != (row["target"], row["method"])), row]
        print(json.dumps(row), flush=True)
        file.write_text(json.dumps({**before, **about, "rows": rows}, indent=1) + "\n", encoding="utf-8")

    def single(name: str, target: float | None, steps: list[dict[str, Any]], **about_it: float) -> None:
        report = recipe_of(recipe, steps, args.out / f"only-{name}-{target}").run()
        add({"target": target, "method": f"only {name}", **about_it, **figures(report, full)})

    for target in args.targets:
        started = time.process_time()
        found = shrink(recipe, target=target, keeps=args.keeps, heal_steps=args.heal_steps, vocabulary=args.vocabulary, run=True)
        expected = {"expected_kl": found.chosen.kl, "expected_perplexity_ratio": found.chosen.perplexity_ratio, "expected_bytes": found.chosen.bytes_on_disk}
        assert found.report is not None
        row = {"target": target, "method": "shrink", "choice": found.chosen.name, **figures(found.report, full), **expected}
        add({**row, "cpu_seconds": time.process_time() - started})
    single("NF4", None, [{"step": "quantize", "scheme": "nf4", "dtype": "bfloat16"}])
    for target in args.targets if args.single_targets is None else args.single_targets:
        keep = round((target * full - (full - decoder)) / decoder - 0.005, 2)  # what is not the decoder stays whole
        single("pruning", target, [{"step": "prune.structured", "keep_parameters": keep}, *heal], keep=keep)
        single("layers", target, [{"step": "prune.layers", "keep": keep}, *heal], keep=keep)


if __name__ == "__main__":
    main()
