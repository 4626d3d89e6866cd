"""What a calibration walk needs beside the model, from the config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["backward_bytes", "blockwise_bytes", "factor_bytes", "head_loss_bytes", "spilled_bytes", "walk_bytes"]


def walk_bytes(config: Any, tokens: int) -> int:
    """Expected bytes: hidden states of all calibration tokens twice and as much that the attention gave, sums of one block's inputs, and working copies of
    the widest of them, in float32.

    Args:
        config: of the model that is walked.
        tokens: calibration tokens; 0 where nothing is calibrated.
    """
    from llmlite.models.size import linear_shapes

    if not tokens:
        return 0
    widths = {in_features for _, in_features in linear_shapes(config).values()}
    return int(4 * (3 * tokens * config.get_text_config().hidden_size + 2 * sum(width**2 for width in widths) + 3 * max(widths) ** 2))


def blockwise_bytes(config: Any, dtype: torch.dtype, tokens: int, measured_tokens: int) -> int:
    """Expected bytes of a model in blocks and of what is done with it: what lies outside the blocks, the base's head once more (to
    compare with), one block twice (as it is and as it will be), and the walk or the hidden states of the held-out tokens, as far as they are not in files.

    Args:
        config: of the model.
        dtype: of its weights.
        tokens: calibration tokens.
        measured_tokens: tokens that are measured on, at most.
    """
    from llmlite.calibration.blocks import SPILL_BYTES
    from llmlite.models.families import family_of
    from llmlite.models.size import size_of_config

    size, text = size_of_config(config), config.get_text_config()
    layers = family_of(config).layers(config) or 1
    weights = dtype.itemsize * (size.parameters - size.decoder + text.vocab_size * text.hidden_size + 2 * -(-size.decoder // layers))
    hidden = min(SPILL_BYTES, _hidden_bytes(config, dtype, tokens, measured_tokens))
    sums = walk_bytes(config, tokens) - 4 * 3 * tokens * text.hidden_size
    return int(weights + 3 * hidden + sums)


def spilled_bytes(config: Any, dtype: torch.dtype, tokens: int, measured_tokens: int) -> int:
    """Expected bytes on disk of hidden states that memory has no room for: before and behind a block, and as much that the attention gave. Arguments as of
    `blockwise_bytes`."""
    from llmlite.calibration.blocks import SPILL_BYTES

    return int(3 * max(0, _hidden_bytes(config, dtype, tokens, measured_tokens) - SPILL_BYTES))


def _hidden_bytes(config: Any, dtype: torch.dtype, tokens: int, measured_tokens: int) -> int:
    return int(dtype.itemsize * config.get_text_config().hidden_size * max(tokens, measured_tokens))


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


def factor_bytes(config: Any, row_tokens: int, dtype: torch.dtype) -> int:
    """Expected bytes of what one row keeps for the gradients of factors at the outputs of its projections, beside `backward_bytes`: those outputs.

    Args:
        config: of the model.
        row_tokens: tokens of a row.
        dtype: of the outputs.
    """
    from llmlite.models.size import linear_shapes

    return row_tokens * dtype.itemsize * sum(outputs for outputs, _ in linear_shapes(config).values())


def head_loss_bytes(config: Any, row_tokens: int, dtype: torch.dtype, *, own_head: bool = True) -> int:
    """Expected bytes of a loss against another model's distribution, which comes on top while what one row keeps is there: the other model's head, and the
    logits of a chunk in float32, twice (`llmlite.training.chunked`).

    Args:
        config: of the model.
        row_tokens: tokens of a row.
        dtype: of the head.
        own_head: the other model has a head of its own.
    """
    from llmlite.training.chunked import CHUNK_ELEMENTS

    text = config.get_text_config()
    return int(own_head * dtype.itemsize * text.vocab_size * text.hidden_size + 2 * 4 * min(CHUNK_ELEMENTS, text.vocab_size * row_tokens))
