"""A teacher of one's own behind an API: `transformers serve` on the loopback interface, for the time of a block.

The server is a process of its own that holds one end of a pipe. When this process ends, however it ends, the pipe closes and the server with it, so a kill
leaves nothing behind.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from llmlite.errors import ApiError

__all__ = ["missing_libraries", "served"]

log = logging.getLogger(__name__)

_NEEDS = ("fastapi", "uvicorn", "openai")
_PATIENCE_SECONDS = 300.0  # for loading
_START = """
import os, sys, threading
def watch():
    sys.stdin.buffer.read()
    os._exit(0)
threading.Thread(target=watch, daemon=True).start()
from transformers.cli.transformers import main
main()
"""


def missing_libraries() -> list[str]:
    """What `transformers serve` needs and is not installed."""
    return [name for name in _NEEDS if importlib.util.find_spec(name) is None]


@contextmanager
def served(folder: Path, device: str, dtype: str) -> Iterator[str]:
    """Serve a model folder on a free port of 127.0.0.1 and yield the base URL; the model's name there is the folder.

    Args:
        folder: a stock model folder with its tokenizer.
        device: as torch names it.
        dtype: type to compute in.

    Raises:
        ApiError: it does not come up; the end of what it said is quoted.
    """
    with tempfile.TemporaryFile() as said:
        for attempt in range(3):
            port = _free_port()
            process = _start(folder, port, device, dtype, said)
            try:
                if _ready(process, port):
                    log.info("the teacher is served on 127.0.0.1:%d by transformers serve", port)
                    yield f"http://127.0.0.1:{port}/v1"
                    return
                said.seek(0)
                words = said.read().decode("utf-8", "replace")
                if "address already in use" not in words or attempt == 2:
                    raise ApiError(f"distill.blackbox: transformers serve did not come up for {folder.name}:\n{words[-800:].strip()}")
            finally:
                _end(process)


def _start(folder: Path, port: int, device: str, dtype: str, said: IO[bytes]) -> subprocess.Popen[bytes]:
    arguments = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", device, "--dtype", dtype]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("API_KEY")}
    return subprocess.Popen(
        [sys.executable, "-c", _START, *arguments],
        stdin=subprocess.PIPE,
        stdout=said,
        stderr=subprocess.STDOUT,
        env={**environment, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
        start_new_session=True,  # Ctrl-C is for us: what was asked may still arrive
    )


def _ready(process: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with opener.open(f"http://127.0.0.1:{port}/health", timeout=2):
                return process.poll() is None
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.stdin:
        process.stdin.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
