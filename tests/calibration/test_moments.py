from __future__ import annotations

import pytest
import torch

from llmlite.calibration.inverse_factor import inverse_factor
from llmlite.calibration.mixture import parse_mixture, shares
from llmlite.calibration.moments import Moments
from llmlite.calibration.sources import windows_of
from llmlite.errors import ConfigError


def test_moments_are_those_of_the_data_however_it_is_cut() -> None:
    x = torch.randn(50, 6, dtype=torch.float64)
    dense = torch.randn(50, 6, dtype=torch.float64)
    whole, parts, swapped = (Moments(6, cross=True, dtype=torch.float64) for _ in range(3))
    whole.add(x, dense)
    for part in (slice(0, 7), slice(7, 30), slice(30, 50)):
        parts.add(x[part], dense[part])
    for part in (slice(30, 50), slice(0, 7), slice(7, 30)):
        swapped.add(x[part], dense[part])
    for moments in (parts, swapped):
        torch.testing.assert_close(moments.gram_II, whole.gram_II)
        torch.testing.assert_close(moments.cross_JI, whole.cross_JI)
    torch.testing.assert_close(whole.gram_II, x.T @ x)
    torch.testing.assert_close(whole.hessian_II, x.T @ x / 50)
    torch.testing.assert_close(whole.cross_JI, dense.T @ x)
    torch.testing.assert_close(whole.mean_I, x.mean(0))
    torch.testing.assert_close(whole.variance_I, x.var(0, correction=0))
    torch.testing.assert_close(whole.norm_I, x.norm(dim=0))
    assert (whole.tokens, parts.tokens) == (50, 50)


def test_the_relative_output_error_is_that_of_the_outputs() -> None:
    x, weight, change = torch.randn(50, 6), torch.randn(4, 6), torch.randn(4, 6)
    moments = Moments(6)
    moments.add(x)
    assert moments.relative_output_error(change, weight) == pytest.approx(float((x @ change.T).square().sum() / (x @ weight.T).square().sum()), rel=1e-5)
    assert moments.relative_output_error(torch.zeros(4, 6), torch.zeros(4, 6)) == 0


@pytest.mark.parametrize("width", [1, 2, 35, 64, 65, 128, 200, 400])
def test_the_mirrored_gram_matrix_is_the_product_at_any_width(width: int) -> None:
    x, weight_N1 = torch.randn(50, width, dtype=torch.float64), torch.rand(50, 1, dtype=torch.float64)
    plain, weighted = Moments(width, dtype=torch.float64), Moments(width, dtype=torch.float64)
    for part in (slice(0, 20), slice(20, 50)):
        plain.add(x[part])
        weighted.add(x[part], weight_N1=weight_N1[part])
    torch.testing.assert_close(plain.gram_II, x.T @ x)
    torch.testing.assert_close(weighted.gram_II, x.T @ (weight_N1 * x))
    squares = Moments(width, gram=False, dtype=torch.float64)
    squares.add(x, weight_N1=weight_N1)
    torch.testing.assert_close(squares.squares_I, weighted.squares_I)
    torch.testing.assert_close(squares.variance_I, (squares.squares_I / 50 - squares.mean_I**2))
    assert squares.gram_II.numel() == 0


@pytest.mark.parametrize("gram", [True, False])
def test_merging_is_counting_together(gram: bool) -> None:
    x = torch.randn(20, 4)
    one, other, both = (Moments(4, gram=gram) for _ in range(3))
    one.add(x[:5])
    other.add(x[5:])
    both.add(x)
    merged = one.merged(other)
    torch.testing.assert_close(merged.gram_II, both.gram_II)
    torch.testing.assert_close(merged.squares_I, x.square().sum(0))
    torch.testing.assert_close(merged.norm_I, both.norm_I)
    torch.testing.assert_close(merged.total_I, both.total_I)
    assert merged.tokens == both.tokens == 20


def test_the_inverse_factor_is_the_upper_cholesky_factor_of_the_inverse() -> None:
    x = torch.randn(50, 7, dtype=torch.float64)
    factor_II = inverse_factor(x.T @ x)
    assert factor_II is not None
    torch.testing.assert_close(factor_II, torch.linalg.cholesky(torch.linalg.inv(x.T @ x), upper=True))
    assert inverse_factor(-x.T @ x) is None
    assert inverse_factor(torch.full((3, 3), torch.nan)) is None
    assert inverse_factor(torch.diag(torch.tensor([torch.inf, torch.inf]).double())) is None


def test_mixtures_are_read_and_shared_out() -> None:
    assert parse_mixture("self") == [(1.0, "self")]
    assert parse_mixture("3*self + 1*data/my text.txt") == [(0.75, "self"), (0.25, "data/my text.txt")]
    assert parse_mixture("self + builtin:python-docs-prose") == [(0.5, "self"), (0.5, "builtin:python-docs-prose")]
    assert shares([0.5, 0.25, 0.25], 10) == [5, 3, 2]
    assert sum(shares([1 / 3] * 3, 8)) == 8


@pytest.mark.parametrize("text", ["", "self + ", "0*self", "-1*self", "nan*self"])
def test_mixtures_that_cannot_be_meant_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="WEIGHT\\*SOURCE"):
        parse_mixture(text)


def test_windows_do_not_overlap_and_are_all_there_when_few() -> None:
    stream = torch.arange(103)
    assert windows_of(stream, 99, 10, 0).flatten().tolist() == list(range(100))
    drawn = windows_of(stream, 4, 10, 0)
    assert drawn.shape == (4, 10)
    assert len(set(drawn.flatten().tolist())) == 40
    assert torch.equal(drawn, windows_of(stream, 4, 10, 0))
    assert not torch.equal(drawn, windows_of(stream, 4, 10, 1))
    assert windows_of(stream[:7], 4, 10, 0).tolist() == [list(range(7))]
    led = windows_of(stream, 99, 10, 0, leading=[7])
    assert led.shape == (11, 10)
    assert (led[:, 0] == 7).all()
    assert led[:, 1:].flatten().tolist() == list(range(99))
