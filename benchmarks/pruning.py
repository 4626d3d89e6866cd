"""Perplexity after one-shot pruning, on text of the calibration's kind and on text that no calibration row resembles.

    python benchmarks/pruning.py --calibration WIKI_VALID.txt --test wikitext=WIKI_TEST.txt --test novel=NOVEL.txt --case ffn=0.8

Prints a table and writes benchmarks/results/pruning.json. Nothing is trained unless a case says so (`--train`).
Every row uses the same test windows; the first is the dense model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from metrics.text import detokenised_file, ids_of

from llmlite.calibration.mixture import parse_mixture, shares
from llmlite.calibration.sample import sampled_windows
from llmlite.calibration.sources import windows_of
from llmlite.context import Run
from llmlite.evaluation.quality import measure_quality
from llmlite.models.find import find
from llmlite.models.load import load_model, load_tokenizer
from llmlite.models.settings import Model
from llmlite.models.size import size_of_model
from llmlite.step import parse_step


class _BenchRun(Run):
    """A run whose calibration windows are given."""

    def __init__(self, windows_NT: torch.Tensor, recipe: Any) -> None:
        super().__init__(recipe)
        self.__dict__["calibration_windows"] = windows_NT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=Model().name)
    parser.add_argument("--calibration", required=True, help="mixture, for instance '0.5*self + 0.5*wiki.txt'")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--test", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--test-windows", type=int, default=16)
    parser.add_argument("--case", action="append", required=True, metavar="LABEL={step: ..., ...}", help="a step as YAML; several steps as a list")
    parser.add_argument("--train", metavar="FILE", help="text for the steps that train, where a case heals what it has pruned")
    parser.add_argument("--dtype", default="auto", help="type to compute in; bfloat16 trains float32 weights under autocast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", help="a folder in which a run that was stopped goes on; one for each case")
    parser.add_argument("--out", default="benchmarks/results/pruning.json")
    args = parser.parse_args()
    import yaml

    import llmlite

    settings = Model(name=args.model, dtype=args.dtype)
    source = find(settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(source, settings)
    dense = load_model(source, settings, device)

    sources = []
    mixture = parse_mixture(args.calibration)
    for (_, name), count in zip(mixture, shares([share for share, _ in mixture], args.sequences), strict=True):
        if name == "self":
            sources.append(sampled_windows(source, lambda: dense, count, args.tokens, seed=args.seed, dtype=dense.dtype))
        else:
            sources.append(windows_of(ids_of(name, tokenizer), count, args.tokens, args.seed))
    windows_NT = torch.cat(sources)
    windows_NT = windows_NT[torch.randperm(len(windows_NT), generator=torch.Generator().manual_seed(args.seed))]

    tests = {}
    for test in args.test:
        name, _, path = test.partition("=")
        chosen = windows_of(ids_of(path, tokenizer), args.test_windows, args.tokens, 1)
        tests[name] = [{"input_ids": part, "labels": part} for part in chosen.split(4)]
    base = {name: measure_quality(dense, batches).perplexity for name, batches in tests.items()}
    size = size_of_model(dense)
    rows: list[dict[str, Any]] = [{"case": "dense", "decoder": 1.0, **base}]
    show(rows[-1], base)
    for case in args.case:
        label, _, text = case.partition("=")
        steps, problems = [], []
        given = yaml.safe_load(text)
        for index, value in enumerate(given if isinstance(given, list) else [given]):
            step, more = parse_step(value, index)
            steps.append(step)
            problems += more
        if problems:
            raise SystemExit("\n".join(problems))
        data = llmlite.Data(train=detokenised_file(args.train), max_length=args.tokens) if args.train else llmlite.Data()
        run = _BenchRun(windows_NT, llmlite.Recipe(model=settings, data=data, steps=tuple(steps), seed=args.seed))
        model = load_model(source, settings, device)
        parts: list[dict[str, Any]] = []
        started, cpu = time.perf_counter(), time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            for index, step in enumerate(steps):
                run.scratch = Path(args.scratch or folder) / f"{index}"
                run.scratch.mkdir(parents=True, exist_ok=True)
                model = step.apply(model, run)
                cost = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
                parts.append({**cost, **{name: measure_quality(model, batches).perplexity for name, batches in tests.items()}})
                started, cpu = time.perf_counter(), time.process_time()
        row = {
            "case": label,
            "calibration": " + ".join(f"{share:g}*{name if name == 'self' else Path(name).name}" for share, name in mixture),
            "calibration_tokens": windows_NT.numel(),
            "dtype": args.dtype,
            "train": Path(args.train).name if args.train else None,
            "steps": [given] if isinstance(given, dict) else given,
            "decoder": size_of_model(model).decoder / size.decoder,
            "sparsity": run.notes.get("sparsity"),
            **{name: run.notes[name] for name in ("spread", "trials") if name in run.notes},
            "after_each_step": parts,
            **{name: sum(part[name] for part in parts) for name in ("seconds", "cpu_seconds")},
            **{name: parts[-1][name] for name in tests},
        }
        rows.append(row)
        show(row, base)
        write(Path(args.out), args, rows)


def show(row: dict[str, Any], base: dict[str, float]) -> None:
    """One line of the table."""
    figures = "  ".join(f"{name} {row[name]:9.2f} {row[name] / base[name]:6.3f}x" for name in base)
    print(
        f"{row['case']:28s} decoder {row['decoder']:6.1%}  {figures}  {row.get('seconds', math.nan):6.0f} s {row.get('cpu_seconds', math.nan):6.0f} CPU-s",
        flush=True,
    )


def write(path: Path, args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Add the rows to the results file. A row with the same settings is replaced, the others stay."""
    settings = {
        "model": args.model,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "seed": args.seed,
        "test_windows": args.test_windows,
        "window_tokens": args.tokens,
    }
    new = [{**settings, **row} for row in rows]
    same = ("model", "seed", "test_windows", "window_tokens", "case", "calibration", "calibration_tokens", "dtype", "train")
    keys = [tuple(row.get(name) for name in same) for row in new]
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [row for row in known if tuple(row.get(name) for name in same) not in keys]
    path.write_text(json.dumps([*kept, *new], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
