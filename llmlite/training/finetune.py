"""The step `finetune`: train every weight on the text, by cross entropy. What heals a pruned model when a teacher is not wanted."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from llmlite.config import settings
from llmlite.step import ModelPlan
from llmlite.training.settings import TrainingStep

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from llmlite.context import Run
    from llmlite.training.trainer import Companion, LossMaker

__all__ = ["Finetune", "full_training_plan", "train_all_weights"]


@settings
class Finetune(TrainingStep):
    """Train all weights on the text."""

    def check(self, model: ModelPlan, run: Run) -> ModelPlan:
        """See `Step.check`."""
        return full_training_plan(self, model, run)

    def apply(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """Train."""
        return train_all_weights(model, self, run)


def full_training_plan(step: TrainingStep, model: ModelPlan, run: Run, *notes: str) -> ModelPlan:
    """What training every weight leaves behind and needs."""
    from llmlite.training.memory import training_peak_bytes

    return dataclasses.replace(
        model,
        trained_parameters=model.parameters,
        peak_bytes=training_peak_bytes(model, model.parameters, step, run),
        tokens=run.training_tokens(step),
        notes=notes or ("all weights",),
    )


def train_all_weights(
    model: PreTrainedModel, step: TrainingStep, run: Run, make_loss: LossMaker | None = None, companion: Companion | None = None
) -> PreTrainedModel:
    """Train every weight in float32 and give the model back in the type it came in; zeros of a sparse model stay (`llmlite.training.keep_zeros`).

    AdamW's small steps vanish in bfloat16 weights, so the weights that are updated are float32 everywhere; autocast computes in the device's type.
    """
    import torch

    from llmlite.training.trainer import train

    came_in = model.dtype
    _cast_parameters(model, torch.float32)
    model.requires_grad_(True)
    train(model, step, run, make_loss, companion)
    model.requires_grad_(False)
    _cast_parameters(model, came_in)
    return model


def _cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Parameters alone: `model.to` would round buffers too, the rotary frequencies for instance, which no checkpoint brings back as they were."""
    for parameter in model.parameters():  # tied ones are one
        parameter.data = parameter.data.to(dtype)
