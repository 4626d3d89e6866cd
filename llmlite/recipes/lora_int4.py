"""Finetune a LoRA adapter on a 4-bit base (QLoRA). ``python -m llmlite.recipes.lora_int4``; the YAML twin is recipes/lora_int4.yaml."""

from __future__ import annotations

from typing import ClassVar

from llmlite.adapters.lora import Lora as LoraStep
from llmlite.config import settings
from llmlite.data.settings import Data
from llmlite.quantization.bnb import Quantize
from llmlite.recipe import DataSettings, Recipe, Steps

__all__ = ["LoraInt4"]


@settings
class LoraInt4(Recipe):
    """Finetune a LoRA adapter on a base stored in 4 bits (QLoRA).

    The base's linear layers are stored as NF4 with double quantization and the adapter is trained on top in 16 or 32 bit. "int4" is what
    people call it; bitsandbytes' 4-bit types are floating grids of 16 values, not integers.

    The adapter starts as the low-rank correction of what rounding broke, computed on a few rows of calibration text, where memory holds the dense base beside
    the 4-bit one; --init_lora_weights default starts it as the base.

    With no option at all it finetunes SmolLM2-135M-Instruct on questions about the Python documentation, offline, in a few minutes on two CPU
    cores. With --data it reads all your rows once (num_train_epochs).
    """

    name: ClassVar[str] = "lora_int4"

    data: DataSettings = Data(max_train_rows=176)
    steps: Steps = (
        Quantize(scheme="nf4", double_quant=True, calibrate=False, report_sequences=0),
        LoraStep(per_device_train_batch_size=1, gradient_accumulation_steps=2),
    )


if __name__ == "__main__":
    from llmlite.cli import recipe_main

    recipe_main(LoraInt4)
