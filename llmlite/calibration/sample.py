"""Calibration text that the model writes itself: sampled from its own distribution, in large batches, once.

A pruned model generalises better when it is calibrated on what the model believes text to be than on one narrow corpus (measured: LLM-pruned models on a
text that no calibration row resembles). No data leaves or enters the machine.

Source: Liu et al. 2023 (LLM-QAT), arXiv:2305.17888, section 2.1; Williams and Aletras 2024, arXiv:2410.17170 (self-calibration).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmlite.config import fingerprint
from llmlite.errors import counted
from llmlite.models.find import Source, config_text, weight_files
from llmlite.storage import cache_folder, damage, writing_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["DOCUMENT_TOKENS", "sample_documents", "sampled_windows"]

log = logging.getLogger(__name__)

DOCUMENT_TOKENS = 256
"""Length of one sampled text. Attention and cache grow with it, so two short texts in a window are cheaper than a long one."""
BATCH_DOCUMENTS = 32
"""Texts sampled together. More are hardly faster on a CPU, where the matrix products already fill it, and need a larger cache."""


@torch.inference_mode()
def sample_documents(model: PreTrainedModel, documents: int, tokens: int, *, seed: int, temperature: float = 1.0) -> Tensor:
    """Texts drawn token by token from the model, all of them in one batch, each position computed once.

    Half of them start after the end-of-text token, where the model expects any new text; half at a random token, which widens the topics.

    Args:
        model: a causal LM in eval mode, on its device.
        documents: how many.
        tokens: length of each, the first token included.
        seed: the same seed on the same device gives the same texts.
        temperature: 1 is the model's own distribution.

    Returns:
        Token ids, int64 on the CPU, (documents, tokens).
    """
    from transformers import DynamicCache

    device = model.get_input_embeddings().weight.device
    generator = torch.Generator(device).manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    ids_B1 = torch.randint(0, vocabulary, (documents, 1), generator=generator, device=device)
    end = model.config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    if end is not None:
        ids_B1[::2] = end
    cache, found = DynamicCache(config=model.config), [ids_B1]
    for _ in range(tokens - 1):
        logits_BV = model(input_ids=ids_B1, past_key_values=cache, use_cache=True).logits[:, -1].float()
        ids_B1 = torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=generator)
        found.append(ids_B1)
    return torch.cat(found, dim=1).cpu()


def sampled_windows(source: Source, load: Callable[[], PreTrainedModel], windows: int, window_tokens: int, *, seed: int, dtype: torch.dtype) -> Tensor:
    """Windows of text that the model wrote, from the cache where it wrote them before.

    Batches are cached one by one, so an interrupted run loses at most one, and asking for more keeps what is there.

    Args:
        source: the model, whose files name the cache.
        load: called only when something has to be sampled.
        windows, window_tokens: shape of the result.
        seed: of the sampling.
        dtype: the type the model computes in; part of the cache's name.

    Returns:
        Token ids, int64, (windows, window_tokens); each window holds texts of at most `DOCUMENT_TOKENS` tokens one after the other.
    """
    document = min(DOCUMENT_TOKENS, window_tokens)
    for_each = -(-window_tokens // document)
    per_batch = max(1, BATCH_DOCUMENTS // for_each)  # windows
    files = [weight_files(source.folder), config_text(source.folder)]
    key = fingerprint(str(source.folder.resolve()), files, seed, document, for_each, per_batch, str(dtype), 1)
    folder = cache_folder() / "samples" / f"{(source.hub_id or source.folder.name).replace('/', '--')}-{key}"
    model, found = None, []
    for batch in range(-(-windows // per_batch)):
        place = folder / f"{batch:04d}"
        if damage(place) is not None:
            model = model or load()
            log.info(
                "sampling calibration text from the model itself, %d of %s; kept in %s",
                min((batch + 1) * per_batch, windows),
                counted(windows, "window"),
                folder,
            )
            ids = sample_documents(model, per_batch * for_each, document, seed=seed * 100_003 + batch)
            with writing_folder(place) as temporary:
                save_file({"ids": ids.reshape(per_batch, -1)[:, :window_tokens].to(torch.int32).contiguous()}, temporary / "ids.safetensors")
        found.append(load_file(place / "ids.safetensors")["ids"].long())
    return torch.cat(found)[:windows]
