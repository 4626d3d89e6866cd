"""quanto: weight-only qint4 (groups of 128, its own choice)."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import dense, run
from optimum.quanto import freeze, qint4, quantize


def compress(args: argparse.Namespace, windows_NT: torch.Tensor) -> Any:
    model = dense(args.model)
    quantize(model, weights=qint4, exclude="lm_head")
    freeze(model)
    return model


if __name__ == "__main__":
    run(compress)
