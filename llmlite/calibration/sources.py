"""Calibration windows of a run: token ids from files, from the documentation in the interpreter, from the model itself, or a mixture of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmlite.calibration.mixture import SELF, parse_mixture, shares
from llmlite.errors import DataError, counted

if TYPE_CHECKING:
    from llmlite.context import Run

__all__ = ["calibration_windows", "windows_of"]

log = logging.getLogger(__name__)


def calibration_windows(run: Run, mixture: str | None = None) -> Tensor:
    """The windows that `data.calibration` asks for, every token real, in an order drawn from the seed so that each stretch holds every source.

    Args:
        run: see `Run`.
        mixture: see `parse_mixture`; None for the run's own.

    Returns:
        Token ids, int64, (at most `calibration_sequences`, at most `max_length`).

    Raises:
        DataError: a source cannot be read, or holds no text.
    """
    from llmlite.data.tokens import leading_ids

    data, seed = run.recipe.data, run.recipe.seed
    parts = parse_mixture(mixture or run.calibration)
    found = []
    for (_, source), count in zip(parts, shares([share for share, _ in parts], data.calibration_sequences), strict=True):
        if not count:
            continue
        if source == SELF:
            found.append(_sampled(run, count))
        else:
            stream_T = _stream(run, source)
            found.append(windows_of(stream_T, count, data.max_length, seed, leading=leading_ids(run.tokenizer)))
            if len(found[-1]) < count:
                windows = f"{counted(len(found[-1]), 'window')} of {data.max_length} tokens"
                log.warning("calibration: %s has only %s; %s asked for", source, windows, counted(count, "was", "were"))
    width = min(part.shape[1] for part in found)
    windows_NT = torch.cat([part[:, :width] for part in found])
    return windows_NT[torch.randperm(len(windows_NT), generator=torch.Generator().manual_seed(seed))]


def windows_of(stream_T: Tensor, count: int, tokens: int, seed: int, *, leading: Sequence[int] = ()) -> Tensor:
    """`count` windows of a run of ids, drawn without overlap; all of them when there are fewer. A text shorter than one window is one short window.

    Args:
        stream_T: ids, int64.
        count: at most so many.
        tokens: width, `leading` included.
        seed: of the draw.
        leading: ids at the start of each window. Gemma and its like give other numbers altogether without their first token.
    """
    stride = max(1, min(tokens - len(leading), len(stream_T)))
    windows_NT = stream_T[: len(stream_T) // stride * stride].view(-1, stride)
    chosen = torch.randperm(len(windows_NT), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    head_NT = torch.tensor(leading, dtype=stream_T.dtype).expand(len(chosen), -1)
    return torch.cat([head_NT, windows_NT[chosen]], dim=1)


def _stream(run: Run, source: str) -> Tensor:
    from llmlite.data.text import read_rows
    from llmlite.data.tokens import token_stream

    columns: Mapping[str, Any] = run.columns()
    # what is also trained on lends only the share that is kept apart for calibration
    rows = read_rows(source, "calibration" if source == run.recipe.data.train else None, **columns)
    stream_T = torch.from_numpy(token_stream(rows, run.tokenizer, progress=run.is_main)).long()
    if len(stream_T) < 2:
        raise DataError(f"calibration: {source} holds no text.")
    return stream_T


def _sampled(run: Run, count: int) -> Tensor:
    from accelerate import PartialState

    from llmlite.calibration.sample import sampled_windows
    from llmlite.models.find import find
    from llmlite.models.load import load_model

    source, width = find(run.recipe.model, weights=True), run.recipe.data.max_length
    with PartialState().main_process_first():
        windows_NT = sampled_windows(
            source, lambda: load_model(source, run.recipe.model, run.device), count, width, seed=run.recipe.seed, dtype=run.compute_dtype
        )
    if run.vocabulary is None:
        return windows_NT
    stream_T = torch.from_numpy(run.vocabulary.expand(windows_NT.flatten().tolist()))
    return windows_of(stream_T, count, width, run.recipe.seed)
