"""Start LoRA factors where they repair what quantization broke: the low-rank matrix that best corrects each layer's output, without training.

    min_{A, B} E |(W - Q) x - s B A x|^2 = min |(E - s B A) L|_F^2,    E = W - Q,  H = E[x x^T] = L L^T,  s = lora_alpha / r

solved by the truncated SVD of E L = U S V^T (Eckart and Young): s B A = U_r S_r V_r^T inverse(L). Unweighted (L = I) it would be LQER's plain form;
the weighting is what lets a rank of 16 matter. Step 0 of a finetune is then already close to the dense model, and the adapter alone, never trained, is a
correction to keep beside the 4-bit file. H counts tokens by their sensitivity (`llmlite.calibration.sensitivity`).

Source: Liu et al. 2024, arXiv:2410.21271 (EoRA); Zhang et al. 2024, arXiv:2410.06040 (QERA, theorem 1); Zhang et al. 2024, arXiv:2402.02446 (LQER).

Legend: O out_features, I in_features, R rank.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmlite.calibration.blocks import Statistics
from llmlite.calibration.sensitivity import quick_sensitivity
from llmlite.calibration.walk import Walk, walk_blocks
from llmlite.models.view import BlockView, ModelView

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmlite.calibration.blocks import Batch
    from llmlite.context import Run

__all__ = ["initialise", "initialise_for_run", "low_rank_correction"]

log = logging.getLogger(__name__)


def low_rank_correction(error_OI: Tensor, hessian_II: Tensor, rank: int, damping: float = 1e-4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Factors of the rank-R matrix that comes closest to `error_OI` on inputs with this Hessian.

    Args:
        error_OI: W - Q, (O, I).
        hessian_II: mean of x x^T over calibration tokens, (I, I). Any positive factor of it gives the same answer.
        rank: R, at most min(O, I).
        damping: share of the mean diagonal added to H's diagonal.
        seed: of the randomised SVD (Halko et al. 2011, arXiv:0909.4061, with power iterations).

    Returns:
        A (R, I) and B (O, R), float32, with B A the correction and the singular values shared out evenly.
    """
    hessian_II = hessian_II.double()
    mean = hessian_II.diagonal().mean().clamp_min(1e-30)
    damped_II = hessian_II + damping * mean * torch.eye(len(hessian_II), dtype=torch.float64, device=hessian_II.device)
    lower_II = torch.linalg.cholesky(damped_II).float()
    weighted_OI = error_OI.float() @ lower_II
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left_OR, sizes_R, right_IR = torch.svd_lowrank(weighted_OI, q=min(2 * rank + 8, *weighted_OI.shape), niter=4)
    root_R = sizes_R[:rank].sqrt()
    # A = root V^T inverse(L): solve A L = root V^T
    a_RI = torch.linalg.solve_triangular(lower_II, right_IR[:, :rank].t() * root_R[:, None], upper=False, left=False)
    return a_RI.contiguous(), (left_OR[:, :rank] * root_R).contiguous()


@torch.no_grad()
def initialise(adapted: nn.Module, dense: nn.Module, batches: Sequence[Batch], adapter: str = "default") -> dict[str, float]:
    """Fill the LoRA factors of a peft model on a quantized base.

    Args:
        adapted: the peft model; only layers that carry the adapter are touched.
        dense: the same model before quantization, in eval mode. Not changed.
        batches: calibration inputs.
        adapter: name of the adapter.

    Returns:
        For each layer the share of its output error that is left: E |(E - s B A) x|^2 / E |E x|^2, over the calibration tokens as they count.
    """
    from llmlite.models.dequantize import dequantized

    layers = {linear.name: linear for linear in ModelView(adapted).linears() if adapter in getattr(linear.module, "lora_A", {})}

    def correct(block: BlockView, found: dict[str, Statistics]) -> dict[str, Any]:
        left: dict[str, float] = {}
        for role, statistics in found.items():
            name = block.linears[role].name
            if name not in layers:
                continue
            layer: Any = layers[name].module
            a_RI, b_OR = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            moments, weight_OI = statistics.all, block.linears[role].weight_OI.float()
            error_OI = weight_OI - dequantized(layers[name].base).to(weight_OI)
            new_RI, new_OR = low_rank_correction(error_OI, moments.hessian_II, len(a_RI))
            scale = layer.scaling[adapter] ** 0.5
            a_RI.copy_(new_RI / scale)
            b_OR.copy_(new_OR / scale)
            left[name] = moments.relative_output_error(error_OI - new_OR @ new_RI, error_OI)
        return left

    walk = Walk(stages=(tuple(ModelView(dense).family.linears),), inputs="dense")
    notes = walk_blocks(dense, batches, walk, correct, weigh=lambda places: quick_sensitivity(dense, batches, places))
    return {name: float(share) for block in notes for name, share in block.items()}


def initialise_for_run(adapted: nn.Module, run: Run, quantize: int, rows: int) -> None:
    """`initialise` with calibration text of a run and the dense model as it was before one of its steps.

    Args:
        adapted: see `initialise`.
        run: see `Run`.
        quantize: place of the step that quantized the base.
        rows: calibration rows that are read, at most.
    """
    from llmlite.calibration.blocks import batches_of
    from llmlite.memory import give_back
    from llmlite.quantization.calibrate import quantization_windows

    dense = _dense_before(quantize, run)
    left = initialise(adapted, dense, batches_of(quantization_windows(run)[:rows]))
    del dense
    give_back()
    share = sum(left.values()) / max(len(left), 1)
    log.info("the adapter starts as a correction of the quantization: %.0f %% of the layers' output error is left", 100 * share)
    run.note(quantization_error_left=share)


def _dense_before(index: int, run: Run) -> PreTrainedModel:
    """What the step at this place got: the run's base, or what the step before it left on disk."""
    from llmlite.models.load import load_model
    from llmlite.step import step_name

    if index == 0:
        return run.load_base()
    name = step_name(run.recipe.steps[index - 1]).rpartition(":")[2]
    return load_model(run.scratch.parent / f"{index:02d}-{name}", run.recipe.model, run.device)
