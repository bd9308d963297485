"""Kronecker-factored curvature: public types, damping, and the priors it takes."""

import pytest
import torch

from laplace.errors import InputError, UnsupportedError
from laplace.structures import Kron, KronDecomposed
from tests import reference
from tests.cases import CASES, named
from tests.estimators import basic_cases, dense, estimator, evidence, fitted, outputs_and_covariance, posterior
from tests.tools import assert_close

DELTAS = pytest.mark.parametrize("delta", [2.0, torch.tensor([0.5, 3.0])], ids=["scalar", "layerwise"])


@basic_cases
def test_public_attributes_are_kronecker_factors(case):
    la = fitted(case, "kron")
    assert isinstance(la.H, KronDecomposed)
    assert isinstance(la.H_facs, Kron)
    assert isinstance(la.posterior_precision, KronDecomposed)
    G, A = case.problem().factors()
    (weight, bias) = la.H_facs.kfacs
    assert_close(weight[0], G)
    assert_close(weight[1], A)
    assert_close(bias[0], G)
    assert_close(la.H_facs.to_matrix(), case.problem().kron())
    assert_close(la.posterior_precision.deltas, torch.ones(2))


@DELTAS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_damping_matches_the_dense_reference(case, delta):
    if not case.bias and isinstance(delta, torch.Tensor):
        delta = delta[:1]
    la = fitted(case, "kron", prior_precision=delta, temperature=1.4, damping=True)
    precision = posterior(case, "kron", delta=delta, temperature=1.4, damping=True)
    assert_close(dense(la.posterior_precision), precision)
    f, J, V = outputs_and_covariance(case, precision)
    assert_close(la.functional_variance(J), V)
    assert_close(la.functional_variance_fast(case.test_inputs())[1], V.diagonal(dim1=1, dim2=2).reshape(f.shape))
    assert_close(la.log_marginal_likelihood(), evidence(case, precision, delta=delta, temperature=1.4))
    result = la(case.test_inputs())
    if case.likelihood == "classification":
        assert_close(result, reference.probit(f.flatten(0, -2), V).reshape(f.shape))
    else:
        assert_close(result[1], V.reshape(*f.shape, -1))


@basic_cases
def test_damping_can_be_switched_after_fit(case):
    la, damped, plain = fitted(case, "kron"), posterior(case, "kron", damping=True), posterior(case, "kron")
    assert la.damping is False
    la(case.test_inputs())
    la.damping = True
    assert_close(dense(la.posterior_precision), damped)
    assert_close(la.log_marginal_likelihood(), evidence(case, damped))
    la.damping = False
    assert_close(dense(la.posterior_precision), plain)
    assert (damped - plain).abs().max() > 0.1


@pytest.mark.parametrize("value", [None, 2, 0.5, "yes"])
def test_damping_is_a_choice_between_two(value):
    with pytest.raises(InputError, match="damping"):
        estimator(CASES[0], "kron", damping=value)


@basic_cases
def test_one_precision_a_weight_is_refused_wherever_it_is_given(case):
    per_weight = torch.ones(len(case.problem().theta()))
    with pytest.raises(UnsupportedError, match="Kronecker"):
        fitted(case, "kron", prior_precision=per_weight)
    la = fitted(case, "kron")
    with pytest.raises(UnsupportedError, match="Kronecker"):
        la.prior_precision = per_weight
    with pytest.raises(UnsupportedError, match="Kronecker"):
        la.log_marginal_likelihood(per_weight)
    with pytest.raises(UnsupportedError, match="Kronecker"):
        la.optimize_prior_precision(prior_structure="diag")
    assert_close(la.prior_precision, torch.ones(1))


def test_kron_equals_full_for_a_gaussian_without_bias():
    """Lambda is the identity for every datum: the sum of products is the product of the sums."""
    case = named("no_bias_regression")
    assert_close(dense(fitted(case, "kron").posterior_precision), fitted(case, "full").posterior_precision)


@pytest.mark.parametrize("case", [named("no_bias_classification"), named("no_bias_regression")], ids=str)
def test_kron_equals_full_for_a_single_datum(case):
    for structure in ("kron", "full"):
        la = estimator(case, structure)
        la.fit(case.batches(1)[:1])
        if structure == "kron":
            kron = dense(la.posterior_precision)
    assert_close(kron, la.posterior_precision)
