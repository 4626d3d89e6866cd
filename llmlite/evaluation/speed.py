"""How fast a model is: tokens a second while it reads a prompt (prefill) and while it writes (decode), batch 1."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llmlite.models.view import unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Speed", "measure_speed"]


@dataclass(frozen=True)
class Speed:
    """Medians over the repeats, after one warm-up.

    Attributes:
        prefill_tokens_per_second: prompt tokens read a second.
        decode_tokens_per_second: tokens written a second after the prompt.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float


@torch.no_grad()
def measure_speed(model: PreTrainedModel, prompt_tokens: int = 256, new_tokens: int = 16, repeats: int = 3) -> Speed:
    """Time forward passes of a random prompt and of the tokens that follow it, with the cache.

    Args:
        model: any causal LM, on its device. It is put into eval mode and back.
        prompt_tokens: length of the prompt; at most what the model allows.
        new_tokens: decoding steps timed after each prompt.
        repeats: timed repeats after one that warms up.
    """
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    longest = getattr(model.config, "max_position_embeddings", None) or prompt_tokens + new_tokens
    prompt_tokens = max(1, min(prompt_tokens, longest - new_tokens))
    generator = torch.Generator().manual_seed(0)
    prompt_BT = torch.randint(0, min(1000, model.config.vocab_size), (1, prompt_tokens), generator=generator).to(device)
    inner = unwrap(model)  # a prefix would set its own keys and values again at every token
    prefill, decode = [], []
    for repeat in range(repeats + 1):
        started = _now(device)
        output = model(input_ids=prompt_BT, use_cache=True, logits_to_keep=1)
        read = _now(device)
        token_BT = output.logits[:, -1:].argmax(-1)
        for _ in range(new_tokens):
            output = inner(input_ids=token_BT, past_key_values=output.past_key_values, use_cache=True)
            token_BT = output.logits[:, -1:].argmax(-1)
        written = _now(device)
        if repeat:
            prefill.append(read - started)
            decode.append(written - read)
    model.train(was_training)
    return Speed(prompt_tokens / statistics.median(prefill), new_tokens / statistics.median(decode))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
