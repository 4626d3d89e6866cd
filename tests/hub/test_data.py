"""Rows from a data set on the Hub, by the real `datasets` client against the loopback Hub, and what is said of those that are not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmlite.data.text import check_source, read_splits
from llmlite.errors import DataError
from tests.hub.fake_hub import FakeHub


def test_rows_are_read_from_a_data_set_on_the_hub(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(40)]
    files = {f"{name}.jsonl": "".join(json.dumps(row) + "\n" for row in part).encode() for name, part in (("train", rows[:30]), ("test", rows[30:]))}
    hub.add("me/rows", private=False, files=files)
    check_source("me/rows")  # asks the Hub, reads nothing
    splits = read_splits("me/rows")
    assert {row["completion"] for row in splits["test"].rows} == {row["completion"] for row in rows[30:]}
    assert {row["prompt"] for row in splits["train"].rows} <= {row["prompt"] for row in rows[:30]}


def test_a_data_set_that_is_not_there_is_said_not_to_be(hub: FakeHub) -> None:
    with pytest.raises(DataError, match="neither a file or folder here"):
        check_source("me/nothing")
