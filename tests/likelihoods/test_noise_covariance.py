"""A Gaussian whose outputs share their noise: it is regression of whitened outputs and targets."""

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal

from laplace import Laplace
from laplace.curvature import BackPackGGN, CurvlinopsGGN
from laplace.enums import LinkApprox
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.evaluation import conformal
from laplace.likelihoods import GaussianLikelihood
from laplace.likelihoods.gaussian import check_covariance
from tests.contracts import generator
from tests.estimators import dense
from tests.likelihoods.situations import DELTA, network, outputs
from tests.networks import Applied
from tests.structures.samples import psd
from tests.tools import assert_close, assert_mean_is

C = 3
S = psd(C, 3) + 0.2 * torch.eye(C, dtype=torch.float64)
SIGMA = torch.tensor(0.8, dtype=torch.float64)
LIKELIHOOD = GaussianLikelihood(noise_covariance=S)
NOISY = GaussianLikelihood(SIGMA, noise_covariance=S)
LINK = LIKELIHOOD.link(LinkApprox.PROBIT, 1, None)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def test_it_is_the_normal_density():
    f, y = random(5, C), random(5, C, seed=1)
    expected = MultivariateNormal(f, SIGMA**2 * S).log_prob(y).sum()
    assert_close(-NOISY.scaled_nll(f, y) - NOISY.log_normalizer(5, C), expected)
    assert_close(LIKELIHOOD.gradient(f, y), torch.func.grad(LIKELIHOOD.nll)(f, y))
    precision = S.inverse().expand(5, C, C)
    assert_close(LIKELIHOOD.hessian(f).dense(), precision)
    root = LIKELIHOOD.hessian_root(f)
    assert_close(root @ root.mT, precision)
    g = LIKELIHOOD.sample_gradient(f[:1], 20_000, generator(0))[:, 0]
    assert_mean_is(g, torch.zeros(C))
    assert_mean_is(torch.einsum("nc,nk->nck", g, g), precision[0])


def test_scores_add_the_noise_to_the_covariance():
    f, y = random(4, C), random(4, C, seed=1)
    cov = torch.stack([psd(C, seed) for seed in range(4)])
    expected = MultivariateNormal(f, cov + SIGMA**2 * S).log_prob(y).sum()
    assert_close(NOISY.predictive_nll(f, cov, y, LINK), -expected)
    variance = cov.diagonal(dim1=1, dim2=2)
    marginal = variance + SIGMA**2 * S.diagonal()
    assert_close(NOISY.predictive_nll(f, variance, y, LINK), -Normal(f, marginal.sqrt()).log_prob(y).sum())
    assert_close(NOISY.noise_variance(f, variance), (SIGMA**2 * S.diagonal()).expand(4, C))
    single = [GaussianLikelihood(SIGMA * S[c, c].sqrt()) for c in range(C)]
    each = [one.crps(f[:, [c]], variance[:, [c]], y[:, [c]], LINK) for c, one in enumerate(single)]
    assert_close(NOISY.crps(f, cov, y, LINK), sum(each))
    excess = torch.tensor([0.5, 1.0, 2.0, 0.0])
    assert_close(NOISY.foreign_variance(2.0, excess), 2.0 * SIGMA**2 * S.diagonal() * excess[:, None] ** 2)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_energies_are_those_of_whitened_outputs(alpha):
    f, y = random(4, C), random(4, C, seed=1)
    cov = torch.stack([psd(C, seed) for seed in range(4)])
    W = torch.linalg.cholesky(S).inverse()
    expected = GaussianLikelihood(SIGMA).energy(f @ W.T, W @ cov @ W.T, y @ W.T, alpha)
    assert_close(NOISY.energy(f, cov, y, alpha), expected)


@pytest.mark.parametrize("structure", ["full", "diag", "blockdiag", "gp"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_posteriors_are_those_of_the_density(subset, structure):
    x, y = random(10, 2), random(10, C, seed=1)
    options = {"n_subset": 10} if structure == "gp" else {}
    options |= {"last_layer_name": "2"} if subset == "last_layer" else {}
    la = Laplace(network(C), LIKELIHOOD, subset, structure, prior_precision=DELTA, sigma_noise=float(SIGMA), **options)
    la.fit([(x[:4], y[:4]), (x[4:], y[4:])])
    f, J = outputs(C, x, subset)
    H = torch.einsum("ncp,ck,nkq->pq", J, S.inverse(), J) / SIGMA**2
    if structure == "diag":
        H = H.diagonal().diag()
    if structure == "blockdiag":
        sizes = [6, 3, 9, 3] if subset == "all" else [9, 3]
        group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        H = H * (group[:, None] == group)
    precision = H + DELTA * torch.eye(len(H))
    assert_close(la.log_likelihood, MultivariateNormal(f, SIGMA**2 * S).log_prob(y).sum())
    at, G = outputs(C, x[:3], subset)
    mean, cov = la(x[:3])
    assert_close(mean, at)
    assert_close(cov, G @ precision.inverse() @ G.mT)
    theta = nn.utils.parameters_to_vector(network(C).parameters()).detach()[-len(H) :]
    ratio = precision.logdet() - len(H) * torch.tensor(DELTA).log()
    expected = MultivariateNormal(f, SIGMA**2 * S).log_prob(y).sum() - 0.5 * (ratio + DELTA * theta @ theta)
    assert_close(la.log_marginal_likelihood(), expected)


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "ekfac"])
def test_a_fit_is_regression_of_whitened_outputs(structure):
    x, y = random(10, 2), random(10, C, seed=1)
    W = torch.linalg.cholesky(S).inverse()
    white = Applied(lambda m, x: m.net(x) @ W.T, net=network(C))
    la = Laplace(network(C), LIKELIHOOD, "all", structure, sigma_noise=float(SIGMA))
    other = Laplace(white, "regression", "all", structure, sigma_noise=float(SIGMA))
    la.fit([(x, y)])
    other.fit([(x, y @ W.T)])
    assert_close(dense(la.posterior_precision), dense(other.posterior_precision))
    jacobian = 10 * torch.linalg.cholesky(S).logdet()
    assert_close(la.log_marginal_likelihood(), other.log_marginal_likelihood() - jacobian)


def test_without_correlation_it_is_a_noise_for_each_output():
    x, y, sigmas = random(20, 2), random(20, C, seed=1), torch.tensor([0.5, 1.0, 2.0])
    first = Laplace(network(C), GaussianLikelihood(noise_covariance=(sigmas**2).diag()), "all", "full")
    second = Laplace(network(C), "regression", "all", "full", sigma_noise=sigmas)
    for la in (first, second):
        la.fit([(x, y)])
    assert_close(first.log_marginal_likelihood(), second.log_marginal_likelihood())
    assert_close(first(x)[1], second(x)[1])
    made = [conformal(la, [(x, y)]) for la in (first, second)]
    for ours, theirs in zip(*(each(x) for each in made), strict=True):
        assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:The best ", "ignore:The validation score is best")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("method", ["tune", "marglik", "loo", "cv"])
def test_every_way_of_tuning_chooses_the_noise_of_a_whitened_regression(method):
    """Whitening by a rotation, under which the prior of the last layer stays what it is."""
    x = random(24, 2)
    y = network(C)(x).detach() + 0.5 * random(24, C, seed=1)
    rotation = torch.linalg.qr(random(C, C, seed=5))[0]
    found = []
    for likelihood, turn in (
        (GaussianLikelihood(noise_covariance=torch.eye(C)), torch.eye(C)),
        ("regression", rotation),
    ):
        net = network(C)
        with torch.no_grad():
            net[2].weight.copy_(turn @ net[2].weight)
            net[2].bias.copy_(turn @ net[2].bias)
        la = Laplace(net, likelihood, "last_layer", "full", last_layer_name="2")
        training = [(x[:16], y[:16] @ turn.T)]
        la.fit(training)
        grid = {"grid_size": 5, "log_prior_prec_min": -1, "log_prior_prec_max": 2}
        if method == "tune":
            la.tune([(x[16:], y[16:] @ turn.T)], distance_aware=False)
        elif method == "marglik":
            la.optimize_prior_precision(noise="scalar")
        else:
            la.optimize_prior_precision(
                method=method, train_loader=training, **grid, **({"n_folds": 3} if method == "cv" else {})
            )
        found.append((la.prior_precision, la.sigma_noise, la(x)[0] @ turn))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("covariance", "says"),
    [
        (torch.ones(2, 2), "least eigenvalue is .*shrink it"),
        (-torch.eye(2), "least eigenvalue is -1"),
        (torch.tensor([[1.0, 0.5], [0.2, 1.0]]), "other side of the diagonal"),
        (torch.eye(2) * torch.nan, "not finite"),
        (torch.ones(3), r"got \[3\]"),
        (torch.ones(2, 3), r"got \[2, 3\]"),
        (torch.eye(2).long(), "int64"),
    ],
    ids=["singular", "negative", "asymmetric", "nan", "vector", "oblong", "integers"],
)
def test_what_is_no_covariance_is_refused_by_name(covariance, says):
    with pytest.raises(InputError, match=f"noise_covariance must be a symmetric positive definite matrix.*{says}"):
        GaussianLikelihood(noise_covariance=covariance)


def test_what_does_not_go_with_a_covariance_is_refused():
    x, y = random(6, 2), random(6, C, seed=1)
    with pytest.raises(UnsupportedError, match="one number beside noise_covariance"):
        Laplace(network(C), LIKELIHOOD, sigma_noise=torch.ones(C))
    for subset in ("all", "last_layer"):
        with pytest.raises(ShapeError, match=r"noise_covariance is \[3, 3\], and the model has 2 outputs"):
            Laplace(network(2), LIKELIHOOD, subset).fit([(x, y[:, :2])])
    la = Laplace(network(C), LIKELIHOOD, "last_layer", "full")
    la.fit([(x, y)])
    with pytest.raises(UnsupportedError, match=r"noise='per_output'.*noise_covariance"):
        la.tune([(x, y)], noise="per_output")
    with pytest.raises(UnsupportedError, match=r"noise='per_output'.*noise_covariance"):
        la.optimize_prior_precision(noise="per_output")


@pytest.mark.parametrize("backend", [BackPackGGN, CurvlinopsGGN], ids=lambda cls: cls.__name__)
def test_packages_that_know_the_squared_error_alone_refuse_it(backend):
    la = Laplace(network(C), LIKELIHOOD, "last_layer", "full", backend=backend)
    with pytest.raises(UnsupportedError, match=r"none for regression\(noise_covariance=.*backend=None"):
        la.fit([(random(6, 2), random(6, C, seed=1))])


def test_a_state_knows_the_covariance(tmp_path):
    x, y = random(6, 2), random(6, C, seed=1)
    la = Laplace(network(C), LIKELIHOOD)
    la.fit([(x, y)])
    la.save(tmp_path / "state")
    again = Laplace(network(C), GaussianLikelihood(noise_covariance=S.clone()))
    again.load(tmp_path / "state")
    assert_close(again(x)[1], la(x)[1])
    with pytest.raises(InputError, match="noise_covariance"):
        Laplace(network(C), GaussianLikelihood(noise_covariance=S + 1e-9 * torch.eye(C))).load(tmp_path / "state")
    with pytest.raises(InputError, match="noise_covariance"):
        Laplace(network(C), "regression").load(tmp_path / "state")


@pytest.mark.filterwarnings("ignore:The best prior precision")
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e5])
def test_tune_measures_the_noise_in_units_of_the_covariance(size):
    """y = W x + L ε with Σ = L Lᵀ: σ is about 1, however large targets are."""
    generator = torch.Generator().manual_seed(0)
    sigma = size**2 * torch.tensor([[1.0, 0.5], [0.5, 2.0]], dtype=torch.float64)
    x = torch.randn(300, 3, dtype=torch.float64, generator=generator)
    weight = size * torch.randn(2, 3, dtype=torch.float64, generator=generator)
    noise = torch.randn(300, 2, dtype=torch.float64, generator=generator)
    y = x @ weight.T + noise @ torch.linalg.cholesky(sigma).T
    model = torch.nn.Linear(3, 2).double()
    with torch.no_grad():
        model.weight.copy_(weight)
        model.bias.zero_()
    for weights in ("last_layer", "all"):
        la = Laplace(model, GaussianLikelihood(noise_covariance=sigma), weights, "full", prior_precision=1 / size**2)
        la.fit([(x[:200], y[:200])])
        la.tune([(x[200:], y[200:])])
        assert 0.8 < float(la.sigma_noise) < 1.25


def test_a_covariance_is_copied():
    sigma = torch.eye(2)
    likelihood = GaussianLikelihood(noise_covariance=sigma)
    sigma.mul_(4)
    assert likelihood.noise_covariance is not None
    torch.testing.assert_close(likelihood.noise_covariance, torch.eye(2))
    with pytest.raises(InputError, match=r"a tensor; got list"):
        check_covariance([[1.0]])


def test_precisions_of_outputs_are_no_option():
    with pytest.raises(TypeError, match="weights"):
        GaussianLikelihood(weights=torch.ones(2))
    private = GaussianLikelihood().weighing(torch.tensor([9.0, 0.25]))
    with pytest.raises(UnsupportedError, match="name of its own"):
        Laplace(torch.nn.Linear(3, 2), private)
