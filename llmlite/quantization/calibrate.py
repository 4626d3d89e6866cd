"""Calibrated 4-bit weights of a whole model, block by block.

Each projection's codes and scales are chosen by its own second-order error (`llmlite.quantization.second_order`) on the inputs that calibration text gives it.
The weights of a whole dense model are overwritten with those that their codes stand for; codes and scales are kept in a folder, from which `write_calibrated`
puts them into a stock bitsandbytes model. What was stopped continues, in each of its parts.

Tokens count by how much an error at them would change what the model says (`llmlite.calibration.sensitivity`), and at the end the scales are tuned end to end
with the codes fixed (`llmlite.quantization.tune`).

Source: Frantar et al. 2022, arXiv:2210.17323; Kim et al. 2025, arXiv:2505.07004 (tokens weighted by the loss's gradient).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmlite.calibration.blocks import Statistics
from llmlite.calibration.sensitivity import quick_sensitivity
from llmlite.calibration.walk import Walk, walk_blocks
from llmlite.distillation.descent import Descent, heard_once
from llmlite.models.blockwise import is_blockwise, shelf_of
from llmlite.models.device_map import is_offloaded
from llmlite.models.quick import quick_dtype_of
from llmlite.models.view import BlockView, LinearView, ModelView
from llmlite.processes import rank_and_processes
from llmlite.quantization.nf4 import Codes, Grid, grid_of
from llmlite.quantization.second_order import calibrated_codes
from llmlite.quantization.stock_format import write_codes
from llmlite.quantization.tune import tune_scales
from llmlite.storage import damage, file_sums, flush, set_aside, writing_folder

if TYPE_CHECKING:
    from llmlite.calibration.blocks import Batch
    from llmlite.context import Run

__all__ = ["CalibratedScheme", "calibrate", "quantization_windows", "write_calibrated"]

log = logging.getLogger(__name__)

_TUNED = "tuned"


@dataclass(frozen=True)
class CalibratedScheme:
    """How codes are chosen.

    Attributes:
        scheme, double_quant: the stock format to fill.
        damping: share of the mean diagonal added to each Hessian.
        sweeps: passes of coordinate descent after GPTQ.
        token_weights: "sensitivity": tokens count by their sensitivity; "equal": all alike, one backward pass cheaper.
        tune: how the scales are tuned at the end, or None.
        seed: of the labels that the sensitivity is taken for.
        skip: names of layers that stay as they are.
    """

    scheme: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = False
    damping: float = 1e-3
    sweeps: int = 2
    token_weights: Literal["sensitivity", "equal"] = "sensitivity"
    tune: Descent | None = field(default_factory=Descent)
    seed: int = 0
    skip: tuple[str, ...] = ()


def quantization_windows(run: Run) -> Tensor:
    """Calibration windows: what `data.calibration` names, else the calibration share of the training text. Sampling text from the model, which pruning wants,
    would take longer than all the rest and gains little here."""
    from llmlite.calibration.sources import calibration_windows

    data = run.recipe.data
    return run.calibration_windows if data.calibration or "calibration_windows" in run.__dict__ else calibration_windows(run, data.train)


@torch.no_grad()
def calibrate(model: nn.Module, batches: Sequence[Batch], how: CalibratedScheme, codes: Path, state: Path | None = None) -> dict[str, float]:
    """Choose codes and scales for every projection.

    Args:
        model: the dense model, in eval mode. Afterwards the weights of a whole model are the quantized ones.
        batches: calibration inputs.
        how: see `CalibratedScheme`.
        codes: folder for codes and scales, one file for each layer; those with tuned scales in its folder `tuned`.
        state: folder of this process from which a calibration that was stopped continues, in whichever of its parts: the sensitivities and the dense model's
            hidden states batch by batch, the walk block by block, the descent on scales by its own state; it ends in the codes of one that was not stopped.
            The model given has to be the same dense one again.

    Raises:
        ValueError: a model that is loaded block by block or offloaded, and a scheme that needs a backward pass.

    Returns:
        For each layer's name its relative output error before tuning: E |(W - Q) x|^2 / E |W x|^2 over the calibration tokens, as they count.
    """
    in_parts = is_blockwise(model) or is_offloaded(model)
    if in_parts and (how.tune is not None or how.token_weights == "sensitivity"):
        raise ValueError("sensitivities and tuned scales need a backward pass through the whole model; this one is loaded block by block, or offloaded")
    grid = grid_of(how.scheme)
    codes.mkdir(parents=True, exist_ok=True)
    hidden = heard_once(model, batches, quick_dtype_of(model), state) if how.tune is not None and not _is_tuned(codes) else []

    def weigh(places: Sequence[int]) -> list[dict[str, Tensor]]:
        return quick_sensitivity(model, batches, places, how.seed, state)

    def change(block: BlockView, found: dict[str, Statistics]) -> dict[str, Any]:
        notes: dict[str, Any] = {}
        together: dict[int, tuple[Statistics, list[LinearView]]] = {}  # the layers that hear the same input
        for role, statistics in found.items():
            if block.linears[role].name not in how.skip:
                together.setdefault(id(statistics), (statistics, []))[1].append(block.linears[role])
        for statistics, layers in together.values():
            moments = statistics.all
            dense = [linear.weight_OI.float() for linear in layers]
            here = grid.to(moments.gram_II.device)
            chosen = calibrated_codes(dense, moments.hessian_II, here, double_quant=how.double_quant, damping=how.damping, sweeps=how.sweeps)
            for linear, weight_OI, one in zip(layers, dense, chosen, strict=True):
                quantized_OI = one.dequantized(here)
                error = moments.relative_output_error(weight_OI - quantized_OI, weight_OI)
                linear.weight_OI.copy_(quantized_OI)
                notes[linear.name] = {"error": error, "sha256": _keep(codes / f"{linear.name}.safetensors", one)}
        return notes

    if state is not None and (rank_and_processes()[0] == 0 or not is_blockwise(model)):  # whose state is common to all processes
        _set_aside_blocks(state, codes)
    roles = tuple(ModelView(model).family.linears)
    notes = walk_blocks(
        model,
        batches,
        Walk(stages=(roles,), inputs="dense", keeps=not in_parts),  # of a model that is not in memory the codes are all that is needed
        change,
        state,
        weigh if how.token_weights == "sensitivity" else None,
    )
    if how.tune is not None:
        if hidden:
            _tune(model, batches, hidden, how.tune, grid, codes, state)
        for linear in ModelView(model).linears():
            if (file := codes / _TUNED / f"{linear.name}.safetensors").is_file():
                linear.weight_OI.copy_(_read(file).dequantized(grid))
    return {name: float(layer["error"]) for block in notes for name, layer in block.items()}


def _set_aside_blocks(state: Path, codes: Path) -> None:
    """Let the walk do a block again whose codes are not those that it chose."""
    sums = file_sums(codes)
    for folder in sorted(state.glob("block-*")):
        if folder.suffix or damage(folder) is not None:
            continue  # set aside before, or the walk says it
        for name, layer in json.loads((folder / "notes.json").read_text(encoding="utf-8")).items():
            if sums.get(f"{name}.safetensors") != layer["sha256"]:
                log.warning("the codes of %s are damaged; %s is set aside as %s and done again", name, folder.name, set_aside(folder).name)
                break


def _is_tuned(codes: Path) -> bool:
    reason = damage(codes / _TUNED)
    if reason and (codes / _TUNED).exists():
        log.warning("the tuned scales are damaged (%s); set aside as %s and tuned again", reason, set_aside(codes / _TUNED).name)
    return reason is None


def _tune(model: nn.Module, batches: Sequence[Batch], hidden: Sequence[Tensor], how: Descent, grid: Grid, codes: Path, state: Path | None) -> None:
    """Tuned codes in their own folder, whole or not at all."""
    chosen = {file.name.removesuffix(".safetensors"): _read(file) for file in sorted(codes.glob("*.safetensors"))}
    with writing_folder(codes / _TUNED) as temporary:
        for name, one in tune_scales(model, chosen, grid, batches, hidden, how, state).items():
            _keep(temporary / f"{name}.safetensors", one)


@torch.no_grad()
def write_calibrated(model: nn.Module, codes: Path, scheme: Literal["nf4", "fp4"]) -> int:
    """Put the kept codes into a model that bitsandbytes has quantized. Returns the number of layers written.

    Args:
        model: quantized with the same scheme and the same kind of scales, and safe (`make_safe`).
        codes: the folder that `calibrate` filled.
        scheme: the model's.
    """
    grid = grid_of(scheme)
    tuned = codes / _TUNED
    place = tuned if tuned.is_dir() else codes

    def put(block: BlockView) -> int:
        files = {linear: place / f"{linear.name}.safetensors" for linear in block.linears.values()}
        there = {linear: file for linear, file in files.items() if file.is_file()}
        for linear, file in there.items():
            write_codes(linear.base, _read(file), grid)
        return len(there)

    shelf = shelf_of(model)
    if shelf is not None:  # each block when it is brought in
        shelf.arrived = put
        return len(list(place.glob("*.safetensors")))
    return sum(put(block) for block in ModelView(model).blocks)


def _keep(file: Path, codes: Codes) -> str:
    """Write one layer's codes, whole or not at all. Returns the SHA-256 of the file."""
    temporary = file.with_suffix(f".{os.getpid()}.part")  # every process of a launch writes the same codes
    save_file({name: tensor.contiguous().cpu() for name, tensor in codes.tensors().items()}, temporary)
    flush(temporary)
    temporary.replace(file)
    return file_sums(file.parent, file.name)[file.name]


def _read(file: Path) -> Codes:
    return Codes.of(load_file(file))
