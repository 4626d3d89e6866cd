"""The step `prune.weights`: zeros in the projections of the decoder blocks, anywhere or N in every M neighbours.

The file keeps its size and stock code its speed: zeros alone are not faster. They pay in formats and kernels made for them (2:4 sparse tensor cores, sparse
compression of the file), and later training keeps them (`llmlite.training.keep_zeros`).

Sources: magnitude, arXiv:1506.02626; Wanda, arXiv:2306.11695; SparseGPT, arXiv:2301.00774; OWL, arXiv:2310.05175.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import Field

from llmlite.config import settings
from llmlite.errors import ConfigError
from llmlite.pruning.settings import ADVICE, planned, require_plain, walk_state
from llmlite.step import ModelPlan, Step

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

    from llmlite.calibration.blocks import Statistics
    from llmlite.context import Run
    from llmlite.models.view import BlockView

__all__ = ["PruneWeights"]

_OUTLIER_WINDOWS = 32
_STAGES = (("q", "k", "v", "qkv"), ("o",), ("gate", "up", "gate_up"), ("down",))


def _sparsity_of(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        pass
    import re

    found = re.fullmatch(r"(\d+):(\d+)", value.strip())
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise ValueError("be a share of zeros in [0, 1), or N:M with 0 < N < M, such as 2:4 (2 zeros in every 4 neighbours)")
    return value.strip()


Sparsity = Annotated[Annotated[float, Field(ge=0, lt=1)] | str, pydantic.BeforeValidator(_sparsity_of)]


@settings
class PruneWeights(Step):
    """Set weights of the decoder's projections to zero; later training keeps the zeros."""

    advice: ClassVar[str] = ADVICE

    sparsity: Sparsity = 0.5
    """Share of zeros in every projection, or N:M: N zeros in every M neighbouring inputs, such as 2:4."""
    method: Literal["sparsegpt", "wanda", "magnitude"] = "sparsegpt"
    """sparsegpt makes up for what goes and is best; wanda only chooses by calibration; magnitude needs no calibration and is worst."""
    damping: Annotated[float, Field(gt=0)] = 0.01
    """SparseGPT: added to the Hessian, as a multiple of the mean of its diagonal."""
    token_weights: Literal["equal", "sensitivity"] = "equal"
    """sparsegpt and wanda: equal counts all calibration tokens alike; sensitivity lets them count by how much an error there changes the prediction: a
    better model for a backward pass over the rows."""
    allocation: Literal["uniform", "owl"] = "uniform"
    """uniform: the same share of zeros in every layer. owl: layers with more outliers (weight times input) keep more; the share over all layers stays."""
    outlier_factor: Annotated[float, Field(gt=1)] = 5.0
    """owl: an outlier is so many times the mean of its layer."""
    allocation_reach: Annotated[float, Field(gt=0, lt=0.5)] = 0.08
    """owl: half the distance between the shares of the sparsest and the densest layer."""
    inputs: Literal["compressed", "dense"] = "compressed"
    """What each block hears during calibration: the blocks before it as already pruned, or the dense model (cheaper)."""

    def check(self, model: ModelPlan, run: Run) -> ModelPlan:
        """See `Step.check`.

        Raises:
            ConfigError: a pattern that does not divide the inputs of some projection.
        """
        from llmlite.models.size import linear_shapes

        require_plain(model, "prune.weights")
        shapes = linear_shapes(model.config)
        if self.pattern:
            uneven = [f"{name} ({width})" for name, (_, width) in shapes.items() if width % self.pattern[1]]
            if uneven:
                raise ConfigError(
                    "prune.weights",
                    [f"sparsity={self.sparsity!r}: inputs of {uneven[0]} are no multiple of {self.pattern[1]}. Choose another pattern, or a share of zeros."],
                )
        if self.allocation == "owl" and (self.pattern or not 2 * self.allocation_reach < float(self.sparsity) < 1 - 2 * self.allocation_reach):
            raise ConfigError(
                "prune.weights",
                [
                    f"allocation=owl with sparsity={self.sparsity!r}: owl moves zeros between layers, by up to {2 * self.allocation_reach:g}, which a pattern "
                    "N:M or a share too near to 0 or 1 leaves no room for. Use allocation: uniform, another sparsity, or a smaller allocation_reach."
                ],
            )
        weights = sum(outputs * inputs for outputs, inputs in shapes.values())
        share = self.pattern[0] / self.pattern[1] if self.pattern else float(self.sparsity)
        note = f"{share:.0%} zeros in {weights:,} weights; the file keeps its size, and zeros alone are not faster"
        calibrated = (self.method != "magnitude" or self.allocation == "owl") and share > 0
        return planned(model, model.config, run, calibrated=calibrated, notes=(note,), form="sparse" if share else None, backward=self._goes_backward)

    def no_blocks(self) -> str:
        """See `Step.no_blocks`."""
        return "token_weights: sensitivity goes backward through the whole model; with token_weights: equal it can be done" if self._goes_backward else ""

    @property
    def _goes_backward(self) -> bool:
        return self.token_weights == "sensitivity" and self.method != "magnitude"

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(N, M), or None for a share of zeros."""
        if not isinstance(self.sparsity, str):
            return None
        zeros, _, group = self.sparsity.partition(":")
        return int(zeros), int(group)

    def apply(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """In place: the shapes stay."""
        import torch

        from llmlite.calibration.blocks import batches_of
        from llmlite.calibration.sensitivity import quick_sensitivity
        from llmlite.calibration.walk import Walk, walk_blocks
        from llmlite.models.size import count_zeros
        from llmlite.models.view import ModelView

        if self.sparsity == 0:
            return model
        blocks = ModelView(model).blocks
        shares_L = self._shares(model, run, len(blocks))

        def change(block: BlockView, found: dict[str, Statistics]) -> Mapping[str, Any]:
            return self._change(block, found, shares_L[block.index])

        with torch.no_grad():
            if self.method == "magnitude":
                walk_blocks(model, [], Walk(stages=((),)), change, walk_state(run))  # nothing to hear, and resumed as the others are
            else:
                stages = _STAGES if self.inputs == "compressed" else (tuple(role for stage in _STAGES for role in stage),)
                walk = Walk(stages=stages, inputs=self.inputs, gram=self.method == "sparsegpt")
                batches = batches_of(run.calibration_windows)
                weigh = (lambda places: quick_sensitivity(model, batches, places, run.recipe.seed, walk_state(run))) if self._goes_backward else None
                walk_blocks(model, batches, walk, change, walk_state(run), weigh)
        zeros = count_zeros(model)
        run.note(zeros=zeros.zeros, weights=zeros.weights, sparsity=zeros.sparsity)
        return model

    def _shares(self, model: PreTrainedModel, run: Run, layers: int) -> list[float]:
        """The share of zeros of each layer; not used with a pattern."""
        if self.pattern or self.allocation == "uniform":
            return [0.0 if self.pattern else float(self.sparsity)] * layers
        import json

        from llmlite.pruning.owl import measure_outliers, owl_sparsities
        from llmlite.storage import write_json

        file = None if run.scratch == Path() else run.scratch / "outliers.json"
        outliers_L = run.agreed(json.loads(file.read_text(encoding="utf-8")) if file is not None and run.is_main and file.is_file() else None)
        if outliers_L is None:
            outliers_L = measure_outliers(model, run.calibration_windows[:_OUTLIER_WINDOWS], self.outlier_factor)
            if file is not None and run.is_main:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, outliers_L)
        shares_L = owl_sparsities(outliers_L, float(self.sparsity), self.allocation_reach)
        run.note(layer_sparsity=shares_L, outliers=outliers_L)
        return shares_L

    def _change(self, block: BlockView, found: dict[str, Statistics], share: float) -> Mapping[str, Any]:
        from llmlite.pruning.scores import wanda_score
        from llmlite.pruning.sparsegpt import sparsegpt

        if self.method == "magnitude":
            for linear in block.linears.values():
                linear.weight_OI.mul_(self._mask(linear.weight_OI.float().abs(), share))
        for role, statistics in found.items():
            weight_OI, moments = block.linears[role].weight_OI, statistics.all
            if self.method == "wanda":
                weight_OI.mul_(self._mask(wanda_score(weight_OI, moments.norm_I), share))
            else:
                chunk = 128 if not self.pattern else self.pattern[1] * max(1, 128 // self.pattern[1])
                weight_OI.copy_(
                    sparsegpt(weight_OI, moments.gram_II, sparsity=None if self.pattern else share, pattern=self.pattern, damping=self.damping, chunk=chunk)
                )
        return {}

    def _mask(self, score_OI: Tensor, share: float) -> Tensor:
        from llmlite.pruning.masks import pattern_mask, row_mask, tensor_mask

        if self.pattern:
            return pattern_mask(score_OI, *self.pattern)
        return (tensor_mask if self.method == "magnitude" else row_mask)(score_OI, share)
