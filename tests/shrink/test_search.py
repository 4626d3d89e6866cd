"""The search finds what a look at every combination finds, and says no early."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlite.shrink.options import mixed_options, prune_options
from llmlite.shrink.search import Candidate, Limits, Option, best, combinations, frontier

OPTIONS = st.builds(Option, st.text(min_size=1, max_size=3), st.just(()), st.floats(0, 1), st.floats(1, 2), st.floats(0.5, 2))
CANDIDATES = st.lists(st.builds(Candidate, st.tuples(OPTIONS, OPTIONS), st.integers(1, 50), st.integers(1, 50)), max_size=12)


@given(CANDIDATES)
def test_nothing_beats_what_is_on_the_frontier_and_something_beats_the_rest(candidates: list[Candidate]) -> None:
    front = frontier(candidates)
    for one in candidates:
        beaten = any(
            other.bytes_on_disk <= one.bytes_on_disk and other.kl <= one.kl and (other.bytes_on_disk, other.kl) != (one.bytes_on_disk, one.kl)
            for other in candidates
        )
        assert beaten or any((other.bytes_on_disk, other.kl) == (one.bytes_on_disk, one.kl) for other in front)
    assert [c.bytes_on_disk for c in front] == sorted((c.bytes_on_disk for c in front), reverse=True)
    assert all(before.kl < after.kl for before, after in itertools.pairwise(front))


@given(CANDIDATES, st.integers(1, 50), st.floats(0, 2))
def test_the_best_is_the_least_kl_within_the_limits(candidates: list[Candidate], most: int, increase: float) -> None:
    limits = Limits(bytes_on_disk=most, perplexity_increase=increase)
    found = best(candidates, limits)
    fitting = [c for c in candidates if c.bytes_on_disk <= most and c.perplexity_ratio <= 1 + increase]
    assert (found is None) == (not fitting)
    if found is not None:
        assert found.kl == min(c.kl for c in fitting)


def test_kl_adds_and_ratios_multiply() -> None:
    prune, store = Option("p", ({"step": "a"},), 0.1, 1.2, 1.5), Option("s", ({"step": "b"},), 0.05, 1.1, 0.8)
    (candidate,) = combinations([[prune], [store]], {("p", "s"): (10, 20)})
    assert candidate.kl == pytest.approx(0.15)
    assert candidate.perplexity_ratio == pytest.approx(1.32)
    assert candidate.decode_speedup == pytest.approx(1.2)
    assert candidate.steps == ({"step": "a"}, {"step": "b"})
    assert Limits(5, 30, 1.3, 0.3).broken_by(candidate) == ["bytes", "speed", "perplexity"]


def test_the_layers_that_cost_most_for_their_size_stay_in_16_bit() -> None:
    nf4 = Option("nf4", ({"step": "quantize", "scheme": "nf4"},), 0.1, 1.21, 0.5)
    costs, weights = {"a": 6.0, "b": 3.0, "c": 1.0, "d": 0.0}, {"a": 100, "b": 10, "c": 10, "d": 80}
    small, middle, most = mixed_options(nf4, costs, weights, shares=(0.02, 0.06, 0.11, 0.65))  # 0.02 of 200 weights holds none
    assert [mixed.option.steps[0]["skip"] for mixed in (small, middle, most)] == [["b"], ["b", "c"], ["a", "b", "c"]]
    assert all(mixed.option.names_layers for mixed in (small, middle, most))
    assert nf4.steps[0].get("skip") is None
    assert small.expected(nf4, 1.0).kl == pytest.approx(0.07)  # b caused three tenths
    assert small.expected(nf4, 0.0).kl == pytest.approx(0.095)  # and is a twentieth of the weights
    assert middle.expected(nf4, 1.0).perplexity_ratio == pytest.approx(1.21**0.6)
    assert most.expected(nf4, 1.0).kl == pytest.approx(0.0)
    assert most.expected(nf4, 0.3).decode_speedup == pytest.approx(1 / (0.4 / 0.5 + 0.6))


@pytest.mark.parametrize(("kl", "trust"), [(0.07, 1.0), (0.0825, 0.5), (0.095, 0.0), (0.2, 0.0), (0.01, 1.0)])
def test_one_measured_mixture_says_how_far_the_costs_are_to_be_believed(kl: float, trust: float) -> None:
    nf4 = Option("nf4", ({"step": "quantize"},), 0.1)
    (mixed,) = mixed_options(nf4, {"a": 7.0, "b": 3.0}, {"a": 190, "b": 10}, shares=(0.05,))
    found = mixed.trust_by(nf4, Option("measured", kl=kl))
    assert found == pytest.approx(trust)
    assert mixed.expected(nf4, found).kl == pytest.approx(min(max(kl, 0.07), 0.095))


def test_a_healed_option_begins_with_the_unhealed_one() -> None:
    pruned, healed = prune_options((0.8,), 40)
    assert healed.steps[: len(pruned.steps)] == pruned.steps
    assert prune_options((0.8,), 0) == [pruned]
