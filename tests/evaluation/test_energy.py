"""Energy is read from counters, says when it is an estimate, and is never made up."""

from __future__ import annotations

import ctypes
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import llmlite
from llmlite.evaluation.energy import Energy, measured_energy
from llmlite.hub.card import model_card
from llmlite.report import Report, Row


def counter(root: Path, name: str, microjoules: int, most: int = 1_000_000, zone: str = "package-0") -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{zone}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    return folder / "energy_uj"


def put(file: Path, microjoules: int) -> None:
    """Let a counter stand at so much, in one go, as the kernel does."""
    file.with_suffix(".new").write_text(f"{microjoules}\n")
    file.with_suffix(".new").replace(file)


def test_the_packages_counters_are_added_up(tmp_path: Path) -> None:
    one, two = counter(tmp_path, "intel-rapl:0", 100_000), counter(tmp_path, "intel-rapl:1", 200_000)
    with measured_energy(rapl=tmp_path) as energy:
        put(one, 350000)
        put(two, 300000)
    assert energy.joules == pytest.approx(0.35)
    assert (energy.source, energy.kind) == ("RAPL", "measured")


def test_a_counter_that_starts_again_goes_on(tmp_path: Path) -> None:
    file = counter(tmp_path, "intel-rapl:0", 900_000)
    with measured_energy(rapl=tmp_path) as energy:
        put(file, 50000)
    assert energy.joules == pytest.approx(0.15)


def test_a_part_of_a_package_is_not_counted_twice(tmp_path: Path) -> None:
    counter(tmp_path, "intel-rapl:0", 0)
    part = counter(tmp_path, "intel-rapl:0:0", 0)
    with measured_energy(rapl=tmp_path) as energy:
        put(part, 500000)
    assert energy.joules == 0


def test_the_whole_board_is_not_added_to_the_packages_that_it_holds(tmp_path: Path) -> None:
    package, board = counter(tmp_path, "intel-rapl:0", 0), counter(tmp_path, "intel-rapl:1", 0, zone="psys")
    with measured_energy(rapl=tmp_path) as energy:
        put(package, 150000)
        put(board, 250000)
    assert energy.joules == pytest.approx(0.15)


def await_reading(file: Path, joules: float) -> None:
    """Wait until the thread has kept so much."""
    deadline = time.monotonic() + 20
    while json.loads(file.read_text())["joules"] != pytest.approx(joules):
        assert time.monotonic() < deadline, file.read_text()
        time.sleep(0.005)


def test_a_counter_that_starts_again_many_times_in_a_long_step_goes_on(tmp_path: Path) -> None:
    file = counter(tmp_path / "rapl", "intel-rapl:0", 900_000)
    with measured_energy(rapl=tmp_path / "rapl", keep=tmp_path / "energy.json", every=0.005) as energy:
        for turn in range(4):
            put(file, 500000)
            await_reading(tmp_path / "energy.json", 0.6 + turn)
            put(file, 900000)
            await_reading(tmp_path / "energy.json", 1.0 + turn)
    assert energy.joules == pytest.approx(4.0)


def test_what_a_killed_process_had_used_counts_for_the_step_that_continues(tmp_path: Path) -> None:
    file, keep = counter(tmp_path / "rapl", "intel-rapl:0", 0), tmp_path / "energy.json"

    def use(microjoules: int) -> Energy:
        with measured_energy(rapl=tmp_path / "rapl", keep=keep, every=0.005) as energy:
            put(file, int(file.read_text()) + microjoules)
        return energy

    assert use(100_000).joules == pytest.approx(0.1)
    with pytest.raises(KeyboardInterrupt), measured_energy(rapl=tmp_path / "rapl", keep=keep):
        put(file, 150000)
        raise KeyboardInterrupt
    whole = use(200_000)
    assert (whole.joules, whole.source, whole.kind) == (pytest.approx(0.35), "RAPL", "measured")


def test_seconds_of_a_killed_process_count_where_no_counter_is(tmp_path: Path) -> None:
    keep = tmp_path / "energy.json"
    with measured_energy(rapl=tmp_path / "none", keep=keep, every=0.005):
        await_seconds = time.monotonic() + 10
        while not json.loads(keep.read_text())["seconds"] and time.monotonic() < await_seconds:  # it is kept while the work lasts
            time.sleep(0.005)
        assert json.loads(keep.read_text())["seconds"] > 0
    keep.write_text(json.dumps({**json.loads(keep.read_text()), "seconds": 3600.0}))
    with measured_energy(rapl=tmp_path / "none", keep=keep) as energy:
        pass
    assert 3600 < energy.seconds < 3660
    assert energy.joules is None


@pytest.mark.parametrize(
    "before",
    [
        {"joules": 5.0, "source": "codecarbon", "kind": "estimated"},
        {"joules": None, "source": "no counter on this machine can be read", "kind": "not available"},
        ["no energy at all"],
    ],
)
def test_a_part_that_is_of_another_kind_or_unknown_makes_the_whole_unknown(before: Any, tmp_path: Path) -> None:
    file, keep = counter(tmp_path / "rapl", "intel-rapl:0", 0), tmp_path / "energy.json"
    keep.write_text(json.dumps(before))
    with measured_energy(rapl=tmp_path / "rapl", keep=keep) as energy:
        put(file, 150000)
    assert (energy.joules, energy.kind) == (None, "not available")
    assert energy.source.startswith("stopped and continued: ")
    assert energy.source.endswith("then RAPL (measured)")


def test_a_counter_that_goes_away_leaves_nothing_half_counted(tmp_path: Path) -> None:
    file = counter(tmp_path, "intel-rapl:0", 0)
    with measured_energy(rapl=tmp_path) as energy:
        file.unlink()
    assert (energy.joules, energy.kind) == (None, "not available")
    assert energy.source == "RAPL could not be read to the end (FileNotFoundError)"


def test_of_a_launch_on_several_machines_one_machine_is_not_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter(tmp_path, "intel-rapl:0", 0)
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with measured_energy(rapl=tmp_path) as energy:
        pass
    assert energy.joules is None
    assert "several machines" in energy.source


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A stand-in for NVML: millijoules of each GPU by its name; torch sees the last two of three, and this process holds memory on the very last."""
    counters = {"GPU-a": 1_000, "GPU-b": 10_000, "GPU-c": 100_000}
    nvml = SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=str, nvmlDeviceGetTotalEnergyConsumption=counters.__getitem__)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="bc"[index]))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda index: [0, 10**9][index])
    return counters


def test_only_the_gpus_that_this_process_uses_are_counted(three_gpus: dict[str, int], tmp_path: Path) -> None:
    file = counter(tmp_path, "intel-rapl:0", 0)
    with measured_energy("cuda", rapl=tmp_path) as energy:
        for name, used in zip(three_gpus, (7_000, 70_000, 700), strict=True):
            three_gpus[name] += used
        put(file, 100000)
    assert (energy.joules, energy.source, energy.kind) == (pytest.approx(0.7 + 0.1), "NVML + RAPL", "measured")


def test_of_several_processes_on_this_machine_the_gpu_of_each_is_counted(three_gpus: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with measured_energy("cuda", rapl=tmp_path) as energy:
        for name, used in zip(three_gpus, (7_000, 70_000, 700), strict=True):
            three_gpus[name] += used
    assert (energy.joules, energy.source) == (pytest.approx(70.7), "NVML")


def test_a_gpu_without_a_counter_leaves_the_whole_unknown(three_gpus: dict[str, int], tmp_path: Path) -> None:
    del three_gpus["GPU-c"]
    counter(tmp_path, "intel-rapl:0", 0)  # the processor alone would pass for the whole
    with measured_energy("cuda", rapl=tmp_path) as energy:
        pass
    assert (energy.joules, energy.kind) == (None, "not available")


def test_where_the_others_of_a_launch_wait_only_this_process_is_counted(three_gpus: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # on two machines
    with measured_energy("cuda", rapl=tmp_path, alone=True) as energy:
        for name, used in zip(three_gpus, (7_000, 70_000, 700), strict=True):
            three_gpus[name] += used
    assert (energy.joules, energy.source) == (pytest.approx(0.7), "NVML")


class Driver:
    """A stand-in for the driver's library beneath the real nvidia-ml-py: C functions that ctypes calls, as libnvidia-ml.so.1 exports them.

    `millijoules` has the counters in the order of the bus; `refuses` is NVML's number of an error that the counter of a GPU gives.
    """

    def __init__(self, millijoules: dict[str, int], refuses: dict[str, int] | None = None) -> None:
        self.millijoules, self.refuses = millijoules, refuses or {}
        self.asked: list[str] = []
        names = list(millijoules)

        def handle_by_uuid(uuid: bytes, device: Any) -> int:
            self.asked.append(uuid.decode())
            if uuid.decode() not in names:
                return 6  # NVML_ERROR_NOT_FOUND
            ctypes.cast(device, ctypes.POINTER(ctypes.c_size_t))[0] = 1 + names.index(uuid.decode())
            return 0

        def energy(device: int, found: Any) -> int:
            name = names[device - 1]
            ctypes.cast(found, ctypes.POINTER(ctypes.c_uint64))[0] = self.millijoules[name]
            return self.refuses.get(name, 0)

        pointer, number = ctypes.c_void_p, ctypes.c_int
        self.nvmlInitWithFlags = ctypes.CFUNCTYPE(number, ctypes.c_uint)(lambda flags: 0)
        self.nvmlDeviceGetHandleByUUID = ctypes.CFUNCTYPE(number, ctypes.c_char_p, pointer)(handle_by_uuid)
        self.nvmlDeviceGetTotalEnergyConsumption = ctypes.CFUNCTYPE(number, pointer, pointer)(energy)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Driver]:
    """The real nvidia-ml-py over such a driver; torch sees the GPUs with these UUIDs, in its own order, and this process holds memory on the first."""
    pynvml = pytest.importorskip("pynvml")

    def installed(visible: list[str], millijoules: dict[str, int], refuses: dict[str, int] | None = None) -> Driver:
        driver = Driver(millijoules, refuses)
        monkeypatch.setattr(pynvml, "nvmlLib", driver)
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=visible[index]))
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda index: 10**9 if index == 0 else 0)
        return driver

    return installed


ONE, TWO = "8e2f1c3a-0000-1111-2222-333344445555", "9f3a2d4b-0000-1111-2222-333344445555"


def test_nvidia_ml_py_reads_millijoules_of_the_gpu_that_torch_computes_on_by_its_uuid(nvml: Callable[..., Driver], tmp_path: Path) -> None:
    driver = nvml([TWO, ONE], {f"GPU-{ONE}": 5_000, f"GPU-{TWO}": 2**40})  # CUDA_VISIBLE_DEVICES has turned the bus around
    with measured_energy("cuda", rapl=tmp_path) as energy:
        driver.millijoules[f"GPU-{ONE}"] += 9_000
        driver.millijoules[f"GPU-{TWO}"] += 2_500
    assert (energy.joules, energy.source, energy.kind) == (pytest.approx(2.5), "NVML", "measured")
    assert driver.asked == [f"GPU-{TWO}", f"GPU-{ONE}"]


def require_next_source(rapl: Path, said: str, caplog: pytest.LogCaptureFixture) -> None:
    """Want a GPU that cannot be read to make energy unknown, or estimated where that is asked for."""
    with measured_energy("cuda", rapl=rapl) as energy:
        pass
    assert (energy.joules, energy.kind) == (None, "not available")
    assert f"no energy counter of the GPU: {said}" in caplog.messages
    with measured_energy("cuda", rapl=rapl, estimate=True) as energy:
        sum(range(10**5))
    assert (energy.source, energy.kind) == ("codecarbon", "estimated")


@pytest.mark.parametrize(
    ("visible", "refuses", "said"),
    [
        ([ONE], {f"GPU-{ONE}": 3}, "Not Supported"),  # before Volta
        ([TWO], {}, "Not Found"),  # a slice (MIG): its UUID is no GPU's
        ([ONE], {f"GPU-{ONE}": 4}, "Insufficient Permissions"),
    ],
)
def test_a_gpu_that_nvidia_ml_py_cannot_read_ends_in_the_next_source(
    visible: list[str], refuses: dict[str, int], said: str, nvml: Callable[..., Driver], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    nvml(visible, {f"GPU-{ONE}": 5_000}, refuses)
    counter(tmp_path, "intel-rapl:0", 0)
    require_next_source(tmp_path, said, caplog)


def test_a_gpu_that_is_lost_in_the_middle_leaves_nothing_half_counted(nvml: Callable[..., Driver], tmp_path: Path) -> None:
    driver = nvml([ONE], {f"GPU-{ONE}": 5_000})
    with measured_energy("cuda", rapl=tmp_path) as energy:
        driver.refuses[f"GPU-{ONE}"] = 15  # NVML_ERROR_GPU_IS_LOST
    assert (energy.joules, energy.source) == (None, "NVML could not be read to the end (NVMLError_GpuIsLost)")


def test_without_a_driver_nvidia_ml_py_says_so_and_the_next_source_is_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pynvml = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
        pytest.skip("this machine has NVIDIA's driver")
    except pynvml.NVMLError as error:
        missing = str(error)
    caplog.set_level("INFO")
    require_next_source(tmp_path, missing, caplog)


def test_the_card_adds_up_neither_kinds_nor_steps_of_which_one_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmlite.html.images.available", lambda: False)

    def card(*energies: tuple[float | None, str]) -> str:
        steps = [Row(f"step {n}", 1, 1, 2.0, details={"energy": {"joules": j, "kind": k, "source": "it"}}) for n, (j, k) in enumerate(energies)]
        recipe = {"model": {"name": "a/b"}, "data": {"train": "builtin:python-docs"}, "steps": [{"step": "lora"}] * len(steps), "grid_grams_per_kwh": 400.0}
        return model_card(Report(tmp_path, recipe, {}, {"device": "cpu"}, [Row("base", 1, 1, 2.0), *steps], base={"name": "a/b"}), tmp_path)

    assert "joules (measured, it) |  | 3 |" in card((1.0, "measured"), (2.0, "measured"))
    assert "emissions: 0.000333" in card((1.0, "measured"), (2.0, "measured"))
    for mixed in (card((1.0, "measured"), (2.0, "estimated")), card((1.0, "measured"), (None, "not available"))):
        assert "joules" not in mixed
        assert "co2_eq_emissions" not in mixed
        assert "- energy" in mixed


def test_a_run_notes_the_energy_of_each_step_its_stops_included(model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = itertools.count(step=2)  # joules since the start: 2 more at each reading

    class Meter:
        name = "a meter"

        def joules(self) -> float:
            return float(next(meter))

    monkeypatch.setattr("llmlite.evaluation.energy._Rapl.found", lambda root: Meter())
    monkeypatch.setattr("llmlite.pipeline._Pipeline._finish", lambda self: None)
    monkeypatch.setattr("llmlite.pipeline._Pipeline._sample", lambda self, model: {})
    monkeypatch.setattr("llmlite.evaluation.speed.measure_speed", lambda model: None)
    data = llmlite.Data(train=str(pairs_file), max_length=64, evaluation_rows=4)
    recipe = llmlite.Recipe(model=str(model_folder), data=data, steps=[llmlite.PruneWeights(method="magnitude")], output_dir=str(tmp_path / "out"))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("llmlite.pipeline._Pipeline._apply", lambda self, index, step: (_ for _ in ()).throw(KeyboardInterrupt))
        recipe.run()
    kept = json.loads((tmp_path / "out" / "steps" / "01-prune.weights.work" / "energy.json").read_text())
    assert (kept["source"], kept["kind"]) == ("a meter", "measured")
    energy = recipe.run().rows[1].details["energy"]
    assert (energy["source"], energy["kind"]) == ("a meter", "measured")
    assert energy["joules"] > kept["joules"]


def test_without_a_counter_it_is_not_available(tmp_path: Path) -> None:
    with measured_energy(rapl=tmp_path) as energy:
        pass
    assert energy.joules is None
    assert energy.kind == "not available"
    assert energy.source.startswith("no counter")
    assert energy.grams_co2(400) is None


def test_an_estimate_is_called_one(tmp_path: Path) -> None:
    with measured_energy(rapl=tmp_path, estimate=True) as energy:
        sum(range(10**6))
    assert energy.joules is not None
    assert energy.joules > 0
    assert (energy.source, energy.kind) == ("codecarbon", "estimated")


def test_a_counter_is_preferred_to_an_estimate(tmp_path: Path) -> None:
    counter(tmp_path, "intel-rapl:0", 0)
    with measured_energy(rapl=tmp_path, estimate=True) as energy:
        pass
    assert energy.kind == "measured"


def test_co2_needs_a_stated_grid() -> None:
    energy = Energy(3.6e6, "RAPL", "measured")
    assert energy.grams_co2(400) == pytest.approx(400)
    assert energy.grams_co2(None) is None
