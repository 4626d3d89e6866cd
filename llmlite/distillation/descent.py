"""A short descent of a few numbers towards what the dense model says on calibration rows: the end of a calibration, not a training run.

    min over factors   KL(dense || model),    Adam, one pass over some rows that are at hand

A few dozen steps, the same on every process, so it needs nothing of what the Trainer brings. What the numbers are is the caller's: scales of 4-bit codes
(`llmlite.quantization.tune`), factors of rows, columns and norms (`llmlite.pruning.rescale`).

Legend: B rows of a batch, T positions, N = B * T tokens, D hidden size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from llmlite.calibration.blocks import last_hidden
from llmlite.calibration.kept import digest_of, made_once
from llmlite.distillation.descent_state import DescentState
from llmlite.distillation.objective import Distillation, HiddenTeacher
from llmlite.errors import counted
from llmlite.models.quick import quick_dtype_of
from llmlite.training.backbone import hidden_and_head
from llmlite.training.chunked import chunked_head_loss
from llmlite.training.token_loss import LogitTransform

if TYPE_CHECKING:
    from llmlite.calibration.blocks import Batch

__all__ = ["DenseAnswers", "Descent", "Kept", "descend", "heard_once"]

log = logging.getLogger(__name__)

_LOG_EVERY = 16


@dataclass(frozen=True)
class Descent:
    """How a descent goes.

    Attributes:
        learning_rate: largest relative change of a factor in one step of Adam; it warms up over 4 steps and falls to 0 as a cosine.
        rows: calibration rows of one step.
        epochs: passes over the calibration rows.
        seed: of the order of the rows.
    """

    learning_rate: float = 1e-3
    rows: int = 1
    epochs: int = 1
    seed: int = 0


class DenseAnswers(NamedTuple):
    """What the dense model says on the calibration rows.

    Attributes:
        hidden: for each batch what enters its head, (B, T, D).
        head: its head; `None`: the model in descent has the same one.
        transform: from raw logits to logits, with a head.
    """

    hidden: Sequence[Tensor]
    head: nn.Module | None = None
    transform: LogitTransform | None = None


class Kept(NamedTuple):
    """Where a descent keeps how it stands (`llmlite.distillation.descent_state`), or `None`; what that belongs to (`llmlite.calibration.kept.digest_of`)."""

    folder: Path | None = None
    made_of: str = ""


def descend(model: Any, factors: Mapping[str, Tensor], batches: Sequence[Batch], answers: DenseAnswers, how: Descent, kept: Kept, what: str = "scales") -> None:
    """Change factors in place so that the model comes nearer to the dense one. One that was stopped goes on there, and ends in the same bits.

    Args:
        model: computes with the factors, and has no other parameter that requires a gradient.
        factors: float32, requiring gradients, by name.
        batches: calibration inputs; with an `attention_mask` its zeros are padding and do not count.
        answers: see `DenseAnswers`.
        how: see `Descent`.
        kept: see `Kept`. A state that is damaged, or of other rows or settings, is not used.
        what: the factors' name in messages.

    Raises:
        OutputError, ResourceError: the state cannot be written, or the disk is full.
    """
    rows = [(batch, place) for batch in range(len(batches)) for place in range(len(answers.hidden[batch]))]
    schedule = _schedule(len(rows), how)
    optimizer = torch.optim.Adam(factors.values(), lr=how.learning_rate, betas=(0.9, 0.95))
    stands = DescentState(kept.folder, kept.made_of, factors, optimizer)
    begun, recent = stands.restore()
    log.info("%s: %s", what, f"continuing behind step {begun} of {len(schedule)}" if begun else f"tuned in {counted(len(schedule), 'step')}")
    for done, chosen in enumerate(schedule[begun:], start=begun):
        for group in optimizer.param_groups:
            group["lr"] = how.learning_rate * min(1.0, (done + 1) / 4) * 0.5 * (1 + math.cos(math.pi * done / len(schedule)))
        for batch, place in (rows[each] for each in chosen):
            inputs = {name: tensor[place : place + 1] for name, tensor in batches[batch].items()}
            recent.append(_descend(model, inputs, answers.hidden[batch][place], answers, how.rows))
        optimizer.step()
        optimizer.zero_grad()
        if (done + 1) % _LOG_EVERY == 0 or done + 1 == len(schedule):
            log.info("%s: step %d of %d, %.4f nats a token from the dense model", what, done + 1, len(schedule), sum(recent) / len(recent))
            recent = []
        stands.keep(done + 1, recent)


def heard_once(model: Any, batches: Sequence[Batch], dtype: torch.dtype, state: Path | None, identity: object = None) -> list[Tensor]:
    """What enters a model's head for each batch, (B, T, D), in `dtype`, on the CPU.

    Args:
        model: the dense one.
        batches: calibration inputs.
        dtype: what the descent computes in.
        state: a folder of this process where it is kept batch by batch; `None` keeps nothing.
        identity: plain values that change with the model, where a state could be another model's.
    """

    def hear(batch: Batch) -> dict[str, Tensor]:
        return {"hidden": next(last_hidden(model, [batch])).to("cpu", dtype)}

    folders = [None if state is None else state / f"hidden-{place:03d}" for place in range(len(batches))]
    of_model = () if identity is None else (identity,)
    return [
        made_once(folder, digest_of("hidden", batch, dtype, *of_model), partial(hear, batch))["hidden"] for folder, batch in zip(folders, batches, strict=True)
    ]


def _schedule(rows: int, how: Descent) -> list[list[int]]:
    """The rows of each step: every epoch in an order of its own, all of which follow from the seed."""
    generator = torch.Generator().manual_seed(how.seed)
    orders = [torch.randperm(rows, generator=generator).tolist() for _ in range(how.epochs)]
    return [order[start : start + how.rows] for order in orders for start in range(0, rows, how.rows)]


def _descend(model: Any, inputs: dict[str, Tensor], hidden_TD: Tensor, answers: DenseAnswers, rows: int) -> float:
    """Add one row's gradient; its mean divergence."""
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    mask = inputs.get("attention_mask")
    keep_N = None if mask is None else mask.reshape(-1).bool()
    with torch.enable_grad():
        student = hidden_and_head(model, inputs)
        head, transform = (student.head, student.transform) if answers.head is None else (answers.head, answers.transform)
        distance = Distillation(HiddenTeacher(hidden_TD.to(device, quick_dtype_of(model)), head, transform=transform), kd_weight=1.0)
        flat_ND = student.hidden.reshape(-1, student.hidden.shape[-1])
        loss = chunked_head_loss(flat_ND, student.head, distance, keep_N=keep_N, transform=student.transform).loss
        (loss / rows).backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())
