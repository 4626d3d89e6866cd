"""Calibrated 4-bit weights of a whole model, block by block.

Each projection's codes and scales are chosen by its own second-order error (`llmlite.quantization.nf4`) on the inputs that calibration text gives it. The
weights of a whole dense model are overwritten with those that their codes stand for; codes and scales are kept in a folder, from which `write_calibrated` puts
them into a stock bitsandbytes model. A walk that was stopped continues behind its last complete block.

Tokens count by how much an error at them would change what the model says (`llmlite.calibration.sensitivity`), and at the end the scales are tuned end to end
with the codes fixed (`llmlite.quantization.tune`).

Source: Frantar et al. 2022, arXiv:2210.17323; Kim et al. 2025, arXiv:2505.07004 (tokens weighted by the loss's gradient).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmlite.calibration.blocks import Statistics, last_hidden
from llmlite.calibration.sensitivity import quick_sensitivity
from llmlite.calibration.walk import Walk, walk_blocks
from llmlite.models.blockwise import is_blockwise, shelf_of
from llmlite.models.device_map import is_offloaded
from llmlite.models.view import BlockView, LinearView, ModelView
from llmlite.quantization.nf4 import DoubleScales, Grid, calibrated_codes, dequantize, grid_of, output_error
from llmlite.quantization.stock_format import write_codes
from llmlite.quantization.tune import Codes, TuneScales, tune_scales
from llmlite.storage import damage, writing_folder

if TYPE_CHECKING:
    from llmlite.calibration.blocks import Batch
    from llmlite.context import Run

__all__ = ["CalibratedScheme", "calibrate", "quantization_windows", "write_calibrated"]

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
    tune: TuneScales | None = field(default_factory=TuneScales)
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
        state: folder from which a stopped walk continues. Tuning that was stopped starts again.

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
    hidden = [one.cpu() for one in last_hidden(model, batches)] if how.tune is not None and damage(codes / _TUNED) is not None else []

    def weigh(places: Sequence[int]) -> list[dict[str, Tensor]]:
        return quick_sensitivity(model, batches, places, how.seed)

    def change(block: BlockView, found: dict[str, Statistics]) -> dict[str, Any]:
        errors: dict[str, float] = {}
        together: dict[int, tuple[Statistics, list[LinearView]]] = {}  # the layers that hear the same input
        for role, statistics in found.items():
            if block.linears[role].name not in how.skip:
                together.setdefault(id(statistics), (statistics, []))[1].append(block.linears[role])
        for statistics, layers in together.values():
            moments = statistics.all
            hessian_II = moments.gram_II / max(moments.tokens, 1)
            dense = [linear.weight_OI.float() for linear in layers]
            here = grid.to(hessian_II.device)
            chosen = calibrated_codes(dense, hessian_II, here, double_quant=how.double_quant, damping=how.damping, sweeps=how.sweeps)
            for linear, weight_OI, (index_OI, scales_OB, double) in zip(layers, dense, chosen, strict=True):
                quantized_OI = dequantize(index_OI, scales_OB, here)
                whole = output_error(weight_OI, hessian_II).sum().clamp_min(1e-30)
                errors[linear.name] = float(output_error(weight_OI - quantized_OI, hessian_II).sum() / whole)
                linear.weight_OI.copy_(quantized_OI)
                _keep(codes / f"{linear.name}.safetensors", Codes(index_OI, scales_OB, double))
        return errors

    families = ModelView(model).family.linears
    notes = walk_blocks(
        model,
        batches,
        Walk(stages=(tuple(families),), inputs="dense", keeps=not in_parts),  # of a model that is not in memory the codes are all that is needed
        change,
        state,
        weigh if how.token_weights == "sensitivity" else None,
    )
    if how.tune is not None:
        if hidden:
            _tune(model, batches, hidden, how.tune, grid, codes)
        for linear in ModelView(model).linears():
            if (file := codes / _TUNED / f"{linear.name}.safetensors").is_file():
                one = _read(file)
                linear.weight_OI.copy_(dequantize(one.index_OI, one.scales_OB, grid))
    return {name: float(error) for block in notes for name, error in block.items()}


def _tune(model: nn.Module, batches: Sequence[Batch], hidden: Sequence[Tensor], how: TuneScales, grid: Grid, codes: Path) -> None:
    """Tuned codes in their own folder, whole or not at all."""
    chosen = {file.name.removesuffix(".safetensors"): _read(file) for file in sorted(codes.glob("*.safetensors"))}
    with writing_folder(codes / _TUNED) as temporary:
        for name, one in tune_scales(model, chosen, grid, batches, hidden, how).items():
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
            one = _read(file)
            write_codes(linear.base, one.index_OI, one.scales_OB, grid, one.double)
        return len(there)

    shelf = shelf_of(model)
    if shelf is not None:  # each block when it is brought in
        shelf.arrived = put
        return len(list(place.glob("*.safetensors")))
    return sum(put(block) for block in ModelView(model).blocks)


def _keep(file: Path, codes: Codes) -> None:
    tensors = {"index": codes.index_OI, "scales": codes.scales_OB}
    if codes.double is not None:
        tensors |= {"offset": codes.double.offset.reshape(1), "absmax": codes.double.absmax_G, "code": codes.double.code_256}
    temporary = file.with_suffix(f".{os.getpid()}.part")  # every process of a launch writes the same codes
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary)
    temporary.replace(file)


def _read(file: Path) -> Codes:
    stored = load_file(file)
    double = DoubleScales(stored["offset"][0], stored["absmax"], stored["code"]) if "absmax" in stored else None
    return Codes(stored["index"], stored["scales"], double)
