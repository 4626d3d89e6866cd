"""The step `distill.whitebox`: train the model towards its teacher's whole distribution.

    loss = ce_weight * CE(text) + kd_weight * T^2 * divergence(teacher, student)

The teacher runs beside the student on the same tokens; only its last hidden states are kept, and both heads are applied chunk by chunk, so no
full logits of either exist. Half cross entropy, half forward KL healed best in our measurements; from a badly broken student reverse KL and
JSD go nowhere, since they ask the student's own samples.

Source: Hinton et al. 2015, arXiv:1503.02531, section 2; the divergences name theirs in `llmlite.distillation.losses`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from llmlite.config import settings
from llmlite.errors import ConfigError
from llmlite.step import ModelPlan
from llmlite.training.finetune import full_training_plan, train_all_weights
from llmlite.training.settings import NonNegative, TrainingStep

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from llmlite.run import Run
    from llmlite.training.token_loss import TokenLoss

__all__ = ["DistillWhiteBox"]

Divergence = Literal["forward_kl", "reverse_kl", "generalised_jsd", "skewed_forward_kl", "skewed_reverse_kl", "total_variation", "logit_mse"]


@settings
class DistillWhiteBox(TrainingStep):
    """Train all weights towards a teacher whose weights are at hand."""

    takes: ClassVar[frozenset[str]] = frozenset({"dense", "sparse"})

    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """Peak learning rate of AdamW."""
    teacher: str = "base"
    """base: the model this run started from. Else a Hub id or folder of a model with the same vocabulary."""
    divergence: Divergence = "forward_kl"
    """Distance between teacher and student, for each token."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Both distributions are softened by it; the divergence is multiplied by its square, so that gradients keep their size."""
    ce_weight: NonNegative = 0.5
    """Weight of cross entropy on the text."""
    kd_weight: NonNegative = 0.5
    """Weight of the divergence from the teacher."""

    def check(self, model: ModelPlan, run: Run) -> ModelPlan:
        """See `Step.check`.

        Raises:
            ConfigError: both weights are zero.
            LoadError: the teacher is not there, or has another vocabulary.
        """
        from llmlite.models.size import expected_bytes

        if self.ce_weight == self.kd_weight == 0:
            raise ConfigError("distill.whitebox", ["ce_weight and kd_weight are both 0, so there is nothing to learn."])
        config = self._teacher_config(run)
        plan = full_training_plan(self, model, run, f"{self.ce_weight:g} CE + {self.kd_weight:g} {self.divergence} to {self.teacher}, all weights")
        return dataclasses.replace(plan, peak_bytes=plan.peak_bytes + expected_bytes(config, dtype=run.compute_dtype))

    def apply(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """Load the teacher and train."""
        teacher = self._load_teacher(run)
        teacher.requires_grad_(False)
        return train_all_weights(model, self, run, self.loss_with(teacher))

    def loss_with(self, teacher: PreTrainedModel) -> Any:
        """The loss of a batch, with the teacher run on it; see `llmlite.training.trainer.LossMaker`."""
        import torch

        from llmlite.distillation.objective import Distillation, HiddenTeacher
        from llmlite.training.backbone import hidden_and_head

        def make_loss(inputs: dict[str, Tensor], labels_N: Tensor) -> TokenLoss:
            with torch.no_grad():
                hidden_BTD, head, transform = hidden_and_head(teacher, inputs)
            signal = HiddenTeacher(hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), head, transform=transform)
            return Distillation(
                signal,
                labels_N,
                divergence=self.divergence,
                temperature=self.temperature,
                ce_weight=self.ce_weight,
                kd_weight=self.kd_weight,
            )

        return make_loss

    def _teacher_config(self, run: Run) -> Any:
        from llmlite.models.load import Model, find, load_config

        if self.teacher == "base":
            return run.config
        settings_of = Model(name=self.teacher)
        return load_config(find(settings_of, weights=False), settings_of)

    def _load_teacher(self, run: Run) -> PreTrainedModel:
        from llmlite.errors import LoadError
        from llmlite.models.load import Model, find, load_model, load_tokenizer

        if self.teacher == "base":
            return run.load_base()
        settings_of = Model(name=self.teacher)
        source = find(settings_of)
        if load_tokenizer(source, settings_of).get_vocab() != run.tokenizer.get_vocab():
            raise LoadError(f"distill.whitebox: the teacher '{self.teacher}' has another tokenizer than the student, so their tokens do not mean the same.")
        return load_model(source, settings_of, run.device)
