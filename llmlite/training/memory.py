"""What a training step will need at its peak, estimated from the config before any weight is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from llmlite.models.families import family_of
from llmlite.models.size import expected_bytes, runtime_bytes
from llmlite.step import QUANTIZED
from llmlite.training.chunked import CHUNK_ELEMENTS

if TYPE_CHECKING:
    from llmlite.context import Run
    from llmlite.step import ModelPlan
    from llmlite.training.settings import TrainingStep

__all__ = ["training_peak_bytes"]


def training_peak_bytes(model: ModelPlan, trained_parameters: int, step: TrainingStep, run: Run) -> int:
    """Expected peak bytes: weights, gradients and Adam's moments of what is trained, activations, the loss's chunk, the runtime itself.

    Args:
        model: what the step gets.
        trained_parameters: parameters with a gradient; 16 bytes each in float32 with Adam.
        step: batch size and checkpointing.
        run: length of a row, device.
    """
    family = family_of(model.config)
    width, layers = family.width(model.config), family.layers(model.config)
    ffn = family.ffn_channels(model.config)
    tokens = step.per_device_train_batch_size * run.recipe.data.max_length
    element = run.compute_dtype.itemsize
    checkpointing = step.recomputes(run.device)
    # kept for the backward pass of one block: inputs of its norms and projections, q, k, v, the attention's output, the FFN's wide tensors, and what
    # the adapters add to each; measured 27 thousand numbers a token at width 576 and FFN 1,536
    block = tokens * element * (16 * width + 12 * ffn)
    activations = tokens * element * width * layers + block if checkpointing else block * layers
    head = 2 * 4 * CHUNK_ELEMENTS
    scheme: Any = model.form if model.form in QUANTIZED else None
    weights = expected_bytes(model.config, dtype=run.compute_dtype, scheme=scheme, double_quant=True)
    if trained_parameters >= model.parameters and run.compute_dtype == torch.float32:
        weights = 0  # they are trained themselves; in another type autocast makes a copy of each, which its backward pass wants
    return weights + 16 * trained_parameters + activations + head + runtime_bytes(run.device)
