"""What 8 and 4 bits cost: divergence from the dense model on two texts, bytes, seconds, memory, speed, with and without a low-rank correction.

    python benchmarks/quantization.py --calibration WIKI_VALID.txt --test wikitext=WIKI_TEST.txt --test novel=NOVEL.txt

Prints a table and writes benchmarks/results/quantization.json. Every row is made by the steps that a recipe would run, is measured on the same windows in the
same run, and nothing is trained. Speeds are ratios to the dense model in 32 bit, batch 1; run it on a machine that does nothing else, or ignore them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from metrics.text import detokenised
from safetensors import safe_open

import llmlite
from llmlite.adapters.correct import Correct
from llmlite.calibration.sources import windows_of
from llmlite.context import Run
from llmlite.evaluation.memory import measured_peak
from llmlite.evaluation.quality import Reference, measure_quality, reference_of
from llmlite.evaluation.speed import measure_speed
from llmlite.models.find import find
from llmlite.models.load import load_model, load_tokenizer
from llmlite.models.save import save_model, storage_dtype
from llmlite.models.settings import Model
from llmlite.models.size import linear_shapes
from llmlite.quantization.bnb import Quantize
from llmlite.storage import folder_bytes

ROWS: dict[str, dict[str, Any]] = {
    "int8": {"scheme": "int8"},
    "nf4": {"scheme": "nf4", "double_quant": False, "calibrate": False},
    "nf4+dq": {"scheme": "nf4", "double_quant": True, "calibrate": False},
    "fp4": {"scheme": "fp4", "double_quant": False, "calibrate": False},
    "nf4 calibrated": {"scheme": "nf4", "double_quant": False, "calibrate": True},
    "nf4+dq calibrated": {"scheme": "nf4", "double_quant": True, "calibrate": True},
    "fp4 calibrated": {"scheme": "fp4", "double_quant": False, "calibrate": True},
}
CORRECTED = " + correction"


class _BenchRun(Run):
    """A run whose calibration windows are given."""

    def __init__(self, windows_NT: torch.Tensor, recipe: llmlite.Recipe, scratch: Path) -> None:
        super().__init__(recipe, scratch)
        self.__dict__["calibration_windows"] = windows_NT


def bits_per_weight(folder: Path, config: Any) -> float:
    """Bits in the file for each weight of the decoder's projections, scales and tables included."""
    shapes = linear_shapes(config)
    stored = 0
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                layer = name.split(".weight")[0].removesuffix(".SCB").removesuffix(".weight_format")
                if layer in shapes and not name.endswith(".bias"):
                    tensor = tensors.get_tensor(name)
                    stored += 8 * tensor.numel() * tensor.element_size()
    return stored / sum(outputs * inputs for outputs, inputs in shapes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=Model().name)
    parser.add_argument("--calibration", required=True, metavar="FILE", help="plain text")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--test", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--test-windows", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", nargs="*", default=[*ROWS, "nf4" + CORRECTED, "nf4 calibrated" + CORRECTED])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="benchmarks/results/quantization.json")
    args = parser.parse_args()

    settings = Model(name=args.model)
    source, device = find(settings), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(source, settings)

    def stream(path: str) -> torch.Tensor:
        return torch.tensor(tokenizer(detokenised(Path(path).read_text(encoding="utf-8")), add_special_tokens=False, verbose=False)["input_ids"])

    windows_NT = windows_of(stream(args.calibration), args.sequences, args.tokens, args.seed)
    texts = dict(test.split("=", 1) for test in args.test)
    batches = {
        name: [{"input_ids": part, "labels": part} for part in windows_of(stream(path), args.test_windows, args.tokens, 1).split(4)]
        for name, path in texts.items()
    }

    dense = load_model(source, settings, device)
    references: dict[str, Reference] = {}
    row: dict[str, Any] = {"row": "dense", "bits_per_weight": 8.0 * dense.dtype.itemsize, "bytes": folder_bytes(source.folder)}
    for name in texts:
        references[name], quality = reference_of(dense, batches[name])
        row[name] = {"perplexity": quality.perplexity}
    started = time.process_time()
    with torch.no_grad():
        for part in windows_NT.split(4):
            dense.base_model(input_ids=part.to(device), use_cache=False)
    forward = time.process_time() - started
    speed = measure_speed(dense)
    row |= {"forward_cpu_seconds": forward}
    rows = [row]
    show(row, list(texts))
    del dense

    for label in args.rows:
        plain = label.removesuffix(CORRECTED)
        steps: tuple[Any, ...] = (Quantize(**ROWS[plain], report_sequences=0),)
        if plain != label:
            steps += (Correct(r=args.rank),)
        gc.collect()
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            run = _BenchRun(
                windows_NT, llmlite.Recipe(model=args.model, steps=steps, seed=args.seed, data=llmlite.Data(calibration_sequences=args.sequences)), place
            )
            started, cpu = time.perf_counter(), time.process_time()
            with measured_peak(device.type) as peak:
                model = steps[0].load(run)
                for step in steps[1:]:
                    save_model(model, place / "base", storage_dtype(run.config))
                    model = step.apply(model, run)
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
            save_model(model, place / "saved", storage_dtype(run.config))
            stored = [place / "saved"] + [place / "base"] * (len(steps) > 1)
            row = {
                "row": label,
                "bits_per_weight": bits_per_weight(stored[-1], run.config),
                "bytes": sum(folder_bytes(one) for one in stored),
                "seconds": seconds,
                "cpu_seconds": cpu,
                "forward_passes": cpu / forward,
                "peak_bytes": peak.bytes,
                "mean_layer_error": run.notes.get("mean_layer_error"),
            }
        for name in texts:
            quality = measure_quality(model, batches[name], references[name])
            row[name] = {"perplexity": quality.perplexity, "kl": quality.kl, "top1_agreement": quality.top1_agreement}
        now = measure_speed(model)
        row |= {
            "prefill": now.prefill_tokens_per_second / speed.prefill_tokens_per_second,
            "decode": now.decode_tokens_per_second / speed.decode_tokens_per_second,
        }
        del model
        rows.append(row)
        show(row, list(texts))
        write(Path(args.out), args, rows)


def show(row: dict[str, Any], texts: list[str]) -> None:
    """One line of the table."""
    figures = "  ".join(f"{name} ppl {row[name]['perplexity']:7.2f} kl {row[name].get('kl') or 0:.4f}" for name in texts)
    work = f"{row.get('cpu_seconds', 0):6.0f} CPU-s {row.get('forward_passes', 0):5.1f}x  peak {row.get('peak_bytes', 0) / 1e9:.1f} GB"
    print(f"{row['row']:30s} {row['bits_per_weight']:5.2f} bit {row['bytes'] / 1e6:6.1f} MB  {figures}  {work}", flush=True)


def write(path: Path, args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The results so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "model": args.model,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "calibration": f"{Path(args.calibration).name}, {args.sequences} x {args.tokens} tokens",
        "test": f"{args.test_windows} x {args.tokens} tokens of each text",
        "rank": args.rank,
        "seed": args.seed,
    }
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
