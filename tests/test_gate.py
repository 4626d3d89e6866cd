"""Gates: what crosses them, what they say, and how a run behaves at one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import llmlite
from llmlite.cli import main
from llmlite.config import to_yaml
from llmlite.context import Run
from llmlite.errors import ConfigError, GateFailed
from llmlite.gate import COLLAPSE, Gate, collapse_warning
from llmlite.pipeline import _Pipeline
from llmlite.report import Report, Row
from tests.conftest import logits_of

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


def test_a_collapse_is_one_sentence_and_what_is_near_its_base_none() -> None:
    assert collapse_warning(20.0, 22.0, 0.2, 0.9) == ""
    assert collapse_warning(20.0, 22.0, None, None) == ""
    assert collapse_warning(328.0, 3.4e33, 80.0, 0.0) == (
        "This model is far from its base: perplexity 328 -> 3.4e+33 (1.04e+31 times; limit +100.0%); KL to the base 80 nats a token (limit 1); "
        "top-1 agreement with the base 0.0% (limit 50.0%)."
    )


def test_a_run_without_a_gate_warns_of_a_collapse_and_goes_on(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    recipe = llmlite.Recipe(steps=(llmlite.Quantize(),), output_dir=str(tmp_path / "out"))
    pipeline = _Pipeline(recipe, Run(recipe), tmp_path / "out")
    pipeline.report.rows = [Row("base", 1, 1, 20.0)]
    pipeline._gate(0, Row("quantize", 1, 1, 21.0, 0.1, 0.9))
    assert caplog.messages == []
    pipeline._gate(0, Row("quantize", 1, 1, 90.0, 0.1, 0.9))
    assert caplog.messages == [
        "quantize: the model is far from its base: perplexity 20 -> 90 (+350.0%; limit +100.0%). To stop at such a step, set a gate.",
    ]


def test_compare_says_which_run_collapsed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name, perplexity in (("good", 21.0), ("bad", 3e5)):
        (tmp_path / name).mkdir()
        Report(tmp_path / name, {}, {}, {}, [Row("base", 1, 9, 20.0), Row("quantize", 1, 5, perplexity, 0.1, 0.9)]).save()
    main(["compare", str(tmp_path / "good"), str(tmp_path / "bad"), "--html", str(tmp_path / "page.html")])
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Note: ")]
    assert note.startswith("Note: bad: This model is far from its base: perplexity 20 -> 3e+05")
    assert "bad: This model is far from its base" in (tmp_path / "page.html").read_text()


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


def test_a_gate_for_the_end_lets_a_step_heal_what_one_before_it_broke(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    recipe = llmlite.Recipe.from_options(
        ("flags", {"steps": ["prune.ffn", "finetune", "quantize"], "gate": {"perplexity_increase": 0.1, "when": "end"}, "output_dir": str(tmp_path / "out")})
    )
    pipeline = _Pipeline(recipe, Run(recipe), tmp_path / "out")

    def gate(*perplexities: float) -> None:
        pipeline.report.rows = [Row("base", 1, 1, 20.0)]
        for index, perplexity in enumerate(perplexities):
            pipeline.report.rows.append(Row(f"step {index + 1}", 1, 1, perplexity, 0.1, 0.9))
            pipeline._gate(index, pipeline.report.rows[-1])

    gate(90.0, 21.0, 21.5)
    assert [message.rpartition(". ")[2] for message in caplog.messages] == ["The gate is for the end, so the steps behind may heal it."]
    with pytest.raises(GateFailed, match=r"(?s)the result, behind step 3, step 3, is too far from the base: perplexity 20 -> 90.*model is in .*02-finetune"):
        gate(90.0, 21.0, 90.0)
    with pytest.raises(GateFailed, match="The last good model is the base"):
        gate(90.0, 30.0, 25.0)


def test_when_is_a_word_for_the_recipes_gate_and_no_limit() -> None:
    assert not Gate(when="end")
    assert llmlite.Recipe.from_options(("flags", {"steps": ["quantize"], "gate": {"kl": 0.1}, "gate.when": "end"})).gate == Gate(kl=0.1, when="end")
    with pytest.raises(ConfigError, match=r"steps\[0\]\.gate: when=end is of the recipe's gate"):
        llmlite.Recipe.from_options(("flags", {"steps": [{"step": "quantize", "gate": {"kl": 0.1, "when": "end"}}]}))
    with pytest.raises(ConfigError, match="when='later'"):
        llmlite.Recipe.from_options(("flags", {"steps": ["quantize"], "gate": {"kl": 0.1, "when": "later"}}))


def test_the_command_ends_with_3_and_the_last_good_model_of_a_later_step_loads(
    model_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "out", tmp_path / "recipe.yaml"
    step = {"step": "prune.ffn", "keep": 0.5, "multiple_of": 1, "score": "magnitude", "reconstruct": False}
    recipe = {"model": str(model_folder), "data": {"train": str(pairs_file), **SMALL}, "output_dir": str(out)}
    file.write_text(to_yaml({**recipe, "steps": [step, step], "gate": {"kl": 1e-9, "when": "end"}}))
    with pytest.raises(SystemExit) as ended:
        main(["run", str(file)])
    assert ended.value.code == 3
    assert "GateFailed: gate: the result, behind step 2, prune.ffn, is too far from the base" in capsys.readouterr().err
    file.write_text(to_yaml({**recipe, "steps": [step, step | {"gate": {"kl": 1e-9}}]}))
    with pytest.raises(SystemExit) as ended:
        main(["run", str(file)])
    assert ended.value.code == 3
    good = out / "steps" / "01-prune.ffn"
    assert f"The last good model is in {good}. Try: keep more" in capsys.readouterr().err
    row = json.loads((good / "row.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(good)
    assert model.num_parameters() == row["parameters"] < AutoModelForCausalLM.from_pretrained(model_folder).num_parameters()
    assert logits_of(model).isfinite().all()


def test_a_steps_own_gate_replaces_the_recipes(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    report = ffn_recipe(model_folder, pairs_file, tmp_path / "out", Gate(kl=1e-9), step_gate=Gate(kl=1e9)).run()
    assert len(report.rows) == 2
