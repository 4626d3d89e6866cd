"""torchao: weight-only int4, groups of 64."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import dense, run
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup


def compress(args: argparse.Namespace, windows_NT: torch.Tensor) -> Any:
    model = dense(args.model)
    quantize_(
        model,
        IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64)),
        filter_fn=lambda module, name: isinstance(module, torch.nn.Linear) and "lm_head" not in name,
    )
    return model


if __name__ == "__main__":
    run(compress)
