"""Energy is read from counters, says when it is an estimate, and is never made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmlite.evaluation.energy import Energy, measured_energy


def counter(root: Path, name: str, microjoules: int, most: int = 1_000_000) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    return folder / "energy_uj"


def test_the_packages_counters_are_added_up(tmp_path: Path) -> None:
    one, two = counter(tmp_path, "intel-rapl:0", 100_000), counter(tmp_path, "intel-rapl:1", 200_000)
    with measured_energy(rapl=tmp_path) as energy:
        one.write_text("350000")
        two.write_text("300000")
    assert energy.joules == pytest.approx(0.35)
    assert (energy.source, energy.kind) == ("RAPL", "measured")


def test_a_counter_that_starts_again_goes_on(tmp_path: Path) -> None:
    file = counter(tmp_path, "intel-rapl:0", 900_000)
    with measured_energy(rapl=tmp_path) as energy:
        file.write_text("50000")
    assert energy.joules == pytest.approx(0.15)


def test_a_part_of_a_package_is_not_counted_twice(tmp_path: Path) -> None:
    counter(tmp_path, "intel-rapl:0", 0)
    part = counter(tmp_path, "intel-rapl:0:0", 0)
    with measured_energy(rapl=tmp_path) as energy:
        part.write_text("500000")
    assert energy.joules == 0


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
