"""The step `bottleneck`: small networks inserted into every block, trained while the base is frozen, in 16/32, 8 or 4 bit.

    houlsby    y = s(x) + U f(D s(x) + d) + u     after attention and after the FFN (s is the sublayer)
    pfeiffer   the same, after the FFN only: half the numbers, nearly as good
    parallel   y = ffn(x) + c (U f(D x + d) + u)  beside the FFN, from its input; c is `scaling`

U starts at zero, so that step 0 is the base. The layers are in `llmlite.adapters.bottleneck_layers`, as a method that peft drives: it saves, loads, switches
and stacks them like its own.

Source: Houlsby et al. 2019, arXiv:1902.00751, section 2.1; Pfeiffer et al. 2020, arXiv:2005.00247, section 3; He et al. 2021, arXiv:2110.04366, section 3.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from llmlite.adapters.settings import AdapterStep
from llmlite.config import settings
from llmlite.errors import ConfigError, counted
from llmlite.training.settings import PositiveInt

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Bottleneck"]


@settings
class Bottleneck(AdapterStep):
    """Train bottleneck adapters (Houlsby, Pfeiffer or parallel) on the frozen model."""

    label: ClassVar[str] = "bottleneck"
    mergeable: ClassVar[bool] = False
    trains_tokens: ClassVar[bool] = True

    placement: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    """houlsby: after attention and after the FFN; pfeiffer: after the FFN; parallel: beside the FFN."""
    bottleneck_size: PositiveInt = 64
    """Width inside the adapter."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """Nonlinearity inside the adapter."""
    bottleneck_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inner values set to zero in training."""
    scaling: Annotated[float, Field(gt=0)] | None = None
    """Factor on what the adapter adds. None: 1 after a sublayer, 4 beside it (He et al. 2021)."""

    def added_parameters(self, config: PretrainedConfig) -> tuple[int, str]:
        """Two matrices with their biases for each place."""
        from llmlite.models.families import family_of

        width, places = family_of(config).width(config), self.places(config)
        added = len(places) * (2 * width * self.bottleneck_size + self.bottleneck_size + width)
        return added, f"{self.placement}, width {self.bottleneck_size}, at {counted(len(places), 'place')}"

    def peft_config(self, config: PretrainedConfig) -> Any:
        """A `BottleneckConfig` with whole module names."""
        from llmlite.adapters.bottleneck_layers import BottleneckConfig

        return BottleneckConfig(
            task_type="CAUSAL_LM",
            target_modules=self.places(config),
            parallel=self.placement == "parallel",
            bottleneck_size=self.bottleneck_size,
            activation=self.activation,
            bottleneck_dropout=self.bottleneck_dropout,
            scaling=self.scaling if self.scaling is not None else 4.0 if self.placement == "parallel" else 1.0,
        )

    def places(self, config: PretrainedConfig) -> list[str]:
        """Dotted names of the modules whose output an adapter is added to.

        Raises:
            ConfigError: the family's FFN is no module of its own, so nothing can stand beside it.
        """
        from llmlite.models.families import family_of
        from llmlite.models.size import linear_roles

        family = family_of(config)
        if self.placement == "parallel":
            if not family.ffn:
                raise ConfigError("bottleneck", [f"placement=parallel needs an FFN module, and {config.model_type} has none. Use pfeiffer or houlsby."])
            return [f"{family.blocks}.{index}.{family.ffn}" for index in range(family.layers(config))]
        wanted = {"houlsby": {"o", "down"}, "pfeiffer": {"down"}}[self.placement]
        return sorted(name for name, role in linear_roles(config).items() if role in wanted)
