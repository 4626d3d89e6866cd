"""The step `prune.structured`: one number, the share of the decoder's parameters that stays, spread over layers, heads and FFN channels.

How it is spread is measured on the model and the calibration text at hand; see `llmlite.pruning.budget`. Without measuring (`spread`), channels go first, and
heads only when asked or when the FFN would lose more than half.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from llmlite.config import settings
from llmlite.errors import ConfigError
from llmlite.pruning.settings import Keep, Score, UnitStep, compensated, kept_in, needs_gradients, planned, require_plain, walk_state
from llmlite.step import ModelPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmlite.context import Run
    from llmlite.pruning.units import Cut

__all__ = ["PruneStructured", "allocate"]

log = logging.getLogger(__name__)

_LEAST_FFN = 0.5
"""Share of the FFN below which heads go as well."""


@settings
class PruneStructured(UnitStep):
    """Shrink the decoder to a share of its parameters, over layers, heads and FFN channels as measured, repaired by least squares."""

    keep_parameters: Keep = 0.8
    """Share of the decoder's parameters (without embeddings and output head) that stays, as near as the widths allow."""
    multiple_of: Annotated[int, Field(ge=1)] = 64
    """FFN widths are rounded to a multiple of this."""
    spread: Literal["measured", "auto", "ffn", "query_heads+ffn"] = "measured"
    """What goes. measured: layers, heads and channels as trials on the calibration text decide. Without trials: ffn (channels), query_heads+ffn (one query
    head of each group, then channels), auto (channels, and heads only when half of the channels would not do)."""
    head_score: Score = "obs"
    """How heads are judged, where heads go; see `score`. The second-order score measured best for heads."""
    trial_sequences: Annotated[int, Field(ge=2)] = 40
    """measured: calibration rows of the trials at most; one in five, at most eight, is held out to be read."""
    trials: Annotated[int, Field(ge=1)] = 12
    """measured: spreads tried at most."""

    def check(self, model: ModelPlan, run: Run) -> ModelPlan:
        """See `Step.check`.

        Raises:
            ConfigError: the share cannot be reached.
        """
        from llmlite.models.size import size_of_config

        require_plain(model, "prune.structured")
        if self.spread == "measured":
            return self._estimate(model, run)
        cuts, config = allocate(model.config, self.keep_parameters, self.multiple_of, self.spread)
        if self.bias_compensation and cuts:
            roles = {cut.role for cut in cuts}
            config = compensated(config, "prune.structured", attention="o" in roles, ffn="down" in roles)
        share = size_of_config(config).decoder / size_of_config(model.config).decoder
        parts = [f"{cut.keep} of {cut.units} {'FFN channels' if cut.kind == 'ffn' else cut.kind.replace('_', ' ')}" for cut in cuts]
        note = f"{share:.1%} of the decoder stays: {', '.join(parts) or 'everything'}"
        return planned(model, config, run, calibrated=bool(cuts) and self.reads_text, notes=(note,), backward=self._goes_backward)

    @property
    def _scores(self) -> tuple[Score, ...]:
        return (self.score, self.head_score)

    def no_blocks(self) -> str:
        """See `Step.no_blocks`."""
        if self.spread == "measured":
            return "spread: measured tries out whole models; spread: auto, ffn or query_heads+ffn does not"
        return needs_gradients("head_score", self.head_score) or super().no_blocks()

    def apply(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """One walk through the blocks, then slice."""
        from llmlite.pruning.units import cut_units

        if self.keep_parameters == 1:
            return model
        if self.spread == "measured":
            return self._measured(model, run)
        cuts, _ = allocate(model.config, self.keep_parameters, self.multiple_of, self.spread)
        if not cuts:
            return model
        cuts = [cut if cut.role == "down" else dataclasses.replace(cut, score=self.head_score) for cut in cuts]
        pruned, figures = cut_units(model, cuts, self.windows(run), self, walk_state(run))
        run.note(**figures)
        return pruned

    def _estimate(self, model: ModelPlan, run: Run) -> ModelPlan:
        """What the plan can say before anything is measured: the channels alone, if they can carry it."""
        from llmlite.models.families import family_of
        from llmlite.models.size import size_of_config
        from llmlite.pruning.budget import Spread, cuts_of, fitted, neighbours

        config, start = model.config, Spread()
        if self.keep_parameters < 1:
            while (spread := fitted(model.config, start, self.keep_parameters, self.multiple_of)) is None:
                start = next(iter(neighbours(model.config, start)))
                if start.layers >= family_of(model.config).layers(model.config):
                    raise ConfigError("prune.structured", [f"keep_parameters={self.keep_parameters} cannot be reached by layers, heads and FFN channels."])
            config = cuts_of(model.config, spread)[1]
        if self.bias_compensation and self.keep_parameters < 1:
            config = compensated(config, "prune.structured", attention=True, ffn=True)
        share = size_of_config(config).decoder / size_of_config(model.config).decoder
        note = f"about {share:.1%} of the decoder stays; trials on the calibration text decide how much goes from layers, heads and FFN channels"
        return planned(
            model,
            config,
            run,
            calibrated=self.keep_parameters < 1,
            notes=(note if self.keep_parameters < 1 else "everything stays",),
            backward=self._goes_backward,
        )

    def _measured(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """Measure where to cut, take the layers, then walk through the blocks that stay."""
        from llmlite.models.rebuild import rebuild
        from llmlite.models.slicing import take_layers
        from llmlite.models.view import ModelView
        from llmlite.pruning.budget import Trials, cuts_of, fitted, search
        from llmlite.pruning.units import cut_units

        config, windows_NT = model.config, run.calibration_windows
        with _scratch_of(run) as folder:
            trials = Trials(model, windows_NT[: self.trial_sequences], self, self.head_score, folder)
            best, losses = search(config, self.keep_parameters, trials.loss, self.trials)
            best, losses = run.agreed((best, losses))
            gone, influence = trials.removed_layers(best), trials.influence
        spread = fitted(config, best, self.keep_parameters, self.multiple_of) or best
        log.info("gone: %s", spread)
        run.note(spread=dataclasses.asdict(spread), trials={str(tried): loss for tried, loss in losses.items()})
        if gone:
            run.note(removed_layers=gone, block_influence=influence)
            model = rebuild(model, *take_layers(ModelView(model), [index for index in range(len(influence)) if index not in gone]))
        cuts, _ = cuts_of(model.config, dataclasses.replace(spread, layers=0), self.head_score)
        pruned, figures = cut_units(model, cuts, windows_NT, self, walk_state(run))
        run.note(**figures)
        return pruned


@contextmanager
def _scratch_of(run: Run) -> Iterator[Path]:
    """Where trials are kept: with the run, or for the moment."""
    kept = kept_in(run, "trials")
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def allocate(config: Any, keep_parameters: float, multiple_of: int, spread: str) -> tuple[list[Cut], Any]:
    """Which units go so that `keep_parameters` of the decoder stays, and the config that is left.

    Raises:
        ConfigError: nothing reaches it.
    """
    from llmlite.models.families import family_of
    from llmlite.models.legal import round_to_multiple
    from llmlite.models.size import size_of_config
    from llmlite.pruning.ffn import config_with_channels
    from llmlite.pruning.heads import config_with_heads, nearest_heads
    from llmlite.pruning.units import Cut

    family = family_of(config)
    channels, dense = family.ffn_channels(config), size_of_config(config).decoder
    wanted = keep_parameters * dense
    # parameters are linear in the number of channels, so two sizes give the number wanted
    one = (dense - size_of_config(config_with_channels(config, channels - 1)).decoder) if channels > 1 else dense
    heads, step = family.heads(config), family.query_groups(config)
    gone_heads = step if spread == "query_heads+ffn" and keep_parameters < 1 else 0
    while True:
        narrowed = config
        if gone_heads:
            number = nearest_heads(config, heads - gone_heads, "query_heads")
            narrowed = config_with_heads(config, number, "query_heads")
            gone_heads = heads - number
        excess = size_of_config(narrowed).decoder - wanted
        keep = channels - max(0, excess) / one
        if keep >= _LEAST_FFN * channels or (spread == "ffn" and keep >= multiple_of) or (family.no_heads and keep >= multiple_of):
            break
        if spread == "ffn" or family.no_heads or gone_heads + step >= heads:
            what = "FFN channels alone" if spread == "ffn" or family.no_heads else "FFN channels and heads"
            raise ConfigError("prune.structured", [f"keep_parameters={keep_parameters} cannot be reached by {what}. Add a prune.layers step."])
        gone_heads += step
    kept = round_to_multiple(round(keep), multiple_of, channels)
    cuts = [Cut("query_heads", heads, heads - gone_heads, step)] if gone_heads else []
    if kept < channels:
        cuts.append(Cut("ffn", channels, kept))
    return cuts, config_with_channels(narrowed, kept)
