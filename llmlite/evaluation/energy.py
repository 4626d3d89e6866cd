"""Energy of a block of work, from counters where the machine has them, estimated only where that is asked for, and never both in one number.

    NVML          the GPUs' own counters                                        measured
    RAPL          the processor packages' counters (/sys/class/powercap)        measured
    codecarbon    processor load times rated power, plus memory by its size     estimated, on request
    else          not available

Grams of CO2 are joules times the intensity of a grid that somebody has to state; llmlite assumes none.

Source: Strubell et al. 2019, arXiv:1906.02243, for why it belongs in a report; codecarbon.io for the estimate.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
    """

    joules: float | None = None
    source: str = ""
    kind: str = "not available"

    def grams_co2(self, grams_per_kwh: float | None) -> float | None:
        """Grams of CO2 equivalent with a stated grid intensity; None without either."""
        return None if self.joules is None or grams_per_kwh is None else self.joules / _JOULES_PER_KWH * grams_per_kwh

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@contextmanager
def measured_energy(device_type: str = "cpu", *, estimate: bool = False, rapl: Path = _RAPL) -> Iterator[Energy]:
    """Measure the energy of the block.

    Args:
        device_type: ``cuda`` reads the GPUs' counters as well.
        estimate: let codecarbon estimate where there is no counter.
        rapl: folder of the processors' counters.
    """
    energy = Energy()
    meters = [meter for meter in ((_nvml() if device_type == "cuda" else None), _rapl(rapl)) if meter is not None]
    if device_type == "cuda" and not any(name == "NVML" for name, _ in meters):
        meters = []  # the processor's joules alone would pass for the whole
    finish = _codecarbon() if estimate and not meters else None
    before = [read() for _, read in meters]
    try:
        yield energy
    finally:
        if meters:
            energy.joules = sum(read() - start for (_, read), start in zip(meters, before, strict=True))
            energy.source, energy.kind = " + ".join(name for name, _ in meters), "measured"
        elif finish is not None:
            energy.joules, energy.source, energy.kind = finish(), "codecarbon", "estimated"
        else:
            energy.source = "no counter on this machine can be read" + ("" if estimate else "; estimate_energy asks codecarbon instead")


Meter = tuple[str, Callable[[], float]]


def _nvml() -> Meter | None:
    """Joules of all GPUs since their drivers were loaded. Untested on GPU."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        for handle in handles:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception as error:  # no library, no driver, or a GPU older than Volta
        log.info("no energy counter of the GPU: %s", error)
        return None
    return "NVML", lambda: sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles) / 1000


class _Counter:
    """One package's counter in microjoules, which starts again at its range."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "energy_uj"
        self.range = int((folder / "max_energy_range_uj").read_text())
        self.last = int(self.file.read_text())
        self.turns = 0

    def joules(self) -> float:
        now = int(self.file.read_text())
        self.turns += now < self.last
        self.last = now
        return (self.turns * self.range + now) / 1e6


def _rapl(root: Path) -> Meter | None:
    try:
        counters = [_Counter(folder) for folder in sorted(root.glob("intel-rapl:?"))]
    except (OSError, ValueError):  # only root may read it on most systems
        return None
    return ("RAPL", lambda: sum(counter.joules() for counter in counters)) if counters else None


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
