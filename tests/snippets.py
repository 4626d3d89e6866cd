"""The Python blocks of the documentation, for the tests that run them on tiny models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent


def snippet(page: str, part: str, instead: Mapping[str, str | Path]) -> str:
    """The one Python block of a page that holds `part`, with the names of models and folders replaced by those of a test."""
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S) if part in block)
    for name, other in instead.items():
        assert name in block, f"{page} names {name} no more"
        block = block.replace(name, str(other))
    return block
