"""The step `prefix`: learn keys and values of a few tokens that stand before every text, in every layer.

    attention over [P_k; K], [P_v; V],     P: (virtual tokens, width), trained; the base is frozen

Rows cannot be packed, since a prefix belongs to one text: `data.packing: false`. It reads slower, having more keys to attend to, and it cannot be merged.

Source: Li and Liang 2021, arXiv:2101.00190, section 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from llmlite.adapters.settings import AdapterStep
from llmlite.config import settings
from llmlite.errors import ConfigError, counted
from llmlite.step import ModelPlan
from llmlite.training.settings import PositiveInt

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from llmlite.context import Run

__all__ = ["Prefix"]


@settings
class Prefix(AdapterStep):
    """Train a prefix of virtual tokens on the frozen model."""

    label: ClassVar[str] = "prefix"
    mergeable: ClassVar[bool] = False

    num_virtual_tokens: PositiveInt = 16
    """Tokens whose keys and values are learnt."""

    def check(self, model: ModelPlan, run: Run) -> ModelPlan:
        """See `Step.check`.

        Raises:
            ConfigError: packed rows, activation checkpointing, or a merge.
        """
        problems = []
        if run.recipe.data.packing and run.packs:
            problems.append("a prefix belongs to one text and rows of several texts have only one: set data.packing: false.")
        if self.recomputes(run.device):
            problems.append("gradient_checkpointing drops the keys and values that a prefix consists of: set gradient_checkpointing: false.")
        if problems:
            raise ConfigError("prefix", problems)
        return super().check(model, run)

    def added_parameters(self, config: PretrainedConfig) -> tuple[int, str]:
        """Keys and values of each virtual token in each layer."""
        from llmlite.models.families import family_of

        family = family_of(config)
        width = family.kv_heads(config) * family.dim_of_head(config)
        return 2 * self.num_virtual_tokens * family.layers(config) * width, counted(self.num_virtual_tokens, "virtual token")

    def peft_config(self, config: PretrainedConfig) -> Any:
        """`peft.PrefixTuningConfig`."""
        import peft

        from llmlite.models.families import family_of

        family = family_of(config)
        return peft.PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.num_virtual_tokens,
            num_layers=family.layers(config),
            num_attention_heads=family.kv_heads(config),
            token_dim=family.kv_heads(config) * family.dim_of_head(config),
        )
