"""Train, calibration and test out of one pile of rows, by a hash of each row's content.

The hash decides, not the order: shuffling or growing the file moves no row from training into the test, equal rows always fall on the
same side, and no seed has to be remembered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from llmlite.errors import DataError, counted

__all__ = ["SPLITS", "Split", "row_key", "split_by_content"]

Split = Literal["train", "calibration", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def row_key(row: Mapping[str, Any]) -> int:
    """64 bits of the row's content; white space and the case of letters make no difference."""
    written = json.dumps(_plain(row), sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.blake2b(written.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(value.split()).casefold()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def split_by_content(keys: Sequence[int], calibration_fraction: float, test_fraction: float, where: str) -> dict[Split, list[int]]:
    """Share out the rows; every split with a fraction above zero gets at least one.

    Args:
        keys: `row_key` of each row. Equal keys go to the same split.
        calibration_fraction, test_fraction: about this share of the distinct rows; the rest trains.
        where: named in the error.

    Returns:
        For each split the indices of its rows, in their original order.

    Raises:
        DataError: fewer distinct rows than splits to fill.
    """
    distinct = sorted(set(keys))
    wanted = [fraction for fraction in (test_fraction, calibration_fraction) if fraction > 0]
    if len(distinct) <= len(wanted):
        raise DataError(
            f"{where}: {counted(len(distinct), 'different row')} cannot be shared out between training"
            f"{' and calibration' if calibration_fraction > 0 else ''}{' and test' if test_fraction > 0 else ''}. "
            "Give more rows (a plain text file is cut at blank lines), or a test file of its own."
        )
    # Thresholds on the hash leave a small split empty now and then, so the smallest hashes are taken by rank there.
    test_end = _boundary(distinct, test_fraction, 0, len(distinct) - len(wanted)) if test_fraction > 0 else 0
    calibration_end = _boundary(distinct, test_fraction + calibration_fraction, test_end, len(distinct) - 1) if calibration_fraction > 0 else test_end
    side: dict[int, Split] = dict.fromkeys(distinct[:test_end], "test")
    side |= dict.fromkeys(distinct[test_end:calibration_end], "calibration")
    shares: dict[Split, list[int]] = {name: [] for name in SPLITS}
    for index, key in enumerate(keys):
        shares[side.get(key, "train")].append(index)
    return shares


def _boundary(distinct: Sequence[int], fraction: float, start: int, most: int) -> int:
    """How many of the sorted keys lie below `fraction` of all 64-bit numbers, at least one after `start`, at most `most`."""
    below = sum(key < fraction * 2**64 for key in distinct)
    return min(max(below, start + 1), most)
