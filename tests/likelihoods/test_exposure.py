"""Counts with exposures: the log of an exposure is added to the output, of targets alone."""

import pytest
import torch
from torch import nn
from torch.distributions import Poisson

from laplace import Laplace
from laplace.enums import LinkApprox
from laplace.errors import InputError, ShapeError
from laplace.likelihoods import NegativeBinomialLikelihood, PoissonLikelihood
from tests.contracts import generator
from tests.estimators import dense
from tests.likelihoods.situations import DELTA, network
from tests.networks import Applied
from tests.tools import assert_close

LIKELIHOODS = [
    (PoissonLikelihood(exposure=True), PoissonLikelihood()),
    (NegativeBinomialLikelihood(exposure=True, dispersion=0.7), NegativeBinomialLikelihood(dispersion=0.7)),
]
both = pytest.mark.parametrize(("likelihood", "plain"), LIKELIHOODS, ids=["poisson", "negative_binomial"])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def targets(*shape: int) -> torch.Tensor:
    counts = torch.randint(0, 6, shape, generator=generator(1)).double()
    return torch.stack([counts, 0.2 + 3 * torch.rand(shape, generator=generator(2))], -1)


def test_the_mean_of_a_count_is_exposure_times_rate():
    f, y = random(4, 2), targets(4, 2)
    expected = -Poisson(y[..., 1] * f.exp()).log_prob(y[..., 0]).sum()
    assert_close(PoissonLikelihood(exposure=True).nll(f, y), expected)


@both
def test_everything_of_targets_is_that_of_moved_outputs(likelihood, plain):
    f, y, variance = random(4, 2), targets(4, 2), random(4, 2, seed=3).exp()
    moved, count = f + y[..., 1].log(), y[..., 0]
    link = plain.link(LinkApprox.PROBIT, 1, None)
    assert_close(likelihood.nll(f, y), plain.nll(moved, count))
    assert_close(likelihood.gradient(f, y), plain.gradient(moved, count))
    assert_close(likelihood.hessian(likelihood.observed(f, y)).diag(), plain.hessian(moved).diag())
    assert_close(likelihood.predictive_nll(f, variance, y, link), plain.predictive_nll(moved, variance, count, link))
    for alpha in (0.0, 0.5, 1.0):
        assert_close(likelihood.energy(f, variance, y, alpha), plain.energy(moved, variance, count, alpha))
    samples = f + 0.3 * random(50, 4, 2, seed=4)
    offset = y[..., 1].log()
    found, expected = (a.average(iter([s]), 50, f) for a, s in ((likelihood, samples), (plain, samples + offset)))
    assert_close(
        likelihood.predictive_nll(*found[:2], y, found[2]), plain.predictive_nll(*expected[:2], count, expected[2])
    )
    for prediction, rate in zip(likelihood.predict(f, variance, link), plain.predict(f, variance, link), strict=True):
        assert_close(prediction, rate)


@both
@pytest.mark.parametrize(
    ("subset", "structure"),
    [("all", "full"), ("all", "kron"), ("all", "ekfac"), ("last_layer", "full"), ("last_layer", "gp"), ("all", "diag")],
)  # fmt: skip
def test_a_fit_is_that_of_a_network_with_an_offset(likelihood, plain, subset, structure):
    x, y = random(10, 2), targets(10, 2)
    net = network(2)
    options = {"last_layer_name": "2"} if subset == "last_layer" else {}
    options |= {"n_subset": 10} if structure == "gp" else {}
    la = Laplace(net, likelihood, subset, structure, prior_precision=DELTA, **options)
    la.fit([(x[:4], y[:4]), (x[4:], y[4:])])
    if subset == "last_layer":  # whose outputs are its own: the offset is a feature of weight 1, and no random one
        f, phi = net(x), net[:2](x)
        phi = torch.cat([phi, torch.ones(10, 1)], 1)
        expected = torch.zeros(8, 8)
        for row in range(10):
            h = plain.hessian((f[row] + y[row, :, 1].log())[None]).diag()[0]
            J = torch.cat([torch.kron(torch.eye(2), phi[row, :3]), torch.eye(2)], 1)
            expected += J.T @ h.diag() @ J
        cov = (expected + DELTA * torch.eye(8)).inverse()
        at = torch.cat([torch.kron(torch.eye(2), net[:2](x[:1])), torch.eye(2)], 1)
        mean, V = net(x[:1]), at @ cov @ at.T
        assert_close(la(x[:1])[0], (mean + V.diagonal() / 2).exp())
        return
    offset = Applied(lambda m, x: m.net(x[:, :2]) + x[:, 2:], net=net)
    other = Laplace(offset, plain, subset, structure, prior_precision=DELTA, **options)
    other.fit([(torch.cat([x, y[..., 1].log()], 1), y[..., 0])])
    assert_close(la.log_marginal_likelihood(), other.log_marginal_likelihood())
    assert_close(dense(la.posterior_precision), dense(other.posterior_precision))
    rates = other(torch.cat([x, torch.zeros(10, 2)], 1))
    for found, expected in zip(la(x), rates, strict=True):
        assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:The best ", "ignore:The validation score is best")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@both
@pytest.mark.parametrize("method", ["tune", "loo", "cv", "marglik"])
def test_every_way_of_tuning_sees_exposures(likelihood, plain, method):
    """Twice the exposure at half the rate are the same data: with the bias free, the same predictions per exposure."""
    x, y = random(12, 2), targets(12, 1)
    found = []
    for factor in (1.0, 2.0):
        net = network(1)
        with torch.no_grad():
            net[2].bias -= torch.tensor(factor).log()
        training = [(x, y * torch.tensor([1.0, factor]))]
        la = Laplace(
            net, likelihood, "last_layer", "full", last_layer_name="2",
            prior_mean=torch.cat([torch.zeros(3), -torch.tensor([factor]).log()]),
        )  # fmt: skip
        la.fit(training)
        grid = {"grid_size": 5, "log_prior_prec_min": -1, "log_prior_prec_max": 2}
        if method == "tune":
            la.tune([(x.flip(0), y * torch.tensor([1.0, factor]))])
        elif method == "marglik":
            la.optimize_prior_precision(method=method)
        else:
            folds = {"n_folds": 3} if method == "cv" else {}
            la.optimize_prior_precision(method=method, train_loader=training, **grid, **folds)
        found.append((la.prior_precision, factor * la(x)[0], factor**2 * la(x)[1]))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-3, atol=0)


@both
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_counts_and_exposures_are_read(likelihood, plain, dtype):
    y = targets(4, 2)
    y[..., 1] = y[..., 1].ceil()
    positions = likelihood.flatten(random(4, 2), y.to(dtype))
    assert_close(positions.y, y)
    assert likelihood.count(y.to(dtype), 2) == 4
    one = likelihood.flatten(random(4, 1), y[:, 0].to(dtype))
    assert one.y.shape == (4, 1, 2)
    assert likelihood.count(y[:, 0], 1) == 4
    several = likelihood.flatten(random(2, 2, 2), y.reshape(2, 2, 2, 2).to(dtype))
    assert several.y.shape == (4, 2, 2)
    assert several.datum.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda y: y * torch.tensor([1.0, 0.0]), InputError, "Exposures must be greater than 0; the least is 0"),
        (lambda y: y * torch.tensor([1.0, -1.0]), InputError, "Exposures must be greater than 0; the least is -"),
        (lambda y: y * torch.tensor([1.0, torch.nan]), InputError, "must be finite"),
        (lambda y: y + torch.tensor([0.5, 0.0]), InputError, "takes counts"),
        (lambda y: y[..., 0], ShapeError, r"counts and exposures side by side, \[4, 2, 2\]; got \[4, 2\]"),
        (lambda y: y[:, :1], ShapeError, r"torch\.stack"),
    ],
    ids=["zero", "negative", "nan", "fraction", "none", "one column"],
)
@both
def test_what_is_no_exposure_is_refused(likelihood, plain, change, error, says):
    with pytest.raises(error, match=says):
        likelihood.flatten(random(4, 2), change(targets(4, 2)))


def test_a_state_knows_that_there_were_exposures(tmp_path):
    la = Laplace(nn.Linear(2, 1).double(), PoissonLikelihood(exposure=True))
    la.fit([(random(5, 2), targets(5, 1))])
    la.save(tmp_path / "state")
    other = Laplace(nn.Linear(2, 1).double(), "poisson")
    with pytest.raises(InputError, match=r"poisson\(exposure=True\)"):
        other.load(tmp_path / "state")
