"""The step `prune.rescale`: what pruning has left is tuned end to end, by factors for rows, columns and norms that are multiplied into the weights.

    min over factors   KL(base || model) on the calibration rows

Least squares repairs one projection after the other and knows nothing of what their errors do together. Some ten thousand factors in each block can still
make up for that, and are too few to learn the calibration text by heart.

Source: end to end on the model's own divergence, as scales of codes are in Chen et al. 2024 (EfficientQAT), arXiv:2407.11062. For the factors see
`llmlite.pruning.factors`.
"""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from llmlite.config import settings
from llmlite.errors import ConfigError, RunError, counted
from llmlite.pruning.settings import ADVICE, calibration_tokens, kept_in, require_plain
from llmlite.step import ModelPlan, Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PreTrainedModel

    from llmlite.calibration.blocks import Batch
    from llmlite.context import Run
    from llmlite.distillation.descent import DenseAnswers

__all__ = ["PruneRescale", "base_answers"]


@settings
class PruneRescale(Step):
    """Rescale rows, columns and norms of a pruned model so that it says what the base says. Comes after the pruning, before training or quantizing."""

    advice: ClassVar[str] = ADVICE

    epochs: Annotated[int, Field(ge=0)] = 1
    """Passes over the calibration rows. 0 leaves the step out, as for models of which one block at a time is in memory."""
    rows: Annotated[int, Field(ge=1)] = 2
    """Calibration rows of one step of Adam."""
    learning_rate: Annotated[float, Field(gt=0, le=0.1)] = 2e-3
    """Largest relative change of a factor in one step; warms up over 4 steps and falls to 0 as a cosine."""

    def check(self, model: ModelPlan, run: Run) -> ModelPlan:
        """See `Step.check`.

        Raises:
            ConfigError: the model has other tokens than the base.
        """
        from llmlite.calibration.memory import backward_bytes, factor_bytes, head_loss_bytes
        from llmlite.models.quick import quick_dtype
        from llmlite.models.size import expected_bytes, runtime_bytes

        require_plain(model, "prune.rescale")
        if run.vocabulary is not None or model.config.get_text_config().vocab_size != run.config.get_text_config().vocab_size:
            raise ConfigError(
                "prune.rescale", ["tokens have gone from the vocabulary, so the base reads other ids. Put prune.rescale before prune.vocabulary."]
            )
        if not self.epochs:
            return dataclasses.replace(model, trained_parameters=0, tokens=0, notes=("epochs: 0 leaves it out",))
        quick, width = quick_dtype(run.device, run.compute_dtype), run.config.get_text_config().hidden_size
        tokens, row_tokens = self.epochs * calibration_tokens(run), run.recipe.data.max_length
        base = expected_bytes(run.config, dtype=quick)
        kept = backward_bytes(model.config, row_tokens, quick) + factor_bytes(model.config, row_tokens, quick)
        descent = kept + head_loss_bytes(run.config, row_tokens, quick)
        beside = max(base, descent) + quick.itemsize * width * calibration_tokens(run)
        steps = self.epochs * -(-run.recipe.data.calibration_sequences // self.rows)
        return dataclasses.replace(
            model,
            trained_parameters=0,
            peak_bytes=expected_bytes(model.config, dtype=run.compute_dtype) + beside + runtime_bytes(run.device),
            tokens=tokens,
            notes=(f"factors of rows, columns and norms tuned against the base in up to {counted(steps, 'step')}, then multiplied into the weights",),
        )

    def no_blocks(self) -> str:
        """See `Step.no_blocks`."""
        return "it goes backward through the whole model; epochs: 0 leaves it out" if self.epochs else ""

    def apply(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """In place: the shapes stay. A descent that overflows changes nothing.

        Raises:
            RunError: it overflows.
        """
        from llmlite.calibration.blocks import batches_of
        from llmlite.calibration.kept import digest_of
        from llmlite.distillation.descent import Descent, Kept, descend
        from llmlite.models.quick import quick_copy, quick_dtype_of
        from llmlite.models.view import ModelView
        from llmlite.pruning.factors import Factors

        if not self.epochs:
            return model
        state = kept_in(run, "rescale")
        batches = batches_of(run.calibration_windows)
        dtype = quick_dtype_of(model)
        answers = base_answers(run, batches, dtype, state)
        how = Descent(self.learning_rate, self.rows, self.epochs, run.recipe.seed)
        copy = quick_copy(model, dtype)
        factors = Factors(ModelView(copy))
        made_of = digest_of("rescale", how, dtype, *batches, *answers.hidden, dict(copy.named_parameters()))
        descend(copy, factors.all, batches, answers, how, Kept(state, made_of), "factors")
        del copy
        if not all(bool(factor.isfinite().all()) for factor in factors.all.values()):
            raise RunError(f"prune.rescale: the descent ran out of the range of {dtype}. Lower learning_rate ({self.learning_rate:g}), or leave the step out.")
        factors.multiply_into(ModelView(model))
        run.note(factors=sum(factor.numel() for factor in factors.all.values()))
        return model


def base_answers(run: Run, batches: Sequence[Batch], dtype: torch.dtype, state: Path | None) -> DenseAnswers:
    """What enters the base's head on the calibration rows, in the type that the descent computes in, and that head. The base is let go again.

    Args:
        run: whose base.
        batches: calibration inputs.
        dtype: float32, bfloat16 or float16.
        state: a folder of this process where the hidden states are kept, batch by batch; `None` keeps nothing.
    """
    import torch

    from llmlite.distillation.descent import DenseAnswers, heard_once
    from llmlite.distillation.teacher import TeacherModel
    from llmlite.models.quick import quick_copy
    from llmlite.training.backbone import hidden_and_head

    source = TeacherModel(run, dtype=str(dtype).removeprefix("torch."))  # type: ignore[arg-type]  # one of its names
    base = source.load()
    hidden = heard_once(base, batches, dtype, state, source.identity())
    with torch.no_grad():
        found = hidden_and_head(base, {"input_ids": batches[0]["input_ids"][:1, :1].to(run.device)})
    head = quick_copy(found.head, dtype)
    del base
    gc.collect()
    return DenseAnswers(hidden, head, found.transform)
