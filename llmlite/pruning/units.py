"""Take units away from output projections: score them, choose, repair what stays, block by block; then slice.

A unit is a run of neighbouring inputs of `o` (a head, or a key/value head with the query heads that read it) or of `down` (one FFN channel). During the
walk the inputs that go are zeroed in place, which is the same function as the sliced model.

Shapes: O outputs, I inputs, U units, K inputs that stay.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from llmlite.calibration.blocks import Statistics, batches_of
from llmlite.calibration.moments import Moments
from llmlite.calibration.sensitivity import quick_silence
from llmlite.calibration.walk import Walk, walk_blocks
from llmlite.models.blockwise import rebuilt
from llmlite.models.slicing import take_ffn_channels, take_kv_groups, take_query_heads, with_zero_biases
from llmlite.models.view import BlockView, LinearView, ModelView
from llmlite.pruning import scores
from llmlite.pruning.reconstruct import choose_damping, least_squares, output_error
from llmlite.pruning.settings import WITH_GRADIENTS
from llmlite.pruning.taylor import taylor_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmlite.pruning.settings import UnitStep

__all__ = ["Cut", "cut_block", "cut_units", "fisher_scores", "gradients_for", "obs_choice", "strongest"]

log = logging.getLogger(__name__)

_OBS_DAMPING = 0.01
_TAYLOR_WINDOWS, _FISHER_WINDOWS = 16, 32  # calibration rows that are read backward at most


def role_of(kind: str) -> str:
    """The projection behind the units of a kind, whose inputs they are."""
    return "down" if kind == "ffn" else "o"


@dataclass(frozen=True)
class Cut:
    """What goes from one kind of projection, in every block.

    Attributes:
        kind: "ffn", "kv_groups" or "query_heads".
        units: units that there are.
        keep: units that stay.
        groups: runs of units that must keep the same number (query heads of one key/value head).
        score: how these units are judged, instead of the step's score.
    """

    kind: Literal["ffn", "kv_groups", "query_heads"]
    units: int
    keep: int
    groups: int = 1
    score: str | None = None

    @property
    def role(self) -> str:
        """The projection whose inputs go."""
        return role_of(self.kind)


def cut_units(
    model: PreTrainedModel, cuts: Sequence[Cut], windows_NT: Tensor | None, step: UnitStep, state: Path | None = None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Take units away, the kinds one after the other inside each block.

    Args:
        model: a stock model; its weights are used up.
        cuts: what goes. A cut that keeps everything does nothing.
        windows_NT: calibration token ids without padding; None where the step reads no text (`UnitStep.reads_text`).
        step: how to choose and repair. Where it listens to nothing (`UnitStep.listens`), there is no pass through the blocks, and no error is measured.
        state: folder of a walk that can be continued, or None.

    Returns:
        A fresh stock model, and figures for the report: the units that went in each layer, and dampings and relative output errors of a step that listens.
    """
    cuts = [cut for cut in cuts if cut.keep < cut.units]
    if not cuts:
        return model, {}
    if step.bias_compensation:
        roles = {cut.role for cut in cuts}
        model = rebuilt(model, partial(with_zero_biases, attention="o" in roles, ffn="down" in roles))
    gradients = {} if windows_NT is None else gradients_for(model, windows_NT, cuts, step, state)
    batches = batches_of(windows_NT) if step.listens and windows_NT is not None else []

    def change(block: BlockView, found: dict[str, Statistics]) -> Mapping[str, Any]:
        notes: dict[str, Any] = {}
        for cut in cuts:
            if cut.role in found or not step.listens:
                notes[cut.kind] = cut_block(block.linears[cut.role], cut, found.get(cut.role), step, gradients.get((cut.kind, block.index)))
        return notes

    walk = Walk(stages=[(cut.role,) for cut in cuts], inputs=step.inputs, target=step.target) if step.listens else Walk(stages=((),))
    remembered = walk_blocks(model, batches, walk, change, state)
    figures: dict[str, Any] = {}
    for cut in cuts:
        keep = [notes[cut.kind]["keep"] for notes in remembered]
        take = {"ffn": take_ffn_channels, "kv_groups": take_kv_groups, "query_heads": take_query_heads}[cut.kind]
        model = rebuilt(model, partial(take, keep=keep))
        figures[cut.kind] = {
            "units": cut.units,
            "removed": [sorted(set(range(cut.units)) - set(kept)) for kept in keep],
        }
        if step.listens:
            figures[cut.kind]["damping"] = [notes[cut.kind]["damping"] for notes in remembered]
            figures[cut.kind]["relative_output_error"] = [notes[cut.kind]["error"] for notes in remembered]
    return model, figures


def gradients_for(model: PreTrainedModel, windows_NT: Tensor, cuts: Sequence[Cut], step: UnitStep, state: Path | None = None) -> dict[tuple[str, int], Tensor]:
    """Scores of the units of those cuts that are judged by gradients: (kind, block) -> (U,).

    Args:
        model: dense.
        windows_NT: calibration token ids without padding.
        cuts: with their own scores.
        step: whose score judges the others.
        state: a folder of this process where what the backward passes gave is kept for a run that was stopped behind them; `None` keeps nothing.
    """
    found: dict[tuple[str, int], Tensor] = {}
    for score, scores_of, most in (("taylor", taylor_scores, _TAYLOR_WINDOWS), ("fisher", fisher_scores, _FISHER_WINDOWS)):
        units: dict[str, int] = {cut.kind: cut.units for cut in cuts if (cut.score or step.score) == score}
        if units:
            found |= scores_of(model, windows_NT[:most], units, state)
    return found


def cut_block(
    linear: LinearView, cut: Cut, found: Statistics | None, step: UnitStep, gradient_U: Tensor | None, damping: float | None = None
) -> dict[str, Any]:
    """Choose and repair in one projection; writes its weight and bias. Returns what to remember.

    Args:
        linear: the output projection.
        cut: what goes.
        found: sums over what it heard; None for a step that does not listen, which repairs nothing.
        step: how to choose and repair.
        gradient_U: scores that were measured with gradients, where the units are judged by them.
        damping: of the repair; None chooses it on the sums that were held out.
    """
    weight_OI, moments = linear.weight_OI, None if found is None else found.all
    kept = _choose(weight_OI.float(), cut, moments, cut.score or step.score, gradient_U)
    size = weight_OI.shape[1] // cut.units
    keep_K = (torch.tensor(kept, device=weight_OI.device)[:, None] * size + torch.arange(size, device=weight_OI.device)).flatten()
    new_OK = weight_OI[:, keep_K].float()
    remembered: dict[str, Any] = {"keep": kept}
    if found is not None and moments is not None:
        if not step.reconstruct:
            damping = None
        elif damping is None:
            damping = choose_damping(weight_OI, keep_K, found.fit, found.held)
        if damping is not None:
            new_OK = least_squares(weight_OI, keep_K, moments, damping)
        energy = float((weight_OI.double() @ moments.gram_II.double() * weight_OI.double()).sum())
        remembered |= {"damping": damping, "error": output_error(weight_OI, new_OK, keep_K, moments) / max(energy, 1e-30)}
        if step.bias_compensation and linear.bias is not None:
            lost_O = weight_OI.float() @ moments.mean_I.float() - new_OK @ moments.mean_I.float()[keep_K]
            linear.bias.data += lost_O.to(linear.bias.dtype)
    weight_OI.zero_()
    weight_OI[:, keep_K] = new_OK.to(weight_OI.dtype)
    return remembered


def _choose(weight_OI: Tensor, cut: Cut, moments: Moments | None, score: str, gradient_U: Tensor | None) -> list[int]:
    if score in WITH_GRADIENTS:
        assert gradient_U is not None
        return strongest(gradient_U, cut.keep, cut.groups)
    if score == "magnitude":
        score_I = scores.magnitude_score(weight_OI).sum(0)
    else:
        assert moments is not None
        if score == "obs":
            return obs_choice(weight_OI, scores.inverse_hessian(moments.gram_II, _OBS_DAMPING), cut)
        score_I = scores.wanda_unit_score(weight_OI, moments.norm_I) if score == "wanda" else scores.flap_score(weight_OI, moments.variance_I)
    return strongest(scores.unit_sum(score_I, cut.units), cut.keep, cut.groups)


def strongest(score_U: Tensor, keep: int, groups: int = 1) -> list[int]:
    """The units of the highest scores, ascending; the same number from each of `groups` equal runs."""
    size = len(score_U) // groups
    best = score_U.view(groups, size).topk(keep // groups, dim=1).indices + torch.arange(groups, device=score_U.device)[:, None] * size
    return sorted(int(unit) for unit in best.flatten())


def obs_choice(weight_OI: Tensor, inverse_II: Tensor, cut: Cut) -> list[int]:
    """Units that stay when the cheapest goes, the others make up for it, the next cheapest goes, and so on. See `llmlite.pruning.scores.obs_score`.

    Source: Kurtic et al. 2023 (ZipLM), arXiv:2302.04089, algorithm 1.
    """
    size, per_group = weight_OI.shape[1] // cut.units, cut.units // cut.groups
    weight_OI, inverse_II = weight_OI.float().clone(), inverse_II.float().clone()
    alive = torch.ones(cut.units, dtype=torch.bool, device=weight_OI.device)
    identity = torch.eye(size, device=weight_OI.device)
    while int(alive.sum()) > cut.keep:
        score_U = scores.obs_score(weight_OI, inverse_II, cut.units)
        full = alive.view(cut.groups, per_group).sum(1) <= cut.keep // cut.groups
        score_U = score_U.masked_fill(~alive | full.repeat_interleave(per_group), torch.inf)
        unit = int(score_U.argmin())
        rows = slice(unit * size, (unit + 1) * size)
        solved_SI = torch.linalg.solve(inverse_II[rows, rows], inverse_II[rows])
        weight_OI -= weight_OI[:, rows] @ solved_SI
        inverse_II -= inverse_II[:, rows] @ solved_SI
        inverse_II[rows, rows] += identity  # what is gone stays out of the way, and invertible
        alive[unit] = False
    return [int(unit) for unit in alive.nonzero()]


def fisher_scores(model: PreTrainedModel, windows_NT: Tensor, units: Mapping[str, int], state: Path | None = None) -> dict[tuple[str, int], Tensor]:
    """Second-order scores of every unit, see `cost_of_silence`: (kind, block) -> (U,). One forward and one backward pass, in the quickest type.

    The sums are kept in `state`, see `gradients_for`.
    """
    blocks = ModelView(model).blocks
    wanted = {(kind, block.index): (block.linears[role_of(kind)].name, count) for kind, count in units.items() for block in blocks}
    found = quick_silence(model, batches_of(windows_NT), wanted.values(), state=state)
    return {key: found[unit] for key, unit in wanted.items()}
