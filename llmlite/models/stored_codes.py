"""Whether the parts of bitsandbytes' weights in a folder belong together, told from the headers of its files before any weight is read.

    4 bit   X            codes, two to a byte: ceil(n / 2) bytes for the n numbers of the shape that the quant state names
            X.absmax     a scale for each block of `blocksize`: float32, or uint8 with a scale of its own (nested_absmax) for each `nested_blocksize` of them
            X.quant_map, X.nested_quant_map      16 and 256 numbers
    8 bit   X.weight     int8, with a scale for each row: X.SCB

bitsandbytes reads past the end of scales that are too few and multiplies with whatever lies there, so that NaN or another model comes out.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlite.errors import LoadError

if TYPE_CHECKING:
    from llmlite.models.tensor_files import TensorFiles

__all__ = ["require_whole_codes"]

_STATE = ".quant_state.bitsandbytes__"


def require_whole_codes(folder: Path) -> None:
    """Refuse a folder in which codes and scales do not belong together; one without any is fine.

    Raises:
        LoadError: with the first tensor that is missing, or has another size than the rest says.
    """
    from llmlite.models.tensor_files import TensorFiles

    files = TensorFiles(folder)
    for name in files.names():
        wanted: dict[str, int] = {}
        if _STATE in name:
            wanted = _four_bit(files, name)
        elif name.endswith(".SCB"):
            weight = name.removesuffix("SCB") + "weight"
            rows = files.shape_of(weight)[:1] if weight in files else ()
            wanted = {weight: math.prod(files.shape_of(weight)), name: rows[0]} if rows else {weight: 1}
        for part, numbers in wanted.items():
            found = _numbers(files, part) if part in files else None
            if found != numbers:
                raise LoadError(
                    f"model: '{folder}' is damaged: {part} {'is missing' if found is None else f'holds {found:,} numbers instead of {numbers:,}'}, so its "
                    "quantized weight cannot be read. Download the folder again, or quantize the dense model once more."
                )


def _four_bit(files: TensorFiles, name: str) -> dict[str, int]:
    """How many numbers each part of a 4-bit weight must have, by its quant state; of the codes, how many bytes."""
    weight = name.partition(_STATE)[0]
    try:
        state: dict[str, Any] = json.loads(bytes(files.read(name).tolist()))
        numbers, block = math.prod(_whole(*state["shape"])), _whole(state["blocksize"])[0]
        nested = _whole(state["nested_blocksize"])[0] if "nested_blocksize" in state else 0
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise LoadError(
            f"model: '{files.place}' is damaged: {name} cannot be read. Download the folder again, or quantize the dense model once more."
        ) from None
    blocks = -(-numbers // block)
    found = {weight: -(-numbers // 2), f"{weight}.absmax": blocks, f"{weight}.quant_map": 16}
    return found | ({f"{weight}.nested_absmax": -(-blocks // nested), f"{weight}.nested_quant_map": 256} if nested else {})


def _whole(*values: Any) -> tuple[int, ...]:
    if not values or not all(type(value) is int and value > 0 for value in values):
        raise ValueError(f"{values} should be whole numbers")
    return values


def _numbers(files: TensorFiles, name: str) -> int:
    """Numbers of a tensor; of 4-bit codes, which may be kept as any type, bytes."""
    is_codes = any(f"{name}{_STATE}{kind}" in files for kind in ("nf4", "fp4"))
    return files.bytes_of(name) if is_codes else math.prod(files.shape_of(name))
