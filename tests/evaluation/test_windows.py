"""A sliding window counts every token but the first exactly once, and is exact where one window holds the text."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from llmlite.errors import DataError
from llmlite.evaluation.quality import measure_quality
from llmlite.evaluation.windows import sliding_batches, text_ids
from tests.conftest import build_tiny, build_tokenizer, logits_of, token_ids


@pytest.mark.parametrize(("length", "window", "stride"), [(50, 16, 8), (51, 16, 15), (16, 16, 4), (5, 16, 8), (33, 16, 1), (2, 8, 4)])
def test_every_token_but_the_first_is_counted_once_with_half_a_window_before_it(length: int, window: int, stride: int) -> None:
    ids_T = torch.arange(3, 3 + length)
    seen = []
    for batch in sliding_batches(ids_T, window, stride):
        labels = batch["labels"][0]
        assert len(labels) <= window
        counted = [int(label) for place, label in enumerate(labels) if label != -100 and place > 0]
        if seen and counted:
            assert int((batch["input_ids"][0] == counted[0]).nonzero()) >= min(window - stride, window // 2) - 1
        seen += counted
    assert sorted(set(seen)) == list(range(4, 3 + length))
    assert len(seen) == len(set(seen))


def test_one_window_gives_the_perplexity_of_the_whole_text() -> None:
    model, ids = build_tiny("llama"), token_ids(rows=1, length=40)
    logits = logits_of(model, ids)[0, :-1].log_softmax(-1)
    expected = math.exp(-float(logits.gather(1, ids[0, 1:, None]).mean()))
    assert measure_quality(model, sliding_batches(ids[0], 64, 32)).perplexity == pytest.approx(expected, rel=1e-5)


def test_a_text_that_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    for name, message in (("none.txt", "cannot be read"), ("empty.txt", "has 0 tokens"), ("latin.txt", "is not UTF-8")):
        with pytest.raises(DataError, match=message):
            text_ids(tmp_path / name, tokenizer)
