"""The tables under "Measured" in the documentation, and shrink's in the benchmarks, say what `benchmarks/results/*.json` says.

A new measurement fails here with the rows to copy.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def row(*cells: str | float) -> str:
    return f"| {' | '.join(map(str, cells))} |"


WIKI, MIXED = "1*WIKI_VALID.txt", "0.5*self + 0.5*WIKI_VALID.txt"


def pruning() -> list[str]:
    found = [one for one in results("pruning") if "text" not in one]
    wide, narrow = (one for one in found if one["case"] == "dense")
    plain, mixed, healed = (one for one in found if one["case"] != "dense")
    layers = next(one for one in results("distillation_time")["rows"] if one["loss"] == "none")
    zeros = results("peers_sparsity")["table"]
    steps = results("pruning_steps")
    bf16 = next(one for one in steps if one["case"] == "dense")

    def step(case: str, calibration: str) -> dict[str, Any]:
        found: dict[str, Any] = next(one for one in steps if one["case"] == case and one.get("calibration") == calibration)
        return found

    def ratios(one: dict[str, Any], dense: dict[str, Any]) -> tuple[str, ...]:
        return tuple(f"{one[text] / dense[text]:.3f}" for text in ("wikitext", "novel"))

    def perplexities(one: dict[str, Any]) -> dict[str, Any]:
        return {text: one[text]["perplexity"] for text in ("wikitext", "novel")}

    return [
        row("`prune.structured`, `spread: ffn`, calibrated on WikiText-2 valid", *ratios(plain, wide)),
        row("the same, calibrated half on that and half on text of the model's own", *ratios(mixed, wide)),
        row("the first in bfloat16, then `prune.rescale`", *ratios(step("FFN channels, rescaled", WIKI), bf16)),
        row("the second in bfloat16, then `prune.rescale`", *ratios(step("FFN channels, rescaled", MIXED), bf16)),
        row("the first in bfloat16, then 150 steps of `distill.whitebox` on WikiText-2 valid", *ratios(healed, narrow)),
        row("`prune.layers`, 6 of 30 by block influence, in bfloat16", f"{layers['ratio']:.3f}", ""),
        *(
            row(f"{label}: {1 - step(case, WIKI)['decoder']:.0%} of the decoder, in bfloat16", *ratios(step(case, WIKI), bf16))
            for case, label in (
                ("kv groups", "`prune.heads`, a third of the key/value groups"),
                ("query heads", "`prune.heads`, `unit: query_heads`, a third of them"),
                ("hidden", "`prune.hidden`, a tenth of the width"),
            )
        ),
        *(
            row(
                f"`prune.weights`, {method.replace(' 50', ', 50').replace(' 2:4', ', 2:4')}",
                *ratios(perplexities(zeros[f"llmlite {method}"]), perplexities(zeros["dense"])),
            )
            for method in ("SparseGPT 50 %", "SparseGPT 2:4", "Wanda 50 %")
        ),
        row(
            "SparseGPT, 50 %, on half that and half text of the model's own, in bfloat16",
            *ratios(step("SparseGPT 50 %, rescaled", MIXED)["after_each_step"][0], bf16),
        ),
        row("the same, then `prune.rescale`", *ratios(step("SparseGPT 50 %, rescaled", MIXED), bf16)),
    ]


def quantization() -> list[str]:
    said = {
        "float32": "32 bit",
        "bfloat16": "16 bit",
        "bitsandbytes int8": "`int8`",
        "bitsandbytes NF4": "`nf4`, `calibrate: false`",
        "bitsandbytes NF4 + double": "the same, `double_quant`",
        "bitsandbytes FP4": "`fp4`, `calibrate: false`",
        "llmlite NF4": "`nf4`",
        "llmlite NF4 + double": "`nf4`, `double_quant`",
        "llmlite FP4": "`fp4`",
        "bitsandbytes NF4, llmlite rank 16": "`nf4`, `calibrate: false`, then `correct`",
        "llmlite NF4 + rank 16": "`nf4`, then `correct`",
    }
    table = results("peers_quantization")["table"]
    one_pass, wide = table["dense"]["calibration_pass_cpu_seconds"], table["float32"]
    lines = []
    for name, label in said.items():
        one, texts = table[name], [table[name]["wikitext"], table[name]["novel"]]
        kl = (f"{text['kl']:.3f}" for text in texts)
        perplexity = ", ".join(f"{text['perplexity']:.2f}" for text in texts)
        size = f"{one['bytes'] / 1e6:.0f} MB"
        speed = ", ".join(f"{one[kind] / wide[kind]:.1f}" for kind in ("prefill", "decode"))
        lines.append(row(label, f"{one['bits_per_weight']:.2f}", size, *kl, perplexity, f"{one['cpu_seconds_inside'] / one_pass:.1f}", speed))
    return lines


def distillation() -> list[str]:
    said = {
        "none": "not trained",
        "ce": "cross entropy alone",
        "ce+forward_kl": "the default, 0.5 CE + 0.5 forward KL",
        "forward_kl": "forward KL alone",
        "ce+forward_kl@T=2": "CE + forward KL at temperature 2",
        "ce+reverse_kl": "CE + reverse KL",
        "ce+generalised_jsd": "CE + generalised JSD",
        "ce+skewed_forward_kl": "CE + skewed forward KL",
        "ce+skewed_reverse_kl": "CE + skewed reverse KL",
        "ce+total_variation": "CE + total variation",
        "ce+logit_mse": "CE + 0.01 logit MSE",
        "ce+forward_kl+hidden": "CE + forward KL + 0.1 hidden-state MSE",
        "ce+uld": "CE + ULD",
        "ce+forward_kl+hidden cosine": "CE + forward KL + 0.1 hidden-state cosine",
        "ce+forward_kl+attention": "CE + forward KL + 0.1 attention maps",
        "ce+forward_kl, top 64": "CE + forward KL of the cached top 64",
        "ce+forward_kl, half on policy": "CE + forward KL, half of the batches on policy",
    }
    timed = sorted(results("distillation_time")["rows"], key=lambda one: (one.get("seed", -1), one["loss"]))
    return [
        *(row(one.get("seed", ""), said[one["loss"]], f"{one['perplexity']:.2f}", f"{one['kl']:.3f}", one.get("steps", 0)) for one in timed),
        *(row(said[one["loss"]], f"{one['perplexity']:.2f}", f"{one['kl']:.3f}") for one in results("distillation_tokens")["rows"]),
    ]


def adapters() -> list[str]:
    kinds = results("adapters")["table"].items()
    starts = {"gaussian": "peft's own", "quantization_error": "`init_lora_weights: quantization_error`"}
    return [
        *(row(kind, f"{one['numbers']:,}", f"{one['perplexity']:.2f}", f"{one['cpu_ratio']:.2f}", f"{one['memory_ratio']:.2f}") for kind, one in kinds),
        *(row(one["seed"], starts[one["start"]], f"{one['kl_before_to_nf4']:.3f}", f"{one['after']['loss']:.3f}") for one in results("lora_start")["rows"]),
        *merging(),
    ]


def merging() -> list[str]:
    table = results("merge")["table"]
    return [
        row(name, f"{one['perplexity']:.2f}", f"{one['kl']:.3f}", f"{one['bytes'] / 1e6:.0f} MB", f"{one['of_the_time']:.2f}") for name, one in table.items()
    ]


def shrink() -> list[str]:
    found = results("shrink")
    choices = {"int8": "int8", "nf4, 53 layers in 16 bit": "NF4, 53 of 210 layers in 16 bit", "keep 0.65, healed + nf4": "decoder to 65 %, healed, then NF4"}
    single = {"only pruning": "decoder to {} %, {} steps of healing", "only layers": "layers to {} % (greedy), {} steps of healing"}
    alone = {"nf4": "NF4", "nf4 + rank 16": "NF4 + rank 16", "keep 0.65, healed": "decoder to 65 %, 16 steps of healing"}

    def digits(kl: float) -> str:
        return f"{kl:.4f}" if kl < 0.1 else f"{kl:.3f}"

    def ratio(perplexity: float) -> str:
        return f"{perplexity:.3f}x" if perplexity < 10 else f"{perplexity:.1f}x"

    def row_of(one: dict[str, Any]) -> str:
        size, ours = f"{one['of_16_bit']:.3f}", one["method"] == "shrink"
        keep = round(100 * one.get("keep", 1))
        how = choices[one["choice"]] if ours else single.get(one["method"], "NF4, run by itself").format(keep, found["heal_steps"])
        expected = (digits(one["expected_kl"]), ratio(one["expected_perplexity_ratio"])) if ours else ("", "")
        target = one["target"] if ours else "alone"
        return row(target, how, size, expected[0], digits(one["kl"]), expected[1], ratio(one["perplexity_ratio"]))

    options = [(how, *found["measured"][name]) for name, how in alone.items()]
    measured = [row("alone", how, "" if size is None else f"{size:.3f}", "", digits(kl), "", ratio(perplexity)) for how, kl, perplexity, size in options]
    ours, others = ([one for one in found["rows"] if (one["method"] == "shrink") == wanted] for wanted in (True, False))
    return [*map(row_of, ours), *measured, *map(row_of, others)]


def test_what_shrink_expected_and_obtained_stands_in_the_benchmarks() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    section = page.partition("\n## `llmlite shrink`")[2].partition("\n## ")[0]
    _, _, *rows = [" ".join(line.split()) for line in section.splitlines() if line.startswith("|")]
    assert rows == [" ".join(line.split()) for line in shrink()]


@pytest.mark.parametrize("rows", [pruning, quantization, distillation, adapters], ids=lambda rows: rows.__name__)
def test_measured_tables_say_what_was_measured(rows: Callable[[], list[str]]) -> None:
    page = (ROOT / "docs" / f"{rows.__name__}.md").read_text(encoding="utf-8")
    lines = page.partition("\n## Measured\n")[2].partition("\n## ")[0].splitlines()
    heads = {place + more for place, line in enumerate(lines) if line.startswith("|---") for more in (-1, 0)}
    assert [line for place, line in enumerate(lines) if line.startswith("|") and place not in heads] == rows()


def test_the_pruning_page_quotes_the_headline_table() -> None:
    rows = {one["row"]: one for one in results("headline")["rows"]}
    vocabulary, owl, alike = (rows[name] for name in ("vocabulary of the text", "half of the weights zero, OWL", "half of the weights zero"))
    page = (ROOT / "docs" / "pruning.md").read_text(encoding="utf-8")
    assert f"`prune.vocabulary` ({vocabulary['of_the_base']:.2f} of the bytes at {vocabulary['perplexity_ratio']:.3f})" in page
    assert f"OWL ({owl['perplexity_ratio']:.3f}, and {alike['perplexity_ratio']:.3f} without it" in page
