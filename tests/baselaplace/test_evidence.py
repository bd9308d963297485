"""The log marginal likelihood and its parts."""

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from laplace.curvature import AutogradEF
from laplace.errors import InputError, ShapeError, UnsupportedError
from tests import reference
from tests.cases import BASIC, BY_GROUP, CASES, STRUCTURES, Case, named
from tests.contracts import generator
from tests.estimators import basic_cases, dense, every_structure, evidence, fitted, posterior, prior_diagonal
from tests.tools import assert_close

BACKENDS = pytest.mark.parametrize("options", [{}, {"backend": AutogradEF}], ids=["GGN", "EF"])
PRIORS = ("scalar", "layerwise", "diag")


def precision_of(kind: str, case: Case) -> torch.Tensor:
    n_params = len(case.problem().theta())
    size = {"scalar": 1, "layerwise": len(case.names), "diag": n_params}[kind]
    return 0.5 + torch.rand(size, generator=generator(1))


STRUCTURE_AND_PRIOR = pytest.mark.parametrize(
    ("structure", "prior"),
    [(s, p) for s in STRUCTURES for p in PRIORS if p != "diag" or s not in BY_GROUP],
)


@pytest.mark.every(5)
@BACKENDS
@every_structure
@pytest.mark.parametrize("case", CASES, ids=str)
def test_evidence_is_that_of_the_dense_reference(case, structure, options):
    la = fitted(case, structure, prior_precision=0.7, temperature=1.5, **options)
    precision = posterior(case, structure, delta=0.7, temperature=1.5, fisher=bool(options))
    assert_close(la.log_marginal_likelihood(), evidence(case, precision, delta=0.7, temperature=1.5))


@pytest.mark.every(4)
@BACKENDS
@STRUCTURE_AND_PRIOR
@basic_cases
def test_evidence_and_its_parts_for_every_shape_of_prior(case, structure, prior, options):
    delta = precision_of(prior, case)
    la = fitted(case, structure, prior_precision=delta, prior_mean=0.3, **options)
    precision = posterior(case, structure, delta=delta, fisher=bool(options))
    P0, shift = prior_diagonal(case, delta), case.problem().theta() - 0.3
    assert_close(la.prior_precision, delta)
    assert_close(la.prior_precision_diag, P0)
    assert_close(dense(la.posterior_precision), precision)
    assert_close(la.log_det_posterior_precision, precision.logdet())
    assert_close(la.log_det_prior_precision, P0.log().sum())
    assert_close(la.log_det_ratio, precision.logdet() - P0.log().sum())
    assert_close(la.scatter, (P0 * shift**2).sum())
    assert_close(la.log_marginal_likelihood(), evidence(case, precision, delta=delta, mean=0.3))


@pytest.mark.every(4)
@BACKENDS
@STRUCTURE_AND_PRIOR
@basic_cases
def test_evidence_is_differentiable_in_the_prior_precision(case, structure, prior, options):
    la, delta = fitted(case, structure, **options), precision_of(prior, case).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: la.log_marginal_likelihood(p), (delta,))


@BACKENDS
@every_structure
def test_evidence_is_differentiable_in_the_noise(structure, options):
    la = fitted(BASIC[1], structure, **options)
    noise = torch.tensor(0.7, requires_grad=True), torch.tensor([1.3], requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, p: la.log_marginal_likelihood(p, s), noise)


@every_structure
@basic_cases
def test_evidence_is_differentiable_with_damping_in_the_kronecker_case(case, structure):
    options = {"damping": True} if structure == "kron" else {}
    la, delta = fitted(case, structure, **options), torch.tensor([0.8], requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: la.log_marginal_likelihood(p), (delta,))


@every_structure
@basic_cases
def test_evidence_is_differentiable_after_predictions_were_made(case, structure):
    """What predictions cache must not cut the graph of an assigned prior precision."""
    la, expected = fitted(case, structure), fitted(case, structure)
    gradients = []
    for approximation, predict_first in ((la, True), (expected, False)):
        delta = torch.tensor([1.7], requires_grad=True)
        approximation.prior_precision = delta
        if predict_first:
            approximation(case.test_inputs())
            approximation.sample(2)
        approximation.log_marginal_likelihood().backward()
        gradients.append(delta.grad)
    assert_close(gradients[0], gradients[1])
    assert gradients[0].abs() > 0


@every_structure
@basic_cases
def test_every_backward_pass_gets_a_graph_of_its_own(case, structure):
    """With a prior precision that has a gradient: densities twice, and predictions that stay off its graph."""
    la = fitted(case, structure, enable_backprop=True)
    delta = torch.tensor([1.7], requires_grad=True)
    la.prior_precision = delta
    gradients = [torch.autograd.grad(la.log_prob(torch.zeros(la.n_params)), delta)[0] for _ in range(2)]
    assert_close(gradients[0], gradients[1])
    assert gradients[0].abs() > 0
    for _ in range(2):
        x = case.test_inputs().requires_grad_()
        la.functional_variance_fast(x)[1].sum().backward()
        assert x.grad.abs().max() > 0
    assert delta.grad is None


@every_structure
def test_the_published_loop_tunes_prior_and_noise_and_predicts_afterwards(structure):
    """Optimize log prior and log noise through the evidence, then predict with what was assigned."""
    case = BASIC[1]
    la = fitted(case, structure)
    log_prior, log_sigma = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([log_prior, log_sigma], lr=0.1)
    start = la.log_marginal_likelihood(log_prior.exp(), log_sigma.exp()).item()
    for _ in range(50):
        optimizer.zero_grad()
        loss = -la.log_marginal_likelihood(log_prior.exp(), log_sigma.exp())
        loss.backward()
        optimizer.step()
    assert la.log_marginal_likelihood(log_prior.exp(), log_sigma.exp()).item() > start + 0.1
    delta, sigma = log_prior.exp().item(), log_sigma.exp().item()
    mean, cov = la(case.test_inputs())
    J = case.problem().jacobian(case.test_inputs()).flatten(0, 1)
    assert_close(cov, reference.output_covariance(J, posterior(case, structure, delta=delta, sigma=sigma)))
    assert not mean.requires_grad
    assert not cov.requires_grad


@every_structure
@basic_cases
def test_evidence_assigns_what_it_is_given(case, structure):
    la = fitted(case, structure)
    delta = torch.tensor([2.5], requires_grad=True)
    value = la.log_marginal_likelihood(delta)
    assert_close(la.prior_precision, delta)
    assert la.prior_precision.requires_grad
    assert value.requires_grad
    assert_close(la.log_marginal_likelihood(), value)
    if case.likelihood == "regression":
        la.log_marginal_likelihood(sigma_noise=0.4)
        assert float(la.sigma_noise) == pytest.approx(0.4)
        assert_close(la.prior_precision, delta)


@every_structure
def test_noise_is_refused_in_classification(structure):
    la = fitted(BASIC[0], structure)
    with pytest.raises(UnsupportedError, match="sigma_noise"):
        la.log_marginal_likelihood(sigma_noise=torch.tensor(0.5))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), torch.tensor([1.0, -1.0])])
@every_structure
def test_values_that_are_no_precision_are_refused_and_not_assigned(structure, value):
    la = fitted(BASIC[1], structure)
    with pytest.raises(InputError, match="prior_precision must be positive"):
        la.log_marginal_likelihood(value)
    with pytest.raises(InputError, match="sigma_noise must be"):
        la.log_marginal_likelihood(sigma_noise=value)
    assert_close(la.prior_precision, torch.ones(1))


# -- hyperparameters after fit ----------------------------------------------------------------------------------------


@every_structure
def test_hyperparameters_set_after_fit_reach_everything(structure):
    case = BASIC[1]
    la = fitted(case, structure)
    la(case.test_inputs())  # fills whatever is cached
    la.prior_precision, la.sigma_noise, la.temperature, la.prior_mean = 3.0, 0.4, 2.0, -0.5
    precision = posterior(case, structure, delta=3.0, sigma=0.4, temperature=2.0)
    assert_close(dense(la.posterior_precision), precision)
    J = case.problem().jacobian(case.test_inputs()).flatten(0, 1)
    assert_close(la(case.test_inputs())[1], reference.output_covariance(J, precision))
    expected = evidence(case, precision, delta=3.0, sigma=0.4, temperature=2.0, mean=-0.5)
    assert_close(la.log_marginal_likelihood(), expected)
    assert_close(la.log_prob(la.mean), 0.5 * (precision.logdet() - len(precision) * torch.tensor(2 * torch.pi).log()))


@every_structure
@basic_cases
def test_a_prior_mean_of_one_value_a_weight(case, structure):
    theta = case.problem().theta()
    la = fitted(case, structure, prior_mean=theta.clone())
    assert_close(la.scatter, torch.tensor(0.0))
    la.prior_mean = torch.zeros(())
    assert_close(la.scatter, theta @ theta)
    for wrong in (torch.zeros(3), torch.zeros(2, 2)):
        with pytest.raises(ShapeError, match=r"prior.mean"):
            la.prior_mean = wrong
    with pytest.raises(InputError, match="prior_mean must be finite"):
        la.prior_mean = float("nan")


@every_structure
def test_temperature_and_noise_scale_alike(structure):
    """Only 1/(sigma^2 T) enters the GGN posterior."""
    case = BASIC[1]
    la, other = fitted(case, structure, sigma_noise=0.5, temperature=4.0), fitted(case, structure, sigma_noise=1.0)
    assert_close(dense(la.posterior_precision), dense(other.posterior_precision))


@every_structure
@basic_cases
def test_a_strong_prior_leaves_nothing_to_the_data(case, structure):
    la = fitted(case, structure, prior_precision=1e12)
    assert_close(dense(la.posterior_precision).inverse() * 1e12, torch.eye(la.n_params), "posterior covariance")


def test_layerwise_means_weight_then_bias():
    case = named("conv_regression")
    la = fitted(case, "full", prior_precision=torch.tensor([2.0, 5.0]))
    head = case.model().head
    expected = torch.cat([torch.full((p.numel(),), v) for p, v in zip(head.parameters(), (2.0, 5.0), strict=True)])
    assert_close(la.prior_precision_diag, expected)
    assert_close(la.mean, parameters_to_vector(head.parameters()))
