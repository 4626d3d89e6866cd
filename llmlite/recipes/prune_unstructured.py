"""Prune single weights in one shot. ``python -m llmlite.recipes.prune_unstructured``; the YAML twin is recipes/prune_unstructured.yaml."""

from __future__ import annotations

from typing import ClassVar

from llmlite.config import settings
from llmlite.data.settings import Data
from llmlite.pruning.weights import PruneWeights
from llmlite.recipe import DataSettings, Recipe, Steps

__all__ = ["PruneUnstructured"]


@settings
class PruneUnstructured(Recipe):
    """Set half of the decoder's weights to zero with SparseGPT, or with --sparsity 2:4 two in every four.

    The file keeps its size: zeros alone are not faster, they want kernels or formats made for them. Later training steps keep the zeros.
    """

    name: ClassVar[str] = "prune_unstructured"

    data: DataSettings = Data(calibration_sequences=32)
    steps: Steps = (PruneWeights(sparsity=0.5),)


if __name__ == "__main__":
    from llmlite.cli import recipe_main

    recipe_main(PruneUnstructured)
