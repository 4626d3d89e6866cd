"""How fast a model is: time to the first token, time of each further one, tokens a second, at one or several prompts together.

    TTFT   from the prompt to the first token (prefill)      prefill tokens/s = batch * prompt tokens / TTFT
    TPOT   from one token to the next (decode)               decode tokens/s  = batch / TPOT

Every figure is a median over repeats after one that warms up, with the 95th percentile beside it where the spread matters. What is measured is the
model as it stands in memory, kernels of the machine included; zeros in a mask or fewer bytes on disk count for nothing here. How many processors other programs
kept from it is noted, since a model that had to wait is not slow.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llmlite.models.adapted import tokens_left
from llmlite.models.view import unwrap

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["Latency", "Speed", "measure_latency", "measure_speed"]


@dataclass(frozen=True)
class Speed:
    """Medians over the repeats, after one warm-up.

    Attributes:
        prefill_tokens_per_second: prompt tokens read a second.
        decode_tokens_per_second: tokens written a second after the prompt.
        processors_short: see `Latency`.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    processors_short: float = 0.0


@dataclass(frozen=True)
class Latency:
    """Times at one batch size, in seconds.

    Attributes:
        batch, prompt_tokens, new_tokens, repeats: what was measured.
        ttft_p50, ttft_p95: time to the first token, over the repeats.
        tpot_p50, tpot_p95: time of each further token, over all tokens of all repeats.
        prefill_tokens_per_second, decode_tokens_per_second: of the whole batch, from the medians.
        peak_memory_bytes: of the process (CPU) or the allocator (CUDA), model included.
        processors_short: how many of the processors that its threads could use were kept busy by other programs meanwhile, on average; 0 on a GPU.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    ttft_p50: float
    ttft_p95: float
    tpot_p50: float
    tpot_p95: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int
    processors_short: float = 0.0


def measure_speed(model: PreTrainedModel, prompt_tokens: int = 256, new_tokens: int = 16, repeats: int = 3) -> Speed:
    """Tokens a second at batch 1.

    Args:
        model: any causal LM, on its device. It is put into eval mode and back.
        prompt_tokens, new_tokens: see `measure_latency`.
        repeats: timed repeats after one that warms up.
    """
    found = measure_latency(model, 1, prompt_tokens, new_tokens, repeats)
    return Speed(found.prefill_tokens_per_second, found.decode_tokens_per_second, found.processors_short)


@torch.no_grad()
def measure_latency(model: PreTrainedModel, batch: int = 1, prompt_tokens: int = 256, new_tokens: int = 16, repeats: int = 3) -> Latency:
    """Time forward passes of random prompts and of the tokens that follow them, with the cache.

    Args:
        model: any causal LM, on its device. It is put into eval mode and back.
        batch: prompts at a time.
        prompt_tokens: length of each prompt; at most what the model has positions for, behind a prefix and before the new tokens.
        new_tokens: decoding steps timed after each prompt; fewer where the model has no position for a prompt before them.
        repeats: timed repeats after one that warms up.
    """
    from llmlite.memory import measured_peak

    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    new_tokens = max(1, tokens_left(model, 1, new_tokens))
    prompt_tokens = max(1, tokens_left(model, new_tokens, prompt_tokens))
    generator = torch.Generator().manual_seed(0)
    prompt_BT = torch.randint(0, min(1000, model.config.vocab_size), (batch, prompt_tokens), generator=generator).to(device)
    first: list[float] = []
    further: list[float] = []
    with measured_peak(device.type) as peak, _watched(torch.get_num_threads() if device.type == "cpu" else 0) as short:
        for repeat in range(repeats + 1):
            ttft, tpot = _timed(model, prompt_BT, new_tokens)
            if repeat:
                first.append(ttft)
                further += tpot
    model.train(was_training)
    ttft_p50, tpot_p50 = statistics.median(first), statistics.median(further)
    return Latency(
        batch,
        prompt_tokens,
        new_tokens,
        repeats,
        ttft_p50,
        _p95(first),
        tpot_p50,
        _p95(further),
        batch * prompt_tokens / ttft_p50,
        batch / tpot_p50,
        peak.bytes,
        short[0],
    )


@contextmanager
def _watched(threads: int) -> Iterator[list[float]]:
    """After the block the list holds `Latency.processors_short` of `threads` threads of this process."""
    short = [0.0]
    started, before = time.perf_counter(), _seconds_of_others()
    yield short
    seconds = time.perf_counter() - started
    if threads and seconds > 0:
        others = (_seconds_of_others() - before) / seconds
        short[0] = round(min(max(others + threads - (os.cpu_count() or 1), 0.0), threads), 2)


def _seconds_of_others() -> float:
    """Processor time of all programs of this machine but this one, from any start."""
    import psutil

    of_all = psutil.cpu_times()
    return float(of_all.user + getattr(of_all, "nice", 0.0) + of_all.system) - time.process_time()


def _timed(model: PreTrainedModel, prompt_BT: Tensor, new_tokens: int) -> tuple[float, list[float]]:
    """Seconds to the first token, and of each further one."""
    device = prompt_BT.device
    inner = unwrap(model)  # a prefix would set its own keys and values again at every token
    started = _now(device)
    output = model(input_ids=prompt_BT, use_cache=True, logits_to_keep=1)
    token_BT = output.logits[:, -1:].argmax(-1)
    times = [_now(device)]
    for _ in range(new_tokens):
        output = inner(input_ids=token_BT, past_key_values=output.past_key_values, use_cache=True)
        token_BT = output.logits[:, -1:].argmax(-1)
        times.append(_now(device))
    return times[0] - started, [after - before for before, after in itertools.pairwise(times)]


def _p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
