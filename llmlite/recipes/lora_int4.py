"""Finetune a LoRA adapter on a 4-bit base (QLoRA). ``python -m llmlite.recipes.lora_int4``; the YAML twin is recipes/lora_int4.yaml."""

from __future__ import annotations

from typing import ClassVar

from llmlite.adapters.lora import Lora
from llmlite.config import settings
from llmlite.quantization.bnb import Quantize
from llmlite.recipe import Recipe
from llmlite.step import Step

__all__ = ["LoraInt4"]


@settings
class LoraInt4(Recipe):
    """Finetune a LoRA adapter on a base stored in 4 bits.

    The base's linear layers are stored as NF4 with double quantization (bitsandbytes' 4-bit types are 16-value floating grids, not integers:
    "int4" is how people call it), the adapter is trained in 16 or 32 bit on top. With no option at all it finetunes SmolLM2-135M-Instruct on
    the Python documentation, offline, in a few minutes on two CPU cores.
    """

    name: ClassVar[str] = "lora_int4"

    steps: tuple[Step, ...] = (Quantize(scheme="nf4", double_quant=True), Lora(learning_rate=5e-4, max_steps=24, per_device_train_batch_size=2))


if __name__ == "__main__":
    from llmlite.cli import recipe_main

    recipe_main(LoraInt4)
