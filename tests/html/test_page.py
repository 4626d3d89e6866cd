"""The HTML report: self-contained, escaped, and honest about what is far from its base."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import llmlite
from llmlite.cli import _show_samples, show_evaluation
from llmlite.errors import LoadError, OutputError
from llmlite.evaluation.result import Evaluation
from llmlite.html import plots
from llmlite.html.compare import compare, pareto_front
from llmlite.html.page import run_page, write_page
from llmlite.quantization.error import error_report
from llmlite.report import Report, Row
from tests.conftest import build_tiny
from tests.pruning.test_steps import run_of

SAMPLE = {"prompt": "What does `len` do?", "expected": "It counts.", "answer": "It <b>counts</b> things."}
REMOVED = {
    "units": 8,
    "removed": [[0, 3], [7], [], [1, 2, 5]],
    "damping": [0.1] * 4,
    "relative_output_error": [0.01, 0.05, 0.02, 0.09],
}


def report(path: Path, **changes: Any) -> Report:
    rows = [
        Row("base", 1000, 4_000_000, 20.0, None, None, 100.0, 10.0, 10**9, 3.0, {"sample": SAMPLE, "tokens": 99, "text": "abc"}),
        Row("prune.ffn", 900, 3_500_000, 24.0, 0.2, 0.8, 110.0, 11.0, 10**9, 9.0, {"sample": SAMPLE, "ffn": REMOVED}),
        Row(
            "lora",
            950,
            3_600_000,
            21.0,
            0.15,
            0.82,
            105.0,
            10.5,
            10**9,
            60.0,
            {"sample": SAMPLE, "train_loss": [{"step": step, "loss": 3 / step} for step in range(1, 9)], "optimizer_steps": 8, "trained_tokens": 512},
        ),
    ]
    values: dict[str, Any] = {
        "recipe": {"model": {"name": "tiny/llama"}, "data": {"train": "builtin:python-docs"}, "steps": [{"step": "prune.ffn", "keep": 0.9}, {"step": "lora"}]},
        "evaluation": {"text": "builtin:python-docs", "examples": 4, "tokens": 99},
        "environment": {"device": "cpu", "cpu": "x86_64", "cores": 2, "date": "2026-01-01"},
        "rows": rows,
        "loading": "model = load()",
        "reload_difference": 0.0,
    }
    return Report(path, **(values | changes))


def test_the_page_asks_nothing_of_the_network_and_holds_every_part(tmp_path: Path) -> None:
    text = write_page(report(tmp_path)).read_text(encoding="utf-8")
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.search(r"https?://|<script|@import|<link|<iframe", without_namespaces)
    for heading in ("What was asked", "What came out", "Step by step", "Training", "Layers", "What went", "How to load it", "The recipe"):
        assert f"<h2>{heading}</h2>" in text
    assert "(0.90x)" in text
    assert "+5.0%" in text
    assert text.count("<svg") == 6 + 1 + 1 + 1


def test_what_comes_from_models_and_data_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    base = report(tmp_path).rows[0]
    rows = [
        dataclasses.replace(base, details={"sample": SAMPLE | {"prompt": evil}}),
        dataclasses.replace(base, name=evil, kl=0.0, top1_agreement=1.0, details={"sample": SAMPLE | {"answer": evil}}),
    ]
    text = run_page(report(tmp_path, rows=rows, recipe={"model": {"name": evil}, "steps": [{"step": evil}]}, loading=evil))
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 5


def test_the_worst_layers_and_what_to_do_about_them_are_said_in_words(tmp_path: Path) -> None:
    rows = report(tmp_path).rows
    errors = {f"layers.{n}.mlp.up_proj": 0.002 for n in range(9)} | {"layers.0.mlp.<down>": 0.25}
    rows[1] = dataclasses.replace(rows[1], name="quantize", details=error_report(errors))
    text = run_page(report(tmp_path, rows=rows))
    assert "<b>quantize</b>: Relative output error of a layer on calibration text: 0.027 on average, largest in layers.0.mlp.&lt;down&gt; 0.25, " in text
    assert "skip: [layers.0.mlp.&lt;down&gt;] leaves it in 16 bit." in text
    assert "Relative output error of a layer" not in run_page(report(tmp_path))


def test_a_collapsed_model_is_said_to_be_one(tmp_path: Path) -> None:
    rows = report(tmp_path).rows
    rows[-1] = dataclasses.replace(rows[-1], perplexity=float("inf"), kl=9.0, top1_agreement=0.1)
    text = run_page(report(tmp_path, rows=rows))
    assert "far from its base: perplexity 20 -&gt; inf" in text
    assert "This model" not in run_page(report(tmp_path))


@pytest.fixture
def words_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page without plots, which take most of its time."""
    monkeypatch.setattr(plots, "available", lambda: False)


def evaluated(path: Path, steps: Sequence[str] = (), **changes: Any) -> Evaluation:
    """What `llmlite evaluate` leaves beside `report`, with steps between base and result, and with a word of the caller's wherever text can stand."""
    latency = {"batch": 8, "ttft_p50": 0.1, "ttft_p95": 0.2, "tpot_p50": 0.01, "tpot_p95": 0.02, "decode_tokens_per_second": 5.0}
    latency |= {"prefill_tokens_per_second": 10.0, "peak_memory_bytes": 10**9, "repeats": 5, "prompt_tokens": 256, "new_tokens": 16}
    task = {"task": "arc", "metric": "acc", "value": 0.5, "standard_error": 0.05, "flips": None}
    base: dict[str, Any] = {"bytes_on_disk": 4_000_000, "perplexity": 20.0, "kl": None, "top1_agreement": None, "latency": [latency], "tasks": [task]}
    base |= {"energy": {"kind": "measured", "source": "RAPL"}, "joules_per_1000_tokens": 250.0, "grid_grams_per_kwh": None}
    base |= {"answers": [{"prompt": "Why is the sky blue?", "expected": "Scattering.", "answer": "Air scatters blue."}]}
    step: dict[str, Any] = {"kl": 0.2, "top1_agreement": 0.8, "tasks": [task | {"flips": 0.25}]}
    this = base | {"kl": 0.15, "top1_agreement": 0.82, "tasks": [task | {"flips": 0.125}], "answers": [base["answers"][0] | {"answer": "It is blue."}]}
    between = {f"{number:02d}-{name}": base | step | {"step": f"{number}. {name}"} for number, name in enumerate(steps, 1)}
    models = {"base": base, **between, "this": this}
    return Evaluation(path, {"quality_on": "Quality on 99 tokens.", "device": "cpu", "cpu": "x86_64", "cores": 2} | changes, models)


@pytest.mark.usefixtures("words_only")
def test_what_evaluate_finds_stands_in_the_page(tmp_path: Path) -> None:
    assert "Measured afterwards" not in write_page(report(tmp_path)).read_text(encoding="utf-8")
    evaluated(tmp_path).save()
    text = write_page(report(tmp_path)).read_text(encoding="utf-8")
    assert "<h2>Measured afterwards, both loaded from disk</h2>" in text
    for cells in (
        ("batch 8: TTFT ms, p50 / p95", "100 / 200", "100 / 200"),
        ("batch 8: TPOT ms, p50 / p95", "10.0 / 20.0", "10.0 / 20.0"),
        ("arc (acc)", "0.500 ± 0.050", "0.500 ± 0.050"),
        ("arc: answers flipped", "", "12.5%"),
        ("J per 1,000 tokens (measured, RAPL)", "250", "250"),
    ):
        assert "".join(f"<td>{cell}</td>" for cell in cells) in text
    assert "Quality on 99 tokens. Speed of the reloaded models: 5 repeats" in text
    assert "of so few first tokens nearly the slowest. Speed and energy on cpu (x86_64, 2 cores)" in text
    for words in ("Why is the sky blue?", "Air scatters blue.", "It is blue.", "Scattering."):
        assert f"<blockquote>{words}</blockquote>" in text


@pytest.mark.usefixtures("words_only")
def test_the_result_s_answers_are_shown_where_an_offloaded_base_was_not_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, (base, *steps) = evaluated(tmp_path, ["lora"]), report(tmp_path).rows
    found.models["base"]["answers"] = []
    ran = report(tmp_path, rows=[dataclasses.replace(base, details={"tokens": 99}), steps[0]])
    text = run_page(ran, found)
    for words in ("Why is the sky blue?", "Air scatters blue.", "It is blue.", "Scattering."):
        assert text.count(f"<blockquote>{words}</blockquote>") == 1
    assert "<h2>One held-out question</h2>" in text
    assert "<h2>One held-out question, before and after</h2>" in run_page(report(tmp_path))
    console = Console(highlight=False, width=120)
    show_evaluation(console, found)
    _show_samples(console, ran)
    told = capsys.readouterr().out
    assert "question  Why is the sky blue?\n  1. lora   Air scatters blue.\n  this      It is blue." in told
    assert "A held-out question, answered by the result:\n  question  What does `len` do?\n  prune.ffn It <b>counts</b> things.\n" in told
    _show_samples(console, report(tmp_path))
    assert "answered by the base and by the result:" in capsys.readouterr().out


@pytest.mark.usefixtures("words_only")
def test_energy_from_several_sources_names_the_source_of_each(tmp_path: Path) -> None:
    found = evaluated(tmp_path, ["lora"])
    found.models["01-lora"] |= {"energy": {"kind": "estimated", "source": "codecarbon"}}
    found.models["this"] |= {"energy": {"kind": "not available", "source": ""}, "joules_per_1000_tokens": None}
    cells = ("J per 1,000 tokens", "250 (measured, RAPL)", "250 (estimated, codecarbon)", "not available")
    assert "".join(f"<td>{cell}</td>" for cell in cells) in run_page(report(tmp_path), found)


@pytest.mark.usefixtures("words_only")
def test_what_evaluate_finds_is_escaped_and_a_grid_is_named_where_one_was_stated(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    found = evaluated(tmp_path, quality_on=evil, cpu=evil)
    task = found.models["this"]["tasks"][0] | {"task": evil, "metric": evil}
    for model in found.models.values():
        model |= {"tasks": [task], "energy": {"kind": evil, "source": evil}, "answers": [dict.fromkeys(("prompt", "expected", "answer"), evil)]}
    text = run_page(report(tmp_path), found)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 10
    assert "CO2 at" not in text
    found.models["this"]["grid_grams_per_kwh"] = 400.0
    assert "CO2 at a stated 400 g per kWh." in run_page(report(tmp_path), found)


def with_energy(path: Path, *energies: tuple[float | None, str, str], grid: float | None = None) -> Report:
    found = report(path)
    for row, (joules, kind, source) in zip(found.rows[1:], energies, strict=True):
        row.details["energy"] = {"joules": joules, "kind": kind, "source": source}
    found.recipe["grid_grams_per_kwh"] = grid
    return found


@pytest.mark.usefixtures("words_only")
def test_energy_of_each_step_and_of_all_stands_in_the_page(tmp_path: Path) -> None:
    assert "nergy" not in run_page(report(tmp_path))
    text = run_page(with_energy(tmp_path, (1500.0, "measured", "RAPL"), (500.0, "measured", "RAPL")))
    assert "<td>energy</td><td></td><td>1.5 kJ, measured</td><td>500 J, measured</td>" in text
    assert "<p>Energy of all steps: 2 kJ, measured (RAPL).</p>" in text
    assert "CO2" not in text
    text = run_page(with_energy(tmp_path, (1.8e6, "measured", "<b>"), (1.8e6, "measured", "<b>"), grid=400.0))
    assert "Energy of all steps: 3.6 MJ, measured (&lt;b&gt;); 400 g CO2 at the stated 400 g per kWh." in text


@pytest.mark.usefixtures("words_only")
def test_measured_and_estimated_energy_are_never_added_up(tmp_path: Path) -> None:
    text = run_page(with_energy(tmp_path, (1500.0, "measured", "RAPL"), (500.0, "estimated", "codecarbon"), grid=400.0))
    assert "Energy of prune.ffn: 1.5 kJ, measured (RAPL); 0.167 g CO2" in text
    assert "Energy of lora: 500 J, estimated (codecarbon); 0.0556 g CO2" in text
    assert "is not added up" in text
    assert "2 kJ" not in text
    text = run_page(with_energy(tmp_path, (1500.0, "measured", "RAPL"), (None, "not available", "no counter on this machine can be read")))
    assert "Energy of prune.ffn: 1.5 kJ" in text
    assert "Energy not available: lora (no counter on this machine can be read)." in text


def drawn(page: str, title: str) -> list[tuple[float, float]]:
    """Width and height of each rectangle that the plot with this title fills in the first colour."""
    svg = page[page.index(f'aria-label="{title}"') :]
    paths = re.findall(r'<path d="([^"]*)"[^>]*fill: var\(--first\)', svg[: svg.index("</svg>")])
    corners = [[tuple(map(float, point)) for point in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)] for path in paths]
    return [tuple(max(values) - min(values) for values in zip(*points, strict=True)) for points in corners]  # type: ignore[misc]


@pytest.mark.parametrize(("unit", "shown", "units"), [("kv_groups", "key/value groups", 2), ("query_heads", "query heads", 4)])
def test_which_heads_went_is_a_map_with_a_field_for_each_that_went(unit: Any, shown: str, units: int, tmp_path: Path) -> None:
    model = build_tiny("llama")
    run = run_of(model.config)
    llmlite.PruneHeads(keep=0.5, unit=unit).apply(model, run)
    made = report(tmp_path)
    text = run_page(report(tmp_path, rows=[made.rows[0], dataclasses.replace(made.rows[1], name="prune.heads", details=run.notes)]))
    fields = drawn(text, f"prune.heads: {shown} that went")
    assert len(fields) == model.config.num_hidden_layers * units / 2
    assert f"{shown}, of {units}<" in text
    assert f"prune.heads: relative output error after repair, {shown}" in text


def test_errors_of_quantized_layers_are_means_over_their_projections(tmp_path: Path) -> None:
    errors = {
        "model.layers.0.self_attn.q_proj": 0.1,
        "model.layers.0.mlp.up_proj": 0.3,
        "model.layers.10.mlp.up_proj": 0.025,
        "model.layers.2.mlp.up_proj": 0.05,
    }
    made = report(tmp_path)
    text = run_page(report(tmp_path, rows=[made.rows[0], dataclasses.replace(made.rows[1], name="quantize", details=error_report(errors))]))
    first, second, third = (height for _, height in drawn(text, "quantize: relative output error, mean of a layer&#x27;s projections"))
    assert first / second == pytest.approx(0.2 / 0.05, rel=1e-3)
    assert second / third == pytest.approx(0.05 / 0.025, rel=1e-3)


def test_runs_are_compared_with_the_front_marked_and_different_texts_named(tmp_path: Path) -> None:
    for name, size, perplexity, text in (("small", 1_000_000, 22.0, "abc"), ("worse", 2_000_000, 30.0, "abc"), ("other", 3_000_000, 25.0, "xyz")):
        folder = tmp_path / name
        folder.mkdir()
        base, *_, last = report(folder).rows
        rows = [dataclasses.replace(base, details={"text": text}), dataclasses.replace(last, bytes_on_disk=size, perplexity=perplexity)]
        report(folder, rows=rows).save()
    found = compare([tmp_path / "small", tmp_path / "worse"])
    assert found.names == ["base", "small", "worse"]
    assert found.front == ["base", "small"]
    assert found.fast_front == ["base", "small"]  # both as fast
    assert found.warnings == []
    assert found.cells()[2][:2] == ["worse", ""] or found.cells()[3][:2] == ["worse", ""]
    assert found.page().count("<svg") == 2
    assert "different held-out text" in compare([tmp_path / "small", tmp_path / "other"]).warnings[0]


@pytest.mark.usefixtures("words_only")
def test_speeds_of_runs_are_against_their_own_base_and_have_a_front_of_their_own(tmp_path: Path) -> None:
    for name, own, this, perplexity in (("large and slow", 10.0, 9.0, 22.0), ("fast", 10.0, 30.0, 23.0), ("on a fast machine", 1000.0, 1100.0, 24.0)):
        (tmp_path / name).mkdir()
        made = report(tmp_path / name)
        made.rows[0] = dataclasses.replace(made.rows[0], decode_tokens_per_second=own)
        made.rows[-1] = dataclasses.replace(made.rows[-1], decode_tokens_per_second=this, perplexity=perplexity)
        made.save()
    found = compare([tmp_path / "large and slow", tmp_path / "fast", tmp_path / "on a fast machine"])
    assert [cells[9] for cells in found.cells()] == ["decode", "1.00x", "0.90x", "3.00x", "1.10x"]
    assert found.fast_front == ["base", "fast"]
    assert [cells[1] for cells in found.cells()] == ["front", "size, speed", "size", "speed", ""]
    text = found.page()
    assert "1. large and slow" in text
    assert "<td>size, speed</td>" in text


@pytest.mark.usefixtures("words_only")
def test_thousands_are_written_out(tmp_path: Path) -> None:
    rows = [dataclasses.replace(row, prefill_tokens_per_second=15_034.2, decode_tokens_per_second=1503.4) for row in report(tmp_path).rows]
    text = run_page(report(tmp_path, rows=rows))
    assert "15,034 tokens a second" in text
    assert "1,503 tokens a second" in text
    assert not re.search(r"\de\+0[1-9]", text)


@pytest.mark.parametrize("name", [r"$\nonsense$", "$a_1$", r"\g<9>", r"C:\dir", "<b>&"])
def test_a_name_is_drawn_as_it_is(name: str) -> None:
    drawn = plots.bars(name, ["base", name], [1.0, 2.0], ["1", "2"]) + plots.lines(name, [0, 1], {name: [1.0, 2.0], "other": [2.0, 1.0]}, name, name)
    assert drawn.count(f'aria-label="{html.escape(name)}"') == 2
    assert drawn.count(f">{html.escape(name)}</text>") == 4  # a bar, a curve and both of its axes


def test_a_long_name_keeps_the_end_that_tells_it_from_others() -> None:
    svg = plots.bars("bytes", ["base", "smollm2-135m-pruned-seed-1", "smollm2-135m-pruned-seed-2"], [1, 2, 3], ["1", "2", "3"])
    assert "seed-1" in svg
    assert "seed-2" in svg


def test_a_folder_without_a_report_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="has no report.json"):
        compare([tmp_path])
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(LoadError, match="no report of llmlite's"):
        compare([tmp_path])


def test_the_front_holds_what_nothing_beats_on_both_axes() -> None:
    assert pareto_front({"a": (1, 5), "b": (2, 2), "c": (3, 3), "d": (5, 1)}) == ["a", "b", "d"]
    assert pareto_front({"a": (1, 1), "b": (1, 1)}) == ["a", "b"]
