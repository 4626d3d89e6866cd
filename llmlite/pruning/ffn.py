"""The step `prune.ffn`: take channels out of every FFN and let `down_proj` make up for them.

    y = W_down (act(W_gate x) * W_up x):  a channel is a row of gate and up and a column of down

Sources: FLAP, arXiv:2312.11983 (score); OSSCAR, arXiv:2403.12983 and ZipLM, arXiv:2302.04089 (repair). See `llmlite.pruning.reconstruct`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from llmlite.config import settings
from llmlite.pruning.settings import Keep, UnitStep, compensated, planned, require_plain, walk_state
from llmlite.step import ModelPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmlite.context import Run

__all__ = ["PruneFfn", "config_with_channels"]


@settings
class PruneFfn(UnitStep):
    """Take channels out of every FFN; the rest is repaired by least squares."""

    keep: Keep = 0.75
    """Share of the FFN channels that stays, the same in every layer."""
    multiple_of: Annotated[int, Field(ge=1)] = 64
    """The number of channels that stay is rounded to a multiple of this; kernels and bitsandbytes want 64."""

    def check(self, model: ModelPlan, run: Run) -> ModelPlan:
        """See `Step.check`."""
        from llmlite.models.families import family_of

        require_plain(model, "prune.ffn")
        channels = family_of(model.config).ffn_channels(model.config)
        keep = self._number(channels)
        config = compensated(model.config, "prune.ffn", ffn=True) if self.bias_compensation and keep < channels else model.config
        return planned(
            model,
            config_with_channels(config, keep),
            run,
            calibrated=keep < channels and self.reads_text,
            notes=(f"{keep} of {channels} FFN channels stay",),
            backward=self._goes_backward,
        )

    def apply(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """Walk through the blocks, then slice."""
        from llmlite.models.view import ModelView
        from llmlite.pruning.units import Cut, cut_units

        channels = ModelView(model).ffn_channels
        keep = self._number(channels)
        if keep == channels:
            return model
        pruned, figures = cut_units(model, [Cut("ffn", channels, keep)], self.windows(run), self, walk_state(run))
        run.note(**figures)
        return pruned

    def _number(self, channels: int) -> int:
        from llmlite.models.legal import round_to_multiple

        return round_to_multiple(round(self.keep * channels), self.multiple_of, channels)


def config_with_channels(config: Any, keep: int) -> Any:
    """The config of the same model with `keep` FFN channels."""
    from llmlite.models.size import meta_model
    from llmlite.models.slicing import take_ffn_channels
    from llmlite.models.view import ModelView

    view = ModelView(meta_model(config))
    return take_ffn_channels(view, [range(keep)] * len(view.blocks))[0]
