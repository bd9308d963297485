"""The mode of a head's weights, against closed forms, L-BFGS and the definition of an optimum."""

import pytest
import torch

from laplace.errors import InputError, NumericalWarning
from laplace.likelihoods import OutputHessian, resolve
from laplace.prior import GaussianPrior
from laplace.tuning import newton
from laplace.tuning.newton import Head, conjugate_gradients, mode, multiply
from tests import reference
from tests.contracts import generator, shapes_of
from tests.structures.samples import psd, uniform
from tests.tools import assert_close

N, C, D = 14, 3, 4
P = C * (D + 1)

LIKELIHOODS = {"classification": {"temperature": 1.4}, "regression": {"sigma_noise": 0.6, "temperature": 0.8}}
likelihoods = pytest.mark.parametrize("likelihood", list(LIKELIHOODS))


@pytest.fixture(params=["dense", "conjugate gradients"])
def solver(request, monkeypatch):
    """Both ways to a Newton direction."""
    if request.param == "conjugate gradients":
        monkeypatch.setattr(newton, "DENSE_PARAMS", 0)


solvers = pytest.mark.usefixtures("solver")


def head(likelihood="classification", delta=None, *, bias=True, mean=0.3, scale=1.0, soft=False):
    noise, sizes = generator(0), (C * D, C) if bias else (C * D,)
    phi = scale * torch.randn(N, D, generator=noise)
    y = torch.randn(N, C, generator=noise)
    if likelihood == "classification":
        y = y.softmax(-1) if soft else torch.randint(C, (N,), generator=noise)
    delta = uniform(sum(sizes)) if delta is None else torch.tensor([delta])
    prior = GaussianPrior(torch.tensor(mean), delta, sizes)
    return Head(phi, y, shapes_of(C, D, bias), resolve(likelihood, **LIKELIHOODS[likelihood]), prior)


def loss(head, theta):
    """The regularized loss, row by row."""
    weight, offset = theta[: C * D].view(C, D), theta[C * D :] if len(head.shapes) > 1 else torch.zeros(C)
    name = head.likelihood.name
    rows = zip(head.phi, head.y, strict=True)
    nll = sum(reference.datum_nll(name, (weight @ phi + offset).unsqueeze(0), y) for phi, y in rows)
    sigma, T = LIKELIHOODS[name].get("sigma_noise", 1.0), LIKELIHOODS[name]["temperature"]
    return nll / (sigma**2 * T) + 0.5 * (head.prior.diagonal() * (theta - head.prior.mean) ** 2).sum()


@solvers
@likelihoods
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_gradient_of_the_regularized_loss_is_zero_at_the_mode(likelihood, bias):
    problem = head(likelihood, bias=bias)
    gradient = torch.func.grad(lambda theta: loss(problem, theta))(mode(problem))
    assert float(gradient.abs().max()) < 1e-8


@solvers
def test_soft_labels_have_a_mode_too():
    problem = head(soft=True)
    assert float(torch.func.grad(lambda theta: loss(problem, theta))(mode(problem)).abs().max()) < 1e-8


@solvers
@likelihoods
def test_the_mode_is_where_lbfgs_arrives(likelihood):
    problem = head(likelihood)
    theta = torch.zeros(P, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(problem, theta)
        value.backward()
        return value

    optimizer.step(closure)
    # It compares losses, which resolve weights to the root of the rounding unit only.
    torch.testing.assert_close(mode(problem), theta.detach(), rtol=0, atol=1e-7)


@solvers
def test_the_mode_of_a_regression_is_the_ridge_estimate():
    problem = head("regression", 0.7, mean=0.0)
    sigma, T = LIKELIHOODS["regression"].values()
    W, _, _ = reference.linear_regression(problem.phi, problem.y, sigma * T**0.5, 0.7)
    assert_close(mode(problem), torch.cat([W[:, :-1].flatten(), W[:, -1]]))


@solvers
@pytest.mark.parametrize("delta", [1e-6, 1e6])
def test_weak_and_strong_priors_on_large_features_reach_their_optimum(delta):
    problem = head("classification", delta, scale=30.0, mean=0.0)  # separable: full Newton steps alone diverge
    theta = mode(problem)
    gradient = torch.func.grad(lambda theta: loss(problem, theta))(theta)
    assert float(gradient.abs().max()) < 1e-6
    assert float(loss(problem, theta)) <= float(loss(problem, torch.zeros(P)))


@solvers
@likelihoods
def test_the_start_does_not_matter(likelihood):
    problem = head(likelihood)
    far = mode(problem, 5 * torch.randn(P, generator=generator(3)))
    assert_close(far, mode(problem))


def test_a_start_is_not_written_to():
    initial = torch.zeros(P)
    mode(head(), initial)
    assert torch.equal(initial, torch.zeros(P))


@solvers
def test_single_precision_reaches_the_optimum_to_its_own_precision():
    problem = head("classification", 0.5)
    narrow = Head(
        problem.phi.float(),
        problem.y,
        shapes_of(C, D),
        problem.likelihood,
        GaussianPrior(torch.tensor(0.3, dtype=torch.float32), torch.tensor([0.5], dtype=torch.float32), (C * D, C)),
    )
    found = mode(narrow)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), mode(problem), rtol=1e-3, atol=1e-3)  # the root of the rounding unit


def test_a_norm_that_overflows_ends_with_a_warning_and_not_where_it_started():
    torch.manual_seed(0)
    phi, y = 1e10 * torch.randn(20, 600, dtype=torch.float32), 1e10 * torch.randn(20, 1, dtype=torch.float32)
    prior = GaussianPrior(torch.zeros((), dtype=torch.float32), torch.ones(1, dtype=torch.float32), (600, 1))
    with pytest.warns(NumericalWarning, match="above the optimum"):
        found = mode(Head(phi, y, shapes_of(1, 600), resolve("regression"), prior))
    assert found.norm() > 0


def test_conjugate_gradients_solve_a_linear_system():
    A, b = psd(6, 0, rank=6) + torch.eye(6), torch.randn(6, generator=generator(1))
    assert_close(conjugate_gradients(lambda v: A @ v, b, A.diagonal(), 1e-12), torch.linalg.solve(A, b))


@pytest.mark.parametrize("sign", [1, -1])
def test_products_with_output_hessians_are_those_of_the_dense_ones(sign):
    noise = generator(0)
    v, d, r = (torch.randn(*shape, generator=noise) for shape in ((N, C), (N, C), (N, C, 2)))
    for hessian in (
        OutputHessian(C, d, r, sign),
        OutputHessian(C, d[:, :1]),
        OutputHessian(C, root=r),
        resolve("classification").hessian(v),
    ):
        assert_close(multiply(hessian, v), torch.einsum("nck,nk->nc", hessian.dense(), v))


def test_a_loss_that_is_not_finite_is_an_error():
    problem = head("regression", 1.0)
    with pytest.raises(InputError, match="features and targets"):
        mode(problem, torch.full((P,), float("inf")))


def test_a_descent_that_ends_early_says_how_much_is_left(monkeypatch):
    monkeypatch.setattr(newton, "MAX_STEPS", 1)
    with pytest.warns(NumericalWarning, match="nats above the optimum"):
        mode(head("classification", 1e-6, scale=30.0))
