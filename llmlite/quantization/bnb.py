"""The step `quantize`: 8- or 4-bit weights by bitsandbytes, in the format that stock `from_pretrained` loads.

Quantizing is saving and reloading with a `BitsAndBytesConfig`, which is what users do later anyway; as the first step of a recipe the
model is loaded straight into it. bitsandbytes' 4-bit types are NF4 and FP4, floating grids of 16 values, not integers.

Source: Dettmers et al. 2022, arXiv:2208.07339 (LLM.int8); Dettmers et al. 2023, arXiv:2305.14314 (NF4, double quantization).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from llmlite.config import settings
from llmlite.errors import ConfigError
from llmlite.step import ModelPlan, Names, Step

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import BitsAndBytesConfig, PreTrainedModel

    from llmlite.run import Run

__all__ = ["BLOCK_SIZE", "Quantize"]

BLOCK_SIZE = 64  # weights that share one scale; transformers fixes it


@settings
class Quantize(Step):
    """Store the linear layers of the decoder blocks in 8 or 4 bits. Embeddings, norms and lm_head stay as they are."""

    takes: ClassVar[frozenset[str]] = frozenset({"dense", "sparse"})

    scheme: Literal["int8", "nf4", "fp4"] = "nf4"
    """int8: LLM.int8 (8.05 bits a weight), nf4: 16 normal quantiles (4.5 bits; 4.16 with double_quant), fp4: a 4-bit float."""
    double_quant: bool = True
    """Store the scales of the 4-bit schemes in 8 bits too."""
    skip: Names = ()
    """Names of layers to leave as they are, besides lm_head."""
    unaligned: Literal["refuse", "skip"] = "refuse"
    """What to do with layers whose input width is not a multiple of 64, which bitsandbytes gets wrong: refuse, or leave them in 16 bit."""
    llm_int8_threshold: Annotated[float, Field(ge=0)] = 6.0
    """int8 only: input features with an outlier above this are multiplied in 16 bit. 0 multiplies all in 8 bit."""

    def check(self, model: ModelPlan, run: Run) -> ModelPlan:
        """See `Step.check`.

        Raises:
            ConfigError: layers whose width bitsandbytes cannot represent, unless they are skipped.
        """
        from llmlite.models.size import expected_bytes

        unaligned = self._unaligned(model)
        if unaligned and self.unaligned == "refuse":
            names = ", ".join(f"{name} ({width})" for name, width in unaligned[:4])
            more = f" and {len(unaligned) - 4} more" if len(unaligned) > 4 else ""
            raise ConfigError(
                "quantize",
                [
                    f"{len(unaligned)} layers have an input width that is not a multiple of {BLOCK_SIZE}: {names}{more}. bitsandbytes gives wrong results for "
                    f"them, silently. Prune to multiples of {BLOCK_SIZE}, or set unaligned: skip to leave these layers in 16 bit."
                ],
            )
        size = expected_bytes(model.config, dtype=run.storage_dtype, scheme=self.scheme, double_quant=self.double_quant)
        dense = expected_bytes(model.config, dtype=run.compute_dtype)
        notes = [f"{self.scheme}{' with double quantization' if self.scheme != 'int8' and self.double_quant else ''}"]
        if self.scheme == "int8":
            notes.append("in evaluation the inputs are rounded to 8 bit too (LLM.int8); in training only the weights are")
        if unaligned:
            notes.append(f"{len(unaligned)} layers stay in 16 bit (width no multiple of {BLOCK_SIZE})")
        return dataclasses.replace(model, form=self.scheme, disk_bytes=size, peak_bytes=dense + size, tokens=0, trained_parameters=0, notes=tuple(notes))

    def apply(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """Save the dense model to a scratch folder and reload it quantized."""
        folder = run.scratch / "dense"
        model.save_pretrained(folder)
        config = model.config
        del model
        return self._load(run, folder, self._quantization_config(ModelPlan(config), run))

    def load(self, run: Run) -> PreTrainedModel:
        """Load the run's base straight into the quantized form."""
        return self._load(run, run.source.folder, self._quantization_config(ModelPlan(run.config), run))

    def _load(self, run: Run, folder: Path, config: BitsAndBytesConfig) -> PreTrainedModel:
        from llmlite.models.load import load_model
        from llmlite.quantization.safety import make_safe

        model = load_model(folder, run.recipe.model, run.device, quantization_config=config)
        make_safe(model)
        return model

    def _quantization_config(self, model: ModelPlan, run: Run) -> BitsAndBytesConfig:
        from transformers import BitsAndBytesConfig

        from llmlite.models.load import compute_dtype

        # transformers skips lm_head by itself only while no names are given
        skipped: Any = [*self._skipped(model), "lm_head"] if self._skipped(model) else None
        if self.scheme == "int8":
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=self.llm_int8_threshold, llm_int8_skip_modules=skipped)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.scheme,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=compute_dtype(run.device, run.recipe.model.dtype),
            llm_int8_skip_modules=skipped,
        )

    def _skipped(self, model: ModelPlan) -> tuple[str, ...]:
        return (*self.skip, *(name for name, _ in self._unaligned(model)))

    def _unaligned(self, model: ModelPlan) -> list[tuple[str, int]]:
        if self.scheme == "int8":
            return []
        from llmlite.models.size import linear_shapes

        return [
            (name, in_features)
            for name, (_, in_features) in linear_shapes(model.config).items()
            if in_features % BLOCK_SIZE and not any(part in name for part in self.skip)
        ]
