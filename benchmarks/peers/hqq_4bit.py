"""HQQ: 4 bits, groups of 64, through transformers."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import dense, run
from transformers import HqqConfig


def compress(args: argparse.Namespace, windows_NT: torch.Tensor) -> Any:
    return dense(args.model, quantization_config=HqqConfig(nbits=4, group_size=64), device_map="cpu")


if __name__ == "__main__":
    run(compress)
