"""How sparse each layer may be, by how many outliers it holds (OWL): layers whose weights times inputs stick out keep more.

    D_l = share of the weights of layer l with |W_ij| ||X_j|| > m * mean of that layer
    S_l = S - reach * (2 (D_l - min D) / (max D - min D) - its mean over the layers)

The mean over the layers is S: the same number of zeros in all, elsewhere.

Source: Yin et al. 2023 (OWL), arXiv:2310.05175, section 3.2; m = 5 and reach = 0.08 are theirs.

Shapes: L layers, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmlite.pruning.scores import wanda_score

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["measure_outliers", "outlier_share", "owl_sparsities"]


def outlier_share(parts: Iterable[tuple[Tensor, Tensor]], factor: float) -> float:
    """Share of a layer's weights whose Wanda score is more than `factor` times the layer's mean score.

    Args:
        parts: (weight_OI, input_norm_I) of each projection of the layer.
        factor: m of the formula.
    """
    scores = torch.cat([wanda_score(weight_OI, norm_I).flatten() for weight_OI, norm_I in parts])
    return float((scores > factor * scores.mean()).float().mean())


def owl_sparsities(outliers_L: Sequence[float], sparsity: float, reach: float) -> list[float]:
    """The share of zeros of each layer; their mean is `sparsity`, none is further than 2 * `reach` from it.

    Args:
        outliers_L: see `outlier_share`.
        sparsity: share of zeros over all layers.
        reach: half the distance between the sparsest and the densest layer (lambda of the paper).
    """
    least, most = min(outliers_L), max(outliers_L)
    if most == least:
        return [sparsity] * len(outliers_L)
    relief_L = [2 * reach * (share - least) / (most - least) for share in outliers_L]
    mean = sum(relief_L) / len(relief_L)
    return [sparsity - relief + mean for relief in relief_L]


def measure_outliers(model: PreTrainedModel, windows_NT: Tensor, factor: float) -> list[float]:
    """`outlier_share` of every block of the dense model, in one pass."""
    from llmlite.calibration.blocks import Blocks, batches_of
    from llmlite.models.blockwise import present

    stream, found = Blocks(model, batches_of(windows_NT), quick=True), []
    for block in stream.view.blocks:
        with present(block):
            statistics = stream.collect(block, list(block.linears), gram=False)
            found.append(outlier_share([(block.linears[role].weight_OI, heard.all.norm_I) for role, heard in statistics.items()], factor))
            del statistics
            stream.advance(block)
    return found
