"""What a calibration walk needs beside the model, from the config alone."""

from __future__ import annotations

from typing import Any

__all__ = ["walk_bytes"]


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
