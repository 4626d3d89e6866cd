"""Tensors that took long, kept in a folder: a run that was stopped reads them there instead of computing them again.

Each folder is complete or absent (`llmlite.storage.writing_folder`) and says what its tensors were made of, so that those of other text or other settings are
not taken for these.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmlite.storage import damage, set_aside, writing_folder

__all__ = ["digest_of", "keep_tensors", "kept_tensors", "made_once"]

log = logging.getLogger(__name__)

_FILE = "kept.safetensors"


def digest_of(*parts: object) -> str:
    """One word for what tensors were made of: bytes, shapes and types of tensors, the items of mappings by their names, the `repr` of everything else."""
    seen = hashlib.sha256()
    for part in parts:
        if isinstance(part, Mapping):
            seen.update(digest_of(*(each for name in sorted(part) for each in (name, part[name]))).encode())
        elif isinstance(part, Tensor):
            seen.update(f"{part.dtype}{tuple(part.shape)}".encode())
            seen.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            seen.update(repr(part).encode())
        seen.update(b"\0")
    return seen.hexdigest()


def keep_tensors(folder: Path, made_of: str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, replacing what the folder held.

    Args:
        folder: complete afterwards, or as it was.
        made_of: see `digest_of`.
        tensors: by name.

    Raises:
        OutputError, ResourceError: the folder cannot be written, or the disk is full.
    """
    with writing_folder(folder) as temporary:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, temporary / _FILE, {"made_of": made_of})


def kept_tensors(folder: Path, made_of: str, device: torch.device | None = None) -> dict[str, Tensor] | None:
    """The tensors in a folder, bit for bit; None where there are none, where they were made of something else, and where the folder is damaged, which is said
    and set aside.

    Args:
        folder: see `keep_tensors`.
        made_of: what they have to be made of.
        device: where they go; None: the CPU.
    """
    if not folder.exists():
        return None
    if reason := damage(folder):
        log.warning("%s is damaged (%s); set aside as %s and done again", folder.name, reason, set_aside(folder).name)
        return None
    with safe_open(folder / _FILE, framework="pt", device=str(device or "cpu")) as file:
        if (file.metadata() or {}).get("made_of") != made_of:
            log.info("%s is of other settings or another text; done again", folder.name)
            return None
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def made_once(folder: Path | None, made_of: str, make: Callable[[], dict[str, Tensor]], device: torch.device | None = None) -> dict[str, Tensor]:
    """What `make` gives: read from the folder where it was kept, else made now and kept there. Without a folder always made."""
    if folder is None:
        return make()
    if (found := kept_tensors(folder, made_of, device)) is None:
        found = make()
        keep_tensors(folder, made_of, found)
    return found
