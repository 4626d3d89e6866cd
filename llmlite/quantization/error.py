"""How much each quantized layer hurts: its relative output error on calibration text, the worst layers, and what to do about them; and what rounding changes.

    error = sum_x |(W - Q) x|^2 / sum_x |W x|^2

A layer at 0.01 changes its output by a tenth of its size. The inputs x are the dense model's; for int8 the rounding of the inputs themselves is not in it.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from llmlite.calibration.blocks import Statistics
from llmlite.calibration.walk import Walk, walk_blocks
from llmlite.models.blockwise import present
from llmlite.models.size import BLOCK_SIZE
from llmlite.models.view import BlockView, ModelView
from llmlite.quantization.nf4 import dequantize, grid_of, largest_scales, nearest_index

if TYPE_CHECKING:
    from llmlite.calibration.blocks import Batch

__all__ = ["error_report", "layer_errors", "rounding_changes"]

_WORST = 5
_OUTLIER = 4.0  # a layer this many times the median is worth 16 bit


@torch.no_grad()
def layer_errors(dense: nn.Module, quantized: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    """The relative output error of every projection that is quantized in `quantized`, by name.

    Args:
        dense: the model before, in eval mode. Not changed.
        quantized: the same model quantized by bitsandbytes, not packed for the CPU.
        batches: calibration inputs.
    """
    from llmlite.models.dequantize import dequantized

    rounded = ModelView(quantized).blocks

    def measure(block: BlockView, found: dict[str, Statistics]) -> dict[str, Any]:
        errors = {}
        with present(rounded[block.index]):
            for role, statistics in found.items():
                linear = rounded[block.index].linears[role]
                if not linear.quantized:
                    continue
                weight_OI = block.linears[role].weight_OI.float()
                rounded_OI = dequantized(linear.base).to(weight_OI)
                errors[linear.name] = statistics.all.relative_output_error(weight_OI - rounded_OI, weight_OI)
        return errors

    walk = Walk(stages=(tuple(ModelView(dense).family.linears),), inputs="dense", keeps=False)
    return {name: float(error) for block in walk_blocks(dense, batches, walk, measure) for name, error in block.items()}


@torch.no_grad()
def rounding_changes(model: nn.Module, scheme: Literal["nf4", "fp4"] = "nf4") -> dict[str, Tensor]:
    """What rounding to nearest, as bitsandbytes does it, would change in each projection that its format can hold.

    Args:
        model: dense. Not changed.
        scheme: the grid of 16 levels.

    Returns:
        Projection -> Q - W, float32, (O, I); those whose input width is no multiple of the block size are left out.
    """
    changes: dict[str, Tensor] = {}
    for linear in ModelView(model).linears():
        weight_OI = linear.weight_OI.float()
        if weight_OI.shape[1] % BLOCK_SIZE == 0:
            grid, scales_OB = grid_of(scheme).to(weight_OI.device), largest_scales(weight_OI)
            index_OI = nearest_index(weight_OI / scales_OB.repeat_interleave(BLOCK_SIZE, 1), grid)
            changes[linear.name] = dequantize(index_OI, scales_OB, grid) - weight_OI
    return changes


def error_report(errors: Mapping[str, float]) -> dict[str, Any]:
    """What the report keeps: the mean, the worst layers, and a suggestion where single layers stand out.

    Args:
        errors: layer name -> relative output error.

    Returns:
        `mean_layer_error`, `worst_layers` (name and error, worst first), `layer_errors` (all), and `suggestion`, a sentence or an empty one.
    """
    if not errors:
        return {}
    ranked = sorted(errors.items(), key=lambda item: -item[1])
    median = ranked[len(ranked) // 2][1]
    outliers = [name for name, error in ranked if error > _OUTLIER * median and error > 1e-3][:_WORST]
    suggestion = (
        f"{', '.join(outliers)} {'has' if len(outliers) == 1 else 'have'} more than {_OUTLIER:g} times the median error; "
        f"skip: [{', '.join(outliers)}] leaves {'it' if len(outliers) == 1 else 'them'} in 16 bit."
        if outliers
        else ""
    )
    return {
        "mean_layer_error": sum(errors.values()) / len(errors),
        "worst_layers": [{"layer": name, "relative_output_error": error} for name, error in ranked[:_WORST]],
        "suggestion": suggestion,
        "layer_errors": dict(errors),
    }
