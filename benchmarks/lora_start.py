"""Where a LoRA adapter on stock NF4 starts, and what the same training makes of it: peft's own start against the correction of the quantization.

    python benchmarks/lora_start.py

For each seed both starts train on the same rows in the same order, on the offline model and the Python documentation. Before and after training the held-out
loss of the trained tokens and the divergence from the dense model are measured on the same rows, beside those of the bare NF4 model. The correction comes from
the calibration share of the documentation. Writes benchmarks/results/lora_start.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import llmlite
from llmlite.adapters.lora import Lora
from llmlite.context import Run
from llmlite.evaluation.quality import Quality, Reference, measure_quality, reference_of
from llmlite.quantization.bnb import Quantize
from llmlite.training.trainer import train

STARTS = {"peft's default": "default", "gaussian": "gaussian", "quantization_error": "quantization_error"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--starts", nargs="*", default=["gaussian", "quantization_error"], choices=list(STARTS))
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of two rows")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--calibration-sequences", type=int, default=16)
    parser.add_argument("--evaluation-rows", type=int, default=24)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out", default="benchmarks/results/lora_start.json")
    args = parser.parse_args()

    reference: Reference | None = None
    table: list[dict[str, Any]] = []
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "training": f"{args.steps} steps of 2 rows of at most {args.max_length} tokens, rank {args.rank} on all linears",
        "calibration": f"{args.calibration_sequences} rows",
        "evaluation": f"{args.evaluation_rows} examples",
    }
    for seed in args.seeds:
        for start in args.starts:
            gc.collect()
            with tempfile.TemporaryDirectory() as folder:
                quantize = Quantize(scheme="nf4", double_quant=False, calibrate=False, report_sequences=0)
                lora = Lora(
                    r=args.rank,
                    init_lora_weights=STARTS[start],  # type: ignore[arg-type]
                    max_steps=args.steps,
                    per_device_train_batch_size=1,
                    gradient_accumulation_steps=2,
                    save_steps=10_000,
                )
                data = llmlite.Data(
                    max_length=args.max_length,
                    calibration_sequences=args.calibration_sequences,
                    evaluation_rows=args.evaluation_rows,
                    max_train_rows=40 * args.steps,
                )
                run = Run(llmlite.Recipe(steps=(quantize, lora), seed=seed, data=data), Path(folder))
                # the held-out rows of the first seed for all of them, so that their losses can be compared
                if reference is None:
                    batches = run.evaluation_batches()
                    dense = run.load_base()
                    reference, quality = reference_of(dense, batches)
                    about["dense"] = {"loss": math.log(quality.perplexity), "tokens": quality.tokens}
                    del dense
                model = quantize.load(run)
                if "nf4" not in about:
                    about["nf4"] = figures(measure_quality(model, batches, reference))
                    print("nf4, no adapter", about["nf4"], flush=True)
                cpu = time.process_time()
                adapted = lora.attach(model, run)
                row: dict[str, Any] = {"seed": seed, "start": start, "start_cpu_seconds": time.process_time() - cpu}
                row["before"] = figures(measure_quality(adapted, batches, reference))
                cpu = time.process_time()
                train(adapted, lora, run)
                row["train_cpu_seconds"] = time.process_time() - cpu
                row["after"] = figures(measure_quality(adapted, batches, reference))
                row["kl_before_to_nf4"] = row["before"]["kl"] / about["nf4"]["kl"]
            table.append(row)
            print(json.dumps(row), flush=True)
            Path(args.out).write_text(json.dumps({**about, "rows": table}, indent=1) + "\n", encoding="utf-8")


def figures(quality: Quality) -> dict[str, Any]:
    """Nats a token."""
    return {"loss": math.log(quality.perplexity), "kl": quality.kl}


if __name__ == "__main__":
    main()
