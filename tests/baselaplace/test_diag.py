"""What users find on an approximation with diagonal curvature."""

from tests.estimators import basic_cases, fitted, posterior
from tests.tools import assert_close


@basic_cases
def test_public_attributes_are_vectors(case):
    la, precision = fitted(case, "diag"), posterior(case, "diag").diagonal()
    assert_close(la.H, case.problem().ggn().diagonal())
    assert_close(la.posterior_precision, precision)
    assert_close(la.posterior_variance, 1 / precision)
    assert_close(la.posterior_scale, precision**-0.5)


@basic_cases
def test_public_attributes_follow_the_hyperparameters(case):
    la = fitted(case, "diag")
    assert la.posterior_variance is not None
    la.prior_precision = 5.0
    assert_close(la.posterior_variance, 1 / posterior(case, "diag", delta=5.0).diagonal())
