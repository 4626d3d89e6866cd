"""Time and peak memory of SparseGPT and calibrated NF4 over random Llamas of growing depth and width, loaded whole and block by block.

    python benchmarks/scale.py                                       # all of it: half an hour and more
    python benchmarks/scale.py --only limited --limited nf4          # one part; the rest of the file stays
    python benchmarks/scale.py --smallest --out outputs/scale.json   # a try-out in a minute: nothing is too large, and the figures say nothing

Each measurement is a process of its own; memory is its peak above what it holds with everything imported. Processor time and memory are those of
load, step and save, without evaluation. Before that runs of the whole pipeline (measuring base and result, reload in a fresh process) on a model whose
16-bit weights are larger than the memory that the process may take (RLIMIT_DATA): loaded whole they must fail, in blocks they must pass. NF4 is calibrated
with `token_weights: equal, tune_epochs: 0`, as blocks want it. Writes benchmarks/results/scale.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LAYERS = (4, 8, 16)
WIDTHS = (128, 256, 384)
SHAPE = (4, 256)  # layers of the widths, width of the layers
TOKENS, WINDOW = 2048, 128
LIMITED = {"layers": 130, "width": 512}
LIMIT_BYTES = 850_000_000  # libraries, and the sums and working copies of one block: SparseGPT at this width needs more than 700 MB, however few its layers
METHODS = ("sparsegpt", "nf4")
SMALLEST: dict[str, Any] = {"layers": (2, 3), "widths": (128,), "limited": {"layers": 3, "width": 128}, "limit": 4_000_000_000}


def make(folder: Path, layers: int, width: int, vocabulary: int = 1024) -> int:
    """A random Llama in bfloat16, written shard by shard, with a tokenizer of bytes. Returns the bytes of its weights."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from llmlite.models.size import meta_model

    shape: dict[str, Any] = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=layers, max_position_embeddings=512, dtype=torch.bfloat16, **shape)
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    generator, total, parts = torch.Generator().manual_seed(0), 0, {}
    shapes = {name: parameter.shape for name, parameter in meta_model(config).named_parameters()}
    for name in shapes:
        parts.setdefault(int(name.split(".")[2]) + 1 if name.startswith("model.layers.") else 0, []).append(name)
    weight_map = {}
    for part, names in sorted(parts.items()):
        file = f"model-{part + 1:05d}-of-{len(parts):05d}.safetensors"
        scale = {name: 1 / math.sqrt(shapes[name][-1]) for name in names}
        tensors = {name: torch.ones(shapes[name]) if len(shapes[name]) == 1 else scale[name] * torch.randn(shapes[name], generator=generator) for name in names}
        save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, folder / file, metadata={"format": "pt"})
        total += sum(2 * tensor.numel() for tensor in tensors.values())
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}), encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>").save_pretrained(folder)
    return total


def recipe_of(model: Path, method: str, mode: str, out: Path) -> Any:
    import llmlite
    from llmlite.models.settings import Model

    step = llmlite.Quantize(scheme="nf4", token_weights="equal", tune_epochs=0) if method == "nf4" else llmlite.PruneWeights(sparsity=0.5, method=method)
    source = "builtin:python-docs"
    data = llmlite.Data(train=source, calibration=source, max_length=WINDOW, calibration_sequences=TOKENS // WINDOW, evaluation_rows=8)
    return llmlite.Recipe(model=Model(name=str(model), load=mode), data=data, steps=(step,), output_dir=str(out))


def step_alone(model: Path, method: str, mode: str, out: Path) -> dict[str, float]:
    """Load, one step, save, in this process."""
    import bitsandbytes  # noqa: F401 - so that it counts as imported
    import torch

    from llmlite.context import Run
    from llmlite.memory import measured_peak, resident_bytes
    from llmlite.models.blockwise import write_blockwise
    from llmlite.models.save import save_model, settle

    recipe = recipe_of(model, method, mode, out)
    run = Run(recipe, scratch=out / "scratch", blockwise=mode == "blocks")
    run.__dict__["calibration_windows"] = torch.randint(0, 256, (TOKENS // WINDOW, WINDOW), generator=torch.Generator().manual_seed(1))
    torch.linalg.cholesky(torch.eye(8))
    run.scratch.mkdir(parents=True)
    before, started = resident_bytes(), time.process_time()
    with measured_peak() as peak:
        found = recipe.steps[0].load(run)
        if mode == "blocks":
            write_blockwise(found, out / "result", run.storage_dtype)
        else:
            settle(found, run.storage_dtype)
            save_model(found, out / "result", run.storage_dtype)
    return {"cpu_seconds": time.process_time() - started, "peak_bytes": peak.bytes - before}


def whole_run(model: Path, method: str, mode: str, out: Path) -> dict[str, Any]:
    """The pipeline from base to reload, in this process, under the limit that the parent has set.

    The fresh process at its end, in which stock transformers loads the result with its blocks on disk, is not limited: safetensors maps all files, and
    RLIMIT_DATA counts what is mapped as if it were read.
    """
    from llmlite.evaluation import reload

    def unlimited(command: list[str], **options: Any) -> Any:
        return subprocess.run(command, **options, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2))

    reload.__dict__["subprocess"] = types.SimpleNamespace(run=unlimited)
    started = time.process_time()
    report = recipe_of(model, method, mode, out).run()
    last = report.rows[-1]
    return {
        "cpu_seconds": time.process_time() - started,
        "perplexity": [row.perplexity for row in report.rows],
        "kl": last.kl,
        "reload_difference": report.reload_difference,
        "step_peak_rss_bytes": last.peak_memory_bytes,
    }


def trouble(errors: str) -> str:
    """The line of a failed process that says why: the last one that names an error."""
    lines = [line for line in errors.strip().splitlines() if "rror" in line] or errors.strip().splitlines() or ["no message"]
    return lines[-1][:300]


def child(kind: str, model: Path, method: str, mode: str, limit: int = 0) -> dict[str, Any]:
    """A measurement in a fresh process; what went wrong there is its last line."""
    with tempfile.TemporaryDirectory(dir=model.parent) as out:
        command = [sys.executable, __file__, "--child", kind, str(model), method, mode, f"{out}/run"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}

        def limited() -> None:
            if limit:
                resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))

        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, preexec_fn=limited)
    if done.returncode:
        return {"failed": f"exit code {done.returncode}: {trouble(done.stderr)}"}
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def curves(work: Path, layers: tuple[int, ...], widths: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = []
    for depth, width in dict.fromkeys([(depth, SHAPE[1]) for depth in layers] + [(SHAPE[0], width) for width in widths]):
        model = work / f"{depth}x{width}"
        weights = make(model, depth, width)
        for method in METHODS:
            for mode in ("whole", "blocks"):
                row = {"layers": depth, "width": width, "weight_bytes_16": weights, "method": method, "load": mode, **child("step", model, method, mode)}
                rows.append(row)
                print(
                    f"{depth:3d} layers, width {width:4d}, {method:9s} {mode:6s} {row['cpu_seconds']:7.1f} s {row['peak_bytes'] / 1e6:8.1f} MB"
                    if "cpu_seconds" in row
                    else row,
                    flush=True,
                )
    return rows


def limited(work: Path, layers: int, width: int, limit: int, methods: Sequence[str]) -> dict[str, Any]:
    model = work / "limited"
    weights = make(model, layers, width)
    found: dict[str, Any] = {"layers": layers, "width": width, "weight_bytes_16": weights, "limit_bytes": limit}
    for method in methods:
        for mode in ("whole", "blocks"):
            started = time.perf_counter()
            measured = child("run", model, method, mode, limit) | {"seconds": time.perf_counter() - started, "load_average": os.getloadavg()[0]}
            found[method] = found.get(method, {}) | {mode: measured}
            print(f"{weights / 1e6:.0f} MB of weights under {limit / 1e6:.0f} MB, {method} {mode}: {json.dumps(measured)}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=5, metavar=("KIND", "MODEL", "METHOD", "MODE", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--out", default="benchmarks/results/scale.json")
    parser.add_argument("--only", choices=("curves", "limited"), help="one part; the other stays in the file as it is")
    parser.add_argument("--limited", default="wanda,sparsegpt,nf4", help="methods of the runs under a limit, the quickest first  [default: all three]")
    parser.add_argument("--smallest", action="store_true", help="tiny models and no real limit, to see that it works")
    args = parser.parse_args()
    if args.child:
        import torch

        torch.set_num_threads(1)
        kind, model, method, mode, out = args.child
        print(json.dumps((step_alone if kind == "step" else whole_run)(Path(model), method, mode, Path(out))))
        return
    path = Path(args.out)
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"limited": {}}
    shape, limit = (SMALLEST["limited"], SMALLEST["limit"]) if args.smallest else (LIMITED, LIMIT_BYTES)
    depths, widths = (SMALLEST["layers"], SMALLEST["widths"]) if args.smallest else (LAYERS, WIDTHS)
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        if args.only != "curves":
            result["limited"] |= limited(Path(folder), **shape, limit=limit, methods=args.limited.split(","))
        if args.only != "limited":
            started = time.perf_counter()
            result["curves"] = curves(Path(folder), depths, widths)
            about = {"cpu": platform.processor() or platform.machine(), "threads": 1, "load_average": os.getloadavg()[0]}
            result["about"] = about | {"seconds": time.perf_counter() - started}
            result["settings"] = {"calibration_tokens": TOKENS, "window": WINDOW, "vocabulary": 1024, "ffn": "3 x width", "computed_in": "float32", "seed": 0}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
