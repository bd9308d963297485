"""``optimize_prior_precision(method="elbo")``: what it assigns, and what it refuses."""

import math

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.curvature import AutogradEF
from laplace.errors import InputError, UnsupportedError
from tests.cases import BASIC, named
from tests.contracts import model_untouched
from tests.estimators import dense, estimator, fitted, outputs_and_covariance
from tests.tools import assert_close

CASE = BASIC[0]
GRID = {"log_prior_prec_min": -2, "log_prior_prec_max": 3, "grid_size": 11}
pytestmark = pytest.mark.filterwarnings("ignore:The best prior precision")


def tuned(structure="full", case=CASE, **options):
    la = fitted(case, structure)
    la.accept_untuned()
    la.optimize_prior_precision(method="elbo", **GRID, **options)
    return la


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_mean_and_curvature_are_those_of_the_fit_and_the_model_stays(structure):
    model = CASE.model()
    with model_untouched(model):
        la = fitted(CASE, structure, model)
        trained = la.mean
        la.optimize_prior_precision(method="elbo", **GRID)
    assert not torch.equal(la.mean, trained)
    assert torch.equal(la._fit.trained, trained)
    assert_close(torch.cat([p.detach().flatten() for p in la.head_.parameters()]), la.mean)
    assert la.tuning_.method == "elbo"
    assert la.tuning_.value == pytest.approx(float(la.tuning_.values.max()))
    assert_close(dense(la.posterior_precision), dense(la.H) + float(la.prior_precision) * torch.eye(la.n_params))
    assert_close(la.loss, CASE.problem(with_head(model, la)).nll())
    assert la.weight_uncertainty


def with_head(model, la):
    """A copy of the model that has the head."""
    other = CASE.model()
    with torch.no_grad():
        for own, chosen in zip(other.get_submodule("head").parameters(), la.head_.parameters(), strict=True):
            own.copy_(chosen)
    return other


def test_the_chosen_precision_is_the_best_of_all_of_the_grid():
    la = tuned()
    every = []
    for delta in torch.logspace(-2, 3, 11).tolist():
        one = fitted(CASE, "full")
        exponent = torch.tensor(delta).log10().item()
        one.optimize_prior_precision(
            method="elbo", log_prior_prec_min=exponent, log_prior_prec_max=exponent, grid_size=1
        )
        every.append(one.tuning_.value)
    best = max(range(11), key=every.__getitem__)
    assert float(la.prior_precision) == pytest.approx(float(torch.logspace(-2, 3, 11)[best]), rel=1e-5)
    assert la.tuning_.value == pytest.approx(every[best], abs=5e-3)


def test_a_second_call_starts_from_the_head_of_the_model():
    la = tuned()
    mean, precision = la.mean, la.prior_precision
    la.optimize_prior_precision(method="elbo", **GRID)
    assert torch.equal(la.mean, mean)
    assert torch.equal(la.prior_precision, precision)


def test_features_that_fit_kept_and_those_of_a_loader_are_the_same():
    la = fitted(CASE, "kron")
    la.forget_data()
    with pytest.raises(UnsupportedError, match="train_loader="):
        la.optimize_prior_precision(method="elbo", **GRID)
    la.optimize_prior_precision(method="elbo", train_loader=CASE.batches(1, 3), **GRID)
    assert_close(la.mean, tuned("kron").mean)
    with pytest.raises(InputError, match="other data than fit had"):
        la.optimize_prior_precision(method="elbo", train_loader=CASE.batches(4)[:1], **GRID)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_what_all_logits_share_does_not_widen_predictions(structure):
    la = tuned(structure)
    _, J, cov = outputs_and_covariance(CASE, dense(la.posterior_precision))
    f, M = J @ la.mean, torch.eye(CASE.n_outputs) - 1 / CASE.n_outputs  # outputs are linear in these weights
    contrasts = (M @ cov @ M).diagonal(dim1=1, dim2=2)
    assert_close(la(CASE.test_inputs()), (f / (1 + math.pi / 8 * contrasts).sqrt()).softmax(-1))


def test_states_carry_all_of_it(tmp_path):
    la, x = tuned(), CASE.test_inputs()
    la.save(tmp_path / "state")
    other = estimator(CASE, "full")
    other.load(tmp_path / "state")
    assert torch.equal(other(x), la(x))
    assert torch.equal(other.mean, la.mean)
    for each in (la, other):
        with pytest.raises(UnsupportedError, match="averaged over the posterior"):
            each.fit(CASE.batches(4), override=False)


def test_one_logit_is_fitted_too():
    x = torch.randn(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = (x.sum(1) > 0).double()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    la = Laplace(model, "binary", hessian_structure="full")
    la.fit([(x, y)])
    la.optimize_prior_precision(method="elbo", **GRID)
    before = torch.nn.functional.binary_cross_entropy_with_logits(model(x)[:, 0], y).detach()
    assert float(torch.nn.functional.binary_cross_entropy(la(x)[:, 0], y)) < float(before)


def test_what_it_does_not_do_is_said():
    cases = {
        "exact": fitted(BASIC[1], "full"),
        'this one is "blockdiag"': fitted(CASE, "blockdiag"),
        "empirical Fisher": fitted(CASE, "full", backend=AutogradEF),
        "compare two inputs": fitted(named("preferences"), "full"),
    }
    for text, la in cases.items():
        with pytest.raises(UnsupportedError, match=text):
            la.optimize_prior_precision(method="elbo", **GRID)
    la = fitted(CASE, "full")
    with pytest.raises(UnsupportedError, match="mean and covariance together"):
        la.optimize_prior_precision(method="elbo", refit=False, **GRID)
    many = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 101))
    wide = Laplace(many, "classification", hessian_structure="kron")
    wide.fit([(torch.randn(5, 2), torch.arange(5))])
    with pytest.raises(UnsupportedError, match="up to 100 classes; the model has 101"):
        wide.optimize_prior_precision(method="elbo", **GRID)


@pytest.mark.parametrize(("method", "options"), [("marglik", {}), ("gridsearch", {}), ("cv", {})])
def test_other_methods_do_not_move_the_head(method, options):
    la = fitted(CASE, "full")
    with pytest.raises(UnsupportedError, match='goes with method="loo"'):
        la.optimize_prior_precision(method=method, refit=True, **options, **GRID)
    with pytest.raises(InputError, match="refit"):
        la.optimize_prior_precision(method="loo", train_loader=CASE.batches(4), refit="yes", **GRID)


def test_digits_are_predicted_better_than_by_the_mode_and_by_the_evidence():
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    x, y = map(torch.tensor, load_digits(return_X_y=True))
    torch.manual_seed(0)
    order = torch.randperm(len(y))
    x, y = (x / 16).float()[order], y[order]
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:200]), y[:200]).backward()
        optimizer.step()

    def nll(probabilities):
        return float(-probabilities.gather(1, y[200:, None]).log().mean().detach())

    la = Laplace(model, "classification", hessian_structure="full")
    la.fit([(x[:200], y[:200])])
    la.optimize_prior_precision()
    evidence = nll(la(x[200:]))
    la.optimize_prior_precision(method="elbo", log_prior_prec_min=-1, log_prior_prec_max=2, grid_size=7)
    assert nll(la(x[200:])) < nll(model(x[200:]).softmax(1)) < evidence
