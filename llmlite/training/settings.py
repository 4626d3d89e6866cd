"""The options of every training step, by transformers' own names. Steps that train inherit them; there is one training path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from llmlite.config import near, settings, shorten
from llmlite.step import QUANTIZED, Names, Step

if TYPE_CHECKING:
    import torch

    from llmlite.layout import Layout

__all__ = ["NonNegative", "PositiveInt", "TrainingStep"]

PositiveInt = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]


@settings
class TrainingStep(Step):
    """Base of the steps that train."""

    advice: ClassVar[str] = "a lower learning_rate, fewer steps, or data nearer to what the base was trained on"
    memory_advice: ClassVar[str] = "Lower per_device_train_batch_size or max_length, or set gradient_checkpointing: true"

    learning_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Peak learning rate of AdamW. None: the step's own choice."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps. None: `num_train_epochs` decides."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training rows, when `max_steps` does not end it before."""
    per_device_train_batch_size: PositiveInt = 4
    """Rows of `max_length` tokens in one forward pass of one device."""
    gradient_accumulation_steps: PositiveInt = 1
    """Forward passes whose gradients make one optimizer step. Losses are normalised by tokens over all of them."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: NonNegative = 0.05
    """Optimizer steps of linear warm-up; below 1 it is a share of all steps."""
    weight_decay: NonNegative = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass: about a third more time for much less memory. None: on accelerators only."""
    save_steps: PositiveInt = 50
    """Optimizer steps between checkpoints that a stopped run continues from."""
    logging_steps: PositiveInt = 5
    """Optimizer steps between two lines of the loss."""
    report_to: Names = ()
    """Trackers that transformers knows: tensorboard, wandb, trackio, ... Files of the first two stay under runs/ in the output folder, never uploaded."""

    def recomputes(self, device: torch.device) -> bool:
        """Whether the backward pass recomputes activations on this device; see `gradient_checkpointing`."""
        return self.gradient_checkpointing if self.gradient_checkpointing is not None else device.type != "cpu"

    def no_tracker(self) -> str:
        """Why `report_to` names a tracker that transformers does not know or cannot use here, as a sentence; empty where all can be used."""
        if not self.report_to:
            return ""
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        for name in self.report_to:
            if name in {"all", "none"}:
                continue
            if name not in INTEGRATION_TO_CALLBACK:
                guess = near(name, INTEGRATION_TO_CALLBACK)
                hint = f"Did you mean '{guess}'?" if guess else f"Known: {', '.join(INTEGRATION_TO_CALLBACK)}."
                return f"report_to: transformers knows no tracker '{shorten(name)}'. {hint}"
            try:
                INTEGRATION_TO_CALLBACK[name]()  # what the Trainer will do, hours from now
            except Exception as error:  # each looks for its library in its own way
                return f"report_to: '{name}' cannot be used here: {shorten(str(error), 200)} Or leave it out: a run may be continued with other trackers."
            if name == "wandb":
                from llmlite.training.trackers import without_key

                if reason := without_key():
                    return reason
        return ""

    def peak_learning_rate(self, hidden_size: int) -> float:
        """The learning rate as asked, else 5e-5, which suits the training of all weights.

        Args:
            hidden_size: width of the model, for steps whose choice depends on it.
        """
        return self.learning_rate or 5e-5

    def no_sharding(self, form: str, layout: Layout) -> str:
        """Why this step's training cannot be split over processes, as a sentence; empty where it can.

        Args:
            form: of the model that the step gets; see `ModelPlan.form`.
            layout: FSDP2 or ZeRO-3.
        """
        if layout.kind == "zero3" and form in QUANTIZED:
            return f"training on a model in {form} under ZeRO-3 is not built. Take recipes/accelerate/fsdp2_qlora.yaml for nf4, or ddp.yaml."
        if form == "int8":
            return f"training on a model in int8 under {layout.name} is not built. Take nf4, or launch it with recipes/accelerate/ddp.yaml."
        if form == "sparse":
            return f"training a sparse model under {layout.name} is not built yet. Launch it with recipes/accelerate/ddp.yaml."
        return ""

    def optimizer(self, model: Any, learning_rate: float) -> torch.optim.Optimizer | None:
        """An optimizer of the step's own; None for the Trainer's AdamW.

        Args:
            model: what will be trained.
            learning_rate: the peak learning rate.
        """
        return None
