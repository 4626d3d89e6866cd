"""llm-compressor: GPTQ W4A16 (groups of 64: its 128 do not divide this model's width of 576), SparseGPT and Wanda, else with the modifiers' defaults."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import dense, run
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

W4A16_64 = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=64))
METHODS = {
    "gptq": lambda: GPTQModifier(config_groups={"all": W4A16_64}, ignore=["lm_head"]),
    "sparsegpt-0.5": lambda: SparseGPTModifier(sparsity=0.5, targets=["Linear"], ignore=["lm_head"]),
    "sparsegpt-2:4": lambda: SparseGPTModifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["lm_head"]),
    "wanda-0.5": lambda: WandaPruningModifier(sparsity=0.5, targets=["Linear"], ignore=["lm_head"]),
}


def compress(args: argparse.Namespace, windows_NT: torch.Tensor) -> Any:
    model = dense(args.model)
    rows = Dataset.from_dict({"input_ids": windows_NT.tolist(), "attention_mask": torch.ones_like(windows_NT).tolist()})
    oneshot(
        model=model,
        dataset=rows,
        recipe=[METHODS[args.method]()],
        max_seq_length=windows_NT.shape[1],
        num_calibration_samples=len(windows_NT),
    )
    return model


if __name__ == "__main__":
    run(compress, lambda model, tokenizer, folder: (model.save_pretrained(folder, save_compressed=True), tokenizer.save_pretrained(folder)))
