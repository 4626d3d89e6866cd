"""Load what a stock folder holds: its config, its tokenizer, its weights. Where the folder is, `llmlite.models.find` says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlite.errors import LoadError, ResourceError, counted, first_line
from llmlite.models.added_tokens import add_to_tokenizer, fill_rows, pieces_of
from llmlite.models.device_map import dispatch_map
from llmlite.models.find import Source, has_tokenizer
from llmlite.models.generation import require_generation_config
from llmlite.models.safety import make_safe
from llmlite.models.settings import Model
from llmlite.storage import read_object

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["compute_dtype", "fill_added_tokens", "load_config", "load_model", "load_tokenizer", "require_matching"]


def load_config(source: Source, model: Model) -> PretrainedConfig:
    """The transformers config, without weights.

    Raises:
        LoadError: the config is unreadable, or its architecture is unknown to the installed transformers; or the folder's generation config is none.
    """
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source.folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # transformers raises KeyError, ValueError, OSError, JSONDecodeError and validation errors of its own here
        if isinstance(error, ImportError | MemoryError):
            raise
        hint = "" if model.trust_remote_code else " If the repository carries its own code and you trust it: trust_remote_code=true."
        raise LoadError(f"model: {source.folder / 'config.json'} cannot be read as a transformers config: {first_line(error)}.{hint}") from None
    require_generation_config(source.folder)
    if model.add_tokens:
        config.vocab_size = max(config.vocab_size, len(load_tokenizer(source, model)))
    return config


def load_tokenizer(source: Source, model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a padding token (the end-of-text token where none is set; padding is masked by position).

    Raises:
        LoadError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(source.folder):  # transformers would make up an empty one
        raise LoadError(
            f"model: '{source.folder}' has no usable tokenizer: neither tokenizer.json nor a vocabulary. Save it there: tokenizer.save_pretrained(folder)."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # as above
        if isinstance(error, ImportError | MemoryError):
            raise
        raise LoadError(f"model: '{source.folder}' has no usable tokenizer: {first_line(error)}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.add_tokens:
        add_to_tokenizer(tokenizer, model.add_tokens)
    return tokenizer


def require_matching(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for; in training that is an index error, hours in.

    Raises:
        LoadError: it has more tokens than the model embeds.
    """
    if len(tokenizer) > config.vocab_size:
        raise LoadError(
            f"model: its tokenizer has {len(tokenizer):,} tokens and its embedding {config.vocab_size:,}: they do not belong together, or tokens were added "
            "without model.resize_token_embeddings(len(tokenizer))."
        )


def load_model(source: Source | Path, model: Model, device: torch.device, *, tensor_parallel: bool = False, **kwargs: Any) -> PreTrainedModel:
    """Load weights by stock `AutoModelForCausalLM.from_pretrained`, in eval mode on `device`; layers of bitsandbytes are made safe.

    Args:
        source: what `find` returned, or a folder.
        model: settings; `dtype` is resolved by `compute_dtype`; what a folder of bitsandbytes keeps beside its codes stays in the type of the file, since stock
            transformers converts only some of it. A `device_map` says where dense weights go.
        device: where the weights go otherwise.
        tensor_parallel: cut the blocks over the processes of this launch, each of which calls this alike; see `llmlite.models.tensor_parallel`.
        kwargs: passed on, for instance ``quantization_config``.

    Raises:
        LoadError: the weights do not fit the config, or cannot be laid out as asked.
        ResourceError: they do not fit into memory.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from llmlite.memory import out_of_memory

    folder = source.folder if isinstance(source, Source) else source
    options: dict[str, Any] = {
        "dtype": _dtype_beside_codes(folder) or compute_dtype(device, model.dtype),
        "use_safetensors": True,
        "trust_remote_code": model.trust_remote_code,
        **kwargs,
    }
    if tensor_parallel:
        options |= _cut_over_processes(folder, model)
    elif "device_map" not in options:
        options["device_map"] = _device_map(folder, model, options, device) or {"": device}
    if model.attn_implementation:
        options["attn_implementation"] = model.attn_implementation
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, MemoryError, SafetensorError) as error:
        if out_of_memory(error):
            raise ResourceError(
                f"model: '{folder}' does not fit into memory ({first_line(error)[:120]}). Pruning and quantization "
                "work on one block at a time with load: blocks; device_map: auto leaves blocks in main memory or on disk; dtype: bfloat16 halves float32."
            ) from error
        raise LoadError(f"model: '{folder}' cannot be loaded: {first_line(error)}") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise LoadError(
            f"model: '{folder}' lacks {counted(len(missing), 'weight')} that its config asks for, first '{missing[0]}'. Its files and config.json do not "
            "belong together."
        )
    _require_shapes(loaded, folder)
    fill_added_tokens(loaded, folder, model)
    make_safe(loaded)
    loaded.eval()
    return loaded


def _require_shapes(loaded: PreTrainedModel, folder: Path) -> None:
    """Raise LoadError for a 4-bit layer whose codes are of another shape than the config gives it."""
    for name, layer in loaded.named_modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is not None and hasattr(layer, "out_features") and tuple(state.shape) != (layer.out_features, layer.in_features):
            raise LoadError(
                f"model: '{folder}': {name} is stored as {tuple(state.shape)}, and its config asks for {(layer.out_features, layer.in_features)}. Its files "
                "and config.json do not belong together."
            )


def _dtype_beside_codes(folder: Path) -> torch.dtype | None:
    """Of a folder that bitsandbytes has quantized the type of what it has not; None of a dense one."""
    import torch

    file = folder / "config.json"
    config = read_object(file) if file.is_file() else {}
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None) if config.get("quantization_config") else None
    return found if isinstance(found, torch.dtype) else None


def _device_map(folder: Path, model: Model, options: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    """`dispatch_map` of the model in a folder; None where it is quantized while it loads."""
    if model.device_map == "none" or "quantization_config" in options:
        return None
    return dispatch_map(load_config(Source(str(folder), folder, None), model), model, options["dtype"], device)


def _cut_over_processes(folder: Path, model: Model) -> dict[str, Any]:
    import torch

    from llmlite.models.tensor_parallel import indivisible, tensor_parallel_options

    config = load_config(Source(str(folder), folder, None), model)
    problems = indivisible(config, torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
    if problems:
        raise LoadError(f"model: '{folder}': {' '.join(problems)}")
    return tensor_parallel_options(config)


def fill_added_tokens(loaded: PreTrainedModel, folder: Path, model: Model) -> None:
    """Rows for the tokens of `Model.add_tokens` that the folder's own tokenizer does not know. A folder that a step left knows them all; one without a
    tokenizer is a step's scratch folder, whose model has the rows already."""
    source = Source(str(folder), folder, None)
    if not model.add_tokens or not has_tokenizer(folder):
        return
    pieces = pieces_of(load_tokenizer(source, dataclasses.replace(model, add_tokens=())), model.add_tokens)
    if pieces:
        tokenizer = load_tokenizer(source, model)
        ids = dict(zip(pieces, tokenizer.convert_tokens_to_ids(list(pieces)), strict=True))
        fill_rows(loaded, {ids[token]: parts for token, parts in pieces.items()}, len(tokenizer))


def compute_dtype(device: torch.device, asked: str = "auto") -> torch.dtype:
    """The type to compute in: as asked, else bfloat16 on accelerators that have it, float16 on older ones, float32 on a CPU.

    Measured on a CPU without AMX: bfloat16 trains 1.6 to 1.8 times slower than float32.
    """
    import torch

    if asked != "auto":
        dtype: torch.dtype = getattr(torch, asked)
        return dtype
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16
