"""Whoever is taught: all weights of the model, a new adapter on it, or the adapter that it carries. What both distillation steps share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import pydantic

from llmlite.adapters.settings import AdapterStep
from llmlite.config import settings, validate
from llmlite.step import QUANTIZED, UNQUANTIZED, ModelPlan, step_class
from llmlite.training.settings import TrainingStep

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from llmlite.context import Run
    from llmlite.training.trainer import Companion, LossMaker

__all__ = ["StudentStep", "Taught"]

Taught = Callable[["PreTrainedModel"], AbstractContextManager["tuple[LossMaker | None, Companion | None]"]]
"""The student -> what it is taught by, for as long as it is: the loss (None for cross entropy), and what goes with it."""


def _adapter_of(value: Any) -> Any:
    options = {"step": value} if isinstance(value, str) else value
    if not isinstance(options, Mapping):
        return value
    name = str(options.get("step", "lora"))
    cls = step_class(name)
    if not issubclass(cls, AdapterStep):
        raise ValueError(f"name an adapter's step, such as lora; '{name}' is none")
    adapter, problems = validate(cls, {key: item for key, item in options.items() if key != "step"}, name)
    if adapter is None:
        raise ValueError("be right: " + " ".join(problems))
    misplaced = [f.name for f in dataclasses.fields(TrainingStep) if getattr(adapter, f.name) != getattr(cls(), f.name)]
    if misplaced:
        raise ValueError(f"say only what the adapter is; {', '.join(misplaced)} belong to the step around it")
    return adapter


Adapter = Annotated[AdapterStep | None, pydantic.BeforeValidator(_adapter_of)]
"""A step that trains an adapter, as its name or a mapping with `step:`; what it says of training is not used here."""


@settings
class StudentStep(TrainingStep):
    """Base of the steps that teach a student."""

    takes: ClassVar[frozenset[str]] = UNQUANTIZED | QUANTIZED
    takes_adapters: ClassVar[bool] = True

    adapter: Adapter = None
    """Train a new adapter on the frozen model instead of all weights: lora, or with its options {step: lora, r: 32}; any step that trains an adapter will do. A
    model that comes with an adapter has that one trained."""

    def problems_of_student(self, model: ModelPlan) -> list[str]:
        """Why this model cannot be the student, one sentence each."""
        if self.adapter and model.adapters:
            return ["adapter: the model already carries an adapter. Leave the option out and that one is trained, or put a step 'merge' before."]
        if model.form in QUANTIZED and not (self.adapter or model.adapters):
            return [f"the weights are {model.form} and cannot be trained themselves. Set adapter: lora, or distil before quantizing."]
        return []

    def student_in_words(self, model: ModelPlan) -> str:
        """What is trained, for the plan."""
        return "the adapter" if model.adapters else "a new adapter" if self.adapter else "all weights"

    def student_plan(self, model: ModelPlan, run: Run) -> ModelPlan:
        """What training the student leaves behind and needs, without notes of its own but those of a new adapter."""
        from llmlite.models.size import size_of_config
        from llmlite.training.finetune import full_training_plan
        from llmlite.training.memory import training_peak_bytes

        if self.adapter:
            shape = dataclasses.replace(self.adapter, **{name: getattr(self, name) for name in ("per_device_train_batch_size", "gradient_checkpointing")})
            return dataclasses.replace(shape.check(model, run), tokens=run.training_tokens(self))
        if not model.adapters:
            return dataclasses.replace(full_training_plan(self, model, run), notes=())
        trained = model.parameters - size_of_config(model.config).parameters
        peak = training_peak_bytes(model, trained, self, run)
        return dataclasses.replace(model, trained_parameters=trained, peak_bytes=peak, tokens=run.training_tokens(self), notes=())

    def train_student(self, model: PreTrainedModel, run: Run, taught: Taught) -> PreTrainedModel:
        """Attach an adapter if asked, and train what is to be trained."""
        from llmlite.adapters.merge import write_merged
        from llmlite.models.adapted import is_adapted, is_adapter_parameter
        from llmlite.training.finetune import train_all_weights
        from llmlite.training.trainer import train

        student = self.adapter.attach(model, run) if self.adapter else model
        if not is_adapted(student):
            with taught(student) as (make_loss, companion):
                return train_all_weights(student, self, run, make_loss, companion)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(is_adapter_parameter(name))
        rate = (self.adapter or AdapterStep()).peak_learning_rate(run.config.get_text_config().hidden_size)
        with taught(student) as (make_loss, companion):
            train(student, dataclasses.replace(self, learning_rate=self.learning_rate or rate), run, make_loss, companion)
        if self.adapter and self.adapter.merge and run.is_main:
            write_merged(student, run)
        return student

    def optimizer(self, model: PreTrainedModel, learning_rate: float) -> torch.optim.Optimizer | None:
        """The adapter's own optimizer, if it has one (LoRA+)."""
        return self.adapter.optimizer(model, learning_rate) if self.adapter else None
