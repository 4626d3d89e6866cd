"""Scores and repairs against slow obvious loops and identities."""

from __future__ import annotations

import pytest
import torch

from llmlite.calibration.moments import Moments
from llmlite.errors import ConfigError
from llmlite.pruning import scores
from llmlite.pruning.masks import pattern_mask, row_mask, tensor_mask
from llmlite.pruning.owl import outlier_share, owl_sparsities
from llmlite.pruning.reconstruct import DAMPINGS, choose_damping, least_squares, output_error
from llmlite.pruning.sparsegpt import sparsegpt
from llmlite.pruning.units import Cut, obs_choice, strongest
from llmlite.pruning.weights import PruneWeights


def correlated(tokens: int = 200, inputs: int = 12, seed: int = 0) -> torch.Tensor:
    """Inputs that speak for each other, so that there is something to repair with."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs // 2, inputs, generator=torch.Generator().manual_seed(99))
    return torch.randn(tokens, inputs // 2, generator=generator) @ mix + 0.3 * torch.randn(tokens, inputs, generator=generator) + 0.5


def moments_of(x_NI: torch.Tensor, dense_NI: torch.Tensor | None = None, dtype: torch.dtype = torch.float64) -> Moments:
    moments = Moments(x_NI.shape[1], cross=dense_NI is not None, dtype=dtype)
    moments.add(x_NI, dense_NI)
    return moments


def follows_pattern(weight_OI: torch.Tensor, zeros: int, group: int) -> bool:
    """Whether every run of `group` neighbouring inputs holds at least `zeros` exact zeros."""
    return bool((weight_OI.reshape(-1, group) == 0).sum(1).min() >= zeros)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(7, 12, generator=torch.Generator().manual_seed(5))


def test_wanda_and_flap_equal_their_formulas_in_loops(weight: torch.Tensor) -> None:
    x = correlated()
    moments = moments_of(x)
    wanda = scores.wanda_score(weight, moments.norm_I)
    flap = scores.flap_score(weight, moments.variance_I)
    for i in range(12):
        torch.testing.assert_close(moments.norm_I[i].float(), x[:, i].norm(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(flap[i], x[:, i].var(correction=0) * sum(float(w) ** 2 for w in weight[:, i]), rtol=1e-4, atol=1e-4)
        for o in range(7):
            torch.testing.assert_close(wanda[o, i], weight[o, i].abs() * x[:, i].norm(), rtol=1e-5, atol=1e-5)


def test_removing_one_unit_costs_its_obs_score(weight: torch.Tensor) -> None:
    moments = moments_of(correlated())
    for units in (12, 4):
        score_U = scores.obs_score(weight, scores.inverse_hessian(moments.gram_II, 0.0), units)
        for unit in range(units):
            size = 12 // units
            keep = torch.tensor([i for i in range(12) if i // size != unit])
            error = output_error(weight, least_squares(weight, keep, moments, 1e-12), keep, moments)
            assert float(score_U[unit]) == pytest.approx(error, rel=1e-3)


def test_choosing_by_obs_one_after_another_never_keeps_less_than_asked_and_is_even_in_groups(weight: torch.Tensor) -> None:
    inverse = scores.inverse_hessian(moments_of(correlated()).gram_II, 0.01)
    kept = obs_choice(weight, inverse, Cut("query_heads", 6, 4, groups=2))
    assert [sum(unit // 3 == group for unit in kept) for group in (0, 1)] == [2, 2]
    # the first to go is the one with the lowest score of all
    first = set(range(12)) - set(obs_choice(weight, inverse, Cut("ffn", 12, 11)))
    assert first == {int(scores.obs_score(weight, inverse, 12).argmin())}


def test_strongest_takes_the_same_number_from_every_group() -> None:
    assert strongest(torch.tensor([5.0, 6.0, 7.0, 1.0, 3.0, 2.0]), 4, groups=2) == [1, 2, 4, 5]
    assert strongest(torch.tensor([5.0, 6.0, 7.0, 1.0, 3.0, 2.0]), 4) == [0, 1, 2, 4]


def test_block_influence_is_zero_for_the_identity_and_two_for_a_reversal() -> None:
    x = torch.randn(5, 8)
    torch.testing.assert_close(scores.block_influence(x, x), torch.zeros(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(scores.block_influence(x, -3 * x), torch.full((5,), 2.0))


# least squares ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [*DAMPINGS, 1e-9])
@pytest.mark.parametrize("keep", [[0, 2, 5], [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]])
def test_least_squares_never_increases_the_calibration_error(weight: torch.Tensor, keep: list[int], damping: float) -> None:
    moments, index = moments_of(correlated()), torch.tensor(keep)
    repaired = output_error(weight, least_squares(weight, index, moments, damping), index, moments)
    assert 0 <= repaired <= output_error(weight, weight[:, index], index, moments)


def test_least_squares_equals_lstsq_on_the_data(weight: torch.Tensor) -> None:
    x, keep = correlated(), torch.tensor([0, 3, 4, 7, 9])
    expected = torch.linalg.lstsq(x[:, keep].double(), (x @ weight.T).double()).solution.T
    torch.testing.assert_close(least_squares(weight, keep, moments_of(x), 1e-12).double(), expected, rtol=1e-3, atol=1e-3)


def test_least_squares_towards_the_dense_outputs_equals_lstsq_with_that_target(weight: torch.Tensor) -> None:
    x, keep = correlated(), torch.tensor([0, 3, 4, 7, 9])
    dense = x + 0.2 * correlated(seed=1)
    moments = moments_of(x, dense)
    expected = torch.linalg.lstsq(x[:, keep].double(), (dense @ weight.T).double()).solution.T
    torch.testing.assert_close(least_squares(weight, keep, moments, 1e-12).double(), expected, rtol=1e-3, atol=1e-3)


def test_heavy_damping_is_no_repair_and_keeping_all_is_the_identity(weight: torch.Tensor) -> None:
    moments, keep = moments_of(correlated()), torch.tensor([0, 3, 4])
    torch.testing.assert_close(least_squares(weight, keep, moments, 1e9), weight[:, keep], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(least_squares(weight, torch.arange(12), moments, 0.1), weight)


def test_the_output_error_is_that_of_the_data(weight: torch.Tensor) -> None:
    x, keep = correlated(), torch.tensor([1, 2, 8])
    expected = (x.double() @ weight.double().T - x[:, keep].double() @ weight[:, keep].double().T).square().sum()
    assert output_error(weight, weight[:, keep], keep, moments_of(x)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("tokens", [8, 14, 40, 400])
@pytest.mark.parametrize("dense", [False, True])
def test_the_damping_found_downhill_is_the_best_of_all_candidates(weight: torch.Tensor, tokens: int, dense: bool) -> None:
    keep = torch.tensor([0, 1, 4, 5, 7, 8, 9])
    fit, held = (moments_of(x, x + 0.1 * correlated(len(x), seed=8) if dense else None) for x in (correlated(tokens, seed=6), correlated(2000, seed=7)))
    errors = {damping: output_error(weight, least_squares(weight, keep, fit, damping), keep, held) for damping in DAMPINGS}
    assert errors[choose_damping(weight, keep, fit, held)] == pytest.approx(min(errors.values()), rel=1e-3)


def test_damping_grows_when_the_fit_has_few_tokens(weight: torch.Tensor) -> None:
    keep, held = torch.arange(9), moments_of(correlated(2000, seed=3))
    few, many = (choose_damping(weight, keep, moments_of(correlated(tokens, seed=4)), held) for tokens in (6, 2000))
    assert few > many


# OWL ----------------------------------------------------------------------------------------------------------------------------------


def test_outliers_are_counted_as_in_a_slow_loop() -> None:
    weight, other = torch.randn(5, 6, generator=torch.Generator().manual_seed(2)), torch.full((3, 4), 0.01)
    weight[2, 3], norm = 40.0, torch.rand(6, generator=torch.Generator().manual_seed(3)) + 0.5
    values = [abs(float(weight[o, i])) * float(norm[i]) for o in range(5) for i in range(6)] + [0.01] * 12
    mean = sum(values) / len(values)
    expected = sum(value > 5 * mean for value in values) / len(values)
    assert expected > 0
    assert outlier_share([(weight, norm), (other, torch.ones(4))], 5) == pytest.approx(expected)


def test_layers_with_more_outliers_keep_more_and_the_mean_share_is_the_one_asked_for() -> None:
    shares = owl_sparsities([0.01, 0.05, 0.02, 0.01], 0.6, 0.08)
    assert sum(shares) / 4 == pytest.approx(0.6)
    assert shares[1] == min(shares)
    assert shares[0] == shares[3] == max(shares)
    assert max(shares) - min(shares) == pytest.approx(2 * 0.08)
    assert owl_sparsities([0.3, 0.3], 0.6, 0.08) == [0.6, 0.6]


# masks and SparseGPT ------------------------------------------------------------------------------------------------------------------


def test_masks_remove_the_lowest_scores() -> None:
    score = torch.tensor([[4.0, 1.0, 3.0, 2.0], [8.0, 7.0, 6.0, 5.0]])
    assert row_mask(score, 0.5).tolist() == [[True, False, True, False], [True, True, False, False]]
    assert tensor_mask(score, 0.5).tolist() == [[False] * 4, [True] * 4]
    assert pattern_mask(score, 1, 2).tolist() == [[True, False, True, False], [True, False, True, False]]


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "a:b", "1:2:4"])
def test_patterns_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="N:M with 0 < N < M"):
        PruneWeights(sparsity=text)
    assert PruneWeights(sparsity=" 4:8 ").pattern == (4, 8)


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": (2, 4)}, {"pattern": (1, 3)}])
@pytest.mark.parametrize("chunk", [12, 24])
def test_sparsegpt_beats_magnitude_and_wanda_in_output_error(options: dict, chunk: int) -> None:
    x = correlated(400, 24)
    weight = torch.randn(9, 24, generator=torch.Generator().manual_seed(1))
    gram = moments_of(x).gram_II

    def error(sparse: torch.Tensor) -> float:
        return float((x @ (sparse - weight).T).square().sum())

    pattern = options.get("pattern")
    mask = (lambda score: pattern_mask(score, *pattern)) if pattern else (lambda score: row_mask(score, 0.5))
    ours = sparsegpt(weight, gram, chunk=chunk, **options)
    wanda = error(weight * mask(scores.wanda_score(weight, moments_of(x).norm_I)))
    assert error(ours) < wanda
    assert error(ours) < 0.8 * error(weight * mask(weight.abs()))
    if pattern:
        assert follows_pattern(ours, *pattern)
    else:
        assert int((ours == 0).sum()) == ours.numel() // 2


def test_sparsegpt_at_no_sparsity_is_the_identity_and_silent_inputs_go() -> None:
    x = correlated(400, 24)
    x[:, 3] = 0
    weight = torch.randn(9, 24)
    ours = sparsegpt(weight, moments_of(x).gram_II, sparsity=0.0, chunk=8)
    assert not ours[:, 3].any()
    alive = [i for i in range(24) if i != 3]
    assert torch.equal(ours[:, alive], weight[:, alive])


def test_sums_in_float64_are_read_and_not_damped_in_place(weight: torch.Tensor) -> None:
    gram = moments_of(correlated()).gram_II
    before = gram.clone()
    scores.inverse_hessian(gram, 0.1)
    sparsegpt(weight, gram, sparsity=0.5)
    assert torch.equal(gram, before)


def test_sparsegpt_refuses_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match="not multiples of 4"):
        sparsegpt(torch.ones(2, 6), torch.eye(6), pattern=(2, 4))
    with pytest.raises(ValueError, match="either"):
        sparsegpt(torch.ones(2, 6), torch.eye(6))
