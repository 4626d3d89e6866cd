"""Bottleneck adapters as a peft method: a config, a layer around the module it adds to, and the tuner that puts it there.

peft has no such method, and the library `adapters` (1.3) wants transformers 4.57. Importing this module teaches peft the type ``BOTTLENECK``; after that
`peft.get_peft_model`, `PeftModel.from_pretrained`, `load_adapter`, `set_adapter` and `disable_adapter` work as with any other.

Shapes: B rows, T tokens, D hidden size, M width inside the adapter.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from llmlite.models.families import family_of

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel"]

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class _Kind(enum.StrEnum):
    """Beside peft's own `PeftType`, which is closed."""

    BOTTLENECK = "BOTTLENECK"


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]
    """What ``adapter_config.json`` says.

    Attributes:
        target_modules: dotted names of the modules whose output is added to.
        parallel: read the module's input instead of its output.
        bottleneck_size: M.
        activation: relu, gelu or silu.
        bottleneck_dropout: in training, on the inner values.
        scaling: factor on what is added.
        trainable_token_indices: rows of the embedding (and head) that are trained too; peft does the rest.
    """

    target_modules: list[str] | set[str] | str | None = None
    parallel: bool = False
    bottleneck_size: int = 64
    activation: str = "relu"
    bottleneck_dropout: float = 0.0
    scaling: float = 1.0
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: dict[str, list[int]] | None = None
    init_weights: bool = field(default=True)

    def __post_init__(self) -> None:
        """Fix the type, and let names be a set, as peft's own configs have them."""
        super().__post_init__()
        self.peft_type = _Kind.BOTTLENECK
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)


class BottleneckLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A module, and the adapters beside it: base(x) + scaling * up(act(down(h))), h the output or, in parallel, the input."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("_settings",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, width: int, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.width = width
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self._settings: dict[str, tuple[nn.Module, nn.Module, float, bool]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def __getattr__(self, name: str) -> Any:
        """What the wrapped module has, this one has: an FFN's projections stay where the model's own code looks for them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add one adapter, in float32, that changes nothing yet."""
        device = next(self.base_layer.parameters()).device
        down = nn.Linear(self.width, config.bottleneck_size, device=device, dtype=torch.float32)
        up = nn.Linear(config.bottleneck_size, self.width, device=device, dtype=torch.float32)
        if config.init_weights and device.type != "meta":
            nn.init.kaiming_uniform_(down.weight, a=5**0.5)
            nn.init.zeros_(down.bias)
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
        self.bottleneck_down[adapter_name] = down
        self.bottleneck_up[adapter_name] = up
        self._settings[adapter_name] = (_ACTIVATIONS[config.activation](), nn.Dropout(config.bottleneck_dropout), config.scaling, config.parallel)
        self.set_adapter(self.active_adapters)

    def forward(self, x_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output, (B, T, D), and what the active adapters add to it."""
        base_BTD: Tensor = self.base_layer(x_BTD, *args, **kwargs)
        if self.disable_adapters:
            return base_BTD
        out_BTD = base_BTD
        for name in self.active_adapters:
            if name not in self.bottleneck_down:
                continue
            activation, dropout, scaling, parallel = self._settings[name]
            down: Any = self.bottleneck_down[name]
            up: Any = self.bottleneck_up[name]
            dropout.train(self.training)
            inner_BTM = dropout(activation(down((x_BTD if parallel else base_BTD).to(down.weight.dtype))))
            out_BTD = out_BTD + (scaling * up(inner_BTM)).to(base_BTD.dtype)
        return out_BTD

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: a network with a nonlinearity is no change of weights."""
        raise ValueError("bottleneck adapters hold a nonlinearity, so they cannot be merged into the weights; keep them beside the base.")

    def unmerge(self) -> None:
        """Nothing was merged."""


class BottleneckModel(BaseTuner):  # type: ignore[misc]
    """Puts `BottleneckLayer`s around the target modules of a model."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _create_and_replace(
        self, peft_config: BottleneckConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, current_key: str, **_: Any
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = BottleneckLayer(target, adapter_name, family_of(self.model.config).width(self.model.config), peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # peft would look for a weight, which an FFN has not

    @staticmethod
    def _prepare_adapter_config(peft_config: BottleneckConfig, model_config: dict[str, Any]) -> BottleneckConfig:
        if not peft_config.target_modules:
            raise ValueError("a BottleneckConfig names its target_modules")
        return peft_config


PEFT_TYPE_TO_CONFIG_MAPPING[_Kind.BOTTLENECK] = BottleneckConfig
PEFT_TYPE_TO_TUNER_MAPPING[_Kind.BOTTLENECK] = BottleneckModel
PEFT_TYPE_TO_PREFIX_MAPPING[_Kind.BOTTLENECK] = BottleneckModel.prefix
