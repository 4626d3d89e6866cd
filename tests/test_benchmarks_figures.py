"""The main tables of `benchmarks/README.md`, the table of the teacher's caches and the README's own say what `benchmarks/results/*.json` says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs_figures import merging, results, row

ROOT = Path(__file__).parent.parent


def rows_under(page: str, heading: str, column: str) -> list[str]:
    """The rows of the one table below a heading whose first line holds `column`, without emphasis."""
    section = (ROOT / page).read_text(encoding="utf-8").partition(f"\n{heading}\n")[2].partition("\n## ")[0]
    tables = [block.splitlines() for block in section.split("\n\n") if block.startswith("|") and column in block.partition("\n")[0]]
    (found,) = tables
    return [" ".join(line.replace("*", "").split()) for line in found[2:]]


def headline(file: str = "headline", digits: int = 3) -> list[str]:
    return [
        row(one["row"], f"{one['of_the_base']:.2f}", f"{one['perplexity_ratio']:.3f}", f"{one['kl']:.{digits}f}", f"{one['top1_agreement']:.1%}")
        for one in results(file)["rows"]
    ]


def headline_gpt2() -> list[str]:
    return headline("headline_gpt2", digits=4)


def losses() -> list[str]:
    return [
        row(one["loss"], f"{one['time']:.2f}", f"{one['cpu_time']:.2f}", f"{one['memory']:.2f}", f"{one['relative_error']:.1e}")
        for one in results("losses")["rows"]
    ]


def cache() -> list[str]:
    found = []
    for one in results("distillation_cache")["rows"]:
        kind, _, k = one["kind"].partition("-")
        name = "live" if kind == "live" else f"`{kind}`{f', {k}' if k else ''}"
        errors = (error_shown(one["gradient_error"]), error_shown(one["gradient_error_kl_alone"]))
        filling = f"{one['fill_in_live_steps']:.2f}" if "fill_in_live_steps" in one else ""
        found.append(row(name, *cached_steps(one), f"{one['bytes_per_token']:,}", *errors, filling))
    return found


def cached_steps(one: dict[str, Any]) -> list[str]:
    return [f"{one['students'][student]['cpu_time']:.2f}" for student in ("a fifth gone", "half gone", "a fifth gone, LoRA")]


def error_shown(error: float) -> str:
    return f"{error:.2g}" if error == 0 else f"{error:#.2g}"


def quantization() -> list[str]:
    table = results("peers_quantization")["table"]
    one_pass, wide, stock = table["dense"]["calibration_pass_cpu_seconds"], table["float32"], table["bitsandbytes NF4"]
    found = []
    for name, one in table.items():
        if name == "dense":
            continue
        bits = "" if one.get("bits_per_weight") is None else f"{one['bits_per_weight']:.2f}"
        size = "" if one.get("bytes") is None else f"{one['bytes'] / 1e6:.0f} MB"
        kl = (f"{one[text]['kl']:.4f} ({one[text]['kl'] / stock[text]['kl']:.2f})" for text in ("wikitext", "novel"))
        perplexity = ", ".join(f"{one[text]['perplexity']:.2f}" for text in ("wikitext", "novel"))
        speed = ", ".join(f"{one[kind] / wide[kind]:.1f}" for kind in ("prefill", "decode"))
        told = one["transformers_loads_it"]
        loads = "no" if told.startswith("no") else "yes" if told.endswith(" 0") else "as another model"
        memory = f"{one['peak_bytes'] / 1e9:.2f} GB"
        found.append(row(name, bits, size, *kl, perplexity, f"{one['cpu_seconds_inside'] / one_pass:.1f}", memory, speed, loads))
    return found


def sparsity() -> list[str]:
    table, found = results("peers_sparsity")["table"], []
    for method in ("SparseGPT 50 %", "SparseGPT 2:4", "Wanda 50 %"):
        theirs = table[f"llm-compressor {method}"]
        for maker in ("llmlite", "llm-compressor"):
            one = table[f"{maker} {method}"]
            ratios = (f"{one[text]['perplexity'] / table['dense'][text]['perplexity']:.3f}" for text in ("wikitext", "novel"))
            costs = ("1", "1") if one is theirs else (f"{one[cost] / theirs[cost]:.2f}" for cost in ("cpu_seconds_inside", "peak_bytes"))
            found.append(row(f"{maker} {method}", *ratios, ", ".join(f"{one[text]['kl']:.3f}" for text in ("wikitext", "novel")), *costs))
    return found


def structured() -> list[str]:
    table, found = results("peers_structured")["table"], []
    theirs = table["Torch-Pruning, taylor"]
    for name, one in table.items():
        if name == "dense":
            continue
        ratios = [one[text]["perplexity"] / table["dense"][text]["perplexity"] for text in ("wikitext", "novel")]
        shown = (f"{ratio:.3f}" if ratio < 100 else f"{ratio:,.0f}" for ratio in ratios)
        kl = ", ".join(f"{one[text]['kl']:.3f}" for text in ("wikitext", "novel"))
        loads = "yes" if one["transformers_loads_it"].endswith(" 0") else "no"
        found.append(row(name, *shown, kl, *(f"{one[cost] / theirs[cost]:.2f}" for cost in ("cpu_seconds_inside", "peak_bytes")), loads))
    return found


@pytest.mark.parametrize(
    ("rows", "heading", "column"),
    [
        (headline, "## The headline table", "of the 16-bit bytes"),
        (headline_gpt2, "## The headline table on a GPT-2", "of the 16-bit bytes"),
        (losses, "## Losses through the LM head", "loss"),
        (cache, "## Distillation: the teacher beside the student, or read from disk", "teacher"),
        (quantization, "## 4 and 8 bits: own formats and peers in one table", "bits a weight"),
        (structured, "## Structured pruning beside Torch-Pruning", "processor time"),
        (merging, "## Merging an adapter", "time of a pass"),
        (sparsity, "## Zeros: SparseGPT and Wanda beside llm-compressor's", "processor time"),
    ],
)
def test_a_table_of_the_benchmarks_says_what_was_measured(rows: Callable[[], list[str]], heading: str, column: str) -> None:
    assert rows_under("benchmarks/README.md", heading, column) == [" ".join(line.split()) for line in rows()]


def test_the_table_of_caches_says_what_was_measured() -> None:
    page = {
        line.strip("| ").split(" | ")[0]: line.strip("| ").split(" | ")[2:] for line in rows_under("docs/distillation.md", "## The teacher", "bytes a token")
    }
    kinds = {"live": "`none`", "hidden": "`hidden`", **{f"top_k-{k}": f"`top_k`, {k}" for k in (32, 64, 128)}}
    measured = {kinds[one["kind"]]: one for one in results("distillation_cache")["rows"]}
    assert page.keys() == measured.keys()
    for name, (size, step, smaller, lora, *errors) in page.items():
        one = measured[name]
        assert [size, step, smaller, lora] == [f"{one['bytes_per_token']:,}", *cached_steps(one)]
        assert [float(error) for error in errors] == pytest.approx([one["gradient_error"], one["gradient_error_kl_alone"]], rel=0.2)


@pytest.mark.parametrize("page", ["README.md", "README.ko.md"])
def test_the_readme_says_what_was_measured(page: str) -> None:
    (table,) = (block for block in (ROOT / page).read_text(encoding="utf-8").split("\n\n") if block.startswith("| | llmlite |"))
    nf4, zeros = results("peers_quantization")["table"], results("peers_sparsity")["table"]
    times = "배" if "ko" in page else "x"

    def kls(name: str) -> str:
        return " / ".join(f"{nf4[name][text]['kl']:.3f}" for text in ("wikitext", "novel"))

    def ratios(one: dict[str, Any], whole: dict[str, Any]) -> str:
        return " / ".join(f"{one[text]['perplexity'] / whole[text]['perplexity']:.2f}{times}" for text in ("wikitext", "novel"))

    ours, theirs = zeros["llmlite SparseGPT 50 %"], zeros["llm-compressor SparseGPT 50 %"]
    quick = results("lora_int4")["table"]["llmlite"]
    found = [one for one in results("pruning") if "text" not in one]
    dense, plain, mixed = (next(one for one in found if one["case"] == "dense"), *(one for one in found if one["case"] == "FFN channels"))
    cut = [" / ".join(f"{one[text] / dense[text]:.2f}{times}" for text in ("wikitext", "novel")) for one in (plain, mixed)]
    steps = results("pruning_steps")
    narrow, *rescaled = (next(one for one in steps if one["case"] == "dense"), *(one for one in steps if one["case"] == "FFN channels, rescaled"))
    cut += [" / ".join(f"{one[text] / narrow[text]:.2f}{times}" for text in ("wikitext", "novel")) for one in rescaled]
    for figure in (
        *(kls(name) for name in ("llmlite NF4", "bitsandbytes NF4", "AutoRound W4A16")),
        f"{nf4['AutoRound W4A16']['cpu_seconds_inside'] / nf4['llmlite NF4']['cpu_seconds_inside']:.1f}",
        ratios(ours, zeros["dense"]),
        ratios(theirs, zeros["dense"]),
        f"{ours['cpu_seconds_inside'] / theirs['cpu_seconds_inside']:.2f}",
        f"{quick['tokens_per_second_ratio']:.1f}{times}, {quick['peak_memory_ratio']:.2f}{times}",
        *cut,
    ):
        assert figure in table
