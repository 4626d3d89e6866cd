"""HQQ: 4 bits, groups of 64, by its own library (transformers 5.23 says that its HQQ integration is not available yet)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import dense, run
from hqq.core.quantize import BaseQuantizeConfig
from hqq.models.hf.base import AutoHQQHFModel


def compress(args: argparse.Namespace, windows_NT: torch.Tensor) -> Any:
    model = dense(args.model)
    AutoHQQHFModel.quantize_model(model, quant_config=BaseQuantizeConfig(nbits=4, group_size=64), compute_dtype=torch.float32, device="cpu")
    return model


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    folder.mkdir()
    AutoHQQHFModel.save_quantized(model, str(folder))
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    run(compress, save)
