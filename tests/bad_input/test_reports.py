"""Reports whose values are of another kind: refused by name, or shown; never a traceback in what reads them."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llmlite.cli import main
from llmlite.errors import LoadError, OutputError
from llmlite.evaluation.result import Evaluation
from llmlite.html.compare import compare
from llmlite.html.page import run_page
from llmlite.hub.card import model_card
from llmlite.hub.push import what_is_sent
from llmlite.report import Report, Row

VALUES: list[Any] = [None, -1, 0, 10**400, math.nan, "text", True, [], [[1]], {}, {"step": 3}]


def good(folder: Path) -> Report:
    """A report with every figure that a page, a card or a table shows."""
    sample = {"prompt": "p", "expected": "e", "answer": "a"}
    details = {
        "text": "0123",
        "tokens": 7,
        "sample": sample,
        "train_loss": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}],
        "optimizer_steps": 2,
        "trained_tokens": 8,
        "energy": {"kind": "measured", "source": "RAPL", "joules": 2.5},
        "block_influence": [0.1, 0.2],
        "removed_layers": [1],
        "layer_sparsity": [0.5, 0.5],
        "layer_errors": {"model.layers.0.up": 0.1, "model.layers.1.up": 0.2},
        "length_growth": {"text": 1.1},
        "tokens_kept": 5,
        "tokens_before": 10,
        "ffn": {"units": 4, "removed": [[0], [3]], "relative_output_error": [0.1, 0.2]},
    }
    return Report(
        folder,
        {"model": {"name": "me/base", "add_tokens": ["<a>"]}, "data": {"train": "builtin:python-docs"}, "steps": [{"step": "lora", "r": 2}], "seed": 0},
        {"text": "docs", "examples": 2, "tokens": 7},
        {"device": "cpu", "cores": 2, "torch": "2"},
        [Row("base", 10, 100, 3.0, details={"text": "0123", "tokens": 7, "sample": sample}), Row("lora", 11, 90, 3.1, 0.1, 0.9, 10.0, 5.0, 1000, 2.0, details)],
        "lines",
        {
            "name": "base",
            "hub_id": "me/base",
            "license": "mit",
            "language": ["en"],
            "made_by": [],
            "quantization_config": {"load_in_8bit": True},
            "vocabulary": 9,
        },
        1e-6,
        {"kl": 0.1, "perplexity": 3.0, "bytes_on_disk": 90.0},
    )


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every value within plain values."""
    if isinstance(value, dict):
        return [found for key in value for found in [(*path, key), *places(value[key], (*path, key))]]
    if isinstance(value, list):
        return [found for index, item in enumerate(value) for found in [(*path, index), *places(item, (*path, index))]]
    return []


def shown(folder: Path) -> str:
    """ "good" after everything that reads a report has read it, or the refusal."""
    refused: LoadError | None = None
    try:
        compare([folder, folder]).table()
    except LoadError as error:
        refused = error
    if refused is not None:
        assert refused.exit_code == 2
        assert "report.json" in str(refused)
        assert len(str(refused)) < 1500
        return str(refused)
    report = Report.read(folder)
    report.table()
    report.expectation()
    what_is_sent(folder, report, "me/name")
    return "good"


@pytest.fixture
def result(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run as far as its report goes; nothing is drawn, which takes most of the time."""
    monkeypatch.setattr("llmlite.html.plots.available", lambda: False)
    monkeypatch.setattr("llmlite.html.images.available", lambda: False)
    folder = tmp_path / "run"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def test_every_value_of_a_report_replaced_is_refused_or_shown(result: Path) -> None:
    whole = good(result).to_json()
    outcomes: Counter[bool] = Counter()
    for path in places(whole):
        for value in VALUES:
            mutant: Any = copy.deepcopy(whole)
            place = mutant
            for part in path[:-1]:
                place = place[part]
            place[path[-1]] = value
            (result / "report.json").write_text(json.dumps(mutant))
            outcomes[shown(result) == "good"] += 1
    assert outcomes.total() > 1000
    assert outcomes[False] > 800


def good_evaluation() -> dict[str, Any]:
    """An evaluation with every figure that a page or a card shows."""
    latency = {"batch": 1, "ttft_p50": 0.1, "ttft_p95": 0.2, "tpot_p50": 0.01, "tpot_p95": 0.02, "repeats": 5, "prompt_tokens": 256, "new_tokens": 16}
    latency |= {"prefill_tokens_per_second": 10.0, "decode_tokens_per_second": 5.0, "peak_memory_bytes": 10**9}
    figures = {"bytes_on_disk": 10, "perplexity": 9.0, "kl": 0.1, "top1_agreement": 0.9, "latency": [latency], "joules_per_1000_tokens": 3.0}
    figures |= {"tasks": [{"task": "arc", "metric": "acc", "value": 0.5, "standard_error": 0.05, "flips": 0.125}]}
    figures |= {"energy": {"kind": "measured", "source": "RAPL"}, "grid_grams_per_kwh": 400.0, "grams_co2_per_1000_tokens": 0.1}
    figures |= {"answers": [{"prompt": "p", "expected": "e", "answer": "a"}]}
    about = {"quality_on": "Quality on 7 tokens.", "date": "2026", "cpu": "x", "cores": 2, "device": "cpu", "torch": "2", "transformers": "5"}
    return {"about": about, "models": {"base": figures, "this": {**figures, "step": "1 lora"}}}


def test_an_evaluation_of_any_kind_is_shown_or_left_out_and_not_pushed(result: Path) -> None:
    report = good(result)
    report.save()
    whole = good_evaluation()
    texts = ["[" * 20_000, "{", "[]", "{}", '{"about": {}, "models": {}}', "9" * 5000, '{"about": [], "models": []}']
    for path in places(whole):
        for value in (None, 10**400, "text", [], {"step": 3}):
            mutant: Any = copy.deepcopy(whole)
            place = mutant
            for part in path[:-1]:
                place = place[part]
            place[path[-1]] = value
            texts.append(json.dumps(mutant))
    refused = 0
    for text in [json.dumps(whole), *texts]:
        (result / "evaluation.json").write_text(text)
        run_page(report, Evaluation.read(result))
        model_card(report, result)
        if Evaluation.read(result) is None:
            refused += 1
            with pytest.raises(OutputError, match="not what `llmlite evaluate` writes"):
                what_is_sent(result, report, "me/name")
    assert refused > 100
    (result / "evaluation.json").write_text(json.dumps(whole))
    assert "arc" in str(what_is_sent(result, report, "me/name")["evaluation.json"])


def test_every_key_of_a_report_left_out_is_refused_or_shown(result: Path) -> None:
    whole = good(result).to_json()
    for path in places(whole):
        mutant: Any = copy.deepcopy(whole)
        place = mutant
        for part in path[:-1]:
            place = place[part]
        del place[path[-1]]
        (result / "report.json").write_text(json.dumps(mutant))
        shown(result)


def test_a_good_report_is_read_as_it_was_written_and_drawn(tmp_path: Path) -> None:
    report = good(tmp_path)
    report.save()
    assert Report.read(tmp_path) == report
    assert "<svg" in run_page(report)
    assert "me/base" in model_card(report, tmp_path)


def test_figures_of_a_collapsed_model_are_shown(tmp_path: Path) -> None:
    report = good(tmp_path)
    report.rows[1] = Row("lora", 11, 90, math.inf, math.nan, 0.0, 10.0, 5.0, 1000, 2.0, {"layer_errors": {"a.0.b": math.nan, "a.1.b": math.inf}})
    report.save()
    assert "far from its base" in run_page(Report.read(tmp_path))
    assert compare([tmp_path]).page()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": []}, "rows"),
        ({"recipe": []}, "recipe"),
        ({"evaluation": "text"}, "evaluation"),
        ({"base": []}, "base"),
        ({"rows": [{"name": "base", "parameters": 1, "bytes_on_disk": 1, "perplexity": 0}]}, "perplexity=0 should be above 0"),
    ],
)
@pytest.mark.parametrize("command", [["compare"], ["push", "me/name"], ["evaluate"]], ids=lambda command: command[0])
def test_a_report_of_another_kind_ends_every_command_with_its_place(
    command: list[str], change: dict[str, Any], said: str, result: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (result / "report.json").write_text(json.dumps({**good(result).to_json(), **change}))
    with pytest.raises(SystemExit) as ended:
        main([command[0], str(result), *command[1:]])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
