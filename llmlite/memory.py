"""Memory of this process: its peak over a block of work (of the allocator on a GPU), what it holds, and what it can still take."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Peak", "free_bytes", "give_back", "measured_peak", "out_of_memory", "resident_bytes"]


@dataclass
class Peak:
    """Peak bytes, filled in when the block ends."""

    bytes: int = 0


@contextmanager
def measured_peak(device_type: str = "cpu") -> Iterator[Peak]:
    """Measure the peak within the block.

    On Linux the kernel's high-water mark of this process is reset first, so the figure is the block's own; elsewhere it is the process's since
    its start. On CUDA it is what the allocator held at most.
    """
    peak = Peak()
    give_back()
    if device_type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        _reset_high_water()
    try:
        yield peak
    finally:
        if device_type == "cuda":
            import torch

            peak.bytes = int(torch.cuda.max_memory_allocated())
        else:
            peak.bytes = _status_bytes("VmHWM") or _rusage_bytes()


def resident_bytes() -> int:
    """Bytes of this process in memory now; 0 where the system does not tell."""
    return _status_bytes("VmRSS") or 0


def free_bytes(device_type: str = "cpu") -> int:
    """Bytes that this process can still take: of the machine, its control group and its own limits, whichever is least; of the GPU where it computes there."""
    if device_type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    import psutil

    free = [int(psutil.virtual_memory().available)]
    for kind, key in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        soft = resource.getrlimit(kind)[0]
        if soft != resource.RLIM_INFINITY:
            free.append(max(0, soft - (_status_bytes(key) or 0)))
    with contextlib.suppress(OSError, ValueError):  # a control group of version 2 with a limit
        group = Path("/sys/fs/cgroup")
        free.append(max(0, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())))
    return min(free)


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that an allocation failed: Python's, torch's on any device, or the system's."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text


def give_back() -> None:
    """Free what nothing uses, and let the C library return the pages to the system: it would keep those of a model that is gone."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library: the pages come back when it likes
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _reset_high_water() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or a container that forbids it: the mark then counts from the start of the process
        return


def _status_bytes(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def _rusage_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
