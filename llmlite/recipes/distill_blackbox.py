"""Train on what a teacher behind an API says. ``python -m llmlite.recipes.distill_blackbox``; the YAML twin is recipes/distill_blackbox.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from llmlite.config import settings
from llmlite.data.settings import Data
from llmlite.distillation.blackbox import DistillBlackBox as DistillBlackBoxStep
from llmlite.pruning.layers import PruneLayers
from llmlite.recipe import DataSettings, Recipe, Steps

__all__ = ["DistillBlackBox"]

R = TypeVar("R", bound="DistillBlackBox")


@settings
class DistillBlackBox(Recipe):
    """Ask a teacher through an OpenAI-compatible API and train on its answers.

    \b
    --teacher NAME --base_url URL    a model behind an API; the student is --model as it is
    left out                         the model is its own teacher, served on loopback while it is asked; the student is the model with
                                     a tenth of its layers taken away (--keep)

    --mode top_logprobs trains on the teacher's likeliest tokens too, where the server returns them. --max_requests, --max_tokens_total and --max_cost end
    the asking in time. Every answer is kept, so that nothing is asked twice.
    """

    name: ClassVar[str] = "distill_blackbox"

    data: DataSettings = Data(calibration="builtin:python-docs", calibration_sequences=8, max_train_rows=48)
    steps: Steps = (
        PruneLayers(keep=0.9, score="block_influence"),
        DistillBlackBoxStep(max_answer_tokens=64, truncated="cut", num_train_epochs=2, per_device_train_batch_size=1, gradient_accumulation_steps=2),
    )

    @classmethod
    def from_options(cls: type[R], *layers: tuple[str, Mapping[str, Any]]) -> R:
        """See `Recipe.from_options`. With a teacher of its own the student is the model as it is, and answers are as long as the step has them."""
        given = {str(key).rpartition(".")[2]: value for _, options in layers for key, value in options.items()}
        if str(given.get("teacher", "serve:base")) != "serve:base" and not {"steps", "keep"} & given.keys():
            step = DistillBlackBoxStep
            meant = {"keep": 1.0, "max_answer_tokens": step.max_answer_tokens, "truncated": step.truncated, "num_train_epochs": step.num_train_epochs}
            layers = (("a teacher of its own", {name: value for name, value in meant.items() if name not in given}), *layers)
        return super().from_options(*layers)


if __name__ == "__main__":
    from llmlite.cli import recipe_main

    recipe_main(DistillBlackBox)
