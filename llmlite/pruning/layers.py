"""The step `prune.layers`: take whole decoder blocks away.

Two ways to choose: block influence (how little a block turns the hidden state; one pass), or greedily the block whose absence hurts perplexity on the
calibration text least, again and again (stronger, and dearer: one measurement for each candidate).

Sources: Men et al. 2024 (ShortGPT), arXiv:2403.03853; Song et al. 2024 (SLEB), arXiv:2402.09025 (greedy removal by perplexity).
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from llmlite.config import settings
from llmlite.errors import ConfigError, UnsupportedModel, counted
from llmlite.pruning.settings import ADVICE, Keep, kept_in, planned, require_plain
from llmlite.step import ModelPlan, Step
from llmlite.storage import write_json

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from llmlite.calibration.blocks import Blocks
    from llmlite.context import Run
    from llmlite.models.view import BlockView

__all__ = ["PruneLayers", "calibration_loss", "config_with_layers", "greedy_layers", "influence_of", "influences"]

log = logging.getLogger(__name__)


@settings
class PruneLayers(Step):
    """Take whole decoder blocks away."""

    advice: ClassVar[str] = ADVICE

    keep: Keep = 0.9
    """Share of the layers that stays."""
    score: Literal["block_influence", "greedy"] = "greedy"
    """block_influence (one pass over the calibration text), or greedy (each time the layer whose absence costs least perplexity; stronger and slower)."""
    candidates: Annotated[int, Field(ge=1)] = 8
    """greedy: layers of the lowest block influence that are tried each time."""
    greedy_windows: Annotated[int, Field(ge=1)] = 8
    """greedy: calibration rows that each trial is measured on."""

    def check(self, model: ModelPlan, run: Run) -> ModelPlan:
        """See `Step.check`.

        Raises:
            ConfigError: the family cannot lose layers.
        """
        from llmlite.models.families import family_of

        require_plain(model, "prune.layers")
        layers = family_of(model.config).layers(model.config)
        keep = self._number(layers)
        try:
            config = config_with_layers(model.config, keep)
        except UnsupportedModel as error:
            raise ConfigError("prune.layers", [str(error)]) from None
        return planned(model, config, run, calibrated=keep < layers, notes=(f"{keep} of {counted(layers, 'layer')} {'stays' if keep == 1 else 'stay'}",))

    def apply(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """Choose, then slice."""
        from llmlite.models.rebuild import rebuild
        from llmlite.models.slicing import take_layers
        from llmlite.models.view import ModelView

        view = ModelView(model)
        keep = self._number(len(view.blocks))
        if keep == len(view.blocks):
            return model
        influence = influences(model, run.calibration_windows)
        if self.score == "greedy":
            state = kept_in(run, "greedy.json")
            windows_NT = run.calibration_windows[: self.greedy_windows]
            removed, losses = greedy_layers(model, windows_NT, len(view.blocks) - keep, influence, self.candidates, state)
            removed, losses = run.agreed((removed, losses))
            run.note(calibration_perplexity=[math.exp(min(loss, 700)) for loss in losses])
        else:
            removed = sorted(range(len(influence)), key=influence.__getitem__)[: len(view.blocks) - keep]
        run.note(removed_layers=sorted(removed), block_influence=influence)
        return rebuild(model, *take_layers(view, [index for index in range(len(view.blocks)) if index not in removed]))

    def _number(self, layers: int) -> int:
        return max(1, round(self.keep * layers))


def config_with_layers(config: Any, keep: int) -> Any:
    """The config of the same model with its first `keep` layers (which layers stay changes only per-layer lists).

    Raises:
        UnsupportedModel: a setting of the model makes a layer depend on its number.
    """
    from llmlite.models.size import meta_model
    from llmlite.models.slicing import take_layers
    from llmlite.models.view import ModelView

    return take_layers(ModelView(meta_model(config)), range(keep))[0]


def influences(model: PreTrainedModel, windows_NT: Tensor) -> list[float]:
    """Mean block influence of each layer over all calibration tokens, in one pass. See `llmlite.pruning.scores.block_influence`."""
    from llmlite.calibration.blocks import Blocks, batches_of

    stream = Blocks(model, batches_of(windows_NT), quick=True)
    return [influence_of(stream, block) for block in stream.view.blocks]


def influence_of(stream: Blocks, block: BlockView) -> float:
    """Mean block influence of the block at whose entrance the stream is; the stream goes through it."""
    from llmlite.pruning.scores import block_influence

    before = stream.hidden
    stream.advance(block)
    turned = sum(
        float(block_influence(stream.tokens(i, one), stream.tokens(i, other)).double().sum())
        for i, (one, other) in enumerate(zip(before, stream.hidden, strict=True))
    )
    total, tokens = stream.summed(turned, sum(len(stream.tokens(i, hidden)) for i, hidden in enumerate(before)))
    return total / tokens


def calibration_loss(model: PreTrainedModel, windows_NT: Tensor, without: Collection[int] = ()) -> float:
    """Mean negative log-likelihood of the windows, nats a token, with some layers skipped."""
    from contextlib import nullcontext

    import torch

    from llmlite.calibration.blocks import skipping
    from llmlite.evaluation.quality import measure_quality
    from llmlite.models.view import ModelView

    skipped = [block for block in ModelView(model).blocks if block.index in without]
    batches = [{"input_ids": part, "labels": part} for part in torch.split(windows_NT, 4)]
    with skipping(skipped) if skipped else nullcontext():
        return math.log(measure_quality(model, batches).perplexity)


def greedy_layers(
    model: PreTrainedModel, windows_NT: Tensor, count: int, influence: Sequence[float], candidates: int, state: Path | None = None
) -> tuple[list[int], list[float]]:
    """Layers to remove, in the order in which they go, and the loss after each.

    Args:
        model: in eval mode; unchanged afterwards.
        windows_NT: calibration windows of the trials.
        count: layers to remove.
        influence: block influence of each layer; only the `candidates` lowest of the layers still there are tried.
        candidates: see above.
        state: a file that keeps every trial, so that a search that was stopped goes on behind the last one.
    """
    known: dict[str, float] = json.loads(state.read_text(encoding="utf-8")) if state is not None and state.is_file() else {}
    removed: list[int] = []
    losses: list[float] = []
    for _ in range(count):
        tried = sorted((index for index in range(len(influence)) if index not in removed), key=influence.__getitem__)[:candidates]
        found = {}
        for index in tried:
            key = " ".join(str(gone) for gone in [*removed, index])
            if key not in known:
                known[key] = calibration_loss(model, windows_NT, [*removed, index])
                if state is not None:
                    state.parent.mkdir(parents=True, exist_ok=True)
                    write_json(state, known)
            found[index] = known[key]
        best = min(found, key=found.__getitem__)
        removed.append(best)
        losses.append(found[best])
        log.info("layer %d goes: calibration loss %.3f", best, found[best])
    return removed, losses
