"""Speed and answers of a 4-bit model are those of stock transformers: bitsandbytes' packed kernel inside, the portable layers before and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
from transformers import PreTrainedModel

import llmlite
from llmlite.evaluation import quality, sample, speed
from llmlite.models.safety import linear_4bit_layers
from llmlite.report import Report

SMALL: dict[str, Any] = {"max_length": 64, "evaluation_rows": 4}


class Watch:
    """Which of the functions that get a model found its 4-bit layers ready to pack, by name."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.packed, self.models = patch, dict[str, set[bool]](), list[PreTrainedModel]()
        patch.setattr(bnb.functional, "has_avx512bf16", lambda: True)
        for module, name in ((quality, "measure_quality"), (speed, "measure_speed"), (speed, "measure_latency"), (sample, "sample")):
            patch.setattr(module, name, self.watching(name, getattr(module, name)))

    def watching(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(model: PreTrainedModel, *args: Any, **options: Any) -> Any:
            if layers := linear_4bit_layers(model):
                self.models.append(model)
                self.packed.setdefault(name, set()).update(layer.support_avx512bf16_for_cpu for layer in layers)
            return function(model, *args, **options)

        return call

    def require_portable(self) -> None:
        for layer in (layer for model in self.models for layer in linear_4bit_layers(model)):
            assert not layer.support_avx512bf16_for_cpu
            assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


@pytest.fixture(scope="module")
def watched_run(model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Watch]:
    out, steps = tmp_path_factory.mktemp("runs") / "out", [llmlite.Quantize(calibrate=False, report_sequences=0)]
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        report = llmlite.Recipe(model=str(model_folder), data=str(pairs_file), output_dir=str(out), steps=steps, **SMALL).run()
    return report, watch


def test_a_run_times_and_answers_with_the_packed_kernel_and_nothing_else(watched_run: tuple[Report, Watch]) -> None:
    _, watch = watched_run
    assert watch.packed == {"measure_quality": {False}, "measure_speed": {True}, "measure_latency": {True}, "sample": {True}}
    watch.require_portable()


def test_evaluate_times_and_answers_with_the_packed_kernel_and_nothing_else(watched_run: tuple[Report, Watch], monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    llmlite.evaluate(watched_run[0].path, batch_sizes=(1,), repeats=1, answers=1)
    assert watch.packed == {"measure_quality": {False}, "measure_latency": {True}, "sample": {True}}
    watch.require_portable()
