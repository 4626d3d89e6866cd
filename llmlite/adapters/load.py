"""Load an adapter onto a model: peft's own way, for peft's kinds and for llmlite's bottleneck adapters alike."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlite.config import shorten
from llmlite.errors import LoadError, first_line
from llmlite.memory import out_of_memory
from llmlite.models.device_map import is_offloaded

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["load_adapter"]


def load_adapter(model: Any, folder: str | Path, *, is_trainable: bool = False, **kwargs: Any) -> PeftModel:
    """``peft.PeftModel.from_pretrained`` that also knows bottleneck adapters.

    Args:
        model: a stock transformers model, dense or quantized by bitsandbytes.
        folder: folder or Hub id of the adapter.
        is_trainable: leave its parameters trainable.
        kwargs: passed on to peft, for instance ``adapter_name``.

    Returns:
        The peft model. ``load_adapter``, ``set_adapter``, ``disable_adapter`` and ``save_pretrained`` are peft's.

    Raises:
        LoadError: the adapter is pickled, damaged, incomplete, or made for another model.
    """
    import peft

    import llmlite.adapters.bottleneck_layers  # noqa: F401 - teaches peft the type BOTTLENECK

    pickled = Path(folder) / "adapter_model.bin"
    if pickled.is_file() and not pickled.with_suffix(".safetensors").is_file():
        raise LoadError(f"adapter: {folder} holds its weights as a pickle, which can run code when it is opened. Save it again as safetensors.")
    if is_offloaded(model):
        raise LoadError(f"adapter: {folder} cannot be put on a model of which device_map has offloaded a part. Merge it (step merge), and load that.")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")  # peft would go on with an adapter that was read in part
            return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable, **kwargs)
    except Exception as error:  # whatever a wrong file does inside of peft
        if out_of_memory(error):  # nothing is wrong with the file
            raise
        reason = shorten(first_line(error), 200)
        raise LoadError(
            f"adapter: {folder} cannot be put on this model ({type(error).__name__}: {reason}). Wanted: adapter_config.json and adapter_model.safetensors as "
            "peft writes them, made for a model with these layers. Is it the right base?"
        ) from error
