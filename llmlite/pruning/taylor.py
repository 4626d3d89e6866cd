"""What the loss would lose, to first order, with each weight of a unit: sums of |W * dL/dW| over all weights that go when the unit goes.

Which weights these are is what `llmlite.models.slicing` takes: rows of the projections before (gate and up; q, k and v), and the unit's columns of the
projection behind (down; o). Biases are left out.

Shapes: O outputs, I inputs of a projection, U units, M rows or columns of one unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmlite.calibration.kept import digest_of, made_once
from llmlite.models.quick import quick_dtype_of, quickened
from llmlite.models.slicing import head_rows
from llmlite.models.view import BlockView, LinearView, ModelView
from llmlite.pruning.scores import element_taylor_score

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["taylor_scores"]

_Part = tuple[LinearView, int, Tensor]  # a projection, whether its rows (0) or columns (1) belong to units, and which belong to each, (U, M)


def taylor_scores(model: PreTrainedModel, windows_NT: Tensor, units: Mapping[str, int], state: Path | None = None) -> dict[tuple[str, int], Tensor]:
    """First-order scores of every unit: (kind, block) -> (U,), float32. One forward and one backward pass over a few windows, in the quickest type; gradients
    of the projections concerned only.

    Args:
        model: a plain model; its weights are read.
        windows_NT: token ids without padding. Their gradients are added up before anything is judged.
        units: kind of unit ("ffn", "kv_groups", "query_heads") -> how many there are in each block.
        state: a folder of this process where the scores are kept for a run that is stopped behind them; `None` keeps nothing.

    Source: Ma et al. 2023 (LLM-Pruner), arXiv:2305.11627, section 3.2: the first-order term, element-wise, summed over the group.
    """
    keys = {f"{kind} {block.index}": (kind, block.index) for kind in units for block in ModelView(model).blocks}
    made_of = digest_of("taylor by elements", windows_NT, sorted(units.items()), quick_dtype_of(model))
    device = next(model.parameters()).device
    found = made_once(None if state is None else state / "taylor", made_of, lambda: _measured(quickened(model), windows_NT, units), device)
    return {key: found[name] for name, key in keys.items()}


def _measured(model: PreTrainedModel, windows_NT: Tensor, units: Mapping[str, int]) -> dict[str, Tensor]:
    """The scores by a backward pass, under kind and block."""
    view = ModelView(model)
    parts = {f"{kind} {block.index}": _parts(view, block, kind, count) for kind, count in units.items() for block in view.blocks}
    wanted = {id(linear.base.weight) for of_unit in parts.values() for linear, _, _ in of_unit}
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(id(parameter) in wanted)
        with torch.enable_grad():
            for window_T in windows_NT.to(next(view.embedding.parameters()).device):
                model(input_ids=window_T[None], labels=window_T[None], use_cache=False).loss.backward()
        return {key: torch.stack([_score(*part) for part in of_unit]).sum(0) for key, of_unit in parts.items()}
    finally:
        for parameter, required in before.items():
            parameter.grad = None
            parameter.requires_grad_(required)


def _parts(view: ModelView, block: BlockView, kind: str, units: int) -> list[_Part]:
    """What goes with the units of a kind, projection by projection."""
    if kind == "ffn":
        channels = torch.arange(units)[:, None]
        rows = {"gate": channels, "up": channels, "gate_up": torch.cat([channels, channels + units], 1)}
        behind = block.linears["down"]
    else:
        with_their_own = kind == "kv_groups" or view.family.query_groups(view.config) == 1  # keys and values that nobody else reads
        rows = {role: head_rows(view, role, range(heads)).view(units, -1) for role, heads in _heads_that_go(view, with_their_own).items()}
        rows["qkv"] = torch.cat(list(rows.values()), 1)
        behind = block.linears["o"]
    parts: list[_Part] = [(block.linears[role], 0, index_UM) for role, index_UM in rows.items() if role in block.linears]
    return [*parts, (behind, 1, torch.arange(behind.in_features).view(units, -1))]


def _heads_that_go(view: ModelView, with_their_own: bool) -> dict[str, int]:
    return {"q": view.heads} | ({"k": view.kv_heads, "v": view.kv_heads} if with_their_own else {})


def _score(linear: LinearView, dim: int, index_UM: Tensor) -> Tensor:
    gradient = linear.base.weight.grad
    score_OI = element_taylor_score(linear.weight_OI, gradient.t() if linear.conv1d else gradient)
    return score_OI.sum(1 - dim)[index_UM.to(score_OI.device)].sum(1).cpu()
