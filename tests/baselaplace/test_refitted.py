"""Leave-one-out and cross-validation as methods of ``optimize_prior_precision``."""

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.curvature import AutogradEF
from laplace.errors import InputError, UnsupportedError
from tests import networks
from tests.cases import BASIC, named
from tests.contracts import generator, model_untouched
from tests.estimators import fitted
from tests.tools import assert_close

F64 = torch.float64
GRID = {"log_prior_prec_min": -2, "log_prior_prec_max": 3, "grid_size": 6}
pytestmark = pytest.mark.filterwarnings("ignore:The best prior precision", "ignore:The validation loss is the same")


def ridge(delta, X, Y, sigma):
    """Mean of the weights, their covariance for one output."""
    ones = torch.cat([X, torch.ones(len(X), 1, dtype=F64)], 1)
    A = ones.T @ ones / sigma**2 + delta * torch.eye(ones.shape[1], dtype=F64)
    return torch.linalg.solve(A, ones.T @ Y / sigma**2), A.inverse()


def held_out(delta, X, Y, sigma, folds):
    """Mean negative log density of each fold by the regression of the others, refitted explicitly."""
    total = 0.0
    for fold in folds:
        rest = torch.tensor([n for n in range(len(X)) if n not in fold.tolist()])
        mean, cov = ridge(delta, X[rest], Y[rest], sigma)
        ones = torch.cat([X[fold], torch.ones(len(fold), 1, dtype=F64)], 1)
        spread = ((ones @ cov * ones).sum(1, keepdim=True) + sigma**2).sqrt()
        total -= float(torch.distributions.Normal(ones @ mean, spread).log_prob(Y[fold]).sum())
    return total / len(X)


def problem(structure):
    X = torch.randn(12, 2, dtype=F64, generator=generator(0))
    Y = X @ torch.ones(2, 2, dtype=F64) + torch.randn(12, 2, dtype=F64, generator=generator(1))
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 2)).double()
    la = Laplace(model, "regression", hessian_structure=structure, last_layer_name="1", sigma_noise=0.8)
    la.fit([(X[:5], Y[:5]), (X[5:], Y[5:])])
    return la, X, Y


def test_leaving_one_out_is_refitting_without_each_datum():
    la, X, Y = problem("full")
    la.optimize_prior_precision(method="loo", train_loader=[(X[:5], Y[:5]), (X[5:], Y[5:])], **GRID)
    alone = list(torch.arange(12).split(1))
    expected = torch.tensor([held_out(delta, X, Y, 0.8, alone) for delta in la.tuning_.points.tolist()])
    assert_close(la.tuning_.values, expected.double())
    assert float(la.prior_precision) == float(la.tuning_.points[expected.argmin()])


@pytest.mark.parametrize("structure", ["full", "kron"])
def test_cross_validation_is_refitting_without_each_fold(structure):
    la, X, Y = problem(structure)
    la.optimize_prior_precision(method="cv", n_folds=3, train_loader=[(X, Y)], **GRID)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    expected = [held_out(delta, X, Y, 0.8, order.tensor_split(3)) for delta in la.tuning_.points.tolist()]
    if structure == "full":
        assert_close(la.tuning_.values, torch.tensor(expected, dtype=F64))
    else:  # weight and bias are two blocks there: close, not equal
        assert la.tuning_.values.argmin() == torch.tensor(expected).argmin()


@pytest.mark.parametrize(
    ("method", "structure"), [("loo", "full"), ("loo", "diag"), ("cv", "full"), ("cv", "kron"), ("cv", "diag")]
)
@pytest.mark.parametrize("name", [BASIC[0].name, "soft_labels", "masked_positions"])
def test_classifiers_are_tuned_by_their_training_data(name, method, structure):
    case = named(name)
    model = case.model()
    la, batches = fitted(case, structure, model), case.batches(2)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    with model_untouched(model):
        la.optimize_prior_precision(method=method, train_loader=batches, n_folds=2, **GRID)
    handle.remove()
    assert len(calls) == len(batches)
    assert bool(torch.isfinite(la.tuning_.values).all())
    assert la.tuning_.method == method


def test_folds_follow_their_number_and_the_generator():
    case, found = BASIC[0], []
    for options in ({"n_folds": 2}, {"n_folds": 2}, {"n_folds": 3}, {"n_folds": 2, "generator": generator(5)}):
        la = fitted(case, "kron")
        la.optimize_prior_precision(method="cv", train_loader=case.batches(4), **options, **GRID)
        found.append(la.tuning_.values)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[3])


@pytest.mark.parametrize("method", ["loo", "cv"])
def test_whole_networks_are_refused_for_their_weights_stay_as_they_are(method):
    network = networks.named("mlp")
    la = Laplace(network.model(), "classification", "all", "full")
    la.fit([network.data()])
    with pytest.raises(UnsupportedError, match=r"last.layer"):
        la.optimize_prior_precision(method=method, train_loader=[network.data()], **GRID)


@pytest.mark.parametrize("method", ["loo", "cv"])
def test_what_cannot_be_done_is_said_and_changes_nothing(method):
    case = BASIC[0]
    la = fitted(case, "diag", prior_precision=2.5)
    tune = {"method": method, **GRID}
    with pytest.raises(InputError, match="train_loader"):
        la.optimize_prior_precision(**tune, val_loader=case.batches(4))
    with pytest.raises(InputError, match="training loader"):
        la.optimize_prior_precision(**tune, train_loader=[])
    if method == "cv":
        for n_folds in (1, 1000):
            with pytest.raises(InputError, match="n_folds"):
                la.optimize_prior_precision(**tune, train_loader=case.batches(4), n_folds=n_folds)
    else:
        with pytest.raises(UnsupportedError, match="sum over data"):
            fitted(case, "kron").optimize_prior_precision(**tune, train_loader=case.batches(4))
    with pytest.raises(UnsupportedError, match="empirical Fisher"):
        fitted(case, "diag", backend=AutogradEF).optimize_prior_precision(**tune, train_loader=case.batches(4))
    assert (float(la.prior_precision), la.tuning_) == (2.5, None)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_leave_one_out_predicts_with_the_mode_under_the_prior_that_it_chose(structure):
    la, X, Y = problem(structure)
    own, model = la.mean, la.model
    loader = [(X[:5], Y[:5]), (X[5:], Y[5:])]
    with model_untouched(model):
        la.optimize_prior_precision(method="loo", train_loader=loader, **GRID)
    mean, _ = ridge(float(la.prior_precision), X, Y, 0.8)
    assert_close(la.mean, torch.cat([mean[:2].T.flatten(), mean[2]]))
    assert_close(la(X)[0], torch.cat([X, torch.ones(12, 1, dtype=F64)], 1) @ mean)
    assert_close(la.head_.weight.detach(), mean[:2].T.contiguous())
    chosen = float(la.prior_precision)
    la.optimize_prior_precision(method="loo", train_loader=loader, **GRID)  # from the head of the model again
    assert float(la.prior_precision) == chosen
    assert_close(la._fit.trained, own)
    la.optimize_prior_precision(method="loo", train_loader=loader, refit=False, **GRID)
    assert_close(la.mean, own)
    assert la._fit.trained is None


@pytest.mark.filterwarnings("ignore:The weights of the last layer have changed")
def test_a_refit_needs_the_data_of_the_fit():
    la, X, Y = problem("full")
    with pytest.raises(InputError, match="other data than fit had"):
        la.optimize_prior_precision(method="loo", train_loader=[(X[:5], Y[:5])], **GRID)
    la.optimize_prior_precision(method="loo", train_loader=[(X[:5], Y[:5])], refit=False, **GRID)
    la.mean = la.mean + 1
    with pytest.raises(UnsupportedError, match="assigned by hand"):
        la.optimize_prior_precision(method="loo", train_loader=[(X, Y)], refit=True, **GRID)
    moved = la.mean
    la.optimize_prior_precision(method="loo", train_loader=[(X, Y)], **GRID)
    assert torch.equal(la.mean, moved)
