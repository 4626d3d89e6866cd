"""Folders that are complete or absent, and stay provably so.

A folder is written under a temporary name, sealed by a manifest of sizes and SHA-256 sums, flushed to disk and renamed into place. Whoever
reads it later can tell a whole one from one that a crash, a full disk or a flipped bit left behind.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from llmlite.errors import LlmliteError, LoadError, OutputError, ResourceError, first_line

__all__ = [
    "MANIFEST",
    "cache_folder",
    "damage",
    "file_sums",
    "flush",
    "folder_bytes",
    "link_or_copy",
    "locked",
    "read_object",
    "require_space",
    "require_writable",
    "seal",
    "set_aside",
    "telling",
    "telling_full",
    "telling_refused",
    "write_json",
    "write_text",
    "writing_folder",
]

MANIFEST = "manifest.json"
_NAME = 40  # characters of a name that its temporary stand-in repeats; more might make it longer than a name may be
_REFUSALS = frozenset({errno.EACCES, errno.EROFS, errno.EPERM})
_NEARLY_FULL_BYTES = 16_000_000
"""So little is free that whoever could not write a checkpoint there ran out of space."""


@contextmanager
def writing_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; when the block ends well, seal it and rename it to `folder`, replacing what was there.

    Raises:
        OutputError: the place cannot be written.
        ResourceError: the disk is full. Nothing is left behind after either.
    """
    with telling(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name[:_NAME]}-"))
    try:
        with telling(folder):
            temporary.chmod(0o755)
            yield temporary
            seal(temporary)
            _put(temporary, folder)
            flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, folder: Path) -> None:
    """Rename one folder to another's name, whose place may be taken, by another run too while this one looks."""
    while True:
        if folder.exists():
            old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name[:_NAME]}-old-"))
            with suppress(FileNotFoundError):  # the other run has just taken it away
                folder.rename(old / folder.name)
        else:
            old = None
        try:
            temporary.rename(folder)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
            continue
        finally:
            if old is not None and folder.exists():
                shutil.rmtree(old, ignore_errors=True)
        return


@contextmanager
def telling(path: Path, instead: str = "") -> Iterator[None]:
    """Turn the operating system's refusals into one clear error about `path`.

    Args:
        path: what is written.
        instead: a sentence that says what to do; left out, the one for a cache or for a run's output, whichever `path` lies in.
    """
    try:
        with telling_full(path):
            yield
    except OSError as error:
        if error.errno in _REFUSALS | {errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP}:
            advice = instead or f"{'Set LLMLITE_CACHE to a folder that can be written' if _is_cache(path) else 'Choose another --output_dir'}."
            raise OutputError(f"{path}: cannot be written ({error.strerror}). {advice}") from error
        raise


def require_writable(folder: Path, instead: str) -> None:
    """Raise OutputError for a folder that takes no new file, before hours are spent on what shall lie there; see `telling` for `instead`."""
    with telling(folder, instead), tempfile.NamedTemporaryFile(dir=folder):
        pass


@contextmanager
def telling_refused(out: Path) -> Iterator[None]:
    """Around a whole run: say of a full disk that it is full, and of a refusal under `out` that it is one. What the system refuses elsewhere, a model that must
    not be read say, is not blamed on the output."""
    try:
        with telling_full(out):
            yield
    except LlmliteError:
        raise
    except Exception as error:
        if (reason := _refusal(error)) and _concerns(error, out):
            raise OutputError(
                f"{out}: cannot be written any more ({reason}). What was complete is kept: when the folder can be written again the same command goes on; or "
                "choose another --output_dir."
            ) from error
        raise


def _refusal(error: Exception) -> str:
    """In the system's words why a file could not be used; empty where it was something else."""
    number, words = _system_number(error), os.strerror(errno.EROFS)
    if number in _REFUSALS:
        return os.strerror(number)
    return words if _is_torch_writer(error) and words in str(error) else ""


def _concerns(error: BaseException | None, out: Path) -> bool:
    """Whether a refusal is about a path under `out`; of one that names no file, whether `out` refuses now."""
    while error is not None:
        named = getattr(error, "filename", None)
        if isinstance(named, str | bytes):
            return Path(os.fsdecode(named)).resolve().is_relative_to(out.resolve())
        error = error.__cause__ or error.__context__
    return not os.access(out, os.W_OK | os.X_OK)


@contextmanager
def telling_full(path: Path) -> Iterator[None]:
    """Say of a full disk that it is full, whoever noticed it first."""
    try:
        yield
    except LlmliteError:
        raise
    except Exception as error:
        if _system_number(error) in {errno.ENOSPC, errno.EDQUOT} or (_is_torch_writer(error) and _free_bytes(path) < _NEARLY_FULL_BYTES):
            raise ResourceError(f"{path}: the disk is full. Free some space and run the same command again; it continues where it stopped.") from error
        raise


def _system_number(error: BaseException | None) -> int | None:
    """The system's number of what went wrong, of an error or of those that led to it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if inside := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors and tokenizers, written in Rust, have errors of their own
            return int(inside[1])
        error = error.__cause__ or error.__context__
    return None


def _is_torch_writer(error: Exception) -> bool:
    """Whether torch.save failed: it keeps the system's number to itself, and on a full disk says that it is elsewhere in the file than it should be."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in ("inline_container", "PytorchStreamWriter", "unexpected pos"))


def _free_bytes(path: Path) -> int:
    """Free bytes of the disk on which a path lies, or will."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def seal(folder: Path) -> None:
    """Write the manifest of a folder, last, and flush everything to disk: from now on the folder counts as complete."""
    entries: dict[str, Any] = {}
    for file in _files(folder):
        flush(file)
        entries[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    write_json(folder / MANIFEST, entries)
    flush(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, as a phrase, or None when every file is there with the size and sum its manifest says."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except FileNotFoundError:
        return "it was never finished"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "its manifest is unreadable"
    for name, (size, digest) in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if _sha256(file) != digest:
            return f"{name} has changed since it was written"
    return None


def cache_folder() -> Path:
    """Where llmlite keeps what it can make again: ``$LLMLITE_CACHE``, else the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("LLMLITE_CACHE") or platformdirs.user_cache_dir("llmlite"))


def file_sums(folder: Path, pattern: str = "*.safetensors") -> dict[str, str]:
    """SHA-256 of the files in a folder (not below it) that match: the manifest's where `seal` has written one, else computed."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        known = {name: str(entry["sha256"]) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):  # none, or somebody else's
        known = {}
    return {file.name: known.get(file.name) or _sha256(file) for file in sorted(folder.glob(pattern))}


def set_aside(folder: Path) -> Path:
    """Rename a damaged folder so that nothing uses it and nothing is lost. Returns the new place."""
    for number in range(1, 1000):
        place = folder.with_name(f"{folder.name}.damaged-{number}")
        if not place.exists():
            folder.rename(place)
            return place
    raise OutputError(f"{folder}: there are already 999 damaged copies beside it. Remove them.")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that may come from anywhere.

    Raises:
        LoadError: there is none, with the reason.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path} is no JSON ({first_line(error)[:120]}). It may be cut off: copy or download it again.") from None
    if not isinstance(value, dict):
        raise LoadError(f"{path} should hold a JSON object and holds a {type(value).__name__}. Copy or download it again.")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text so that a reader sees the old file or the new one, never half of it."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}-", delete=False, encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def link_or_copy(source: Path, target: Path) -> None:
    """Let `target` hold the same bytes: a hard link where the file system has them, else a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def folder_bytes(folder: Path, which: str = "*.safetensors") -> int:
    """Bytes of the files in a folder that fit a pattern, its weights when none is given."""
    return sum(file.stat().st_size for file in folder.glob(which))


def require_space(folder: Path, wanted_bytes: int) -> None:
    """Stop early when the disk cannot hold the plan.

    Raises:
        ResourceError: fewer free bytes than `wanted_bytes`.
    """
    free = _free_bytes(folder)
    if free < wanted_bytes:
        what, advice = ("the cache", "Set LLMLITE_CACHE to a folder") if _is_cache(folder) else ("output_dir", "Choose an --output_dir")
        raise ResourceError(
            f"{what}: {folder} needs about {wanted_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free. "
            f"{advice} on a larger disk, or free some space."
        )


def _is_cache(path: Path) -> bool:
    return path.absolute().is_relative_to(cache_folder().absolute())


@contextmanager
def locked(folder: Path, movable: bool = True) -> Iterator[None]:
    """Hold the folder for one run; a second run on it is refused.

    Args:
        folder: of the run.
        movable: whether what is done could be done in another folder.

    Raises:
        OutputError: another run holds it, or it cannot be written.
    """
    with telling(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            advice = "Wait for it, or choose another --output_dir." if movable else "Wait for it."
            raise OutputError(f"{'output_dir: ' * movable}another run is working in {folder}. {advice}") from None
    try:
        yield
    finally:
        lock.release()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() != MANIFEST)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
