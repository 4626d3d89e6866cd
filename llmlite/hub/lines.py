"""The Python lines that load a result with stock libraries: from a folder here, or from the Hub.

They stand in reports and on cards, and they are run: every result is loaded by its own lines in a fresh process before it counts as done. So nothing in a
name or a path may end the string that it stands in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlite.models.device_map import places
from llmlite.models.view import ModelView
from llmlite.storage import read_object

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["adapter_loader", "dtype_of", "loading_lines", "loading_snippet", "offloaded_lines"]


def loading_lines(
    folder: Path | str, base: Path | str | None = None, dtype: str | None = None, vocabulary: int | None = None, adapters: Sequence[str] = ()
) -> str:
    """The Python lines that load a result with stock libraries.

    Args:
        folder: where the result lies.
        base: folder or Hub id of the base, when the result is an adapter.
        dtype: passed as ``dtype=``; None for transformers' default.
        vocabulary: rows that the base's embedding must have for the adapter's added tokens, when it has fewer.
        adapters: names of the adapters that lie side by side in the folder, the last of which is to be active; none for one adapter, or a model.
    """
    options = f', dtype="{dtype}"' if dtype else ""
    if base is None:
        return f"from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained({_literal(folder)}{options})"
    loader, load = adapter_loader(Path(folder, *adapters[:1]))
    return (
        f"from transformers import AutoModelForCausalLM; {loader}\n"
        f"base = AutoModelForCausalLM.from_pretrained({_literal(base)}{options})\n"
        + (f"{_resizing_line(vocabulary)}\n" if vocabulary else "")
        + "\n".join(_adapter_lines(load, _literal(folder), adapters))
    )


def dtype_of(model: PreTrainedModel, dense: torch.dtype) -> str:
    """The type that the lines of a model, or of the base of its adapter, name: a quantized one loads in the type of its file, a dense one in `dense`."""
    return str(model.config.dtype if getattr(model, "hf_quantizer", None) is not None else dense).removeprefix("torch.")


def offloaded_lines(model: PreTrainedModel, folder: Path | str, dtype: str) -> str:
    """The Python lines that load a dense result with stock transformers while its blocks stay on disk, read at each forward pass."""
    view = ModelView(model)
    found = places(view, {block.name: "disk" for block in view.blocks}, "cpu")
    return f"""import tempfile; from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({_literal(folder)}, dtype="{dtype}", device_map={found}, offload_folder=tempfile.mkdtemp())"""


def loading_snippet(place: str, base: Mapping[str, Any] | None, base_model: str | None = None, revision: str | None = None) -> str:
    """The Python lines that load a result from the Hub with stock libraries.

    Args:
        place: repository, or folder.
        base: what `llmlite.hub.base.describe_base` found, for an adapter; None for a whole model. Its ``loader`` is `adapter_loader`'s answer; its ``adapters``
            are the names of several side by side.
        base_model: Hub id of an adapter's base, when it is not the one in `base`.
        revision: branch or commit.
    """
    at = f", revision={_literal(revision)}" if revision else ""
    place = _literal(place)
    if base is None:
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained({place}{at}, dtype="auto")\n'
            f"tokenizer = AutoTokenizer.from_pretrained({place}{at})"
        )
    quantization = base.get("quantization_config")
    loader, load = base.get("loader") or ("from peft import PeftModel", "PeftModel.from_pretrained")
    lines = [
        f"from transformers import AutoModelForCausalLM, AutoTokenizer{', BitsAndBytesConfig' if quantization else ''}",
        loader,
        "",
    ]
    if quantization:
        lines.append(
            f"quantization_config = BitsAndBytesConfig({', '.join(f'{name}={_literal(value)}' for name, value in quantization.items() if name.isidentifier())})"
        )
    name = _literal(base_model or base.get("hub_id") or base.get("name") or "BASE")
    options = ", quantization_config=quantization_config" if quantization else ""
    lines += [
        f'base = AutoModelForCausalLM.from_pretrained({name}, dtype="auto"{options})',
        *([_resizing_line(base["vocabulary"])] if base.get("vocabulary") else []),
        *_adapter_lines(load, f"{place}{at}", base.get("adapters") or ()),
        f"tokenizer = AutoTokenizer.from_pretrained({place}{at})",
    ]
    return "\n".join(lines)


def adapter_loader(folder: Path) -> tuple[str, str]:
    """The import, and the name of the function, that put an adapter on its base: peft's, or for a kind that peft does not have llmlite's."""
    config = folder / "adapter_config.json"
    kind = read_object(config).get("peft_type") if config.is_file() else None
    if kind == "BOTTLENECK":
        return "from llmlite import load_adapter", "load_adapter"
    return "from peft import PeftModel", "PeftModel.from_pretrained"


def _resizing_line(vocabulary: int) -> str:
    """The line that gives a stock base the rows of added tokens; the adapter fills them."""
    return f"base.resize_token_embeddings({int(vocabulary)}, mean_resizing=False)"


def _adapter_lines(load: str, place: str, names: Sequence[str] = ()) -> list[str]:
    """The lines that put one adapter on ``base``, or several side by side and switch to the last.

    Args:
        load: what `adapter_loader` says.
        place: the folder or repository as a Python literal, and further arguments.
        names: of the adapters in subfolders; none where the place itself holds the only one.
    """
    if not names:
        return [f"model = {load}(base, {place})"]
    named = [_literal(name) for name in names]
    first, *others = [f"{place}, adapter_name={name}, subfolder={name}" for name in named]
    switch = [f"model.set_adapter({named[-1]})  # and back: model.set_adapter({named[0]})"] if others else []
    return [f"model = {load}(base, {first})", *(f"model.load_adapter({other})" for other in others), *switch]


def _literal(value: Any) -> str:
    """A Python literal; what is quoted stands in double quotes, which nothing in it can end."""
    return json.dumps(str(value), ensure_ascii=False) if isinstance(value, str | Path) else repr(value)
