"""A loopback Hub for the real client: the endpoint and the token are set before each test, and every cache is a folder of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import save_tiny
from tests.hub.fake_hub import TOKEN, FakeHub

STRANGERS_LINES = """
import sys
{snippet}
import torch
from safetensors.torch import load_file, save_file
for module in model.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
"""
"""How a script begins that a stranger would run: the lines that load the model, without the packed kernels of CPUs that have bfloat16."""


@contextmanager
def loopback_hub(cache: Path) -> Iterator[FakeHub]:
    """A Hub, and this process and its children talking to it."""
    import huggingface_hub
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patched, FakeHub() as hub:
        for name, value in {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1"}.items():
            patched.setenv(name, value)
        patched.setenv("NO_PROXY", "127.0.0.1,localhost")
        patched.setenv("no_proxy", "127.0.0.1,localhost")
        patched.delenv("HF_HUB_OFFLINE", raising=False)
        patched.setattr(constants, "ENDPOINT", hub.url)
        patched.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patched.setattr(constants, "HF_HUB_CACHE", str(cache))
        patched.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patched.setattr(constants, "HF_HUB_OFFLINE", False)
        patched.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        patched.setattr(constants, "HF_STORED_TOKENS_PATH", str(cache / "stored_tokens"))
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    with loopback_hub(tmp_path_factory.mktemp("cache")) as hub:
        yield hub


@pytest.fixture(scope="session")
def full_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock model folder of another origin: no report."""
    return save_tiny(tmp_path_factory.mktemp("full") / "tiny-full")
