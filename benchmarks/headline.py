r"""The headline table: what each method makes of one model, by recipes as anybody would run them, offline.

    python benchmarks/headline.py                                   # SmolLM2-135M-Instruct, about 45 minutes on two cores
    python benchmarks/train_gpt2.py outputs/gpt2 && python benchmarks/headline.py --model outputs/gpt2 --data outputs/gpt2-text.jsonl --dtype bfloat16 \
        --out benchmarks/results/headline_gpt2.json                 # a second family: a small GPT-2, trained first

Every row is a run of its own with its own reload in a fresh process; one that begins with all steps of another row continues from what they left. Finished rows
are kept in --work, so the same command continues after a stop. Quality is measured on held-out rows of the same text that calibrates and heals (never on
trained ones).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

import llmlite
from llmlite.errors import ConfigError
from llmlite.plan import claim
from llmlite.shrink.measure import recipe_of

NF4 = {"step": "quantize", "scheme": "nf4", "dtype": "bfloat16"}


def rows(heal_steps: int) -> dict[str, list[dict[str, Any]]]:
    """The table's rows: name -> steps."""
    heal: dict[str, Any] = {"step": "distill.whitebox", "max_steps": heal_steps}
    rescale: dict[str, Any] = {"step": "prune.rescale"}
    return {
        "int8": [{"step": "quantize", "scheme": "int8", "dtype": "bfloat16"}],
        "NF4, as bitsandbytes rounds": [{**NF4, "calibrate": False, "report_sequences": 0}],
        "NF4, calibrated": [NF4],
        "NF4, calibrated + rank 16": [NF4, {"step": "correct", "r": 16}],
        "half of the weights zero": [{"step": "prune.weights", "sparsity": 0.5}],
        "half of the weights zero, rescaled": [{"step": "prune.weights", "sparsity": 0.5}, rescale],
        "half of the weights zero, OWL": [{"step": "prune.weights", "sparsity": 0.5, "allocation": "owl"}],
        "2 of 4 weights zero": [{"step": "prune.weights", "sparsity": "2:4"}],
        "vocabulary of the text": [{"step": "prune.vocabulary"}],
        "decoder to 80 %": [{"step": "prune.structured", "keep_parameters": 0.8}],
        "decoder to 80 %, rescaled": [{"step": "prune.structured", "keep_parameters": 0.8}, rescale],
        "decoder to 80 %, healed": [{"step": "prune.structured", "keep_parameters": 0.8}, heal],
        "layers to 80 %": [{"step": "prune.layers", "keep": 0.8}],
        "layers to 80 %, healed": [{"step": "prune.layers", "keep": 0.8}, heal],
        "80 %, healed, NF4 calibrated": [{"step": "prune.structured", "keep_parameters": 0.8}, heal, NF4],
    }


def begin(recipe: llmlite.Recipe, done: dict[Path, list[dict[str, Any]]], steps: list[dict[str, Any]]) -> None:
    """Put into the recipe's folder what the longest finished row left whose steps are its first ones, as if the recipe had been stopped behind them."""
    beginnings = [place for place, other in done.items() if other == steps[: len(other)] and len(other) < len(steps)]
    if beginnings and not recipe.folder.exists():
        recipe.folder.mkdir(parents=True)
        claim(recipe)
        shutil.copytree(max(beginnings, key=lambda place: len(done[place])) / "steps", recipe.folder / "steps", copy_function=os.link)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=llmlite.Model().name)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--data", default=llmlite.Data().train)
    parser.add_argument("--sequences", type=int, default=16, help="calibration rows")
    parser.add_argument("--calibration", help="left out: half of it is written by the model itself")
    parser.add_argument("--evaluation-rows", type=int, default=32)
    parser.add_argument("--heal-steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="*", choices=rows(0))
    parser.add_argument("--work", type=Path, default=Path("outputs/headline"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "headline.json")
    args = parser.parse_args()

    data = llmlite.Data(train=args.data, calibration=args.calibration, calibration_sequences=args.sequences, evaluation_rows=args.evaluation_rows)
    recipe = llmlite.Recipe(model=llmlite.Model(name=args.model, dtype=args.dtype), data=data, steps=(llmlite.Quantize(),), seed=args.seed)
    start, table, done = time.perf_counter(), list[dict[str, Any]](), dict[Path, list[dict[str, Any]]]()
    about = {
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "data": Path(args.data).name,
        "calibration": f"{args.sequences} rows of {data.max_length} tokens",
        "evaluation_rows": args.evaluation_rows,
        "heal_steps": args.heal_steps,
        "seed": args.seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    for name, steps in rows(args.heal_steps).items():
        if args.rows and name not in args.rows:
            continue
        place = args.work / "".join(letter if letter.isalnum() else "-" for letter in name)
        row_recipe = recipe_of(recipe, steps, place)
        begin(row_recipe, done, steps)
        try:
            report = row_recipe.run()
        except ConfigError as error:  # a family or a width that the method does not take is a row of the table, too
            table.append({"row": name, "refused": str(error).splitlines()[-1].strip()})
            print(f"{name:32s} refused: {table[-1]['refused']}", file=sys.stderr, flush=True)
            continue
        done[place] = steps
        base, last = report.rows[0], report.rows[-1]
        row = {
            "row": name,
            "bytes": last.bytes_on_disk,
            "of_the_base": last.bytes_on_disk / base.bytes_on_disk,
            "perplexity": last.perplexity,
            "perplexity_ratio": last.perplexity / base.perplexity,
            "kl": last.kl,
            "top1_agreement": last.top1_agreement,
            "reload_difference": report.reload_difference,
        }
        table.append(row)
        print(f"{name:32s} {row['of_the_base']:5.2f} of the bytes  perplexity {row['perplexity_ratio']:6.3f}x  KL {last.kl:.4f}", flush=True)
        args.out.write_text(json.dumps({**about, "dense_perplexity": base.perplexity, "rows": table}, indent=1) + "\n", encoding="utf-8")
    print(f"{len(table)} rows in {(time.perf_counter() - start) / 60:.0f} minutes, those that {args.work} already held among them")


if __name__ == "__main__":
    main()
