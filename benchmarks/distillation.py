"""What each distillation loss makes of a model that has lost layers, beside cross entropy alone: perplexity and KL on a test text.

    python benchmarks/distillation.py --train WIKI_VALID.txt --test wikitext=WIKI_TEST.txt --seeds 0 1 2 --losses ce ce+forward_kl      # equal time
    python benchmarks/distillation.py --train WIKI_VALID.txt --test wikitext=WIKI_TEST.txt --equal tokens                               # all losses

Six of thirty layers are taken away (block influence), then all weights are trained by the steps that a recipe would run, on the same rows in the same order
(`finetune` for cross entropy, `distill.whitebox` for the rest, with a live teacher unless the name says top 64). With `--equal time` a loss trains for as much
processor time as the first distillation loss needs for `--steps`: its own steps are timed first, and their number follows. Writes
benchmarks/results/distillation_EQUAL.json as it goes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from metrics.text import detokenised_file, ids_of

import llmlite
from llmlite.calibration.sources import windows_of
from llmlite.context import Run
from llmlite.evaluation.quality import measure_quality, reference_of
from llmlite.models.find import find
from llmlite.models.load import load_tokenizer

HERE = Path(__file__).parent
TIMED_STEPS = 4
LOSSES: dict[str, dict[str, Any] | None] = {
    "ce": None,
    "ce+forward_kl": {},
    "forward_kl": {"ce_weight": 0.0, "kd_weight": 1.0},
    "ce+forward_kl@T=2": {"temperature": 2.0},
    "ce+reverse_kl": {"divergence": "reverse_kl"},
    "ce+generalised_jsd": {"divergence": "generalised_jsd"},
    "ce+skewed_forward_kl": {"divergence": "skewed_forward_kl"},
    "ce+skewed_reverse_kl": {"divergence": "skewed_reverse_kl"},
    "ce+total_variation": {"divergence": "total_variation"},
    "ce+logit_mse": {"divergence": "logit_mse", "kd_weight": 0.01},
    "ce+uld": {"divergence": "uld"},
    "ce+forward_kl+hidden": {"hidden_weight": 0.1},
    "ce+forward_kl+hidden cosine": {"hidden_weight": 0.1, "hidden_loss": "cosine"},
    "ce+forward_kl+attention": {"attention_weight": 0.1},
    "ce+forward_kl, top 64": {"cache": "top_k"},
    "ce+forward_kl, half on policy": {"on_policy": 0.5},
}


def step_of(name: str, steps: int, args: argparse.Namespace) -> Any:
    shared = {
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": args.rows,
        "learning_rate": args.learning_rate,
        "save_steps": 10**6,
        "logging_steps": 10**6,
    }
    options = LOSSES[name]
    return llmlite.Finetune(**shared) if options is None else llmlite.DistillWhiteBox(**shared, **{"cache": "none", **options})


def trained(name: str, steps: int, student: Any, args: argparse.Namespace, seed: int) -> tuple[Any, float, int]:
    """A copy of the student, trained; the processor seconds that took, and the tokens it read."""
    step = step_of(name, steps, args)
    with tempfile.TemporaryDirectory() as folder:
        data = llmlite.Data(train=args.train, max_length=args.tokens)
        run = Run(llmlite.Recipe(model=llmlite.Model(name=args.model, dtype=args.dtype), data=data, steps=(step,), seed=seed), Path(folder))
        _ = run.train_data  # not part of the time
        started = time.process_time()
        model = step.apply(copy.deepcopy(student), run)
        return model, time.process_time() - started, steps * args.rows * args.tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=llmlite.Model().name)
    parser.add_argument("--dtype", default="auto", help="bfloat16 trains float32 weights under autocast, faster on CPUs with AVX512-BF16 or AMX")
    parser.add_argument("--train", required=True, metavar="FILE")
    parser.add_argument("--test", required=True, metavar="NAME=FILE")
    parser.add_argument("--test-windows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--keep-layers", type=float, default=0.8)
    parser.add_argument("--equal", choices=("time", "tokens"), default="time")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of the first distillation loss")
    parser.add_argument("--rows", type=int, default=2, help="rows in an optimizer step")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()

    about = {"train": Path(args.train).name}
    args.train = detokenised_file(args.train)
    settings = llmlite.Model(name=args.model, dtype=args.dtype)
    source = find(settings, weights=True)
    tokenizer = load_tokenizer(source, settings)
    name, _, path = args.test.partition("=")
    batches = [{"input_ids": part, "labels": part} for part in windows_of(ids_of(path, tokenizer), args.test_windows, args.tokens, 1).split(4)]

    prune = llmlite.PruneLayers(keep=args.keep_layers, score="block_influence")
    data = llmlite.Data(train=args.train, calibration=args.train, calibration_sequences=8, max_length=args.tokens)
    run = Run(llmlite.Recipe(model=settings, data=data, steps=(prune,)))
    dense = run.load_base()
    reference, base = reference_of(dense, batches)
    student = prune.apply(dense, run)
    rows: list[dict[str, Any]] = []

    def add(label: str, model: Any, **figures: Any) -> None:
        quality = measure_quality(model, batches, reference)
        rows.append({"loss": label, "perplexity": quality.perplexity, "ratio": quality.perplexity / base.perplexity, "kl": quality.kl, **figures})
        print(json.dumps(rows[-1]), flush=True)
        out = HERE / "results" / f"distillation_{args.equal}.json"
        more = {
            "model": args.model,
            "dtype": str(run.compute_dtype).removeprefix("torch."),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "test": f"{args.test_windows} x {args.tokens} tokens of {name}",
            "layers": f"{student.config.num_hidden_layers} left",
            "learning_rate": args.learning_rate,
            "dense_perplexity": base.perplexity,
        }
        out.write_text(json.dumps({**more, **about, "rows": rows}, indent=1) + "\n", encoding="utf-8")

    add("none", student)
    distilled = next((loss for loss in args.losses if LOSSES[loss] is not None), None)
    order = [distilled, *(loss for loss in args.losses if loss != distilled)] if distilled else args.losses
    each: dict[str, float] = {}  # processor seconds of one optimizer step
    if args.equal == "time":
        for loss in order:
            once = trained(loss, 1, student, args, 0)[1]
            each[loss] = (trained(loss, 1 + TIMED_STEPS, student, args, 0)[1] - once) / TIMED_STEPS
    for seed in args.seeds:
        for loss in order:
            steps = args.steps if args.equal == "tokens" or loss == order[0] else math.floor(args.steps * each[order[0]] / each[loss])
            model, seconds, tokens = trained(loss, steps, student, args, seed)
            add(loss, model, seed=seed, steps=steps, tokens=tokens, cpu_seconds=seconds)


if __name__ == "__main__":
    main()
