"""What calibration needs beside the model: SparseGPT on random Llamas of 4, 8, 16 and 32 layers, each in a process of its own.

    python benchmarks/calibration_memory.py

Prints a table and writes benchmarks/results/calibration_memory.json. The column "beside the model" should not grow with the layers.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

LAYERS = (4, 8, 16, 32)


def peak_bytes() -> int:
    """Highest resident memory of this process so far (Linux counts kibibytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(layers: int, tokens: int) -> dict[str, int]:
    """One walk in this process; the difference is taken after a first small walk, which loads every library it needs."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    import llmlite
    from llmlite.context import Run
    from llmlite.memory import resident_bytes

    torch.manual_seed(0)
    shape = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}

    def walk(depth: int, windows: int) -> int:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_hidden_layers=depth)).eval()
        run = Run(llmlite.Recipe(steps=(llmlite.PruneWeights(),)))
        run.__dict__["calibration_windows"] = torch.randint(0, 1000, (windows, 256))
        before = resident_bytes()
        llmlite.PruneWeights(sparsity=0.5).apply(model, run)
        return before

    walk(1, 4)
    before = walk(layers, tokens // 256)
    beside = peak_bytes() - before
    weights = sum(p.numel() * 4 for p in AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_hidden_layers=layers)).parameters())
    return {"layers": layers, "model_bytes": weights, "beside_bytes": beside}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--layers", type=int, help="measure this one in this process and print JSON")
    parser.add_argument("--out", default="benchmarks/results/calibration_memory.json")
    args = parser.parse_args()
    if args.layers:
        print(json.dumps(measure(args.layers, args.tokens)))
        return
    rows = []
    print(f"{'layers':>6} {'model':>10} {'beside the model':>18}")
    for layers in LAYERS:
        command = [sys.executable, __file__, "--layers", str(layers), "--tokens", str(args.tokens)]
        rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))
        print(f"{layers:6d} {rows[-1]['model_bytes'] / 1e6:7.1f} MB {rows[-1]['beside_bytes'] / 1e6:15.1f} MB", flush=True)
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"calibration_tokens": args.tokens, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
