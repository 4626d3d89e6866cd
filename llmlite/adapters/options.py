"""What a LoRA adapter looks like, for every step that can train one: rank, scale, where it sits, how it starts.

    h = W x + (alpha / r) B A x,    A: (r, in), B: (out, r), W frozen

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; on a 4-bit base Dettmers et al. 2023, arXiv:2305.14314.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from llmlite.config import settings
from llmlite.errors import ConfigError
from llmlite.step import ModelPlan, Names
from llmlite.training.settings import PositiveInt, TrainingStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmlite.run import Run

__all__ = ["LoraOptions", "lora_learning_rate"]


def lora_learning_rate(hidden_size: int) -> float:
    """5e-4 (2000 / hidden_size)^0.781: about ten times what the training of all weights wants.

    Source: Schulman and Thinking Machines Lab 2025, "LoRA Without Regret", the fit for Llama models.
    """
    return float(5e-4 * (2000 / hidden_size) ** 0.781)


@settings
class LoraOptions(TrainingStep):
    """Base of the steps that can train a LoRA adapter."""

    r: PositiveInt = 16
    """Rank of the adapter: rows of A, columns of B."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    """The adapter's output is scaled by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs set to zero in training."""
    target_modules: Names = ("all-linear",)
    """Layers that get an adapter: all-linear (every linear layer of the decoder blocks), or names such as q_proj."""
    init_lora_weights: Literal["default", "gaussian", "quantization_error"] = "default"
    """quantization_error starts as the low-rank correction of what the quantize step broke, from calibration text; the others start as the base."""
    merge: bool = False
    """Also write merged/: the adapter added into the (dequantized) base it was trained against, in 16 bit."""

    def adapter_plan(self, model: ModelPlan, run: Run, where: str, *notes: str) -> ModelPlan:
        """What training a fresh adapter leaves behind and needs.

        Args:
            model: what the step gets.
            run: see `Run`.
            where: the step's name, for errors.
            notes: for the plan, before the adapter's own.

        Raises:
            ConfigError: target modules that match nothing, or nothing to correct.
        """
        from llmlite.training.memory import training_peak_bytes

        if self.init_lora_weights == "quantization_error":
            self._require_quantize_step(model, run, where)
        shapes = self._target_shapes(model, where)
        trained = sum(self.r * (out_features + in_features) for out_features, in_features in shapes.values())
        return dataclasses.replace(
            model,
            adapters=True,
            parameters=model.parameters + trained,
            trained_parameters=trained,
            disk_bytes=4 * trained,
            peak_bytes=training_peak_bytes(model, trained, self, run),
            tokens=run.training_tokens(self),
            notes=(*notes, f"rank {self.r} on {len(shapes)} layers"),
        )

    def attach(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """A peft model with fresh adapters, ready to train."""
        import peft
        import torch

        from llmlite.adapters.initialise import initialise_for_run

        torch.manual_seed(run.recipe.seed)
        init = True if self.init_lora_weights in {"default", "quantization_error"} else self.init_lora_weights
        config = peft.LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=sorted(self._target_shapes(ModelPlan(model.config), "lora")),
            init_lora_weights=init,
            task_type="CAUSAL_LM",
        )
        adapted: PreTrainedModel = peft.get_peft_model(model, config)
        if self.init_lora_weights == "quantization_error":
            initialise_for_run(adapted, run)
        return adapted

    def _require_quantize_step(self, model: ModelPlan, run: Run, where: str) -> None:
        from llmlite.quantization.bnb import Quantize

        if model.form not in {"int8", "nf4", "fp4"} or not any(isinstance(step, Quantize) for step in run.recipe.steps):
            raise ConfigError(where, ["init_lora_weights=quantization_error corrects what a quantize step of this recipe broke; there is none before it."])

    def _target_shapes(self, model: ModelPlan, where: str) -> dict[str, tuple[int, int]]:
        from llmlite.models.size import linear_shapes

        shapes = linear_shapes(model.config)
        if self.target_modules == ("all-linear",):
            return shapes
        wanted = {name: shape for name, shape in shapes.items() if any(name == t or name.endswith(f".{t}") for t in self.target_modules)}
        unmatched = [t for t in self.target_modules if not any(name == t or name.endswith(f".{t}") for name in shapes)]
        if unmatched:
            known = sorted({name.rpartition(".")[2] for name in shapes})
            raise ConfigError(where, [f"target_modules {', '.join(map(repr, unmatched))} match no layer of this model. It has: {', '.join(known)}."])
        return wanted
