"""Finetune a LoRA adapter on an 8-bit base. ``python -m llmlite.recipes.lora_int8``; the YAML twin is recipes/lora_int8.yaml."""

from __future__ import annotations

from typing import ClassVar

from llmlite.adapters.lora import Lora as LoraStep
from llmlite.config import settings
from llmlite.data.settings import Data
from llmlite.quantization.bnb import Quantize
from llmlite.recipe import DataSettings, Recipe, Steps

__all__ = ["LoraInt8"]


@settings
class LoraInt8(Recipe):
    """Finetune a LoRA adapter on a base stored in 8 bits.

    The base's linear layers are stored as LLM.int8: one scale for each output row. In training only the weights are rounded, in evaluation the
    inputs too.
    """

    name: ClassVar[str] = "lora_int8"

    data: DataSettings = Data(max_train_rows=176)
    steps: Steps = (Quantize(scheme="int8", report_sequences=0), LoraStep(per_device_train_batch_size=1, gradient_accumulation_steps=2))


if __name__ == "__main__":
    from llmlite.cli import recipe_main

    recipe_main(LoraInt8)
