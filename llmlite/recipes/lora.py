"""Finetune a LoRA adapter on a 16- or 32-bit base. ``python -m llmlite.recipes.lora``; the YAML twin is recipes/lora.yaml."""

from __future__ import annotations

from typing import ClassVar

from llmlite.adapters.lora import Lora as LoraStep
from llmlite.config import settings
from llmlite.data.settings import Data
from llmlite.recipe import DataSettings, Recipe, Steps

__all__ = ["Lora"]


@settings
class Lora(Recipe):
    """Finetune a LoRA adapter on a base in 16 bit (32 bit on CPUs).

    The most faithful base and the largest; lora_int8 and lora_int4 use smaller ones.
    """

    name: ClassVar[str] = "lora"

    data: DataSettings = Data(max_train_rows=176)
    steps: Steps = (LoraStep(per_device_train_batch_size=1, gradient_accumulation_steps=2),)


if __name__ == "__main__":
    from llmlite.cli import recipe_main

    recipe_main(Lora)
