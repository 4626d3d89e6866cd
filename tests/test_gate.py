"""Gates: what crosses them, what they say, and how a run behaves at one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import llmlite
from llmlite.errors import ConfigError, GateFailed
from llmlite.gate import COLLAPSE, Gate

SMALL: dict[str, Any] = {"max_length": 64, "evaluation_rows": 6}


def ffn_recipe(model_folder: Path, pairs_file: Path, out: Path, gate: Gate, step_gate: Gate | None = None) -> llmlite.Recipe:
    step = llmlite.PruneFfn(keep=0.5, multiple_of=1, score="magnitude", reconstruct=False, gate=step_gate or Gate())
    return llmlite.Recipe(model=str(model_folder), data=llmlite.Data(train=str(pairs_file), **SMALL), steps=(step,), output_dir=str(out), gate=gate)


def test_each_limit_is_named_with_the_figure_that_crosses_it() -> None:
    gate = Gate(perplexity_increase=0.05, kl=0.1, agreement=0.9)
    assert gate.crossed(20.0, 20.9, 0.09, 0.91) == []
    assert gate.crossed(20.0, 22.0, 0.2, 0.5) == [
        "perplexity 20 -> 22 (+10.0%; limit +5.0%)",
        "KL to the base 0.2 nats a token (limit 0.1)",
        "top-1 agreement with the base 50.0% (limit 90.0%)",
    ]


def test_a_figure_that_is_no_number_crosses() -> None:
    assert len(COLLAPSE.crossed(20.0, math.nan, math.nan, math.nan)) == 3
    assert "without bound" in COLLAPSE.crossed(20.0, math.inf, None, None)[0]


def test_an_empty_gate_is_false_and_checks_nothing() -> None:
    assert not Gate()
    assert Gate(kl=0.0)
    assert Gate().crossed(1.0, math.inf, math.inf, 0.0) == []


def test_yaml_gives_a_gate_as_a_mapping_and_its_mistakes_are_named() -> None:
    recipe = llmlite.Recipe.from_options(("flags", {"steps": ["quantize"], "gate": {"kl": 0.1}, "steps.0.gate.agreement": 0.9}))
    assert recipe.gate == Gate(kl=0.1)
    assert recipe.steps[0].gate == Gate(agreement=0.9)
    with pytest.raises(ConfigError, match=r"perplexity_increas'\. Did you mean 'perplexity_increase'"):
        llmlite.Recipe.from_options(("flags", {"steps": ["quantize"], "gate": {"perplexity_increas": 0.1}}))
    with pytest.raises(ConfigError, match="agreement=2"):
        llmlite.Recipe.from_options(("flags", {"steps": ["quantize"], "gate.agreement": 2}))


def test_a_gate_is_no_part_of_what_a_continuation_must_agree_with() -> None:
    tight, loose = (llmlite.Recipe(steps=(llmlite.Quantize(gate=Gate(kl=kl)),), gate=Gate(kl=kl)) for kl in (0.1, 1.0))
    assert tight.identity() == loose.identity()


def test_a_crossed_gate_stops_with_exit_code_3_and_a_looser_one_continues_without_doing_the_step_again(
    model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(GateFailed, match=r"(?s)step 1, prune.ffn, went too far: KL to the base .*last good model is the base.*Try: keep more") as failed:
        ffn_recipe(model_folder, pairs_file, out, Gate(kl=1e-9)).run()
    assert failed.value.exit_code == 3
    assert not (out / "model.safetensors").exists()
    written = (out / "steps" / "01-prune.ffn" / "model.safetensors").stat().st_mtime_ns
    report = ffn_recipe(model_folder, pairs_file, out, Gate(kl=1e9)).run()
    assert (out / "steps" / "01-prune.ffn" / "model.safetensors").stat().st_mtime_ns == written
    assert (out / "model.safetensors").exists()
    with pytest.raises(GateFailed):
        ffn_recipe(model_folder, pairs_file, out, Gate(kl=1e-9)).run()
    assert report.rows[-1].kl is not None


def test_a_steps_own_gate_replaces_the_recipes(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    report = ffn_recipe(model_folder, pairs_file, tmp_path / "out", Gate(kl=1e-9), step_gate=Gate(kl=1e9)).run()
    assert len(report.rows) == 2
