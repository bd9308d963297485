"""Points that validation data weigh, and averages over them."""

import math

import pytest
import torch

from laplace.errors import InputError
from laplace.tuning import averaging
from laplace.tuning.averaging import Point

LIMITS = math.log(0.05), math.log(20.0)


def quadratic(centers, bend=200.0, heights=(0.0, 0.0)):
    """A criterion of known optimum and curvature for each candidate; s² adds (s² − 3)²/10."""
    return lambda k, t, s2: heights[k] + bend / 2 * (t - centers[k]) ** 2 + (s2 - 3) ** 2 / 10


def test_every_candidate_has_its_best_temperature_and_the_width_of_its_optimum():
    found = averaging.points(quadratic((0.4, -1.1)), 2, (0.0,), LIMITS, prior=False)
    assert [point.candidate for point in found] == [0, 1]
    for point, center in zip(found, (0.4, -1.1), strict=True):
        assert point.log_width == pytest.approx(center, abs=1e-6)
        assert point.spread == pytest.approx(1 / 200, rel=1e-6)


def test_the_prior_moves_the_optimum_of_log_t_toward_zero():
    (point,) = averaging.points(quadratic((1.0,), bend=3.0), 1, (0.0,), LIMITS, prior=True)
    assert point.log_width == pytest.approx(3 / 4, abs=1e-6)
    assert point.criterion == pytest.approx(3 / 2 * (1 / 4) ** 2 + 0.5 * (3 / 4) ** 2 + 0.9, abs=1e-9)


def test_the_optimum_is_found_where_it_is_no_parabola():
    def criterion(k, t, s2):
        return 300 * (0.3 / math.exp(t) + t) + 0 * k * s2

    (point,) = averaging.points(criterion, 1, (0.0,), LIMITS, prior=False)
    assert point.log_width == pytest.approx(math.log(0.3), abs=1e-4)
    assert point.spread == pytest.approx(1 / 300, rel=1e-2)


def test_an_optimum_at_a_limit_stays_there():
    (point,) = averaging.points(lambda k, t, s2: 10 * t, 1, (0.0,), LIMITS, prior=False)
    assert point.log_width == LIMITS[0]
    (fixed,) = averaging.points(lambda k, t, s2: t, 1, (0.0,), (0.3, 0.3), prior=True)
    assert (fixed.log_width, fixed.spread) == (0.3, 0.0)


def test_a_candidate_without_a_value_where_the_first_is_best_is_looked_for_elsewhere():
    def criterion(k, t, s2):
        return 50 * (t + 1.5) ** 2 if k == 0 else 50 * (t - 1.5) ** 2 if t > 0 else math.nan

    found = averaging.points(criterion, 2, (0.0,), LIMITS, prior=False)
    assert [point.log_width for point in found] == pytest.approx([-1.5, 1.5], abs=1e-3)


def test_scales_are_tried_for_candidates_that_are_close_to_the_best():
    asked = set()

    def criterion(k, t, s2):
        asked.add((k, s2))
        return quadratic((0.0, 0.0), heights=(0.0, 100.0))(k, t, s2)

    found = averaging.points(criterion, 2, averaging.SCALES, LIMITS, prior=False)
    assert asked == {(0, s2) for s2 in averaging.SCALES} | {(1, 0.0)}
    assert min(found, key=lambda point: point.criterion).scale == 3.0
    assert 30.0 not in averaging.scales_for(49)
    assert 30.0 in averaging.scales_for(50)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_criterion_that_is_finite_nowhere_is_refused_and_one_candidate_without_value_left_out(bad):
    with pytest.raises(InputError, match="finite nowhere"):
        averaging.points(lambda k, t, s2: bad, 2, (0.0,), LIMITS, prior=True)
    found = averaging.points(lambda k, t, s2: bad if k == 0 else t * t, 2, (0.0,), LIMITS, prior=True)
    assert {point.candidate for point in found} == {1}


def test_weights_are_those_of_gaussian_integrals():
    points = [Point(0, 0.0, 0.01, 0.0, 5.0), Point(1, 0.0, 0.04, 0.0, 6.0)]
    expected = torch.tensor([0.1 * math.exp(-5), 0.2 * math.exp(-6)], dtype=torch.float64)
    torch.testing.assert_close(averaging.weights(points), expected / expected.sum())


def test_averages_of_parameters_keep_the_mean_of_divided_logits():
    points = [Point(0, math.log(2.0), 0.0, 0.0, 0.0), Point(1, math.log(0.5), 0.0, 30.0, 0.0)]
    thetas = [torch.tensor([2.0, 4.0]), torch.tensor([1.0, -1.0])]
    shares = torch.tensor([0.25, 0.75], dtype=torch.float64)
    theta, log_width, scale = averaging.averaged(points, shares, thetas, divided=True)
    torch.testing.assert_close(theta / math.exp(log_width), 0.25 * thetas[0] / 2 + 0.75 * thetas[1] / 0.5)
    assert log_width == pytest.approx(0.25 * math.log(2) + 0.75 * math.log(0.5))
    assert scale == pytest.approx(22.5)
    plain, _, _ = averaging.averaged(points, shares, thetas, divided=False)
    torch.testing.assert_close(plain, 0.25 * thetas[0] + 0.75 * thetas[1])


def test_a_mixture_has_at_most_32_points_whose_shares_sum_to_one():
    points = [Point(k % 3, 0.1 * k, 0.0, 0.0, 0.01 * k) for k in range(50)]
    kept = averaging.most_likely(points, averaging.weights(points))
    assert len(kept) == 32
    assert sum(share for share, *_ in kept) == pytest.approx(1)
    assert [(k, math.log(t)) for _, k, t, _ in kept[:3]] == [(k, pytest.approx(0.1 * k)) for k in range(3)]
