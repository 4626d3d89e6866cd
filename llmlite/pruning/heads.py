"""The step `prune.heads`: take attention heads away so that what is left is a stock config, and let `o_proj` make up for them.

Heads go as whole key/value groups (a key/value head with all query heads that read it), or as query heads, the same number from every group. Where a family
refuses a number of heads, the nearest legal one is taken and said.

Sources: FLAP, arXiv:2312.11983 and LLM-Pruner, arXiv:2305.11627 (scores); SlimGPT, arXiv:2412.18110 and ZipLM, arXiv:2302.04089 (second order, repair).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

from llmlite.config import settings
from llmlite.errors import ConfigError, UnsupportedModel
from llmlite.pruning.settings import Keep, Score, UnitStep, compensated, planned, require_plain, walk_state
from llmlite.step import ModelPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmlite.context import Run

__all__ = ["PruneHeads", "config_with_heads", "nearest_heads"]

log = logging.getLogger(__name__)

Unit = Literal["kv_groups", "query_heads"]


@settings
class PruneHeads(UnitStep):
    """Take attention heads away, grouped-query attention included; the output projection is repaired by least squares."""

    keep: Keep = 0.75
    """Share of the heads that stays, the same in every layer."""
    unit: Unit = "kv_groups"
    """What goes: kv_groups (key/value heads with all their query heads; also shrinks the cache) or query_heads (evenly from every group)."""
    score: Score = "obs"
    """How heads are judged; see prune.ffn. The second-order score measured best for heads."""

    def check(self, model: ModelPlan, run: Run) -> ModelPlan:
        """See `Step.check`.

        Raises:
            ConfigError: the family cannot have fewer heads in a stock checkpoint; the message has the alternative.
        """
        from llmlite.models.families import family_of

        require_plain(model, "prune.heads")
        keep, units = self._number(model.config)
        family = family_of(model.config)
        wide = compensated(model.config, "prune.heads", attention=True) if self.bias_compensation and keep < units else model.config
        config = config_with_heads(wide, keep, self.unit)
        before = model.config
        notes = [
            f"{family.heads(config)} of {family.heads(before)} query heads and {family.kv_heads(config)} of {family.kv_heads(before)} key/value heads stay"
        ]
        if type(config) is not type(model.config):
            notes.append(f"written as {config.model_type}, with equal logits: {model.config.model_type} refuses this number of heads")
        return planned(model, config, run, calibrated=keep < units and self.reads_text, notes=tuple(notes), backward=self._goes_backward)

    def apply(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """Walk through the blocks, then slice."""
        from llmlite.models.families import family_of
        from llmlite.pruning.units import Cut, cut_units

        keep, units = self._number(model.config)
        if keep == units:
            return model
        groups = family_of(model.config).query_groups(model.config) if self.unit == "query_heads" else 1
        pruned, figures = cut_units(model, [Cut(self.unit, units, keep, groups)], self.windows(run), self, walk_state(run))
        run.note(**figures)
        return pruned

    def _number(self, config: Any) -> tuple[int, int]:
        from llmlite.models.families import family_of

        family = family_of(config)
        units = family.kv_heads(config) if self.unit == "kv_groups" else family.heads(config)
        wanted = self.keep * units
        keep = nearest_heads(config, wanted, self.unit)
        if abs(keep - wanted) >= 1:
            log.warning(
                "prune.heads: keep=%s of %d %s would be %.1f; the nearest number that a stock checkpoint can have is %d",
                self.keep,
                units,
                self.unit,
                wanted,
                keep,
            )
        return keep, units


def nearest_heads(config: Any, wanted: float, unit: Unit) -> int:
    """The number of units nearest to `wanted` that a stock checkpoint can have.

    Raises:
        ConfigError: none but all of them; the message has the alternative.
    """
    from llmlite.models.families import family_of

    family = family_of(config)
    units, step = (family.kv_heads(config), 1) if unit == "kv_groups" else (family.heads(config), family.query_groups(config))
    candidates = sorted(range(step, units + 1, step), key=lambda number: (abs(number - wanted), number))
    if candidates[0] == units:
        return units
    problem = ""
    for number in candidates:
        if number == units:
            break
        try:
            config_with_heads(config, number, unit)
        except UnsupportedModel as error:
            problem = problem or str(error)
            continue
        return number
    raise ConfigError("prune.heads", [problem or f"there are only {units} {unit}; none can go without all. Use prune.ffn or prune.layers, or the other unit."])


def config_with_heads(config: Any, keep: int, unit: Unit) -> Any:
    """The config of the same model with `keep` key/value groups or query heads.

    Raises:
        UnsupportedModel: it cannot be written as a stock config.
    """
    from llmlite.models.size import meta_model
    from llmlite.models.slicing import take_kv_groups, take_query_heads
    from llmlite.models.view import ModelView

    view = ModelView(meta_model(config))
    if unit == "kv_groups":
        return take_kv_groups(view, [range(keep)] * len(view.blocks))[0]
    groups = view.family.query_groups(config)
    size = view.heads // groups
    kept = [group * size + member for group in range(groups) for member in range(keep // groups)]
    return take_query_heads(view, [kept] * len(view.blocks))[0]
