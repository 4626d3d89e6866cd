"""Times by a clock that the test winds: the warm-up does not count, and the 95th percentile is one."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch

from llmlite.evaluation.speed import measure_latency, measure_speed
from llmlite.report import SPEED_OF_STEPS
from tests.conftest import build_tiny

NEW = 4


def test_the_first_repeat_warms_up_and_p95_is_over_repeats_and_over_all_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    ttft = [1000.0, 1.0, 5.0, 2.0]  # the first one loads kernels
    tpot = [[900.0] * NEW, [0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 3.0], [0.8, 0.9, 1.0, 1.1]]
    passed = itertools.chain.from_iterable([0.0, first, *further] for first, further in zip(ttft, tpot, strict=True))
    times = itertools.accumulate(passed)
    monkeypatch.setattr("llmlite.evaluation.speed._now", lambda _: next(times))
    found = measure_latency(build_tiny("llama"), batch=2, prompt_tokens=10, new_tokens=NEW, repeats=3)
    assert next(times, None) is None  # one warm-up and three repeats
    counted = torch.tensor(tpot[1:]).flatten()
    assert found.ttft_p50 == pytest.approx(2.0)
    assert found.ttft_p95 == pytest.approx(float(torch.tensor(ttft[1:]).quantile(0.95)))
    assert found.tpot_p50 == pytest.approx(float(counted.quantile(0.5)), rel=1e-5)
    assert found.tpot_p95 == pytest.approx(float(counted.quantile(0.95)), rel=1e-5)
    assert found.prefill_tokens_per_second == pytest.approx(2 * 10 / 2.0)
    assert found.decode_tokens_per_second == pytest.approx(2 / float(counted.quantile(0.5)), rel=1e-5)
    assert (found.batch, found.prompt_tokens, found.new_tokens, found.repeats) == (2, 10, NEW, 3)


def test_one_repeat_is_its_own_percentile(monkeypatch: pytest.MonkeyPatch) -> None:
    times = itertools.accumulate([0.0, 50.0, 50.0, 0.0, 3.0, 4.0])
    monkeypatch.setattr("llmlite.evaluation.speed._now", lambda _: next(times))
    found = measure_latency(build_tiny("llama"), prompt_tokens=10, new_tokens=1, repeats=1)
    assert (found.ttft_p50, found.ttft_p95, found.tpot_p50, found.tpot_p95) == (3.0, 3.0, 4.0, 4.0)


def test_a_prompt_is_no_longer_than_the_model_reads() -> None:
    assert measure_latency(build_tiny("llama"), prompt_tokens=256, new_tokens=2, repeats=1).prompt_tokens == 126


def test_what_is_said_of_the_steps_speed_is_how_it_is_measured() -> None:
    usual = {name: parameter.default for name, parameter in inspect.signature(measure_speed).parameters.items()}
    said = "at most {prompt_tokens} tokens and {new_tokens} more, the median of {repeats} repeats"
    assert said.format(**usual) in SPEED_OF_STEPS
