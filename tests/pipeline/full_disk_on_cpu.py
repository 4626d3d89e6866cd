"""FSDP2 on CPU processes (`fsdp2_on_cpu.py`) whose disk is full when the first checkpoint is written, for tests only.

torchrun --nproc_per_node 2 full_disk_on_cpu.py run RECIPE.yaml ...

FULL=part      the second process cannot write more than the beginning of its part
FULL=FILE      before the checkpoint the main process writes a FILE that takes all of its disk but 200 kB
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from fsdp2_on_cpu import believe
from torch.distributed.checkpoint.filesystem import FileSystem
from transformers import Trainer

LEFT_BYTES = 200_000


class _Full:
    """A file on a disk that has room for its first bytes."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, data: Any) -> int:
        self.stream.write(bytes(data)[:100])
        self.stream.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.stream.name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _refuse_a_part() -> None:
    create = FileSystem.create_stream

    @contextmanager
    def create_full(self: Any, path: Any, mode: str) -> Iterator[Any]:
        with create(self, path, mode) as stream:
            yield _Full(stream) if "w" in mode and os.environ["RANK"] == "1" else stream

    FileSystem.create_stream = create_full


def _fill(file: Path) -> None:
    save = Trainer._save_checkpoint

    def save_full(self: Any, *args: Any, **options: Any) -> None:
        if self.is_world_process_zero() and not file.exists():
            with file.open("wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(file.parent).free - LEFT_BYTES)
        PartialState().wait_for_everyone()
        save(self, *args, **options)

    Trainer._save_checkpoint = save_full


if __name__ == "__main__":
    from llmlite.cli import main

    believe()
    full = os.environ.get("FULL")
    if full == "part":
        _refuse_a_part()
    elif full:
        _fill(Path(full))
    main(sys.argv[1:])
