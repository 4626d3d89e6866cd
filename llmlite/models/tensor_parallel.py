"""Tensor parallel: every process of a launch holds a slice of each block's matrices, and all of them read the same tokens (`tp_plan`).

Queries, keys, values, gate and up are cut by rows, output and down by columns; behind each of the latter the slices' results are added up (all-reduce). How
a family is cut is transformers' knowledge (`base_model_tp_plan`); heads stay whole, so their numbers must divide. Embeddings, norms and the head are whole in
every process, since every measurement touches them: with P processes a model of B bytes in the blocks and E outside takes B / P + E each.

For forward passes only: measuring, and teachers.

Source: Shoeybi et al. 2019, arXiv:1909.08053 (Megatron-LM), section 3.
"""

from __future__ import annotations

from typing import Any

from llmlite.errors import counted
from llmlite.models.families import family_of
from llmlite.models.size import meta_model

__all__ = ["indivisible", "tensor_parallel_options"]


def indivisible(config: Any, processes: int) -> list[str]:
    """Why a model cannot be cut into so many slices, as sentences; nothing when it can. The FFN's width need not divide: the last slice is then narrower."""
    if processes < 2:
        return ["tp_plan=auto cuts a model over the processes of a launch, and this is one process. Start it with torchrun --nproc_per_node 2 -m llmlite ..."]
    if getattr(config, "quantization_config", None) is not None:
        return ["tp_plan=auto cuts dense weights, and this model is quantized. In 8 or 4 bits it may fit one device."]
    family, plan = family_of(config), meta_model(config).tp_plan
    if not _of_blocks(plan):
        return [f"tp_plan=auto: transformers has no plan for {config.model_type}. device_map spreads its blocks from one process instead."]
    cut = {family.linears[role].rpartition(".")[2] for role in ("q", "k", "v", "qkv") if role in family.linears}
    if not any(name.rpartition(".")[2] in cut and style == "colwise" for name, style in plan.items()):
        return []  # gathered before they are taken apart into heads
    of, counts = f"of {config.model_type}", {"query head": family.heads(config), "key/value head": family.kv_heads(config)}
    return [
        f"tp_plan=auto: {counted(count, f'{what} {of} does', f'{what}s {of} do')} not divide by {processes} processes. {_fitting(counts, processes)}"
        for what, count in counts.items()
        if count % processes
    ]


def tensor_parallel_options(config: Any) -> dict[str, Any]:
    """What `from_pretrained` wants, in every process alike."""
    from transformers.distributed import DistributedConfig

    plan = meta_model(config).tp_plan
    return {"distributed_config": DistributedConfig(tp_plan=dict.fromkeys(plan.keys() - _of_blocks(plan).keys(), "replicate"))}


def _of_blocks(plan: dict[str, str]) -> dict[str, str]:
    """The rules of a plan that speak of decoder blocks."""
    return {name: style for name, style in plan.items() if ".*." in name}


def _fitting(counts: dict[str, int], processes: int) -> str:
    fitting = [number for number in range(2, processes) if not any(count % number for count in counts.values())]
    return f"{fitting[-1]} processes would do." if fitting else "device_map spreads whole blocks from one process instead."
