"""Train bottleneck adapters on a frozen base. ``python -m llmlite.recipes.bottleneck_adapter``; the YAML twin is recipes/bottleneck_adapter.yaml."""

from __future__ import annotations

from typing import ClassVar

from llmlite.adapters.bottleneck import Bottleneck
from llmlite.config import settings
from llmlite.data.settings import Data
from llmlite.recipe import DataSettings, Recipe, Steps

__all__ = ["BottleneckAdapter"]


@settings
class BottleneckAdapter(Recipe):
    """Train small networks inserted into every block (bottleneck adapters) while the base stays as it is.

    --placement houlsby puts them after attention and FFN, pfeiffer after the FFN, parallel beside it. They cannot be merged; load them onto the stock base
    with `llmlite.load_adapter(base, folder)`. For a 4-bit base put a step `quantize` before: `llmlite steps bottleneck`.

    With no option at all it trains on SmolLM2-135M-Instruct and questions about the Python documentation, offline.
    """

    name: ClassVar[str] = "bottleneck_adapter"

    data: DataSettings = Data(max_train_rows=176)
    steps: Steps = (Bottleneck(per_device_train_batch_size=1, gradient_accumulation_steps=2),)


if __name__ == "__main__":
    from llmlite.cli import recipe_main

    recipe_main(BottleneckAdapter)
