"""Energy of a block of work, from counters where the machine has them, estimated only where that is asked for, and never both in one number.

    NVML          the counters of the GPUs in use                               measured
    RAPL          the processor packages' counters (/sys/class/powercap)        measured
    codecarbon    processor load times rated power, plus memory by its size     estimated, on request
    else          not available

Grams of CO2 are joules times the intensity of a grid that somebody has to state; llmlite assumes none.

Source: Strubell et al. 2019, arXiv:1906.02243, for why it belongs in a report; codecarbon.io for the estimate.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from llmlite.errors import LlmliteError
from llmlite.storage import write_json

__all__ = ["Energy", "measured_energy"]

log = logging.getLogger(__name__)

_RAPL = Path("/sys/class/powercap")
_JOULES_PER_KWH = 3.6e6


@dataclass
class Energy:
    """Filled in when the block ends.

    Attributes:
        joules: None when it could not be had.
        source: where the figure comes from.
        kind: ``measured``, ``estimated`` or ``not available``.
        seconds: how long the work took.
    """

    joules: float | None = None
    source: str = ""
    kind: str = "not available"
    seconds: float = 0.0

    def grams_co2(self, grams_per_kwh: float | None) -> float | None:
        """Grams of CO2 equivalent with a stated grid intensity; None without either."""
        return None if self.joules is None or grams_per_kwh is None else self.joules / _JOULES_PER_KWH * grams_per_kwh

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@contextmanager
def measured_energy(
    device_type: str = "cpu", *, estimate: bool = False, rapl: Path = _RAPL, keep: Path | None = None, every: float = 10.0, alone: bool = False
) -> Iterator[Energy]:
    """Measure the energy of the block. A thread reads the counters meanwhile, which start again at their range.

    Args:
        device_type: ``cuda`` reads the counters of the GPUs in use as well.
        estimate: let codecarbon estimate where there is no counter.
        rapl: folder of the processors' counters.
        keep: a file for what was used so far, joules and seconds: when this process is killed, the block that continues begins with it. A kill loses `every`
            seconds at most.
        every: seconds between two readings.
        alone: this process does the work, and the others of its launch wait: only its own GPUs are counted.
    """
    before, elsewhere = _kept(keep), not alone and _on_other_machines()
    meters = [] if elsewhere else [meter for meter in ((_Nvml.found(alone) if device_type == "cuda" else None), _Rapl.found(rapl)) if meter is not None]
    if device_type == "cuda" and not any(isinstance(meter, _Nvml) for meter in meters):
        meters = []  # the processor's joules alone would pass for the whole
    finish = _codecarbon() if estimate and not meters and not elsewhere else None
    if meters:
        begins = Energy(0.0, " + ".join(meter.name for meter in meters), "measured")
    elif finish is not None:
        begins = Energy(None, "codecarbon, which says nothing before its end", "estimated")
    else:
        begins = Energy(source=_ELSEWHERE if elsewhere else "no counter on this machine can be read" + ("" if estimate else _ASK))
    energy, watch = Energy(), _Watch(meters, begins, before, keep, every)
    try:
        yield energy
    finally:
        found = watch.stop()
        found = found if finish is None else Energy(finish(), "codecarbon", "estimated", found.seconds)
        watch.write(found)
        for name, value in asdict(_together(before, found)).items():
            setattr(energy, name, value)


_ASK = "; estimate_energy asks codecarbon instead"
_ELSEWHERE = "the launch runs on several machines, and the counters of one are not the whole"


def _on_other_machines() -> bool:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return processes > int(os.environ.get("LOCAL_WORLD_SIZE", processes))


def _kept(file: Path | None) -> Energy | None:
    """What a process that was stopped had used for the same work; None for work that begins."""
    if file is None or not file.is_file():
        return None
    try:
        return Energy(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Energy(source="what was used before a stop could not be read")


def _together(before: Energy | None, now: Energy) -> Energy:
    """The whole of work that was stopped and continued: unknown when one part is, or when one is measured and the other estimated."""
    if before is None:
        return now
    return replace(_both(before, now), seconds=before.seconds + now.seconds)


def _both(before: Energy, now: Energy) -> Energy:
    """Joules of two parts, with where they come from."""
    if before.joules is not None and now.joules is not None and before.kind == now.kind:
        return Energy(before.joules + now.joules, now.source if before.source == now.source else f"{before.source}, then {now.source}", now.kind)
    if before.joules is None and now.joules is None and before.source == now.source:
        return now
    return Energy(source=f"stopped and continued: {before.source} ({before.kind}), then {now.source} ({now.kind})")


class _Meter(Protocol):
    """Counters that are read again and again."""

    name: str

    def joules(self) -> float:
        """Since it was made."""


class _Nvml:
    """The counters of the GPUs that this process can see; those count on which it holds memory, or, of several processes, one for each of them.

    GPUs are found by their UUID, so neither CUDA_VISIBLE_DEVICES nor the order of the bus matters. A slice of one (MIG) has no counter of its own.
    Tested with nvidia-ml-py over a stand-in for the driver's library; untested on GPU.
    """

    name = "NVML"

    def __init__(self, handles: list[Any], read: Callable[[Any], int], alone: bool) -> None:
        self.handles, self.read, self.alone = handles, read, alone
        self.first = [read(handle) for handle in handles]

    @classmethod
    def found(cls, alone: bool = False) -> _Nvml | None:
        """None without NVML, a driver, or GPUs that count (Volta and later)."""
        try:
            import pynvml
            import torch

            pynvml.nvmlInit()
            names = [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(torch.cuda.device_count())]
            return cls([pynvml.nvmlDeviceGetHandleByUUID(name) for name in names], pynvml.nvmlDeviceGetTotalEnergyConsumption, alone)
        except Exception as error:
            log.info("no energy counter of the GPU: %s", error)
            return None

    def joules(self) -> float:
        """See `_Meter.joules`; the counters are in millijoules."""
        import torch

        neighbours = 1 if self.alone else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        used = [index < neighbours if neighbours > 1 else torch.cuda.max_memory_reserved(index) > 0 for index in range(len(self.handles))]
        counted = zip(self.handles, self.first, used, strict=True)
        return sum(self.read(handle) - first for handle, first, is_used in counted if is_used) / 1000


class _Counter:
    """One package's counter in microjoules, which starts again at its range."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "energy_uj"
        self.range = int((folder / "max_energy_range_uj").read_text())
        self.first = self.last = int(self.file.read_text())
        self.turns = 0

    def joules(self) -> float:
        now = int(self.file.read_text())
        self.turns += now < self.last
        self.last = now
        return (self.turns * self.range + now - self.first) / 1e6


class _Rapl:
    """The counters of the processor packages. They count for everybody who uses the machine."""

    name = "RAPL"

    def __init__(self, counters: list[_Counter]) -> None:
        self.counters = counters

    @classmethod
    def found(cls, root: Path) -> _Rapl | None:
        """None where there are none, or only root may read them. The zone ``psys`` is the whole board, packages included, so it is left out."""
        try:
            counters = [_Counter(folder) for folder in sorted(root.glob("intel-rapl:?")) if not _zone(folder).startswith("psys")]
        except (OSError, ValueError):
            return None
        return cls(counters) if counters else None

    def joules(self) -> float:
        """See `_Meter.joules`."""
        return sum(counter.joules() for counter in self.counters)


def _zone(folder: Path) -> str:
    return (folder / "name").read_text().strip() if (folder / "name").is_file() else ""


class _Watch:
    """Reads meters every so often until it is stopped, and keeps what was used so far in a file."""

    def __init__(self, meters: Sequence[_Meter], begins: Energy, before: Energy | None, keep: Path | None, every: float) -> None:
        self.meters, self.found, self.before, self.keep, self.every = meters, begins, before, keep, every
        self.ended, self.started = threading.Event(), time.perf_counter()
        self.thread = threading.Thread(target=self._run, name="energy", daemon=True)
        self.write(begins)
        if meters or keep is not None:
            self.thread.start()

    def stop(self) -> Energy:
        """Energy and seconds since the start."""
        self.ended.set()
        if self.thread.ident is not None:
            self.thread.join()
        self._read()
        return self.found

    def write(self, found: Energy) -> None:
        """Keep it, together with what was used before; work is not stopped because that fails."""
        if self.keep is not None:
            with contextlib.suppress(OSError, LlmliteError):
                write_json(self.keep, _together(self.before, found).to_json())

    def _run(self) -> None:
        while not self.ended.wait(self.every):
            self._read()
            self.write(self.found)

    def _read(self) -> None:
        try:
            if self.found.joules is not None:
                self.found.joules = sum(meter.joules() for meter in self.meters)
        except Exception as error:  # a counter that went away, or a driver's own error
            self.found = Energy(source=f"{self.found.source} could not be read to the end ({type(error).__name__})")
        self.found.seconds = time.perf_counter() - self.started


def _codecarbon() -> Callable[[], float] | None:
    try:
        from codecarbon import OfflineEmissionsTracker
    except ImportError:
        log.warning("estimate_energy needs codecarbon: pip install 'llmlite[energy]'")
        return None
    logging.getLogger("codecarbon").setLevel(logging.ERROR)
    # the country only turns kilowatt hours into CO2, which is not asked of it
    tracker = OfflineEmissionsTracker(country_iso_code="USA", save_to_file=False, log_level="error", allow_multiple_runs=True, measure_power_secs=5)
    tracker.start()

    def finish() -> float:
        tracker.stop()
        return float(tracker.final_emissions_data.energy_consumed) * _JOULES_PER_KWH

    return finish
