"""Take layers away and distil the whole model into what is left. ``python -m llmlite.recipes.distill_whitebox``; YAML twin: recipes/distill_whitebox.yaml."""

from __future__ import annotations

from typing import ClassVar

from llmlite.config import settings
from llmlite.data.settings import Data
from llmlite.distillation.whitebox import DistillWhiteBox as DistillWhiteBoxStep
from llmlite.pruning.layers import PruneLayers
from llmlite.recipe import DataSettings, Recipe, Steps

__all__ = ["DistillWhiteBox"]


@settings
class DistillWhiteBox(Recipe):
    """Take a fifth of the layers away, then train what is left towards the whole model's distributions.

    --keep says how many layers stay. The teacher is the model itself before pruning (--teacher names another); its signals are computed once, kept on disk
    and used again by later epochs and runs (--cache none: it runs beside the student). Your text (--data) should be like what the small model is for.
    """

    name: ClassVar[str] = "distill_whitebox"

    data: DataSettings = Data(calibration="builtin:python-docs", calibration_sequences=8, max_train_rows=240)
    steps: Steps = (
        PruneLayers(keep=0.8, greedy_windows=2),
        DistillWhiteBoxStep(per_device_train_batch_size=1, gradient_accumulation_steps=2),
    )


if __name__ == "__main__":
    from llmlite.cli import recipe_main

    recipe_main(DistillWhiteBox)
