"""The step `prefix`: learn keys and values of a few tokens that stand before every text, in every layer.

    attention over [P_k; K], [P_v; V],     P: (virtual tokens, width), trained; the base is frozen

It starts as the keys and values of the first training tokens, so the model begins as one that has read a little text; from random numbers it begins as
a broken one.

Rows cannot be packed, since a prefix belongs to one text: `data.packing: false`. It reads slower, having more keys to attend to, and it cannot be merged.

Source: Li and Liang 2021, arXiv:2101.00190, section 4; the start from real activations, section 7.4 there.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmlite.adapters.settings import AdapterStep
from llmlite.config import settings
from llmlite.errors import ConfigError, counted, first_line
from llmlite.models.adapted import longest_of
from llmlite.step import ModelPlan
from llmlite.training.settings import PositiveInt

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from llmlite.context import Run

__all__ = ["Prefix"]

log = logging.getLogger(__name__)


@settings
class Prefix(AdapterStep):
    """Train a prefix of virtual tokens on the frozen model."""

    label: ClassVar[str] = "prefix"
    mergeable: ClassVar[bool] = False

    num_virtual_tokens: PositiveInt = 16
    """Tokens whose keys and values are learnt."""
    init_prefix: Literal["text", "random"] = "text"
    """Where they start: text (what the model makes of the first training tokens), or random (peft's own: the model begins broken)."""

    def check(self, model: ModelPlan, run: Run) -> ModelPlan:
        """See `Step.check`.

        Raises:
            ConfigError: packed rows, activation checkpointing, a merge, or no positions left for the text behind the prefix.
        """
        problems, length = [], run.recipe.data.max_length
        left = longest_of(model.config, self.num_virtual_tokens)
        if left is not None and length > left:
            problems.append(
                f"num_virtual_tokens={self.num_virtual_tokens} before rows of max_length={length} tokens are more than {longest_of(model.config)}, the "
                "longest sequence that the model allows. Lower one of the two."
            )
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

    def attach(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """See `AdapterStep.attach`. Text that is too short, and a model that forgets what lies behind a short window, leave it random, which is said."""
        adapted = super().attach(model, run)
        if self.init_prefix == "text":
            _start_from_text(adapted, run.train_data.dataset, self.num_virtual_tokens)
        return adapted

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


def _start_from_text(adapted: Any, rows: Any, tokens: int) -> None:
    """Load keys and values of the first tokens of the training rows, in their order, into the prefix."""
    import peft
    import torch

    ids: list[int] = []
    for row in rows:
        ids += list(row["input_ids"])
        if len(ids) >= tokens:
            break
    with torch.no_grad(), adapted.disable_adapter():
        heard = adapted(input_ids=torch.tensor([ids[:tokens]], device=adapted.device), use_cache=True)
    try:
        peft.initialize_kv_prefix_from_past_key_values(adapted, past_key_values=heard.past_key_values)
    except ValueError as error:
        log.warning("prefix: starts from random numbers, not from text (%s)", first_line(error))
