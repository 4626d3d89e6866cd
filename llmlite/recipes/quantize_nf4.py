"""Store a model in 4 bits, calibrated. ``python -m llmlite.recipes.quantize_nf4``; the YAML twin is recipes/quantize_nf4.yaml."""

from __future__ import annotations

from typing import ClassVar

from llmlite.config import settings
from llmlite.data.settings import Data
from llmlite.quantization.bnb import Quantize
from llmlite.recipe import DataSettings, Recipe, Steps

__all__ = ["QuantizeNf4"]


@settings
class QuantizeNf4(Recipe):
    """Store the linear layers of the decoder blocks as NF4, with codes and scales chosen on calibration text.

    What comes out is bitsandbytes' stock format: the same bytes, loaded by unmodified transformers. --calibrate false rounds to nearest instead, as
    `BitsAndBytesConfig` does, without data and in seconds.

    With no option at all it quantizes SmolLM2-135M-Instruct on the Python documentation, offline.
    """

    name: ClassVar[str] = "quantize_nf4"

    data: DataSettings = Data(calibration_sequences=32)
    steps: Steps = (Quantize(scheme="nf4", double_quant=True),)


if __name__ == "__main__":
    from llmlite.cli import recipe_main

    recipe_main(QuantizeNf4)
