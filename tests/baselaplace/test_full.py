"""What users find on an approximation with dense curvature."""

import torch

from tests.estimators import basic_cases, fitted, posterior
from tests.tools import assert_close


@basic_cases
def test_public_attributes_are_dense_matrices(case):
    la, precision = fitted(case, "full"), posterior(case, "full")
    assert_close(la.H, case.problem().ggn())
    assert_close(la.posterior_precision, precision)
    assert_close(la.posterior_covariance, precision.inverse())
    L = la.posterior_scale
    assert_close(L, L.tril())
    assert bool((L.diagonal() > 0).all())
    assert_close(L @ L.T, precision.inverse())


@basic_cases
def test_public_attributes_follow_the_hyperparameters(case):
    la = fitted(case, "full")
    before = la.posterior_covariance
    la.prior_precision = 5.0
    assert_close(la.posterior_covariance, posterior(case, "full", delta=5.0).inverse())
    assert not torch.equal(before, la.posterior_covariance)
