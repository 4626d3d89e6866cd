"""AutoRound: W4A16, groups of 64, 50 iterations, on the same windows."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from auto_round import AutoRound
from common import dense, run
from transformers import AutoTokenizer


def compress(args: argparse.Namespace, windows_NT: torch.Tensor) -> Any:
    model = dense(args.model)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in windows_NT]
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(args.model),
        scheme="W4A16",
        group_size=64,
        iters=50,
        nsamples=len(rows),
        seqlen=windows_NT.shape[1],
        batch_size=4,
        dataset=rows,
        seed=args.seed,
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
    )
    quantized, _ = rounding.quantize()
    return quantized


if __name__ == "__main__":
    run(compress)
