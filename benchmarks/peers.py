"""llmlite beside its peers, in one run: the same model, calibration windows and test windows, each method in a fresh process of its own environment.

    python benchmarks/peers/environments.py ENVS            # once: one virtual environment for each peer, from pinned requirements
    python benchmarks/peers.py quantization --envs ENVS --calibration WIKI_VALID.txt --test wikitext=WIKI_TEST.txt --test novel=NOVEL.txt
    python benchmarks/peers.py sparsity --envs ENVS ...                 # and structured, distillation

Without --envs only llmlite's own rows run, with --rows only those named. Rows that do not run stay in the file as long as they were measured on the same texts;
otherwise nothing starts, for their figures could not stand in one table.

Quality is measured here, from the hidden states that each method leaves on the test windows; cost is measured from outside, as a whole process. Writes
benchmarks/results/peers_TASK.json, or --out, as it goes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from metrics.process import Failed, measure
from metrics.text import ids_of
from safetensors.torch import load_file, save_file

from llmlite.calibration.sources import windows_of
from llmlite.models.find import find
from llmlite.models.load import load_model, load_tokenizer
from llmlite.models.rebuild import rebuild
from llmlite.models.settings import Model
from llmlite.models.slicing import take_layers
from llmlite.models.view import ModelView

HERE = Path(__file__).parent
OURS = ""
ROWS: dict[str, dict[str, tuple[str, str, str]]] = {  # row -> (environment, script, method)
    "quantization": {
        "float32": (OURS, "llmlite_steps.py", "float32"),
        "bfloat16": (OURS, "llmlite_steps.py", "bfloat16"),
        "bitsandbytes int8": (OURS, "llmlite_steps.py", "int8"),
        "bitsandbytes NF4": (OURS, "llmlite_steps.py", "nf4-stock"),
        "bitsandbytes NF4 + double": (OURS, "llmlite_steps.py", "nf4-dq-stock"),
        "bitsandbytes FP4": (OURS, "llmlite_steps.py", "fp4-stock"),
        "llmlite NF4": (OURS, "llmlite_steps.py", "nf4-calibrated"),
        "llmlite NF4 + double": (OURS, "llmlite_steps.py", "nf4-dq-calibrated"),
        "llmlite FP4": (OURS, "llmlite_steps.py", "fp4-calibrated"),
        "bitsandbytes NF4, llmlite rank 16": (OURS, "llmlite_steps.py", "nf4-stock-corrected"),
        "llmlite NF4 + rank 16": (OURS, "llmlite_steps.py", "nf4-calibrated-corrected"),
        "llm-compressor GPTQ W4A16": ("llmcompressor", "llmcompressor_oneshot.py", "gptq"),
        "HQQ 4 bit": ("misc", "hqq_4bit.py", ""),
        "torchao int4": ("misc", "torchao_int4.py", ""),
        "quanto qint4": ("misc", "quanto_int4.py", ""),
        "AutoRound W4A16": ("autoround", "autoround_w4.py", ""),
    },
    "sparsity": {
        "llmlite SparseGPT 50 %": (OURS, "llmlite_steps.py", "sparsegpt-0.5"),
        "llm-compressor SparseGPT 50 %": ("llmcompressor", "llmcompressor_oneshot.py", "sparsegpt-0.5"),
        "llmlite SparseGPT 2:4": (OURS, "llmlite_steps.py", "sparsegpt-2:4"),
        "llm-compressor SparseGPT 2:4": ("llmcompressor", "llmcompressor_oneshot.py", "sparsegpt-2:4"),
        "llmlite Wanda 50 %": (OURS, "llmlite_steps.py", "wanda-0.5"),
        "llm-compressor Wanda 50 %": ("llmcompressor", "llmcompressor_oneshot.py", "wanda-0.5"),
    },
    "structured": {  # the same number of FFN channels gone from every layer
        "llmlite prune.ffn": (OURS, "llmlite_steps.py", "ffn"),
        "llmlite prune.ffn, taylor": (OURS, "llmlite_steps.py", "ffn-taylor-repaired"),
        "llmlite prune.ffn, taylor, no repair": (OURS, "llmlite_steps.py", "ffn-taylor"),
        "llmlite prune.ffn, magnitude, no repair": (OURS, "llmlite_steps.py", "ffn-magnitude"),
        "Torch-Pruning, taylor": ("misc", "torch_pruning_ffn.py", "taylor"),
        "Torch-Pruning, magnitude": ("misc", "torch_pruning_ffn.py", "magnitude"),
    },
    "distillation": {  # a student without a fifth of the layers, 16 steps of 2 rows, forward KL
        "llmlite distill.whitebox": (OURS, "llmlite_distil.py", "none"),
        "llmlite distill.whitebox, cached": (OURS, "llmlite_distil.py", "hidden"),
        "TRL GKDTrainer": ("trl", "trl_gkd.py", ""),
    },
}


@torch.no_grad()
def compared(
    student_NTD: torch.Tensor, dense_NTD: torch.Tensor, head: torch.nn.Module, ids_NT: torch.Tensor, trained_VD: torch.Tensor | None = None
) -> dict[str, float]:
    """Perplexity of the next tokens, and KL from the dense model in nats a token; the head is the dense one unless another was trained."""
    nll = kl = 0.0
    for student_TD, dense_TD, ids_T in zip(student_NTD, dense_NTD, ids_NT, strict=True):
        logits_TV = head(student_TD[:-1]) if trained_VD is None else student_TD[:-1] @ trained_VD.T
        student_TV, dense_TV = logits_TV.float().log_softmax(-1), head(dense_TD[:-1]).float().log_softmax(-1)
        nll -= float(student_TV.gather(1, ids_T[1:, None]).double().mean())
        kl += float((dense_TV.exp() * (dense_TV - student_TV)).sum(-1).double().mean())
    return {"perplexity": float(torch.tensor(nll / len(ids_NT)).exp()), "kl": kl / len(ids_NT)}


@torch.no_grad()
def seconds_of_a_pass(model: Any, windows_NT: torch.Tensor) -> float:
    """Processor time of one forward pass over the windows, without the head."""
    started = time.process_time()
    for part in windows_NT.split(4):
        model.base_model(input_ids=part, use_cache=False)
    return time.process_time() - started


def student_of(model: Any, tokenizer: Any, folder: Path) -> Path:
    """The model without a fifth of its layers, evenly spaced, as a stock folder."""
    view = ModelView(model)
    count = len(view.blocks)
    student = rebuild(model, *take_layers(view, [index for index in range(count) if index % 5 != 3]))
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measured(python: str, script: str, arguments: list[str], threads: int) -> dict[str, Any]:
    """Run one method as a whole process; its row of the table, or why there is none."""
    try:
        cost = measure(HERE / "peers" / script, arguments, threads, python=python, quiet=True, CUDA_VISIBLE_DEVICES="")
    except Failed as error:
        return {"failed": str(error)}
    return {**cost.answer, "process_seconds": cost.seconds, "process_cpu_seconds": cost.cpu_seconds}


def kept_rows(out: Path, about: Mapping[str, Any], known: Collection[str], running: Collection[str]) -> dict[str, Any]:
    """The rows of an earlier file that do not run now.

    Args:
        out: the file; it need not be there.
        about: conditions of this run, as the file holds them beside its table.
        known: names of all rows of the task; others are left out.
        running: those that are measured now.

    Raises:
        SystemExit: there are such rows, and they were measured under other conditions.
    """
    before = json.loads(out.read_text()) if out.exists() else {"table": {}}
    kept = {name: row for name, row in before["table"].items() if name in known and name not in running}
    other = [f"{name}: {before.get(name)} there, {value} now" for name, value in about.items() if before.get(name) != value]
    if kept and other:
        sys.exit(f"{out} holds {', '.join(kept)}, measured otherwise ({'; '.join(other)}). Run them too (--envs, no --rows), or write elsewhere: --out FILE.")
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=ROWS)
    parser.add_argument("--envs", type=Path)
    parser.add_argument("--calibration", required=True, metavar="FILE")
    parser.add_argument("--test", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--test-windows", type=int, default=16)
    parser.add_argument("--rows", nargs="*", help="only these")
    parser.add_argument("--out", type=Path, help="left out: benchmarks/results/peers_TASK.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = args.out or HERE / "results" / f"peers_{args.task}.json"
    about = {
        "model": Model().name,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": args.threads,
        "calibration": f"{Path(args.calibration).name}, {args.sequences} x {args.tokens} tokens",
        "test": f"{args.test_windows} x {args.tokens} tokens of each text",
        "seed": args.seed,
    }
    asked = [label for label in ROWS[args.task] if not args.rows or label in args.rows]
    running = [label for label in asked if ROWS[args.task][label][0] == OURS or args.envs is not None]
    for label in sorted({*asked} - {*running}):
        print(f"{label:32s} not run: no --envs", file=sys.stderr, flush=True)
    kept = kept_rows(out, about, ROWS[args.task], running)

    settings = Model()
    source = find(settings)
    tokenizer = load_tokenizer(source, settings)

    def windows(path: str, count: int, seed: int) -> torch.Tensor:
        return windows_of(ids_of(path, tokenizer), count, args.tokens, seed)

    ids = {name: windows(path, args.test_windows, 1) for name, path in (test.split("=", 1) for test in args.test)}
    model = load_model(source, settings, torch.device("cpu"))
    head = model.get_output_embeddings()
    dense = {}
    for name, ids_NT in ids.items():
        with torch.no_grad():
            dense[name] = torch.cat([model.base_model(input_ids=part, use_cache=False).last_hidden_state for part in ids_NT.split(4)])
    table: dict[str, Any] = {"dense": {name: compared(dense[name], dense[name], head, ids[name]) for name in ids}}
    table["dense"]["calibration_pass_cpu_seconds"] = seconds_of_a_pass(model, windows(args.calibration, args.sequences, args.seed))
    table |= kept
    for label in running:
        environment, script, method = ROWS[args.task][label]
        python = str(args.envs / environment / "bin" / "python") if environment else sys.executable
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            save_file({"calibration": windows(args.calibration, args.sequences, args.seed), **ids}, place / "windows.safetensors")
            given = ["--model", str(source.folder), "--windows", str(place / "windows.safetensors"), "--hidden", str(place / "hidden.safetensors")]
            if args.task == "distillation":
                given += ["--student", str(student_of(model, tokenizer, place / "student"))]
            row = measured(python, script, [*given, "--method", method, "--seed", str(args.seed)], args.threads)
            if "failed" not in row:
                hidden = load_file(place / "hidden.safetensors")
                row |= {name: compared(hidden[name], dense[name], head, ids[name], hidden.get("head")) for name in ids}
        table[label] = row
        print(f"{label:32s}", json.dumps(row), flush=True)
        out.write_text(json.dumps({**about, "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
