"""Text files of benchmarks, as people write text."""

from __future__ import annotations

import atexit
import re
import tempfile
from pathlib import Path
from typing import Any

import torch


def detokenised(text: str) -> str:
    """WikiText's tokenized text as people write it; other text comes out as it was.

    ``<unk>`` stays: the words behind it are lost, and without a sign of them sentences would lack their subjects, which no model predicts.
    """
    for mark, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" n't", "n't"), (" 's", "'s")):
        text = text.replace(mark, plain)
    if " ." in text:
        text = re.sub(r" ([.,;:!?)\]])", r"\1", text)
        text = re.sub(r"([(\[]) ", r"\1", text)
        text = re.sub(r'" ([^"]*?) "', r'"\1"', text)
    return text


def detokenised_file(path: str | Path) -> str:
    """A copy of a text file as people write it, for as long as the process lives."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    copy = Path(folder.name) / Path(path).name
    copy.write_text(detokenised(Path(path).read_text(encoding="utf-8")), encoding="utf-8")
    return str(copy)


def ids_of(path: str | Path, tokenizer: Any) -> torch.Tensor:
    """A text file as people write it, as one run of token ids without special tokens, int64, (T,)."""
    text = detokenised(Path(path).read_text(encoding="utf-8"))
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
