"""Store a model in 8 bits. ``python -m llmlite.recipes.quantize_int8``; the YAML twin is recipes/quantize_int8.yaml."""

from __future__ import annotations

from typing import ClassVar

from llmlite.config import settings
from llmlite.quantization.bnb import Quantize
from llmlite.recipe import Recipe, Steps

__all__ = ["QuantizeInt8"]


@settings
class QuantizeInt8(Recipe):
    """Store the linear layers of the decoder blocks as LLM.int8: one scale for each output row.

    In evaluation the inputs are rounded to 8 bits too, except features with outliers above --llm_int8_threshold; in training only the weights are. No data
    is needed; a few calibration rows measure what each layer loses.

    With no option at all it quantizes SmolLM2-135M-Instruct, offline.
    """

    name: ClassVar[str] = "quantize_int8"

    steps: Steps = (Quantize(scheme="int8"),)


if __name__ == "__main__":
    from llmlite.cli import recipe_main

    recipe_main(QuantizeInt8)
