"""llmlite's own steps, called as the peers are: the same windows, the same measure."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import KEEP_CHANNELS, run
from transformers import AutoModelForCausalLM

import llmlite
from llmlite.context import Run
from llmlite.models.save import save_model, storage_dtype
from llmlite.quantization.bnb import Quantize

METHODS: dict[str, Any] = {
    "int8": lambda: Quantize(scheme="int8", report_sequences=0),
    "nf4-stock": lambda: Quantize(scheme="nf4", double_quant=False, calibrate=False, report_sequences=0),
    "nf4-dq-stock": lambda: Quantize(scheme="nf4", double_quant=True, calibrate=False, report_sequences=0),
    "fp4-stock": lambda: Quantize(scheme="fp4", double_quant=False, calibrate=False, report_sequences=0),
    "nf4-calibrated": lambda: Quantize(scheme="nf4", double_quant=False),
    "nf4-dq-calibrated": lambda: Quantize(scheme="nf4", double_quant=True),
    "fp4-calibrated": lambda: Quantize(scheme="fp4", double_quant=False),
    "sparsegpt-0.5": lambda: llmlite.PruneWeights(sparsity=0.5),
    "sparsegpt-2:4": lambda: llmlite.PruneWeights(sparsity="2:4"),
    "ffn": lambda: llmlite.PruneFfn(keep=KEEP_CHANNELS, multiple_of=2),
    "ffn-taylor-repaired": lambda: llmlite.PruneFfn(keep=KEEP_CHANNELS, multiple_of=2, score="taylor"),
    "ffn-magnitude": lambda: llmlite.PruneFfn(keep=KEEP_CHANNELS, multiple_of=2, score="magnitude", reconstruct=False),
    "ffn-taylor": lambda: llmlite.PruneFfn(keep=KEEP_CHANNELS, multiple_of=2, score="taylor", reconstruct=False),
    "wanda-0.5": lambda: llmlite.PruneWeights(sparsity=0.5, method="wanda"),
}
CORRECTED, RANK = "-corrected", 16


def compress(args: argparse.Namespace, windows_NT: torch.Tensor) -> Any:
    if args.method in ("float32", "bfloat16"):
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=args.method)
    step, *correct = METHODS[args.method.removesuffix(CORRECTED)](), *([llmlite.Correct(r=RANK)] if args.method.endswith(CORRECTED) else [])
    recipe = llmlite.Recipe(model=args.model, steps=(step, *correct), seed=args.seed, data=llmlite.Data(calibration_sequences=len(windows_NT)))
    run_ = Run(recipe, Path(tempfile.mkdtemp(dir=args.hidden.parent)))
    run_.__dict__["calibration_windows"] = windows_NT
    model = step.load(run_)
    if not correct:
        return model
    base = args.hidden.parent / "saved" / "base"  # an adapter is nothing without it
    save_model(model, base, storage_dtype(model.config))
    corrected = correct[0].apply(model, run_)
    corrected.peft_config["default"].base_model_name_or_path = str(base)
    return corrected


if __name__ == "__main__":
    run(compress, lambda model, tokenizer, folder: (save_model(model, folder, storage_dtype(model.config)), tokenizer.save_pretrained(folder)))
