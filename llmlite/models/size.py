"""How large a model is: parameters, bytes on disk, zeros.

What a plan needs comes from the config alone, on the meta device, in seconds and without weights. What a report needs is counted in the file or in the
model, never taken from the plan.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from llmlite.errors import LoadError
from llmlite.models.adapted import is_adapter_parameter
from llmlite.models.view import ModelView, unwrap
from llmlite.step import Scheme

__all__ = [
    "BLOCK_SIZE",
    "NESTED_BLOCK_SIZE",
    "Size",
    "Zeros",
    "count_zeros",
    "expected_bytes",
    "linear_roles",
    "linear_shapes",
    "meta_model",
    "runtime_bytes",
    "size_of_config",
    "size_of_model",
]

BLOCK_SIZE = 64
"""Weights that share one scale in bitsandbytes' 4-bit types; BitsAndBytesConfig offers no other number."""
NESTED_BLOCK_SIZE = 256
"""Scales that share one second-level scale, with double quantization."""

_RUNTIME_BYTES = 500_000_000  # Python, torch, transformers, bitsandbytes and the allocator, before any weight
_OFFSET_DIGITS = 18  # typical length of the nested offset as JSON; the real one depends on the weights
_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8", torch.uint8: "U8"}  # in file order


@dataclass(frozen=True)
class Size:
    """Parameters of a model, tied tensors counted once.

    Attributes:
        parameters: all of them.
        decoder: in the decoder blocks. "20 % of the decoder gone" speaks of these.
        embedding: token table and learned positions.
        head: output head; 0 when it is tied to the token table.
    """

    parameters: int
    decoder: int
    embedding: int
    head: int


@dataclass(frozen=True)
class Zeros:
    """Exact zeros in the projections of the decoder blocks.

    Attributes:
        zeros: weights that are exactly 0.
        weights: all weights looked at.
        by_name: dotted name -> share of zeros in that tensor.
    """

    zeros: int
    weights: int
    by_name: dict[str, float]

    @property
    def sparsity(self) -> float:
        """Share of zeros, 0 to 1."""
        return self.zeros / self.weights if self.weights else 0.0


def meta_model(config: Any) -> Any:
    """The model of a config without weights: shapes on the meta device. The config is not changed.

    Raises:
        ValueError: stock transformers refuses the config.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


def size_of_config(config: Any) -> Size:
    """Parameters that a config stands for; seconds, no weights."""
    return size_of_model(meta_model(config))


_SHAPES: dict[str, dict[str, tuple[int, int]]] = {}


def linear_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """Dotted name -> (out_features, in_features) of every projection in the decoder blocks, from the config alone."""
    key = config.to_json_string(use_diff=False)
    if key not in _SHAPES:
        _SHAPES[key] = {linear.name: (linear.out_features, linear.in_features) for linear in ModelView(meta_model(config)).linears()}
    return dict(_SHAPES[key])


def linear_roles(config: Any) -> dict[str, str]:
    """Dotted name -> role in the families table (q, k, v, qkv, o, gate, up, gate_up, down) of every projection, from the config alone."""
    return {linear.name: linear.role for linear in ModelView(meta_model(config)).linears()}


def size_of_model(model: nn.Module) -> Size:
    """Parameters of a live model; those that bitsandbytes packed count as the numbers they stand for, those of adapters do not count.

    Raises:
        UnsupportedModel: the architecture is not in the families table.
    """
    view = ModelView(model)
    counts = dict(_logical_parameters(view))

    def under(*modules: nn.Module | None) -> int:
        inside = {id(parameter) for module in modules if module is not None for parameter in module.parameters()}
        return sum(count for key, count in counts.items() if key in inside)

    embedding = under(view.embedding, view.position_embedding)
    head = under(view.head) - (sum(counts.get(id(p), 0) for p in view.embedding.parameters()) if view.tied else 0)
    return Size(parameters=sum(counts.values()), decoder=under(*(block.module for block in view.blocks)), embedding=embedding, head=head)


def _logical_parameters(view: ModelView) -> Iterator[tuple[int, int]]:
    """(id, number of weights) of each distinct parameter of the base model."""
    packed = {id(linear.base.weight): linear.in_features * linear.out_features for linear in view.linears() if linear.quantized}
    for name, parameter in view.model.named_parameters():
        if not is_adapter_parameter(name):
            yield id(parameter), packed.get(id(parameter), parameter.numel())


def expected_bytes(
    config: Any, *, dtype: torch.dtype = torch.float32, scheme: Scheme | None = None, double_quant: bool = False, skip: Collection[str] = ()
) -> int:
    """Bytes of the safetensors file that `save_pretrained` will write, from the config alone.

    Exact for one file, header included. Two things add to it: models beyond one shard carry one more header for each shard, and with double quantization each
    projection holds a number whose text is a few bytes longer or shorter.

    Args:
        config: of a family in the table.
        dtype: of everything that is not quantized (embeddings, norms, biases, lm_head): float32, bfloat16 or float16.
        scheme: bitsandbytes format of the projections in the decoder blocks; None leaves them in `dtype`.
        double_quant: 4 bits only: the scales are quantized to 8 bits too (Dettmers et al. 2023, arXiv:2305.14314, section 3).
        skip: names of projections that stay in `dtype` all the same.
    """
    model = meta_model(config)
    view = ModelView(model)
    packed = [linear for linear in view.linears() if scheme and linear.name not in skip]
    shapes = {f"{linear.name}.weight": (linear.out_features, linear.in_features) for linear in packed}
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        if name in shapes and scheme:
            tensors |= _packed_tensors(name, shapes[name], dtype, scheme, double_quant)
        else:
            path, _, leaf = name.rpartition(".")
            tensors[f"{view.family.saved_names.get(path, path)}.{leaf}"] = (dtype, tuple(parameter.shape))
    return _safetensors_bytes(tensors)


def _packed_tensors(
    name: str, shape_OI: tuple[int, int], dtype: torch.dtype, scheme: Scheme, double_quant: bool
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What bitsandbytes 0.50 saves for one weight: the codes and what decodes them."""
    count = shape_OI[0] * shape_OI[1]
    if scheme == "int8":
        prefix = name.removesuffix("weight")
        return {name: (torch.int8, shape_OI), f"{prefix}SCB": (torch.float32, shape_OI[:1]), f"{prefix}weight_format": (torch.uint8, ())}
    blocks = math.ceil(count / BLOCK_SIZE)
    state: dict[str, Any] = {"quant_type": scheme, "blocksize": BLOCK_SIZE, "dtype": str(dtype).removeprefix("torch."), "shape": list(shape_OI)}
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        name: (torch.uint8, (math.ceil(count / 2), 1)),
        f"{name}.absmax": (torch.uint8 if double_quant else torch.float32, (blocks,)),
        f"{name}.quant_map": (torch.float32, (16,)),
    }
    text = len(json.dumps(state))
    if double_quant:
        tensors[f"{name}.nested_absmax"] = (torch.float32, (math.ceil(blocks / NESTED_BLOCK_SIZE),))
        tensors[f"{name}.nested_quant_map"] = (torch.float32, (256,))
        text = len(json.dumps({**state, "nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": 0})) - 1 + _OFFSET_DIGITS
    tensors[f"{name}.quant_state.bitsandbytes__{scheme}"] = (torch.uint8, (text,))
    return tensors


def _safetensors_bytes(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Size of a safetensors file: 8 bytes of length, a JSON header padded to 8 bytes, the tensors sorted by type and name."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, order = 0, list(_SAFETENSORS_DTYPES)
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (order.index(item[1][0]), item[0])):
        end = offset + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    return 8 + math.ceil(len(json.dumps(header, separators=(",", ":"))) / 8) * 8 + offset


def runtime_bytes(device: torch.device) -> int:
    """What a process needs before any weight, counted where weights lie in the process's own memory: on a CPU."""
    return _RUNTIME_BYTES if device.type == "cpu" else 0


@torch.no_grad()
def count_zeros(source: nn.Module | str | Path) -> Zeros:
    """Exact zeros among the weights of the decoder's projections: in a live model, or really read from the safetensors files of a folder.

    Weights that bitsandbytes packed count by their code (its 4-bit formats have a code for 0).

    Raises:
        LoadError: a folder without safetensors files.
        UnsupportedModel: the architecture is not in the families table.
    """
    counts = dict(_zeros_in_folder(Path(source)) if isinstance(source, str | Path) else _zeros_in_model(source))
    by_name = {name: zeros / weights for name, (zeros, weights) in counts.items()}
    return Zeros(sum(zeros for zeros, _ in counts.values()), sum(weights for _, weights in counts.values()), by_name)


def _zeros_in_model(model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    from llmlite.models.blockwise import present

    for block in ModelView(unwrap(model)).blocks:
        with present(block):
            for linear in block.linears.values():
                weight = linear.base.weight
                code = weight.quant_state.code if getattr(weight, "quant_state", None) is not None else None
                yield linear.name, _zeros(weight.data, code)


def _zeros_in_folder(folder: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    from transformers import AutoConfig

    if not list(folder.glob("*.safetensors")):
        raise LoadError(f"{folder} holds no .safetensors files, so its zeros cannot be counted.")
    names = {f"{linear.name}.weight": linear.name for linear in ModelView(meta_model(AutoConfig.from_pretrained(folder))).linears()}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            for key in sorted(stored & set(names)):
                code = file.get_tensor(f"{key}.quant_map") if f"{key}.quant_map" in stored else None
                yield names[key], _zeros(file.get_tensor(key), code)


def _zeros(weight: Tensor, code_C: Tensor | None) -> tuple[int, int]:
    """(zeros, weights) of one tensor. With a 4-bit codebook, (16,), each byte holds two codes."""
    if code_C is None:
        return int((weight == 0).sum()), weight.numel()
    packed = weight.view(torch.uint8).flatten()
    zero_codes = (code_C == 0).nonzero().flatten().tolist()
    zeros = sum(int((nibble == code).sum()) for code in zero_codes for nibble in (packed >> 4, packed & 15))
    return zeros, 2 * packed.numel()
