"""Search over a grid of prior precisions."""

import pytest
import torch

from laplace.errors import InputError
from laplace.tuning import gridsearch
from tests.tools import assert_close

GRID = torch.tensor([0.1, 1.0, 10.0, 100.0], dtype=torch.float64)


def search(scores, grid=GRID):
    table = dict(zip(grid.tolist(), scores, strict=True))
    return gridsearch.search(lambda points: torch.tensor([table[float(point)] for point in points]), grid)


@pytest.mark.parametrize("base", [2.0, 10.0])
def test_the_grid_is_evenly_spaced_between_its_ends(base):
    grid = gridsearch.log_grid(-2, 3, 6, base)
    assert_close(grid, base ** torch.arange(-2.0, 4.0))


def test_a_grid_of_one_point_is_its_lower_end():
    assert_close(gridsearch.log_grid(-1, 4, 1, 10.0), torch.tensor([0.1]))
    assert_close(gridsearch.log_grid(1, 1, 3, 10.0), torch.tensor([10.0] * 3))


@pytest.mark.parametrize(
    "bounds",
    [(1, -1, 5, 10.0), (-1, 1, 0, 10.0), (-1, 1, 5, 1.0), (-1, float("inf"), 5, 10.0), (float("nan"), 1, 5, 10.0)],
)
def test_impossible_grids_are_refused(bounds):
    with pytest.raises(InputError, match="grid_size"):
        gridsearch.log_grid(*bounds)


def test_the_lowest_score_wins_and_every_point_is_asked_once():
    asked = []

    def score(points):
        asked.extend(points.tolist())
        return (points - 9) ** 2

    best, scores = gridsearch.search(score, GRID, at_once=3)
    assert float(best) == 10.0
    assert asked == GRID.tolist()
    assert_close(scores, (GRID - 9) ** 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_points_without_a_finite_score_are_skipped(bad, place):
    scores = [3.0, 2.0, 1.0, 4.0]
    scores[place] = bad
    assert float(search(scores)[0]) == 10.0


def test_no_finite_score_at_all_is_an_error():
    with pytest.raises(InputError, match="not finite at any of the 4"):
        search([float("inf"), float("nan"), float("inf"), float("nan")])


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ([1.0, 2.0, 3.0, 4.0], "lower end.*log_prior_prec_min"),
        ([4.0, 3.0, 2.0, 1.0], "upper end.*log_prior_prec_max"),
        ([1.0, 1.0, 1.0, 1.0], "does not depend on the prior"),
    ],
    ids=["lower", "upper", "flat"],
)
def test_a_best_point_at_an_end_is_reported(scores, says):
    with pytest.warns(UserWarning, match=says):
        best, _ = search(scores)
    assert float(best) == GRID[scores.index(1.0)]


def test_an_inner_optimum_and_a_single_point_are_silent():
    search([2.0, 1.0, 1.0, 2.0])
    search([1.0], GRID[:1])
