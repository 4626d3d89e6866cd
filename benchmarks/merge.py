"""Where a LoRA adapter trained on a 4-bit base is merged into, and what becomes of it: the dequantized base, the published weights, 4 bits again.

    python benchmarks/merge.py

One recipe trains the adapter on NF4 and merges it by the step `merge`; the other rows go on from its folders, as anybody would. Everything is loaded by stock
transformers and peft and measured on the same held-out examples: perplexity, KL from the model that was trained (adapter beside its 4-bit base), bytes, and
processor time of one pass over the examples relative to that model. Writes benchmarks/results/merge.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmlite
from llmlite.context import Run
from llmlite.evaluation.quality import Reference, measure_quality, reference_of
from llmlite.shrink.measure import recipe_of

TRAINED = "the adapter beside its NF4 base"
CALIBRATION_ROWS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=32, help="optimizer steps of two rows")
    parser.add_argument("--evaluation-rows", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("outputs/merge"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "merge.json")
    args = parser.parse_args()
    recipe = llmlite.Recipe(data=llmlite.Data(max_train_rows=40 * args.steps, evaluation_rows=args.evaluation_rows), steps=(llmlite.Merge(),), seed=args.seed)
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "training": f"{args.steps} steps of 2 rows, rank 16 on all linears",
        "evaluation": f"{args.evaluation_rows} examples",
        "calibration": f"{CALIBRATION_ROWS} rows",
        "seed": args.seed,
    }
    table = rows_of(recipe, args.steps, args.work)
    args.out.write_text(json.dumps({**about, "table": table}, indent=1) + "\n", encoding="utf-8")


def rows_of(recipe: llmlite.Recipe, steps: int, work: Path) -> dict[str, dict[str, float]]:
    """The table: name of a model, then its figures."""
    nf4 = {"step": "quantize", "scheme": "nf4", "double_quant": False, "calibrate": False, "report_sequences": 0}
    lora = {"step": "lora", "r": 16, "max_steps": steps, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    trained = recipe_of(recipe, [nf4, lora, {"step": "merge"}], work / "merged").run()
    quantized, adapter, dense = (Path(trained.path) / "steps" / name for name in ("01-quantize", "02-lora", "03-merge"))
    into_published = work / "into-published"
    if not (into_published / "config.json").exists():
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(published(recipe), dtype=torch.float32), adapter)
        model.merge_and_unload().to(torch.bfloat16).save_pretrained(into_published)
    folders = {"merged into the dequantized base (the step merge)": dense, "merged into the published weights": into_published}
    for name, calibrate in (("merged, then NF4 by rounding", False), ("merged, then NF4 calibrated", True)):
        again = {**nf4, "calibrate": calibrate, "dtype": "bfloat16"}
        data = dataclasses.replace(recipe.data, calibration_sequences=CALIBRATION_ROWS)
        moved = dataclasses.replace(recipe, model=llmlite.Model(name=str(dense)), data=data)
        folders[name] = Path(recipe_of(moved, [again], work / f"again-{calibrate}").run().path)

    batches = Run(recipe).evaluation_batches()
    rows: dict[str, dict[str, float]] = {}
    model = peft.PeftModel.from_pretrained(loaded(quantized), adapter).eval()
    reference, quality = reference_of(model, batches)
    rows[TRAINED] = {"perplexity": quality.perplexity, "kl": 0.0, "bytes": size(quantized) + size(adapter), "cpu_seconds": seconds(model, batches)}
    model.unload()
    for name, folder in {"NF4 without the adapter": quantized, **folders}.items():
        rows[name] = figures(loaded(folder), folder, batches, reference)
        print(name, rows[name], flush=True)
    of_trained = rows[TRAINED]["cpu_seconds"]
    return {name: {**row, "of_the_time": row["cpu_seconds"] / of_trained} for name, row in rows.items()}


def published(recipe: llmlite.Recipe) -> Path:
    """The folder of the model that the recipe starts from."""
    from llmlite.models.find import find

    return find(recipe.model).folder


def loaded(folder: Path) -> PreTrainedModel:
    """By stock transformers, computed in float32 as the adapter was trained."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def figures(model: PreTrainedModel, folder: Path, batches: list[Any], reference: Reference) -> dict[str, float]:
    """One row."""
    quality = measure_quality(model, batches, reference)
    assert quality.kl is not None
    return {"perplexity": quality.perplexity, "kl": quality.kl, "bytes": size(folder), "cpu_seconds": seconds(model, batches)}


@torch.no_grad()
def seconds(model: Any, batches: list[Any]) -> float:
    """Processor time of one forward pass over the examples."""
    started = time.process_time()
    for batch in batches:
        model(**{name: value for name, value in batch.items() if name != "labels"})
    return time.process_time() - started


def size(folder: Path) -> int:
    """Bytes of its weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
