"""Which axis of outputs holds what, and what is refused that cannot be outputs."""

import pytest
import torch

from laplace.enums import LinkApprox
from laplace.errors import UnsupportedError
from laplace.likelihoods import (
    BradleyTerryLikelihood,
    CategoricalLikelihood,
    GaussianLikelihood,
    PoissonLikelihood,
)
from tests.tools import assert_close

CLASSES, NUMBERS, COUNTS, SCORES = (
    CategoricalLikelihood(),
    GaussianLikelihood(),
    PoissonLikelihood(),
    BradleyTerryLikelihood(),
)


@pytest.mark.parametrize("likelihood", [CLASSES, NUMBERS, COUNTS])
def test_channels_are_read_from_the_last_axis_alone(likelihood):
    for shape, axis in (((4, 3), 1), ((4, 3), None), ((4, 5, 3), 2), ((4, 5, 6, 3), 3)):
        likelihood.check_axes(shape, axis)
        assert likelihood.count_outputs(shape) == 3


@pytest.mark.parametrize(
    ("likelihood", "shape", "told"),
    [
        (CLASSES, (4, 3, 5), True),
        (CLASSES, (4, 3, 3), False),
        (CLASSES, (4, 3, 3, 5), True),
        (CLASSES, (4, 3, 3, 3), False),
        (NUMBERS, (4, 3, 5), True),
        (NUMBERS, (4, 3, 3, 5), False),
    ],
)
def test_channels_that_were_not_seen_are_told_by_targets_of_another_shape(likelihood, shape, told):
    if told:
        likelihood.check_axes(shape, None)
        return
    with pytest.raises(UnsupportedError, match=r"tell which axis.*output_dim=1 if"):
        likelihood.check_axes(shape, None)


@pytest.mark.parametrize("shape", [(4, 2, 1), (4, 2), (8, 1)])
def test_items_of_pairs_have_one_score_each(shape):
    SCORES.check_axes(shape, 1)
    assert SCORES.count_outputs(shape) == 1


@pytest.mark.parametrize("n_rows", [2, 5])
def test_counts_see_the_variances_of_a_covariance(n_rows):
    """Each count has one rate: what rates have in common changes no density of one count."""
    noise = torch.Generator().manual_seed(0)
    root, mean = torch.randn(n_rows, 2, 2, generator=noise), torch.randn(n_rows, 2, generator=noise)
    cov, y = root @ root.mT, torch.arange(2.0 * n_rows).view(n_rows, 2)
    variance, link = cov.diagonal(dim1=1, dim2=2), COUNTS.link(LinkApprox.PROBIT, 1, None)
    for alpha in (0.0, 0.5, 1.0):
        assert_close(COUNTS.energy(mean, cov, y, alpha), COUNTS.energy(mean, variance, y, alpha))
    assert_close(COUNTS.predictive_nll(mean, cov, y, link), COUNTS.predictive_nll(mean, variance, y, link))
    (rate, together), (same, alone) = COUNTS.predict(mean, cov, link), COUNTS.predict(mean, variance, link)
    assert_close(rate, same)
    assert_close(together.diagonal(dim1=1, dim2=2), alone)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("impossible", [False, True], ids=["all possible", "some impossible"])
def test_probabilities_in_the_place_of_logits_are_refused(impossible, dtype):
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
    if impossible:
        logits[::2, 1:3] = -torch.inf
    p, y = logits.softmax(-1), torch.zeros(20, dtype=torch.long)
    assert bool((p == 0).any()) is impossible
    with pytest.raises(UnsupportedError, match="outputs of the model are probabilities"):
        CLASSES.flatten(p, y)
    for taken in (2 * p, p - 0.25, p.clamp(min=1e-30).log()):
        assert_close(CLASSES.flatten(taken, y).f, taken)
