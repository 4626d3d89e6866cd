"""Torch-Pruning: the same share of FFN channels in every layer, judged by the group's weights (magnitude) or by weight times gradient (taylor)."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch_pruning as tp
from common import KEEP_CHANNELS, dense, run

TAYLOR_ROWS = 16


def compress(args: argparse.Namespace, windows_NT: torch.Tensor) -> Any:
    model = dense(args.model)
    channels = model.config.intermediate_size
    pruned = {linear for layer in model.model.layers for linear in (layer.mlp.gate_proj, layer.mlp.up_proj)}
    importance = tp.importance.GroupTaylorImportance() if args.method == "taylor" else tp.importance.GroupMagnitudeImportance(p=2)
    if args.method == "taylor":
        for window_T in windows_NT[:TAYLOR_ROWS]:
            model(input_ids=window_T[None], labels=window_T[None], use_cache=False).loss.backward()
    pruner = tp.pruner.BasePruner(
        model,
        {"input_ids": windows_NT[:1, :32], "use_cache": False},
        importance=importance,
        pruning_ratio=1 - KEEP_CHANNELS,
        ignored_layers=[module for module in model.modules() if isinstance(module, torch.nn.Linear) and module not in pruned],
        root_module_types=[torch.nn.Linear],
        round_to=2,
        output_transform=lambda output: output.logits.sum(),
    )
    pruner.step()
    model.zero_grad()
    (model.config.intermediate_size,) = {layer.mlp.gate_proj.out_features for layer in model.model.layers}
    assert model.config.intermediate_size < channels
    return model


if __name__ == "__main__":
    run(compress)
