"""Prune widths to a share of the parameters in one shot. ``python -m llmlite.recipes.prune_structured``; the YAML twin is recipes/prune_structured.yaml."""

from __future__ import annotations

from typing import ClassVar

from llmlite.config import settings
from llmlite.data.settings import Data
from llmlite.pruning.rescale import PruneRescale
from llmlite.pruning.structured import PruneStructured as PruneStructuredStep
from llmlite.recipe import DataSettings, Recipe, Steps

__all__ = ["PruneStructured"]


@settings
class PruneStructured(Recipe):
    """Shrink the decoder to a share of its parameters in one shot, as a stock checkpoint of smaller widths.

    --keep_parameters 0.8 is the share of the decoder's parameters that stays, as near as widths of multiples of 64 allow (--multiple_of 2 is finer). How
    much of it comes from layers, heads and FFN channels is measured (--spread ffn takes channels alone and is faster). The calibration text, half of it
    written by the model itself, decides what goes and how what stays makes up for it: by least squares, then by factors of rows, columns and norms that are
    tuned against the base in one pass over the same text. No weight is trained. More text (--calibration_sequences) and text like yours
    (--calibration "0.5*self + 0.5*mine.txt") make a better model.
    """

    name: ClassVar[str] = "prune_structured"

    data: DataSettings = Data(calibration_sequences=32)
    steps: Steps = (PruneStructuredStep(keep_parameters=0.8), PruneRescale())


if __name__ == "__main__":
    from llmlite.cli import recipe_main

    recipe_main(PruneStructured)
