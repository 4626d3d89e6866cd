"""What strangers may see: values and text without tokens, keys and folders of this machine; and which files of a folder are a result.

Two lines of defence. What we write ourselves (report, recipe, card, the names of base models) is rewritten: a folder becomes its last
part. Everything that is about to be sent is then searched, and a file that still holds a secret or a private folder stops the upload.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["leak", "places_of", "public_json", "public_text", "result_files", "secrets_of_this_machine"]

REMOVED = "[removed]"

_SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|(API|ACCESS|PRIVATE|SECRET)_?KEY|KEY)(_|$)", re.IGNORECASE)
_SECRET = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|AKIA[0-9A-Z]{16}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,}|AIza[A-Za-z0-9_-]{30,}|glpat-[A-Za-z0-9_-]{16,})"
)
_PASSWORD_IN_URL = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+@")
_FOLDER = re.compile(r"(?<![\w:/.~-])(?:~[\w.-]*|\.{1,2})?(?:/[^\s/'\"`,;:()<>|]+)+/?")
_WINDOWS = re.compile(r"\b[A-Za-z]:\\(?:[^\s'\"\\]+\\?)+")
_RELATIVE_FILE = re.compile(r"(?<![\w/:.-])(?:[\w.-]+/)+[\w.-]+\.(?:jsonl?|parquet|csv|txt|gguf|ya?ml|arrow|gz|zst)\b")

# What a model, an adapter and its tokenizer consist of; anything else in the folder is not ours to publish.
_RESULT = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "*_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.jinja",
    "README.md",
    "recipe.yaml",
    "report.json",
    "report.html",
    "evaluation.json",
    "adapters.json",
    "*.png",
    "*.svg",
    "LICENSE*",
    "NOTICE*",
)
_NEVER = ("steps", "*.work", "*.damaged-*", "checkpoint-*", "runs", "logs", "wandb")
_VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model")


def result_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of a folder that belong to the result, and the others (without steps/ and hidden files), which stay here.

    A folder inside counts when it is a model, an adapter or chat templates of its own, like ``merged/``.
    """
    ours: list[Path] = []
    others: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or (path.is_symlink() and path.is_dir()) or any(fnmatch.fnmatch(path.name, pattern) for pattern in _NEVER):
            continue
        if path.is_dir():
            inside, outside = result_files(path)
            is_result = any(file.name in {"config.json", "adapter_config.json"} or file.suffix == ".jinja" for file in inside)
            (ours if is_result else others).extend(inside)
            others += outside
        elif path.name not in {"manifest.json", "row.json"}:
            (ours if any(fnmatch.fnmatch(path.name, pattern) for pattern in _RESULT) else others).append(path)
    return ours, others


def secrets_of_this_machine() -> tuple[str, ...]:
    """Values that must never be sent: the Hub's tokens, and what the environment keeps under names like TOKEN, KEY or PASSWORD."""
    from huggingface_hub import constants

    found = {value.strip() for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    for file in (constants.HF_TOKEN_PATH, constants.HF_STORED_TOKENS_PATH):
        try:
            found |= set(re.findall(r"[A-Za-z0-9_-]{12,}", Path(file).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError):
            continue
    # short values and folders (SSL_KEY_FILE and the like name files) are no secrets, and would be found everywhere
    return tuple(sorted((value for value in found if len(value) >= 8 and not value.startswith("/")), key=len, reverse=True))


def places_of(*paths: str | Path | None) -> tuple[str, ...]:
    """Folders of this machine that must not be named: home, the working folder, and the given ones; longest first."""
    named: set[str] = set()
    for path in (Path.home(), Path.cwd(), *paths):
        if path is None or not str(path):
            continue
        for form in (Path(path).expanduser().absolute(), Path(path).expanduser().resolve()):
            if len(form.parts) > 2 or form == Path.home():  # /app or /data alone tell nothing, and are found in any text
                named.add(str(form))
    return tuple(sorted(named, key=len, reverse=True))


def public_text(text: str, secrets: Iterable[str] = (), places: Iterable[str] = (), quoted: bool = False) -> str:
    """Text without secrets, and with every folder of this machine cut to its last part.

    Args:
        text: what is to be published.
        secrets: exact values to remove, besides all that look like a token.
        places: exact folders to cut, besides all that look like a path.
        quoted: the text quotes training data or a model's answer: only the exact folders are cut, since ``/usr/bin`` in an answer is no leak.
    """
    for secret in secrets:
        text = text.replace(secret, REMOVED)
    text = _PASSWORD_IN_URL.sub("", _SECRET.sub(REMOVED, text))
    for place in places:
        text = re.sub(rf"{re.escape(place)}(?=$|[/\\\s'\"`,;:()<>|.])([/\\][^\s/\\'\"`,;:()<>|]+)*", lambda match: _last(match.group()), text)
    if quoted:
        return text
    if re.match(r"^(~|/|[A-Za-z]:\\)", text) and "\n" not in text and ", " not in text:
        return _last(text)  # a whole path, blanks and all
    for pattern in (_FOLDER, _WINDOWS, _RELATIVE_FILE):
        text = pattern.sub(lambda match: _last(match.group()), text)
    return text


def _last(path: str) -> str:
    if path.rstrip("/\\") in {"~", str(Path.home())} or re.fullmatch(r"(/home|/Users|[A-Za-z]:\\Users)[/\\][^/\\]+[/\\]?", path):
        return "~"  # its name would be the user's
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "folder"


def public_json(value: Any, secrets: Iterable[str] = (), places: Iterable[str] = (), quoted: bool = False) -> Any:
    """`public_text` on every string of plain values; what lies under a key ``sample`` or ``add_tokens`` is quoted text (``</call>`` is no folder)."""
    secrets, places = tuple(secrets), tuple(places)
    if isinstance(value, Mapping):
        return {key: public_json(item, secrets, places, quoted or key in {"sample", "add_tokens"}) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public_json(item, secrets, places, quoted) for item in value]
    return public_text(value, secrets, places, quoted) if isinstance(value, str) else value


def leak(name: str, content: bytes | Path, secrets: Iterable[str], places: Iterable[str]) -> str | None:
    """What a file about to be sent gives away, as a phrase without the secret itself; None when nothing was found.

    Weights are not searched, only their header. In vocabularies only exact secrets are looked for: they hold pieces of everything.
    """
    text = "\n".join(_texts(name, content))
    if any(secret in text for secret in secrets):
        return "a token or key of this machine"
    if name.rpartition("/")[2] in _VOCABULARY:
        return None
    found = _SECRET.search(text)
    if found:
        return f"what looks like a token ({found.group()[:3]}...)"
    for place in places:
        if re.search(rf"{re.escape(place)}(?=$|[/\\\s'\"`,;:()<>|])", text):
            return f"a folder of this machine ({place})"
    return None


def _texts(name: str, content: bytes | Path) -> Iterator[str]:
    if name.endswith(".safetensors"):
        with open(content, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            yield stream.read(min(size, 100_000_000)).decode("utf-8", errors="replace")
        return
    data = content if isinstance(content, bytes) else content.read_bytes()
    text = data.decode("utf-8", errors="replace")
    yield text
    if name.endswith(".json"):
        with suppress(ValueError, RecursionError):  # no JSON after all: then nothing in it is escaped
            yield from _strings(json.loads(text))  # unescaped: a folder may be written with \\ or \u


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, str):
        yield value
