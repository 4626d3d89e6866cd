"""Names that no file can have, told before the system is asked: it would answer with an OSError or a ValueError, in the middle of something.

Imports no torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import pydantic

from llmlite.config import shorten
from llmlite.errors import ConfigError

__all__ = ["PathText", "path_problem", "require_path"]

_NAME_BYTES = 255  # of one part, on every file system in use
_PATH_BYTES = 3840  # Linux takes 4,095; the files inside of a folder need some of them


def path_problem(path: Path | str) -> str:
    """Why no file or folder can be called so, as what follows on "should"; empty for a path that can be.

    Args:
        path: as somebody wrote it, ``~`` included; nothing has to be there.
    """
    text = str(path)
    if "\0" in text:
        return "hold no NUL byte"
    try:
        encoded = text.encode("utf-8")
    except UnicodeEncodeError:
        return "be UTF-8, since reports and recipes that name it are"
    longest = max(map(len, encoded.split(os.sep.encode())))
    if longest > _NAME_BYTES:
        return f"have no name in it of more than {_NAME_BYTES} bytes, which is all that file systems take; there is one of {longest:,}"
    whole = len(os.path.abspath(text).encode("utf-8"))
    if whole > _PATH_BYTES:
        return f"be at most {_PATH_BYTES:,} bytes long, counted from the root, so that the system can open files in it; it has {whole:,}"
    try:
        Path(text).expanduser()
    except RuntimeError:
        return "start with ~/ or the name of a user of this machine"
    return ""


def require_path(path: Path | str, where: str, name: str) -> Path:
    """The path, once it is known to be one.

    Args:
        path: as somebody wrote it.
        where: the command.
        name: of the argument.

    Raises:
        ConfigError: no file can be called so.
    """
    problem = path_problem(path)
    if problem:
        raise ConfigError(where, [f"{name}={shorten(repr(str(path)))} should {problem}."])
    return Path(path)


def _validated(text: str) -> str:
    problem = path_problem(text)
    if problem:
        raise ValueError(problem)
    return text


PathText = Annotated[str, pydantic.AfterValidator(_validated)]
"""A setting that names a file or folder, or may name one."""
