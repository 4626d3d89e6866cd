"""Text files of benchmarks, as people write text."""

from __future__ import annotations

import re


def detokenised(text: str) -> str:
    """WikiText's tokenized text as people write it; other text comes out as it was."""
    for mark, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" n't", "n't"), (" 's", "'s"), ("<unk>", "")):
        text = text.replace(mark, plain)
    if " ." in text:
        text = re.sub(r" ([.,;:!?)\]])", r"\1", text)
        text = re.sub(r"([(\[]) ", r"\1", text)
        text = re.sub(r'" ([^"]*?) "', r'"\1"', text)
    return text
