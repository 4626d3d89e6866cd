"""The same finetuning by llmlite's own steps: packed rows, a chunked loss on the counted tokens only."""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import llmlite
from llmlite.context import Run
from llmlite.models.save import save_model
from llmlite.training.trainer import train

parser = argparse.ArgumentParser()
parser.add_argument("answer", type=Path)
parser.add_argument("--model", required=True)
parser.add_argument("--rows", type=Path, required=True)
parser.add_argument("--adapter", type=Path, required=True)
parser.add_argument("--learning-rate", type=float, required=True)
parser.add_argument("--batch", type=int, required=True)
parser.add_argument("--accumulation", type=int, default=1)
parser.add_argument("--max-length", type=int, required=True)
parser.add_argument("--checkpointing", type=int, default=0)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

recipe = llmlite.LoraInt4(
    model=args.model,
    data=llmlite.Data(train=str(args.rows), max_length=args.max_length),
    per_device_train_batch_size=args.batch,
    gradient_accumulation_steps=args.accumulation,
    learning_rate=args.learning_rate,
    gradient_checkpointing=bool(args.checkpointing),
    seed=args.seed,
    save_steps=100_000,
)
run = Run(recipe)
run.scratch = args.adapter.with_name(args.adapter.name + "-scratch")
run.scratch.mkdir(parents=True, exist_ok=True)
quantize, lora = recipe.steps
model = lora.attach(quantize.load(run), run)
tokens = run.train_data.counts.tokens
started = time.perf_counter()
train(model, lora, run)
seconds = time.perf_counter() - started
save_model(model, args.adapter, run.storage_dtype, run.base_name())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
args.answer.write_text(json.dumps({"tokens": tokens, "train_seconds": seconds, "steps": run.notes["optimizer_steps"], "peak_bytes": peak}))
