"""What every peer's script shares: the same windows in, the changed model's last hidden states on the test windows out. No llmlite in here.

With the head, which goes with them where it was trained, hidden states are enough to compare whole distributions in the driver's own environment.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

STEPS, ROWS_OF_A_STEP = 16, 2  # of distillation
KEEP_CHANNELS = 0.733  # of structured pruning, every FFN; a fifth of SmolLM2-135M's decoder goes


def bits_per_weight(folder: Path, config: Any) -> float | None:
    """Bits in the file for each weight of the decoder's projections, scales and tables included; None where they are not in safetensors."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = {name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"}
    bits, seen = 0, set()
    for file in folder.rglob("model*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                layer = next((".".join(name.split(".")[:end]) for end in range(name.count("."), 0, -1) if ".".join(name.split(".")[:end]) in sizes), None)
                if layer is not None and not name.endswith(".bias"):
                    seen.add(layer)
                    tensor = tensors.get_tensor(name)
                    bits += 8 * tensor.numel() * tensor.element_size()
    return bits / sum(sizes.values()) if seen == set(sizes) else None


@torch.no_grad()
def speed(model: Any, prompt_T: torch.Tensor, new_tokens: int = 16, repeats: int = 3) -> dict[str, float]:
    """Tokens a second of prompt and of greedy writing at batch 1: medians after a round that warms up."""
    prefill, decode = [], []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        out = model(input_ids=prompt_T[None], use_cache=True)
        prefill.append(len(prompt_T) / (time.perf_counter() - started))
        started = time.perf_counter()
        for _ in range(new_tokens):
            out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        decode.append(new_tokens / (time.perf_counter() - started))
    return {"prefill": statistics.median(prefill[1:]), "decode": statistics.median(decode[1:])}


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
    folder, ids_NT = args.hidden.parent / "saved", next(iter(windows.values()))
    try:
        (save or (lambda model, tokenizer, folder: (model.save_pretrained(folder), tokenizer.save_pretrained(folder))))(
            model, AutoTokenizer.from_pretrained(args.model), folder
        )
        answer["bytes"] = bytes_of(folder)
        answer["bits_per_weight"] = bits_per_weight(folder, AutoConfig.from_pretrained(args.model))
        again = AutoModelForCausalLM.from_pretrained(folder).eval()
        for module in again.modules():  # bitsandbytes' packed CPU path computes in bfloat16; the comparison is of the stored weights
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        difference = (hidden_states(again, ids_NT[:2]) - hidden_states(model, ids_NT[:2])).abs().max()
        answer["transformers_loads_it"] = f"yes, hidden states differ by {float(difference):.2g}"
        del again
        model = AutoModelForCausalLM.from_pretrained(folder).eval()  # as anybody has it, kernels of the machine included
    except Exception as error:  # whatever a peer raises is its result
        answer["transformers_loads_it"] = f"no: {type(error).__name__}: {str(error).replace(str(folder), 'the folder').partition(chr(10))[0][:160]}"
    args.answer.write_text(json.dumps(answer | speed(model, ids_NT[0, :256])))
