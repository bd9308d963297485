"""Logits are divided by the output temperature before the link."""

import pytest
import torch

from laplace.errors import InputError, UnsupportedError
from tests import reference
from tests.cases import BASIC
from tests.contracts import generator
from tests.estimators import estimator, fitted
from tests.tools import assert_close

F64 = torch.float64


@pytest.mark.parametrize(
    "options",
    [{}, {"link_approx": "mc"}, {"link_approx": "bridge"}, {"link_approx": "mc", "joint": True}, {"pred_type": "nn"}],
)
def test_the_output_temperature_divides_logits_before_the_link(options):
    case = BASIC[0]
    la, x = fitted(case, "full"), case.test_inputs()
    la.output_temperature = 0.6
    actual = la(x, generator=generator(0), n_samples=7, **options)
    mean, covariance = case.forward(la.model.model, x).detach(), la._linearize(x).covariance(la._posterior, F64)
    if options == {}:
        expected = reference.probit(mean / 0.6, covariance / 0.36)
    elif options == {"link_approx": "bridge"}:
        expected = reference.bridge(mean / 0.6, covariance / 0.36)
    elif options == {"link_approx": "mc"}:
        from laplace.likelihoods.draws import draw

        samples = torch.cat(list(draw(mean, covariance, 7, generator(0), spread=True)))
        expected = (samples / 0.6).softmax(-1).mean(0)
    else:
        expected = (la.functional_samples(x, n_samples=7, generator=generator(0)) / 0.6).softmax(-1).mean(0)
    assert_close(actual, expected)
    samples = la.predictive_samples(x, n_samples=3, generator=generator(0))
    assert_close(samples, (la.functional_samples(x, n_samples=3, generator=generator(0)) / 0.6).softmax(-1))


def test_without_uncertainty_it_is_temperature_scaling():
    case = BASIC[0]
    la = fitted(case, "diag", prior_precision=1e14)
    la.output_temperature = 2.5
    assert_close(la(case.test_inputs()), (case.forward(la.model.model, case.test_inputs()) / 2.5).softmax(-1))


def test_it_is_checked_and_saved_and_leaves_the_posterior_alone(tmp_path):
    la = fitted(BASIC[0], "diag")
    before = la.log_marginal_likelihood()
    la.output_temperature = 0.3
    assert torch.equal(la.log_marginal_likelihood(), before)
    la.save(tmp_path / "state")
    other = estimator(BASIC[0], "diag")
    other.load(tmp_path / "state")
    assert other.output_temperature == 0.3
    for wrong in (0.0, -1.0, float("nan"), [1.0, 2.0]):
        with pytest.raises(InputError, match="output_temperature"):
            la.output_temperature = wrong
    with pytest.raises(UnsupportedError, match="regression"):
        fitted(BASIC[1], "diag").output_temperature = 2.0
