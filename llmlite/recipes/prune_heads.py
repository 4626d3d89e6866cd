"""Prune attention heads in one shot. ``python -m llmlite.recipes.prune_heads``; the YAML twin is recipes/prune_heads.yaml."""

from __future__ import annotations

from typing import ClassVar

from llmlite.config import settings
from llmlite.data.settings import Data
from llmlite.pruning.heads import PruneHeads as PruneHeadsStep
from llmlite.recipe import DataSettings, Recipe, Steps

__all__ = ["PruneHeads"]


@settings
class PruneHeads(Recipe):
    """Take attention heads away, by whole key/value groups, and repair the output projections by least squares.

    The result is a stock checkpoint with fewer heads and a smaller cache, and nothing was trained. Where a family refuses a number of heads, the nearest legal
    one is taken and said. With --unit query_heads the same number of query heads goes from every group instead.
    """

    name: ClassVar[str] = "prune_heads"

    data: DataSettings = Data(calibration_sequences=32)
    steps: Steps = (PruneHeadsStep(keep=0.67),)


if __name__ == "__main__":
    from llmlite.cli import recipe_main

    recipe_main(PruneHeads)
