"""The HTML report: self-contained, escaped, laid out without overflow in a real browser, and honest about what is far from its base."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llmlite.errors import LoadError, OutputError
from llmlite.html.compare import compare, pareto_front
from llmlite.html.page import run_page, write_page
from llmlite.quantization.error import error_report
from llmlite.report import Report, Row

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
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


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [500, 1200])
def test_nothing_overflows_and_no_plot_is_empty_in_a_browser(tmp_path: Path, width: int) -> None:
    script = """<script>
    addEventListener("load", () => {
      const wide = [...document.querySelectorAll("body *:not(svg *)")]
        .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".wide, pre"));
      const plots = [...document.querySelectorAll("svg")].map(e => ({ height: e.getBoundingClientRect().height, width: e.getBoundingClientRect().width,
        out: [...e.querySelectorAll("text")].filter(t => { const a = t.getBoundingClientRect(), b = e.getBoundingClientRect();
          return a.right > b.right + 2 || a.left < b.left - 2; }).map(t => t.textContent), shapes: e.querySelectorAll("path, rect").length }));
      document.body.innerHTML = "<pre id=found>" + JSON.stringify({ wide: wide.map(e => e.tagName), plots }) + "</pre>";
    });</script>"""
    text = re.sub(r"<meta http-equiv[^>]*>", script, run_page(report(tmp_path)))
    page = tmp_path / "page.html"
    page.write_text(text, encoding="utf-8")
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},2000",
        "--dump-dom",
    ]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None, done.stdout[-400:]
    found = json.loads(match[1])
    assert found["wide"] == []
    assert len(found["plots"]) == 9
    for plot in found["plots"]:
        assert plot["out"] == []
        assert plot["shapes"] > 3
        assert plot["height"] > 60
        assert plot["width"] > 200


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
    assert found.warnings == []
    assert found.cells()[2][:2] == ["worse", ""] or found.cells()[3][:2] == ["worse", ""]
    assert found.page().count("<svg") == 2
    assert "different held-out text" in compare([tmp_path / "small", tmp_path / "other"]).warnings[0]


def test_a_folder_without_a_report_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="has no report.json"):
        compare([tmp_path])
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(LoadError, match="no report of llmlite's"):
        compare([tmp_path])


def test_the_front_holds_what_nothing_beats_on_both_axes() -> None:
    assert pareto_front({"a": (1, 5), "b": (2, 2), "c": (3, 3), "d": (5, 1)}) == ["a", "b", "d"]
    assert pareto_front({"a": (1, 1), "b": (1, 1)}) == ["a", "b"]
