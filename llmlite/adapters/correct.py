"""The step `correct`: a low-rank adapter that repairs a quantized model without any training, saved beside it as a stock peft adapter.

Source: see `llmlite.adapters.initialise`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from llmlite.adapters.lora import Lora, correction_peak_bytes
from llmlite.config import settings
from llmlite.step import QUANTIZED, ModelPlan, Names, Step
from llmlite.training.settings import PositiveInt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmlite.context import Run

__all__ = ["Correct"]


@settings
class Correct(Step):
    """Add the low-rank correction of what quantization broke, computed on calibration text, not trained."""

    takes: ClassVar[frozenset[str]] = QUANTIZED

    r: PositiveInt = 16
    """Rank of the correction. Each layer of O x I weights gets r (O + I) numbers more."""
    target_modules: Names = ("all-linear",)
    """Layers that are corrected: all-linear (every linear layer of the decoder blocks), or names such as down_proj."""

    def _lora(self) -> Lora:
        return Lora(r=self.r, lora_alpha=self.r, target_modules=self.target_modules, init_lora_weights="quantization_error")

    def check(self, model: ModelPlan, run: Run) -> ModelPlan:
        """See `Step.check`.

        Raises:
            ConfigError: no `quantize` step before, target modules that match nothing, or a second adapter.
        """
        data = run.recipe.data
        plan = self._lora().check(model, run)
        return dataclasses.replace(
            plan,
            disk_bytes=plan.disk_bytes // 4 * run.storage_dtype.itemsize,
            trained_parameters=0,
            tokens=data.calibration_sequences * data.max_length,
            peak_bytes=correction_peak_bytes(model, data.calibration_sequences, run),
            notes=(f"rank-{self.r} correction, not trained",),
        )

    def no_dispatch(self, form: str) -> str:
        """See `Step.no_dispatch`."""
        return self._lora().no_dispatch(form)

    def apply(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """Attach the adapter, filled; its numbers are rounded to the type of the base's files, in which half of the bytes hold them."""
        from llmlite.models.save import settle_adapter

        adapted = self._lora().attach(model, run).eval()
        settle_adapter(adapted, run.storage_dtype)
        return adapted
