"""Draws from batches of Gaussians over outputs."""

import pytest
import torch

from laplace.errors import ShapeError
from laplace.likelihoods import draws as gaussian
from laplace.utils import normal_samples
from tests.contracts import generator
from tests.structures.samples import psd, uniform
from tests.tools import LargestTensor, assert_close, assert_covariance_of

MEAN = uniform(6).reshape(2, 3)


def samples(cov: torch.Tensor, n: int = 20_000, seed: int = 0) -> torch.Tensor:
    return torch.cat(list(gaussian.draw(MEAN, cov, n, generator(seed))))


@pytest.mark.parametrize("rank", [0, 1, 3], ids=["certain", "singular", "full rank"])
def test_draws_have_the_mean_and_covariance_asked_for(rank):
    cov = torch.stack([psd(3, 1, rank=rank), psd(3, 2, rank=rank)])
    drawn = samples(cov)
    assert drawn.shape == (20_000, 2, 3)
    for row in range(2):
        assert_covariance_of(drawn[:, row], MEAN[row], cov[row])


def test_variances_draw_independent_outputs():
    variances = uniform(6, 1).reshape(2, 3)
    variances[0, 0] = 0.0
    drawn = samples(variances)
    for row in range(2):
        assert_covariance_of(drawn[:, row], MEAN[row], variances[row].diag())


def test_variances_draw_what_their_diagonal_covariance_draws():
    variances = uniform(6, 1).reshape(2, 3)
    assert_close(samples(variances, 5), samples(torch.diag_embed(variances), 5))


def test_draws_are_reproducible():
    cov = psd(3, 1).expand(2, 3, 3)
    assert torch.equal(samples(cov, 5, seed=1), samples(cov, 5, seed=1))
    assert not torch.equal(samples(cov, 5, seed=1), samples(cov, 5, seed=2))


def test_chunks_bound_memory_and_keep_the_number_of_samples(monkeypatch):
    monkeypatch.setattr(gaussian, "CHUNK_ELEMENTS", 60)
    with LargestTensor() as largest:
        sizes = [len(part) for part in gaussian.draw(MEAN, uniform(6, 1).reshape(2, 3), 25, generator(0))]
    assert sizes == [10, 10, 5]
    assert largest.numel <= 60, largest.operation


# -- the recorded helper ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3], ids=["singular", "full rank"])
def test_normal_samples_have_the_mean_and_covariance_asked_for(rank):
    cov = torch.stack([psd(3, 1, rank=rank), psd(3, 2, rank=rank)])
    drawn = normal_samples(MEAN, cov, 20_000, generator(0))
    assert drawn.shape == (20_000, 2, 3)
    for row in range(2):
        assert_covariance_of(drawn[:, row], MEAN[row], cov[row])


def test_normal_samples_take_variances():
    variances = uniform(6, 1).reshape(2, 3)
    drawn = normal_samples(MEAN, variances, 20_000, generator(0))
    for row in range(2):
        assert_covariance_of(drawn[:, row], MEAN[row], variances[row].diag())


def test_normal_samples_are_reproducible_and_come_in_one_piece(monkeypatch):
    variances = uniform(6, 1).reshape(2, 3)
    assert torch.equal(
        normal_samples(MEAN, variances, 5, generator(1)), normal_samples(MEAN, variances, 5, generator(1))
    )
    monkeypatch.setattr(gaussian, "CHUNK_ELEMENTS", 12)
    assert normal_samples(MEAN, variances, 5, generator(1)).shape == (5, 2, 3)
    state = torch.get_rng_state()
    normal_samples(MEAN, variances, 5, generator(1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("mean", "var"), [((3,), (3,)), ((2, 3), (3, 3)), ((2, 3), (2, 3, 2)), ((2, 3), (2,))])
def test_normal_samples_refuse_shapes_that_do_not_fit(mean, var):
    with pytest.raises(ShapeError, match=r"Expected a mean \[rows, C\]"):
        normal_samples(torch.zeros(mean), torch.ones(var), 2)
