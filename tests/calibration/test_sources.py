"""Calibration windows of a run: which text, how much of each, and the model's own text written once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llmlite
from llmlite.calibration import sample
from llmlite.context import Run
from llmlite.data.settings import Data
from llmlite.models.find import Source
from tests.conftest import build_tiny

pytestmark = pytest.mark.usefixtures("own_cache")


def run_on(model_folder: Path, **data: Any) -> Run:
    return Run(llmlite.Recipe(model=str(model_folder), data=Data(max_length=32, **data), steps=(llmlite.PruneFfn(),)))


def test_sampled_text_follows_the_models_own_distribution() -> None:
    model = build_tiny("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.05)
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
    ids = sample.sample_documents(model, 64, 50, seed=0)
    assert ids.shape == (64, 50)
    assert set(ids[::2, 0].tolist()) == {2}  # half start behind the end of a text
    counts = torch.bincount(ids[:, 1:].flatten(), minlength=96).float()
    assert float((counts - counts.mean()).abs().max()) < 6 * float(counts.mean()) ** 0.5  # logits are all equal, so tokens are uniform


def test_a_position_is_drawn_from_what_the_stock_forward_pass_gives_there() -> None:
    model = build_tiny("gemma3_text")  # its sliding window exercises the cache
    ids = sample.sample_documents(model, 16, 20, seed=1, temperature=1e-4)  # the most likely token, then
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    assert float((logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean()) > 0.99


def test_what_the_model_wrote_is_kept_and_more_of_it_begins_with_the_same(model_folder: Path) -> None:
    written = []

    def load() -> Any:
        written.append(1)
        return build_tiny("llama")

    source = Source("tiny", model_folder, None)
    options: dict[str, Any] = {"seed": 0, "dtype": torch.float32}
    first = sample.sampled_windows(source, load, 4, 32, **options)
    assert torch.equal(sample.sampled_windows(source, load, 4, 32, **options), first)
    assert len(written) == 1
    more = sample.sampled_windows(source, load, 40, 32, **options)
    assert torch.equal(more[:4], first)
    assert more.shape == (40, 32)
    assert not torch.equal(sample.sampled_windows(source, load, 4, 32, seed=1, dtype=torch.float32), first)


def test_a_mixture_holds_its_parts_in_the_asked_shares_and_mixed_order(model_folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{name} {n} " + name * 60 for n in range(80)))
    both = f"3*{tmp_path / 'a.txt'} + 1*{tmp_path / 'b.txt'}"
    run = run_on(model_folder, calibration=both, calibration_sequences=16)
    texts = [run.tokenizer.decode(window) for window in run.calibration_windows]
    holds_a = ["aaaaa" in text for text in texts]
    assert (len(texts), sum(holds_a)) == (16, 12)
    assert holds_a != sorted(holds_a)
    assert holds_a != sorted(holds_a, reverse=True)


def test_a_text_that_is_too_short_is_said_with_what_it_has(model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("a " * 20)
    run = run_on(model_folder, calibration=str(tmp_path / "a.txt"), calibration_sequences=2)
    assert len(run.calibration_windows) == 1
    assert f"calibration: {tmp_path / 'a.txt'} has only 1 window of 32 tokens; 2 were asked for" in caplog.messages


def test_the_default_mixes_text_of_the_model_with_rows_that_are_neither_trained_on_nor_tested_on(model_folder: Path, pairs_file: Path) -> None:
    run = run_on(model_folder, train=str(pairs_file), calibration_sequences=4)
    assert run.calibration == f"0.5*self + 0.5*{pairs_file}"
    run.check_data()
    windows = run.calibration_windows
    assert windows.shape[1] == 32
    text = " ".join(run.tokenizer.decode(window) for window in windows)
    trained = [row["prompt"] for row in run.train_data.rows.rows]
    assert not any(question in text for question in trained)


def test_a_source_that_does_not_exist_is_found_by_the_check(model_folder: Path, pairs_file: Path) -> None:
    run = run_on(model_folder, train=str(pairs_file), calibration="0.5*self + 0.5*nowhere.txt")
    with pytest.raises(llmlite.LlmliteError, match="nowhere"):
        run.check_data()
