"""What every peer's script shares: the same windows in, the changed model's last hidden states on the test windows out. No llmlite in here.

With the head, which goes with them where it was trained, hidden states are enough to compare whole distributions in the driver's own environment.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS, ROWS_OF_A_STEP = 16, 2  # of distillation
KEEP_CHANNELS = 0.733  # of structured pruning, every FFN; a fifth of SmolLM2-135M's decoder goes


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in {".safetensors", ".bin", ".pt", ".pth"})


def dense(folder: str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@torch.no_grad()
def hidden_states(model: Any, windows_NT: torch.Tensor) -> torch.Tensor:
    """What enters the LM head, (N, T, D), float32."""
    seen: list[torch.Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _module, args: seen.append(args[0].float().cpu().clone()))
    for part in windows_NT.split(4):
        model(input_ids=part, use_cache=False)
    handle.remove()
    return torch.cat(seen)


def run(compress: Callable[[argparse.Namespace, torch.Tensor], Any], save: Callable[[Any, Any, Path], None] | None = None) -> None:
    """Compress with the calibration windows, note what it cost, and write hidden states of the test windows.

    Args:
        compress: (arguments, calibration windows (N, T)) -> the compressed model.
        save: (model, tokenizer, folder) writes the checkpoint as the peer means it; None for `save_pretrained`.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("answer", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--windows", type=Path, required=True)
    parser.add_argument("--hidden", type=Path, required=True)
    parser.add_argument("--method", default="")
    parser.add_argument("--student", default="")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    windows = load_file(args.windows)
    started, cpu = time.perf_counter(), time.process_time()
    model = compress(args, windows.pop("calibration"))
    answer: dict[str, Any] = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds_inside": time.process_time() - cpu,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    model.eval()
    found = {name: hidden_states(model, ids_NT) for name, ids_NT in windows.items()}
    if args.student:
        found["head"] = model.get_output_embeddings().weight.detach().float().contiguous().clone()
    save_file(found, args.hidden)
    folder = args.hidden.parent / "saved"
    try:
        (save or (lambda model, tokenizer, folder: (model.save_pretrained(folder), tokenizer.save_pretrained(folder))))(
            model, AutoTokenizer.from_pretrained(args.model), folder
        )
        answer["bytes"] = bytes_of(folder)
        again = AutoModelForCausalLM.from_pretrained(folder).eval()
        for module in again.modules():  # bitsandbytes' packed CPU path computes in bfloat16; the comparison is of the stored weights
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        ids_NT = next(iter(windows.values()))
        difference = (hidden_states(again, ids_NT[:2]) - hidden_states(model, ids_NT[:2])).abs().max()
        answer["transformers_loads_it"] = f"yes, hidden states differ by {float(difference):.2g}"
    except Exception as error:  # whatever a peer raises is its result
        answer["transformers_loads_it"] = f"no: {type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
    args.answer.write_text(json.dumps(answer))
