"""Times by a clock that the test winds: the warm-up does not count, and the 95th percentile is one."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmlite.evaluation.result import Evaluation
from llmlite.evaluation.speed import _seconds_of_others, measure_latency, measure_speed
from llmlite.html.page import run_page
from llmlite.hub.card import model_card
from llmlite.report import SPEED_OF_STEPS, Report, Row
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


@pytest.mark.parametrize(("others", "short"), [(0.0, 0.0), (0.5, 0.5), (2.0, 2.0), (9.0, 2.0)])
def test_processors_that_others_kept_busy_are_noted(monkeypatch: pytest.MonkeyPatch, others: float, short: float) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    monkeypatch.setattr("llmlite.evaluation.speed._seconds_of_others", lambda: others * time.perf_counter())
    found = measure_latency(build_tiny("llama"), prompt_tokens=10, new_tokens=2, repeats=1)
    assert found.processors_short == pytest.approx(short, abs=0.01)


def test_a_free_processor_is_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    monkeypatch.setattr("llmlite.evaluation.speed._seconds_of_others", lambda: 5.0 * time.perf_counter())
    assert measure_speed(build_tiny("llama"), prompt_tokens=10, new_tokens=2, repeats=1).processors_short == 0


def test_another_programs_work_counts_and_ones_own_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _seconds_of_others()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 1: pass"], check=True)
    assert _seconds_of_others() - before > 0.8
    monkeypatch.setattr("psutil.cpu_times", lambda: SimpleNamespace(user=50.0, nice=1.0, system=9.0, idle=100.0, iowait=100.0))
    monkeypatch.setattr("time.process_time", lambda: 20.0)
    assert _seconds_of_others() == 40.0


def test_table_page_and_card_say_whose_speed_others_held_up(tmp_path: Path) -> None:
    rows = [
        Row("base", 1, 1, 10.0, decode_tokens_per_second=1.0, details={"processors_short": 1.26}),
        Row("prune.ffn", 1, 1, 10.0, decode_tokens_per_second=2.0),
    ]
    report = Report(tmp_path, {}, {}, {}, rows)
    said = "While base was timed, other programs kept up to 1.3 of the processors busy: do not compare speeds"
    shown = [str(report.table().caption), run_page(report), model_card(report, tmp_path)]
    assert all(said in one for one in shown)
    assert "2.00x" not in shown[1]
    assert "not to be compared" in shown[1]
    rows[0].details["processors_short"] = 0.1
    assert "other programs" not in report.speed_on()
    assert "2.00x" in run_page(report)


def test_the_evaluation_says_whose_speed_others_held_up(tmp_path: Path) -> None:
    latency = dataclasses.asdict(measure_latency(build_tiny("llama"), prompt_tokens=10, new_tokens=2, repeats=1))
    models = {name: {"latency": [{**latency, "processors_short": short}]} for name, short in (("base", 0.0), ("this", 0.9))}
    assert (
        Evaluation(tmp_path, {}, models)
        .speed_on()
        .endswith("While this was timed, other programs kept up to 0.9 of the processors busy: do not compare speeds; time again on a quiet machine.")
    )
    old = {name: {"latency": [{key: value for key, value in latency.items() if key != "processors_short"}]} for name in models}
    assert "other programs" not in Evaluation(tmp_path, {}, old).speed_on()
