"""The step `lora`: train a low-rank adapter on a frozen base, in 16/32 bit or on a bitsandbytes base (QLoRA), by cross entropy on the text.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; on a 4-bit base Dettmers et al. 2023, arXiv:2305.14314. Its shape: `llmlite.adapters.options`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from llmlite.adapters.options import LoraOptions, lora_learning_rate
from llmlite.config import settings
from llmlite.errors import ConfigError
from llmlite.step import ModelPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmlite.run import Run

__all__ = ["Lora"]


@settings
class Lora(LoraOptions):
    """Train a LoRA adapter on the frozen model."""

    takes: ClassVar[frozenset[str]] = frozenset({"dense", "sparse", "int8", "nf4", "fp4"})

    learning_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Peak learning rate of AdamW. None: by the model's width, 1.3e-3 at 576, 2.9e-4 at 4,096; adapters want about ten times that of full training."""

    def check(self, model: ModelPlan, run: Run) -> ModelPlan:
        """See `Step.check`.

        Raises:
            ConfigError: target modules that match nothing, or a second adapter.
        """
        if model.adapters:
            raise ConfigError("lora", ["the model already carries an adapter. Merge it first, or train one adapter with more steps."])
        return self.adapter_plan(model, run, "lora")

    def apply(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """Attach, train, and merge if asked."""
        from llmlite.adapters.merge import write_merged
        from llmlite.training.trainer import train

        adapted = self.attach(model, run)
        train(adapted, self, run)
        if self.merge and run.is_main:
            write_merged(adapted, run)
        return adapted

    def peak_learning_rate(self, hidden_size: int) -> float:
        """The learning rate as asked, else `lora_learning_rate`."""
        return self.learning_rate or lora_learning_rate(hidden_size)
