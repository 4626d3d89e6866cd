"""The step `ia3`: learn one factor for each key, value and FFN channel, and nothing else.

    k = l_k * (W_k x),   v = l_v * (W_v x),   ffn = W_down (l_ff * act(...)),     l starts as ones

58 thousand numbers for SmolLM2-135M, an eightieth of LoRA's at rank 16, and it learns less.

Source: Liu et al. 2022, arXiv:2205.05638, section 3.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from llmlite.adapters.settings import AdapterStep, target_shapes
from llmlite.config import settings
from llmlite.errors import counted

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Ia3"]


@settings
class Ia3(AdapterStep):
    """Train (IA)^3 factors on the frozen model."""

    label: ClassVar[str] = "ia3"

    learning_rate: Annotated[float, Field(gt=0, lt=1)] | None = 1e-2
    """Peak learning rate of AdamW; factors around one want a larger one than matrices."""

    def added_parameters(self, config: PretrainedConfig) -> tuple[int, str]:
        """One number for each output of keys and values and each input of the down projection."""
        outputs, inputs = self._targets(config)
        shapes = target_shapes(config, ("all-linear",), "ia3")
        added = sum(shapes[name][0] for name in outputs) + sum(shapes[name][1] for name in inputs)
        return added, f"factors on {counted(len(outputs) + len(inputs), 'layer')}"

    def peft_config(self, config: PretrainedConfig) -> Any:
        """`peft.IA3Config` with whole layer names."""
        import peft

        outputs, inputs = self._targets(config)
        return peft.IA3Config(target_modules=sorted(outputs + inputs), feedforward_modules=sorted(inputs), task_type="CAUSAL_LM")

    def _targets(self, config: PretrainedConfig) -> tuple[list[str], list[str]]:
        """Layers scaled at their outputs (keys and values; the fused projection where there is one) and at their inputs (down)."""
        from llmlite.models.size import linear_roles

        roles = linear_roles(config)
        return [name for name, role in roles.items() if role in {"k", "v", "qkv"}], [name for name, role in roles.items() if role == "down"]
