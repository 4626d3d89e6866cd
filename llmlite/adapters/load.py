"""Load an adapter onto a model: peft's own way, for peft's kinds and for llmlite's bottleneck adapters alike."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    """
    import peft

    import llmlite.adapters.bottleneck_layers  # noqa: F401 - teaches peft the type BOTTLENECK

    return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable, **kwargs)
