"""What a calibration walk needs beside the model, from the config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["backward_bytes", "walk_bytes"]


def walk_bytes(config: Any, tokens: int) -> int:
    """Expected bytes: hidden states of all calibration tokens twice, sums of one block's inputs, and working copies of the widest of them, in float32.

    Args:
        config: of the model that is walked.
        tokens: calibration tokens; 0 where nothing is calibrated.
    """
    from llmlite.models.size import linear_shapes

    if not tokens:
        return 0
    widths = {in_features for _, in_features in linear_shapes(config).values()}
    return int(4 * (2 * tokens * config.get_text_config().hidden_size + 2 * sum(width**2 for width in widths) + 3 * max(widths) ** 2))


def backward_bytes(config: Any, row_tokens: int, dtype: torch.dtype, scale_block: int = 0) -> int:
    """Expected bytes beside the model of a backward pass through all of it: a copy in another type, and what one row keeps for its gradients.

    Args:
        config: of the model.
        row_tokens: tokens of a row.
        dtype: of the copy.
        scale_block: weights that share a scale which is trained (its factor, gradient and Adam's two moments); 0 trains nothing.
    """
    from llmlite.models.families import family_of
    from llmlite.models.size import expected_bytes, linear_shapes

    family, element = family_of(config), dtype.itemsize
    kept = row_tokens * element * family.layers(config) * (16 * family.width(config) + 12 * family.ffn_channels(config))
    scales = sum(outputs * inputs for outputs, inputs in linear_shapes(config).values()) // scale_block if scale_block else 0
    return expected_bytes(config, dtype=dtype) + kept + 4 * 5 * scales
