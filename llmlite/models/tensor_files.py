"""Single tensors out of the safetensors files of a folder, read rather than mapped.

`safetensors.safe_open` maps the whole file, privately and writable, so that opening a file counts against a memory limit as much as reading all of it, and
pages that were read stay in the resident set. Here the bytes of one tensor are read into one tensor, and nothing else happens.

Format: 8 bytes of length, a JSON header with dtype, shape and place of each tensor, then the bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmlite.errors import LoadError
from llmlite.models.find import stock_files

__all__ = ["TensorFiles"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorFiles:
    """The tensors of a file, or of the model in a folder, by the names they have there.

    Args:
        place: a `.safetensors` file, or a stock folder.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self._found: dict[str, tuple[Path, int, dict[str, Any]]] = {}  # name -> file, where its data begin, entry of the header
        for file in stock_files(place) if place.is_dir() else [place]:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                entries = json.loads(stream.read(length))
            self._found |= {name: (file, 8 + length, entry) for name, entry in entries.items() if name != "__metadata__"}

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def names(self) -> list[str]:
        """All names."""
        return list(self._found)

    def bytes_of(self, name: str) -> int:
        """Bytes of one tensor in its file."""
        start, end = self._found[name][2]["data_offsets"]
        return int(end - start)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(self._found[name][2]["shape"])

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the type of the file.

        Raises:
            LoadError: the file ends before the tensor does, or the type is not known.
        """
        file, begin, entry = self._found[name]
        if entry["dtype"] not in _DTYPES:
            raise LoadError(f"model: {name} in {file} is stored as {entry['dtype']}, which cannot be read block by block. Use load: whole.")
        tensor = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]])
        if tensor.numel():
            with file.open("rb") as stream:
                stream.seek(begin + entry["data_offsets"][0])
                got = stream.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data)
            if got != tensor.nbytes:
                raise LoadError(f"model: '{file}' is damaged: it ends within {name}. Download or save it again.")
        return tensor
