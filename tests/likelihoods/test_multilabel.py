"""Independent labels: they are so many binary ones, and a missing one says nothing."""

import pytest
import torch
from torch.distributions import Bernoulli

from laplace import Laplace
from laplace.enums import LinkApprox
from laplace.errors import InputError, ShapeError
from laplace.likelihoods import BernoulliLikelihood, MultiLabelLikelihood
from tests.contracts import generator
from tests.estimators import dense
from tests.likelihoods.situations import DELTA, network, outputs
from tests.tools import assert_close

LIKELIHOOD, ONE = MultiLabelLikelihood(), BernoulliLikelihood()
C, NAN = 3, torch.nan
Y = torch.tensor([[1.0, 0, NAN], [NAN, 1, 0.3], [0, NAN, 1], [1, 1, 0]])
KNOWN = ~Y.isnan()


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(0))


def fit_data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(12, 2, generator=generator(1))
    y = (torch.rand(12, C, generator=generator(2)) > 0.5).double()
    y[torch.rand(12, C, generator=generator(3)) < 0.3] = NAN
    y[4] = NAN
    return x, y


@pytest.mark.parametrize("c", range(C))
def test_each_label_is_binary(c):
    """Everything of one column is that of the likelihood of one logit."""
    f, y, one = logits(4, C), Y.nan_to_num(1.0), slice(c, c + 1)
    assert_close(LIKELIHOOD.gradient(f, y)[:, one], ONE.gradient(f[:, one], y[:, one]))
    assert_close(LIKELIHOOD.hessian(f).dense()[:, c, c], ONE.hessian(f[:, one]).dense().flatten())
    variance = logits(4, C).exp()
    for link in (LinkApprox.PROBIT, LinkApprox.MC):
        found = LIKELIHOOD.predict(f, variance, LIKELIHOOD.link(link, 50, generator(0)))
        assert_close(found[:, one], ONE.predict(f[:, one], variance[:, one], ONE.link(link, 50, generator(0))))


def test_sums_are_those_of_the_labels_that_are_there():
    f, variance = logits(4, C), logits(4, C).exp()
    for of in (
        lambda likelihood, f, y, v: likelihood.nll(f, y),
        lambda likelihood, f, y, v: likelihood.predictive_nll(f, v, y, likelihood.link(LinkApprox.PROBIT, 1, None)),
        lambda likelihood, f, y, v: likelihood.brier(f, v, y, likelihood.link(LinkApprox.PROBIT, 1, None)),
        lambda likelihood, f, y, v: likelihood.energy(f, v, y, 0.0).sum(),
        lambda likelihood, f, y, v: likelihood.energy(f, v, y, 0.4).sum(),
    ):
        alone = [cell.reshape(-1, 1) for cell in (f[KNOWN], Y[KNOWN], variance[KNOWN])]
        assert_close(of(LIKELIHOOD, f, Y, variance), of(ONE, *alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_missing_label_has_no_derivative_and_no_curvature(dtype):
    f = (30 * logits(4, C)).to(dtype).requires_grad_()
    y, at = Y.to(dtype), LIKELIHOOD.observed(f, Y.to(dtype))
    for values in (LIKELIHOOD.gradient(f, y), LIKELIHOOD.hessian(at).diag(), LIKELIHOOD.sample_gradient(at, 1)[0]):
        assert bool((values[~KNOWN] == 0).all())
        assert bool(values.isfinite().all())
    assert_close(LIKELIHOOD.hessian(at).diag()[KNOWN], LIKELIHOOD.hessian(f).diag()[KNOWN])
    for score in (
        LIKELIHOOD.nll,
        lambda f, y: LIKELIHOOD.brier(f, f**2, y, LIKELIHOOD.link(LinkApprox.PROBIT, 1, None)),
    ):
        (slope,) = torch.autograd.grad(score(f, y), f, retain_graph=True)
        assert bool((slope[~KNOWN] == 0).all())
        assert bool(slope.isfinite().all())


def test_soft_labels_are_averages_over_labels():
    f, y = logits(5, C), torch.rand(5, C, generator=generator(4))
    one, zero = torch.ones(5, C), torch.zeros(5, C)
    expected = -(y * Bernoulli(logits=f).log_prob(one) + (1 - y) * Bernoulli(logits=f).log_prob(zero)).sum()
    assert_close(LIKELIHOOD.nll(f, y), expected)
    assert_close(LIKELIHOOD.gradient(f, y), y * LIKELIHOOD.gradient(f, one) + (1 - y) * LIKELIHOOD.gradient(f, zero))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.float32, torch.float64])
def test_missing_labels_are_read_and_rows_without_any_are_masked(dtype):
    y = torch.tensor([[0, 1, -100], [-100, -100, -100], [1, 1, 1], [-100, 0, 0]])
    y = torch.where(y == -100, NAN, y.to(dtype)).to(dtype) if dtype.is_floating_point else y.to(dtype)
    f = logits(4, C)
    positions = LIKELIHOOD.flatten(f, y)
    assert positions.kept.tolist() == [0, 2, 3]
    assert_close(positions.f, f[[0, 2, 3]])
    expected = torch.tensor([[0, 1, NAN], [1, 1, 1], [NAN, 0, 0]])
    assert torch.equal(positions.y.isnan(), expected.isnan())
    assert_close(positions.y.nan_to_num(), expected.nan_to_num())
    assert LIKELIHOOD.count(y, C) == 3
    several = LIKELIHOOD.flatten(f.reshape(2, 2, C), y.reshape(2, 2, C))
    assert several.datum.tolist() == [0, 1, 1]


def test_bool_labels_and_labels_that_are_all_there_are_taken():
    positions = LIKELIHOOD.flatten(logits(4, C), Y.nan_to_num() > 0.5)
    assert positions.kept is None
    assert_close(positions.y, (Y.nan_to_num() > 0.5).double())


@pytest.mark.parametrize(
    ("y", "error", "says"),
    [
        (1.1 * torch.ones(4, C), InputError, "probabilities between them"),
        (-0.1 * torch.ones(4, C), InputError, "0 or 1"),
        (torch.full((4, C), -99), InputError, "-100"),
        (torch.ones(4, C) / 0, InputError, "0 or 1"),
        (torch.ones(4, C) + 0j, InputError, "0 or 1"),
        (torch.ones(4).long(), ShapeError, r"Labels must have the shape.*\[4, 3\]; got \[4\]"),
        (torch.ones(4, 1), ShapeError, r"got \[4, 1\]"),
    ],
    ids=["above", "below", "int", "infinite", "complex", "classes", "one column"],
)
def test_what_is_no_label_is_refused(y, error, says):
    with pytest.raises(error, match=says):
        LIKELIHOOD.flatten(logits(4, C), y)


@pytest.mark.parametrize(
    ("subset", "structure"),
    [("all", "full"), ("all", "diag"), ("all", "lowrank"), ("last_layer", "full"), ("last_layer", "gp"), ("last_layer", "diag")],
)  # fmt: skip
def test_fits_with_missing_labels_are_sums_over_those_that_are_there(subset, structure):
    x, y = fit_data()
    options = {"gp": {"n_subset": 12}, "lowrank": {"rank": 30}}.get(structure, {})
    options |= {"last_layer_name": "2"} if subset == "last_layer" else {}
    la = Laplace(network(C), "multilabel", subset, structure, prior_precision=DELTA, **options)
    la.fit([(x[:5], y[:5]), (x[5:], y[5:])])
    f, J = outputs(C, x, subset)
    p, known = f.sigmoid(), ~y.isnan()
    weight = known * p * (1 - p)
    H = torch.einsum("ncp,nc,ncq->pq", J, weight, J)
    assert_close(la.log_likelihood, Bernoulli(logits=f).log_prob(y.nan_to_num())[known].sum())
    assert la.n_data == 12
    kept = H.diagonal().diag() if structure == "diag" else H
    cov = (kept + DELTA * torch.eye(len(H))).inverse()
    at, G = outputs(C, torch.ones(1, 2), subset)
    variance = (G @ cov @ G.mT).diagonal(dim1=1, dim2=2)
    assert_close(la(torch.ones(1, 2)), torch.sigmoid(at / (1 + torch.pi / 8 * variance).sqrt()))
    if structure not in ("gp", "lowrank"):
        assert_close(dense(la.posterior_precision), kept + DELTA * torch.eye(len(H)))


@pytest.mark.filterwarnings(
    "ignore:The best ", "ignore:.*no temperature is best", "ignore:The validation score is best"
)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("method", ["tune", "loo", "cv", "elbo"])
def test_rows_without_labels_change_no_way_of_tuning(method):
    x, y = fit_data()
    found = []
    for rows in (slice(None), ~y.isnan().all(1)):
        training = [(x[rows], y[rows])]
        la = Laplace(network(C), "multilabel", "last_layer", "full", last_layer_name="2")
        la.fit(training)
        if method == "tune":
            la.tune([(x[rows].flip(0), y[rows].flip(0))])
        else:
            la.optimize_prior_precision(
                method=method, train_loader=training, grid_size=4, log_prior_prec_min=-1, log_prior_prec_max=1,
                **({"n_folds": 3} if method == "cv" else {}),
            )  # fmt: skip
        found.append(la)
    first, second = found
    if method != "cv":  # whose folds are drawn of all rows
        torch.testing.assert_close(first.prior_precision, second.prior_precision, rtol=1e-4, atol=0)
        torch.testing.assert_close(first(x), second(x), rtol=1e-4, atol=1e-6)
    assert bool(first(x).isfinite().all())
