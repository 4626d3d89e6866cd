"""Training under FSDP2 or ZeRO-3, where each process holds its share of every weight, and whole models before and after; and teachers that are split as well.

Both rebuild a model's modules for good: weights become DTensors or are emptied, classes are swapped, hooks are added. So they are given a twin that takes the
weights over; the model itself keeps its plain structure, empty meanwhile, and gets whole weights back at the end: every process takes part in gathering each
weight once, and weights that are tied stay one. What comes after training (evaluation, saving, the next step) meets a plain model on every process.

Sharded are therefore the weights, their gradients and the optimizer's state while training runs; before and behind it a whole model must fit each device.

Source: Zhao et al. 2023, arXiv:2304.11277 (FSDP); Rajbhandari et al. 2020, arXiv:1910.02054 (ZeRO, whose stage 3 it is).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

__all__ = ["forget_zero3", "lend", "plain_errors", "share_out", "take_back"]

M = TypeVar("M", bound=nn.Module)


def lend(model: M) -> M:
    """A twin of the model that takes its parameters over. The model keeps empty ones, on the meta device, until `take_back`.

    Buffers are copied. What holds on to modules of the model (hooks, for instance) does not see the twin.
    """
    parameters = list(model.parameters())
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in parameters})
    empty = {id(p): _like(p, torch.empty(p.shape, dtype=p.dtype, device="meta"), p.requires_grad) for p in parameters}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = empty[id(parameter)]
    return twin


@torch.no_grad()
def take_back(model: nn.Module, twin: nn.Module) -> None:
    """Give the model the twin's parameters, whole. Every process must call this; tied ones are gathered once and stay tied.

    Args:
        model: what was given to `lend`.
        twin: what that returned, sharded since then or not.
    """
    named = dict(model.named_parameters())
    made: dict[int, nn.Parameter] = {}
    for name, parameter in twin.named_parameters():
        made[id(named[name])] = _like(named[name], _whole(parameter), parameter.requires_grad)
    for module in model.modules():
        for name, empty in module._parameters.items():
            if empty is not None:
                module._parameters[name] = made[id(empty)]


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    if not hasattr(parameter, "ds_id"):
        return parameter.data
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.data.clone()


def share_out(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Leave each process a share of every weight of the blocks of a model that only reads; a block is whole on `device` during its own forward pass.

    What lies outside of the blocks stays whole, on `device`. Every process must call this alike, and run the model as often as the others do.

    Args:
        model: frozen, on the CPU or on `device`. Its modules get hooks of FSDP2 for good.
        blocks: modules of it.
        device: where this process computes.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    outside = {parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)}
    for parameter in outside:
        parameter.data = parameter.data.to(device)
    fully_shard(model, mesh=mesh, ignored_params=outside)  # holds nothing itself; with it a block is gathered while the one before computes
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise what went wrong in a checkpoint of which each process writes its part, on every process: the first one's error itself.

    torch raises a `CheckpointException` there, which is no `Exception`: whoever looks for a full disk would not see it.
    """
    try:
        yield
    except CheckpointException as error:
        if not error.failures:
            raise RuntimeError(str(error)) from error
        raise error.failures[min(error.failures)][0] from error


def forget_zero3() -> None:
    """Let models be loaded whole again: as long as transformers remembers a ZeRO-3 configuration, it would load a part of them on each process."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def _like(parameter: nn.Parameter, data: torch.Tensor, requires_grad: bool) -> nn.Parameter:
    """A parameter of the same class with other numbers; bitsandbytes' keep their scales in attributes, which go along."""
    made: nn.Parameter = torch.Tensor._make_subclass(type(parameter), data, requires_grad)
    made.__dict__.update(parameter.__dict__)
    return made
