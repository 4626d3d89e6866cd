"""The step `prune.structured`: one number, the share of the decoder's parameters that stays, spread over query heads and FFN channels in a single walk.

Where to cut was measured, not guessed (SmolLM2-135M, 20 %): FFN channels alone lose least on text that the calibration did not resemble; layers and key/value
groups lose more for the same parameters. So channels go first, heads only when asked or when the FFN would lose more than half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from llmlite.config import settings
from llmlite.errors import ConfigError
from llmlite.pruning.settings import Keep, UnitStep, compensated, planned, require_plain, walk_state
from llmlite.step import ModelPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmlite.pruning.units import Cut
    from llmlite.run import Run

__all__ = ["PruneStructured", "allocate"]

_LEAST_FFN = 0.5
"""Share of the FFN below which heads go as well."""


@settings
class PruneStructured(UnitStep):
    """Shrink the decoder to a share of its parameters, over query heads and FFN channels, repaired by least squares."""

    keep_parameters: Keep = 0.8
    """Share of the decoder's parameters (without embeddings and output head) that stays, as near as the widths allow."""
    multiple_of: Annotated[int, Field(ge=1)] = 64
    """FFN widths are rounded to a multiple of this."""
    spread: Literal["auto", "ffn", "query_heads+ffn"] = "auto"
    """What goes: FFN channels, or one query head of each group and then channels. auto: channels, and heads only when half of the channels would not do."""

    def check(self, model: ModelPlan, run: Run) -> ModelPlan:
        """See `Step.check`.

        Raises:
            ConfigError: the share cannot be reached.
        """
        require_plain(model, "prune.structured")
        from llmlite.models.size import size_of_config

        cuts, config = allocate(model.config, self.keep_parameters, self.multiple_of, self.spread)
        if self.bias_compensation and cuts:
            kinds = {cut.role for cut in cuts}
            config = compensated(config, "prune.structured", attention="o" in kinds, ffn="down" in kinds)
        share = size_of_config(config).decoder / size_of_config(model.config).decoder
        parts = [f"{cut.keep} of {cut.units} {'FFN channels' if cut.kind == 'ffn' else cut.kind.replace('_', ' ')}" for cut in cuts]
        return planned(model, config, run, calibrated=bool(cuts), notes=(f"{share:.1%} of the decoder stays: {', '.join(parts) or 'everything'}",))

    def apply(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """One walk through the blocks, then slice."""
        from llmlite.pruning.units import cut_units

        cuts, _ = allocate(model.config, self.keep_parameters, self.multiple_of, self.spread)
        if not cuts:
            return model
        pruned, figures = cut_units(model, cuts, run.calibration_windows, self, walk_state(run))
        run.note(**figures)
        return pruned


def allocate(config: Any, keep_parameters: float, multiple_of: int, spread: str) -> tuple[list[Cut], Any]:
    """Which units go so that `keep_parameters` of the decoder stays, and the config that is left.

    Raises:
        ConfigError: nothing reaches it.
    """
    from llmlite.models.families import family_of
    from llmlite.models.size import size_of_config
    from llmlite.pruning.ffn import config_with_channels
    from llmlite.pruning.heads import config_with_heads, nearest_heads
    from llmlite.pruning.units import Cut

    family = family_of(config)
    channels, dense = family.ffn_channels(config), size_of_config(config).decoder
    wanted = keep_parameters * dense
    # parameters are linear in the number of channels, so two sizes give the number wanted
    one = (dense - size_of_config(config_with_channels(config, channels - 1)).decoder) if channels > 1 else dense
    heads, kv_heads = family.heads(config), family.kv_heads(config)
    step = kv_heads if kv_heads < heads else 1
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
    from llmlite.models.legal import round_to_multiple

    kept = round_to_multiple(round(keep), multiple_of, channels)
    cuts = [Cut("query_heads", heads, heads - gone_heads, kv_heads if kv_heads < heads else 1)] if gone_heads else []
    if kept < channels:
        cuts.append(Cut("ffn", channels, kept))
    return cuts, config_with_channels(narrowed, kept)
