"""How calibration text is named: one source, or several with weights, as ``0.5*self + 0.5*wiki.txt``. No torch here; checks use it."""

from __future__ import annotations

import math
from collections.abc import Iterable

from llmlite.errors import ConfigError

__all__ = ["SELF", "parse_mixture", "shares"]

SELF = "self"
"""The source that the base model writes itself."""


def parse_mixture(text: str) -> list[tuple[float, str]]:
    """Read a mixture.

    Args:
        text: sources joined by `` + `` (with blanks), each optionally led by ``WEIGHT*``. A source is ``self``, a file, a folder, a Hub id or a
            ``builtin:`` name.

    Returns:
        (share, source) pairs; shares add up to 1.

    Raises:
        ConfigError: an empty source, or a weight that is not a positive number.
    """
    parts: list[tuple[float, str]] = []
    problems: list[str] = []
    for part in text.split(" + "):
        weight, star, source = part.strip().partition("*")
        if not star:
            weight, source = "1", part.strip()
        try:
            value = float(weight)
        except ValueError:
            value, source = 1.0, part.strip()  # a * in a file name
        if not source.strip() or not (math.isfinite(value) and value > 0):
            problems.append(
                f"calibration: '{part}' in {text!r} should be a source, or WEIGHT*SOURCE with a positive weight, for instance '0.5*self + 0.5*wiki.txt'."
            )
        parts.append((value, source.strip()))
    if problems:
        raise ConfigError("data", problems)
    total = sum(value for value, _ in parts)
    return [(value / total, source) for value, source in parts]


def shares(weights: Iterable[float], count: int) -> list[int]:
    """Whole numbers that add up to `count` and follow the weights as closely as they can (largest remainders)."""
    exact = [weight * count for weight in weights]
    found = [math.floor(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda index: found[index] - exact[index])
    for index in order[: count - sum(found)]:
        found[index] += 1
    return found
