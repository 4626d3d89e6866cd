"""Factors around one for rows and columns of every projection and for the gains of norms: computed with first, then multiplied into the weights.

    W[o, i] -> a_o W[o, i] b_i        bias_o -> a_o bias_o        norm gain g_d -> c_d g_d        norm bias -> c_d times it

Zeros stay zeros, shapes stay, and nothing is left beside the weights.

Source: factors of inputs and outputs, Liu et al. 2022 (IA3), arXiv:2205.05638, here for every projection; gains of norms alone, for quantized models,
Li et al. 2023 (Norm Tweaking), arXiv:2309.02784.

Legend: O out_features, I in_features, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmlite.models.view import ModelView

__all__ = ["Factors"]


class Factors:
    """Factors around one, by name, and a model that computes with them.

    Args:
        view: of the model that is to compute with them; its modules get hooks.

    Attributes:
        all: name -> factors, float32, requiring gradients: (O,) of outputs, (I,) of inputs, (D,) of a norm.
    """

    def __init__(self, view: ModelView) -> None:
        self.all: dict[str, Tensor] = {}
        device = next(view.embedding.parameters()).device

        def ones(name: str, width: int) -> Tensor:
            self.all[name] = torch.ones(width, device=device, requires_grad=True)
            return self.all[name]

        for linear in view.linears():
            outputs_O, inputs_I = ones(f"{linear.name}/outputs", linear.out_features), ones(f"{linear.name}/inputs", linear.in_features)
            linear.module.register_forward_pre_hook(lambda _module, args, factor_I=inputs_I: (_times(args[0], factor_I), *args[1:]))
            linear.module.register_forward_hook(lambda _module, _args, output, factor_O=outputs_O: _times(output, factor_O))
        for name, norm in _norms(view):
            gain_D = ones(name, norm.weight.numel())
            norm.register_forward_hook(lambda _module, _args, output, factor_D=gain_D: _times(output, factor_D))

    @torch.no_grad()
    def multiply_into(self, view: ModelView) -> None:
        """Multiply the weights of another model of the same shape, in float32, rounded once.

        Args:
            view: of the model.
        """
        for linear in view.linears():
            outputs_O, inputs_I = self.all[f"{linear.name}/outputs"], self.all[f"{linear.name}/inputs"]
            linear.weight_OI.copy_(outputs_O[:, None] * linear.weight_OI.float() * inputs_I)
            if linear.bias is not None:
                linear.bias.copy_(outputs_O * linear.bias.float())
        offset = view.family.norm_weight_offset
        for name, norm in _norms(view):
            gain_D = self.all[name]
            norm.weight.copy_(gain_D * (norm.weight.float() + offset) - offset)
            if getattr(norm, "bias", None) is not None:
                norm.bias.copy_(gain_D * norm.bias.float())


def _times(values: Tensor, factors: Tensor) -> Tensor:
    return (values * factors).to(values.dtype)  # the product in float32: a factor of 1.001 is lost in bfloat16


def _norms(view: ModelView) -> Iterator[tuple[str, Any]]:
    """Norms with a gain, by name; of those that are lists of norms none."""
    found: dict[str, Any] = {}
    for block in view.blocks:
        found |= {f"{block.name}/{role}": norm for role, norm in block.norms.items()}
        found |= {f"{block.name}/q_norm": block.q_norm, f"{block.name}/k_norm": block.k_norm}
    found["final_norm"] = view.final_norm
    for name, norm in found.items():
        if isinstance(getattr(norm, "weight", None), Tensor):
            yield name, norm
