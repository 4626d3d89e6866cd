"""The families table resolved on one model: modules instead of paths.

A view holds references only, so it is cheap, works on the meta device, and sees whatever the modules are at the moment. It looks through the wrappers
that `unwrap` knows, and through the layers that PEFT and bitsandbytes put in place of `nn.Linear`.

Shape suffixes: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmlite.errors import UnsupportedModel
from llmlite.models.families import Family, family_of

__all__ = ["BlockView", "LinearView", "ModelView", "base_layer", "unwrap"]


def unwrap(model: Any) -> Any:
    """The transformers model inside PEFT, DDP, FSDP1, DeepSpeed and `torch.compile` wrappers; the model itself where there are none."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def base_layer(module: Any) -> Any:
    """The layer under a PEFT wrapper (LoRA, modules_to_save)."""
    while True:
        if hasattr(module, "base_layer"):
            module = module.base_layer
        elif hasattr(module, "original_module"):
            module = module.original_module
        else:
            return module


@dataclass(frozen=True)
class LinearView:
    """One projection of one block.

    Attributes:
        role: its name in the table: q, k, v, qkv, o, gate, up, gate_up or down.
        name: dotted name in the transformers model, for instance ``model.layers.3.mlp.down_proj``.
        block: index of its block.
        module: what the forward pass calls; put hooks here. A PEFT layer when the model is wrapped.
    """

    role: str
    name: str
    block: int
    module: nn.Module

    @property
    def base(self) -> Any:
        """The layer itself, under any PEFT wrapper: nn.Linear, Conv1D, bitsandbytes Linear4bit or Linear8bitLt."""
        return base_layer(self.module)

    @property
    def conv1d(self) -> bool:
        """True when the weight is stored (in_features, out_features), as GPT-2's Conv1D does."""
        return not hasattr(self.base, "in_features") and hasattr(self.base, "nf")

    @property
    def in_features(self) -> int:
        """Width of its input, also when the weight is packed to 4 bits."""
        return int(self.base.weight.shape[0] if self.conv1d else self.base.in_features)

    @property
    def out_features(self) -> int:
        """Width of its output, also when the weight is packed to 4 bits."""
        return int(self.base.nf if self.conv1d else self.base.out_features)

    @property
    def quantized(self) -> bool:
        """True when the weight is not a plain floating-point matrix."""
        weight = self.base.weight
        return not weight.is_floating_point() or hasattr(weight, "quant_state")

    @property
    def weight_OI(self) -> Tensor:  # noqa: N802 - a tensor with its shape suffix
        """The weight as (out_features, in_features), a view that shares memory with the model, so writing into it changes the model.

        Raises:
            UnsupportedModel: the weight is quantized; there is no matrix to look at.
        """
        if self.quantized:
            raise UnsupportedModel(
                f"{self.name} is quantized ({type(self.base).__name__}), so it has no {self.out_features} x {self.in_features} matrix of numbers. "
                "Do this step before quantizing, or load the model in 16 or 32 bit."
            )
        weight: Tensor = self.base.weight.data
        return weight.t() if self.conv1d else weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, (out_features,), or None."""
        return getattr(self.base, "bias", None)


@dataclass(frozen=True)
class BlockView:
    """One decoder block.

    Attributes:
        index: position in the model.
        name: dotted name, for instance ``model.layers.3``.
        module: the block.
        attention: the module that holds the attention's projections.
        linears: role -> projection, in the order the block uses them.
        norms: role -> norm over the hidden width; roles that this model does not have are left out.
        q_norm, k_norm: norms of queries and keys, or None.
    """

    index: int
    name: str
    module: nn.Module
    attention: nn.Module
    linears: dict[str, LinearView]
    norms: dict[str, nn.Module]
    q_norm: nn.Module | None
    k_norm: nn.Module | None

    def unmapped_parameters(self) -> list[str]:
        """Names, relative to the block, of parameters that no entry of the table covers. Empty for every family that llmlite knows."""
        known = [linear.module for linear in self.linears.values()] + list(self.norms.values())
        known += [norm for norm in (self.q_norm, self.k_norm) if norm is not None]
        covered = {id(parameter) for module in known for parameter in module.parameters()}
        return [name for name, parameter in self.module.named_parameters() if id(parameter) not in covered]


class ModelView:
    """A model seen through its family.

    Args:
        model: a decoder-only `...ForCausalLM` of a family in the table; wrapped by PEFT, quantized by bitsandbytes or on the meta device, if you like.

    Attributes:
        model: the transformers model under any wrapper. All names are relative to it.
        config, family: its config and its row of the table.
        blocks: one `BlockView` for each decoder block.
        embedding, position_embedding, final_norm, head: modules, or None where this model has none.
        stem: other modules outside the blocks that hold parameters.

    Raises:
        UnsupportedModel: the architecture is not in the table, or the model lacks what the table says it has (a bare `AutoModel`, remote code).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = unwrap(model)
        self.config: Any = self.model.config
        self.family: Family = family_of(self.config)
        family = self.family
        self.blocks: list[BlockView] = [self._block(index, block) for index, block in enumerate(self._need(family.blocks).children())]
        self.embedding: nn.Module = self._need(family.embedding)
        self.position_embedding: nn.Module | None = _find(self.model, family.position_embedding)
        self.final_norm: nn.Module | None = _find(self.model, family.final_norm)
        self.head: nn.Module = self._need(family.head)
        self.stem: list[nn.Module] = [module for path in family.stem if (module := _find(self.model, path)) is not None]

    @property
    def heads(self) -> int:
        """Query heads in each block."""
        return self.family.heads(self.config)

    @property
    def kv_heads(self) -> int:
        """Key/value heads in each block; as many as query heads where the family has no grouping."""
        return self.family.kv_heads(self.config)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.family.dim_of_head(self.config)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.family.width(self.config)

    @property
    def ffn_channels(self) -> int:
        """Channels between up and down projection in each block."""
        return self.family.ffn_channels(self.config)

    @property
    def tied(self) -> bool:
        """True when the output head and the input embedding are one tensor."""
        return base_layer(self.head).weight is base_layer(self.embedding).weight

    @property
    def quantized(self) -> bool:
        """True when any projection of a block is quantized."""
        return any(linear.quantized for linear in self.linears())

    @property
    def wrapped(self) -> bool:
        """True when PEFT layers stand in place of the model's own."""
        return any(hasattr(module, "base_layer") or hasattr(module, "original_module") for module in self.model.modules())

    def linears(self, roles: Iterable[str] | None = None) -> Iterator[LinearView]:
        """The projections of all blocks, block by block.

        Args:
            roles: only these, for instance ``("o", "down")``; None for all.
        """
        wanted = None if roles is None else set(roles)
        for block in self.blocks:
            yield from (linear for role, linear in block.linears.items() if wanted is None or role in wanted)

    def unmapped_parameters(self) -> list[str]:
        """Dotted names of all parameters that no entry of the table covers, in the blocks and outside of them."""
        outer = [module for module in (self.embedding, self.position_embedding, self.final_norm, self.head, *self.stem) if module is not None]
        covered = {id(parameter) for module in [*outer, *(block.module for block in self.blocks)] for parameter in module.parameters()}
        outside = [name for name, parameter in self.model.named_parameters() if id(parameter) not in covered]
        return outside + [f"{block.name}.{name}" for block in self.blocks for name in block.unmapped_parameters()]

    def _block(self, index: int, module: nn.Module) -> BlockView:
        family = self.family
        name = f"{family.blocks}.{index}"
        linears = {role: LinearView(role, f"{name}.{path}", index, self._need(f"{name}.{path}")) for role, path in family.linears.items()}
        norms = {role: norm for role, path in family.norms.items() if (norm := _find(module, path)) is not None}
        return BlockView(
            index=index,
            name=name,
            module=module,
            attention=self._need(f"{name}.{family.attention}"),
            linears=linears,
            norms=norms,
            q_norm=_find(module, family.q_norm),
            k_norm=_find(module, family.k_norm),
        )

    def _need(self, path: str) -> nn.Module:
        found = _find(self.model, path)
        if found is None:
            raise UnsupportedModel(
                f"{type(self.model).__name__} says it is model_type '{self.family.model_type}' but has no module '{path}'. "
                "llmlite wants stock AutoModelForCausalLM models: load it so, without remote code."
            )
        return found


def _find(root: nn.Module, path: str | None) -> nn.Module | None:
    """The module at a dotted path, or None when the path is None, leads nowhere, or leads to None."""
    here: Any = root
    for part in path.split(".") if path else ():
        here = getattr(here, part, None)
    return here if path and isinstance(here, torch.nn.Module) else None
