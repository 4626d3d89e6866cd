"""Perplexity of a long text by a sliding window: every token is predicted once, from at least half a window of what stands before it.

    window w, stride s: tokens [i - (w - s), i + s) are read, the last s of them counted

Source: the evaluation of Radford et al. 2019 (GPT-2) as transformers' documentation describes it for models of fixed length.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmlite.errors import DataError, counted
from llmlite.paths import require_path
from llmlite.training.token_loss import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["sliding_batches", "text_ids"]


def sliding_batches(ids_T: Tensor, window: int, stride: int) -> list[dict[str, Tensor]]:
    """Model inputs with labels, one window each, in which every token but the first counts exactly once.

    Args:
        ids_T: the text's tokens, int64, (T,).
        window: tokens read at a time.
        stride: new tokens in each window, fewer than `window`, so that each has one before it.

    Raises:
        ValueError: a stride outside [1, window).
    """
    if not 1 <= stride < window:
        raise ValueError(f"stride={stride} should be at least 1 and below the window of {window} tokens")
    batches, counted = [], 0
    for start in range(0, max(len(ids_T) - 1, 0), stride):
        ids = ids_T[start : start + window]
        labels = ids.clone()
        labels[: max(counted - start, 0)] = IGNORE_INDEX
        batches.append({"input_ids": ids[None], "labels": labels[None]})
        counted = start + len(ids)
        if counted == len(ids_T):
            break
    return batches


def text_ids(path: Path | str, tokenizer: PreTrainedTokenizerBase, most: int | None = None) -> Tensor:
    """Tokens of a plain text file, int64, (T,), at most `most`.

    Raises:
        DataError: no such file, no UTF-8, or fewer than two tokens.
    """
    try:
        text = require_path(path, "evaluate", "text").read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"text: {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"text: {path} is not UTF-8 (byte {error.start}).") from None
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)[:most]
    if len(ids) < 2:
        raise DataError(f"text: {path} has {counted(len(ids), 'token')}; at least two are needed to predict one from the other.")
    return ids
