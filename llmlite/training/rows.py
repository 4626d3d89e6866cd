"""Rows dealt out to the processes of a launch: in the order in which one process would read them, each of them once in an epoch.

accelerate deals whole batches, and where they do not come out even it fills up with rows from the epoch's beginning, which then count twice: N processes would
train as no single one does. Here the epoch's end is filled up with an empty row, of which no token counts; losses are divided by the tokens that do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Dataset

from llmlite.training.token_loss import IGNORE_INDEX

__all__ = ["EMPTY", "EvenSampler", "WithEmptyRow"]

EMPTY = -1
"""Number of the row that is none."""
_LENGTH = 2  # tokens of the empty row; one alone predicts nothing


class WithEmptyRow(Dataset[dict[str, Any]]):
    """Rows, and one behind the last that is empty.

    Args:
        rows: a data set whose rows have `input_ids`, `labels` and `row`, their number.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        """Without the empty one."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row; `len(self)` gives the empty one."""
        if index < len(self.rows):
            row: dict[str, Any] = self.rows[index]
            return row
        short = {name: value[:_LENGTH] if isinstance(value, list) else value for name, value in self.rows[0].items()}
        return {**short, "labels": [IGNORE_INDEX] * len(short["labels"]), "row": EMPTY}


class EvenSampler(SeedableRandomSampler):  # type: ignore[misc]
    """All rows in the random order of the epoch, then the empty one until their number is a multiple.

    Args:
        rows: how many there are.
        multiple: rows that all processes read at a time.
        seed: of the order; the epoch is added.
    """

    def __init__(self, rows: int, multiple: int, seed: int) -> None:
        super().__init__(range(rows), data_seed=seed)
        self.rows, self.filling = rows, -rows % multiple

    def __iter__(self) -> Iterator[int]:
        """Places in a `WithEmptyRow`."""
        yield from super().__iter__()
        yield from [self.rows] * self.filling

    def __len__(self) -> int:
        """The empty ones included."""
        return self.rows + self.filling
