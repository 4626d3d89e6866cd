"""Make a bitsandbytes model safe to evaluate, train and save in any order.

On a CPU with AVX512-BF16 bitsandbytes repacks each 4-bit layer at its first evaluation forward, in place. From then on the layer has no
gradient for its input (a LoRA on it learns from noise), and saving it writes scales that no loader understands; widths that its kernel
cannot handle raise, or give wrong numbers without a word. None of this happens while every layer is told not to use that path. It costs
decoding speed, so `packed_generation` turns it back on for a copy of the layers' weights, for generation only.

An 8-bit layer says in every forward pass that it casts what is not float16. Once is enough.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmlite.errors import RunError

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit
    from torch import nn

__all__ = ["linear_4bit_layers", "make_safe", "packed_generation"]

_PACKED_ROWS = 32  # the packed kernel's block of output features


class _Once(logging.Filter):
    """Lets a line of bitsandbytes through that it has not let through before; everything else always."""

    def __init__(self, begins: str) -> None:
        super().__init__()
        self.begins, self.said = begins, set[str]()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if not text.startswith(self.begins):
            return True
        new = text not in self.said
        self.said.add(text)
        return new


_CASTS = _Once("MatMul8bitLt: inputs will be cast")


def linear_4bit_layers(model: nn.Module) -> list[Linear4bit]:
    """Every bitsandbytes 4-bit layer of a model; empty when there is none."""
    import bitsandbytes as bnb

    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


def make_safe(model: nn.Module) -> int:
    """Keep every 4-bit layer in its portable format, whatever the CPU can do. `load_model` and `load_blockwise` call it; so must who loads otherwise,
    before anything else. Returns the number of layers.

    That 8-bit layers cast their inputs is said once in this process from then on (it came from each layer at each forward pass);
    `logging.getLogger("bitsandbytes").setLevel("ERROR")` silences that too, as the commands of llmlite do.

    Without it, on CPUs with AVX512-BF16: KL 7.4 instead of 0.04 after a save, LoRA gradients up to 2500 times too small.

    Raises:
        RunError: a layer was packed before, by an evaluation forward; its scales are rounded to bfloat16 and do not come back.
    """
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_CASTS)  # the same one is added once only
    layers = linear_4bit_layers(model)
    packed = sum(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)
    if packed:
        raise RunError(
            f"{packed} of {len(layers)} 4-bit layers are already packed for this CPU by an evaluation forward: they can neither be trained nor saved. "
            "Load the model again and call make_safe(model) before anything else."
        )
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


@contextmanager
def packed_generation(model: nn.Module) -> Iterator[None]:
    """Within the block, generate with bitsandbytes' packed CPU kernel where the CPU and the layer's shape allow it.

    The portable weights come back bit for bit afterwards. Do not train or save inside the block. Without such a CPU it does nothing.
    """
    from bitsandbytes.functional import has_avx512bf16

    layers = [
        layer
        for layer in (linear_4bit_layers(model) if has_avx512bf16() else [])
        if layer.weight.device.type == "cpu" and layer.out_features % _PACKED_ROWS == 0 and layer.in_features % layer.weight.blocksize == 0
    ]
    portable = [(layer.weight.data, copy.copy(layer.weight.quant_state)) for layer in layers]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    try:
        yield
    finally:
        for layer, (data, state) in zip(layers, portable, strict=True):
            layer.support_avx512bf16_for_cpu = False
            layer.weight.data = data
            layer.weight.quant_state = layer.quant_state = state
