"""Choosing the prior precision."""

import contextlib
import math

import pytest
import torch

from laplace.curvature import AutogradEF
from laplace.errors import InputError, UnsupportedError
from tests import reference
from tests.cases import BASIC, BY_GROUP, STRUCTURES, named
from tests.contracts import model_untouched
from tests.estimators import basic_cases, estimator, every_structure, fitted, posterior
from tests.tools import assert_close

STRUCTURES_AND_PRIORS = pytest.mark.parametrize(
    ("structure", "prior_structure"),
    [(s, p) for s in STRUCTURES for p in ("scalar", "layerwise", "diag") if p != "diag" or s not in BY_GROUP],
)
N_VALUES = {"scalar": 1, "layerwise": 2}


def validation(case, *sizes: int):
    """Other data from the same source, in batches."""
    x, y = case.data(n_rows=9, shift=3)
    parts = torch.arange(9).split([*sizes, 9 - sum(sizes)])
    return [(x[part], y[part]) for part in parts if len(part)]


def grid_search(la, case, loader=None, **options):
    loader = validation(case, 4) if loader is None else loader
    options = {"log_prior_prec_min": -2, "log_prior_prec_max": 3, "grid_size": 6, **options}
    la.optimize_prior_precision(method="gridsearch", val_loader=loader, **options)


# -- marginal likelihood ----------------------------------------------------------------------------------------------


@STRUCTURES_AND_PRIORS
@basic_cases
def test_tuning_never_lowers_the_evidence(case, structure, prior_structure):
    la = fitted(case, structure)
    start = la.log_marginal_likelihood()
    la.optimize_prior_precision(prior_structure=prior_structure)
    assert la.prior_precision.shape == (N_VALUES.get(prior_structure, la.n_params),)
    assert not la.prior_precision.requires_grad
    assert la.log_marginal_likelihood() > start + 1e-3


@every_structure
@basic_cases
def test_more_precisions_reach_more_evidence(case, structure):
    values = []
    for prior_structure in ("scalar", "layerwise", "diag")[: 2 if structure in BY_GROUP else 3]:
        la = fitted(case, structure)
        la.optimize_prior_precision(prior_structure=prior_structure, n_steps=300)
        values.append(float(la.log_marginal_likelihood()))
    assert values == sorted(values)


@every_structure
@basic_cases
def test_the_optimum_of_the_evidence_is_stationary(case, structure):
    la = fitted(case, structure)
    la.optimize_prior_precision(n_steps=1000, lr=0.05)
    log_delta = la.prior_precision.log().requires_grad_()
    (slope,) = torch.autograd.grad(la.log_marginal_likelihood(log_delta.exp()), log_delta)
    assert abs(float(slope)) < 1e-2


def test_the_diagonal_optimum_has_a_closed_form():
    """h s / (h s + d) = d theta^2 at the optimum of each weight, hence d = (-h + sqrt(h^2 + 4 h / theta^2)) / 2."""
    case = BASIC[1]
    la = fitted(case, "diag")
    la.optimize_prior_precision(prior_structure="diag", n_steps=3000, lr=0.03)
    h, theta = case.scale * case.problem().ggn().diagonal(), case.problem().theta()
    optimum = (-h + (h**2 + 4 * h / theta**2).sqrt()) / 2
    assert (la.prior_precision.log() - optimum.log()).abs().max() < 0.05


@every_structure
def test_the_start_is_the_one_asked_for(structure):
    case = BASIC[0]
    la = fitted(case, structure)
    la.optimize_prior_precision(n_steps=0, init_prior_prec=7.0)
    assert_close(la.prior_precision, torch.tensor([7.0]))
    la.optimize_prior_precision(n_steps=0, init_prior_prec=torch.tensor([2.0, 3.0]), prior_structure="layerwise")
    assert_close(la.prior_precision, torch.tensor([2.0, 3.0]))
    for wrong in (torch.ones(5), 0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="init_prior_prec"):
            la.optimize_prior_precision(init_prior_prec=wrong)
    assert_close(la.prior_precision, torch.tensor([2.0, 3.0]))


@every_structure
def test_tuning_keeps_damping_and_noise_and_mean(structure):
    case = BASIC[1]
    options = {"damping": True} if structure == "kron" else {}
    la = fitted(case, structure, prior_mean=0.5, sigma_noise=0.3, **options)
    start = la.log_marginal_likelihood()
    la.optimize_prior_precision()
    assert la.log_marginal_likelihood() >= start
    assert (float(la.prior_mean), float(la.sigma_noise)) == pytest.approx((0.5, 0.3))


# -- grid search ------------------------------------------------------------------------------------------------------


@every_structure
@pytest.mark.parametrize("case", BASIC, ids=str)
@pytest.mark.parametrize("base", [10.0, 2.0])
def test_grid_search_takes_the_best_point_of_exactly_the_grid_asked_for(case, structure, base):
    la = fitted(case, structure)
    grid = base ** torch.arange(-2.0, 4.0)
    (x, y), losses = case.data(n_rows=9, shift=3), []
    J = case.problem().jacobian(x).flatten(0, 1)
    with torch.no_grad():
        f = case.forward(case.model(), x)
    for delta in grid.tolist():
        V = reference.output_covariance(J, posterior(case, structure, delta=delta))
        if case.likelihood == "classification":
            losses.append(float(-reference.probit(f, V)[torch.arange(9), y].log().mean()))
        else:
            density = torch.distributions.MultivariateNormal(f, V + case.sigma**2 * torch.eye(case.n_outputs))
            losses.append(float(-density.log_prob(y).mean()))
    best = losses.index(min(losses))
    with pytest.warns(UserWarning, match="end of the grid") if best in (0, 5) else contextlib.nullcontext():
        grid_search(la, case, log_prior_prec_base=base)
    assert_close(la.prior_precision, grid[best : best + 1])


@every_structure
@pytest.mark.parametrize("options", [{}, {"backend": AutogradEF}, {"damping": True}], ids=["GGN", "EF", "damped"])
def test_grid_search_scores_the_posterior_at_each_point(structure, options):
    if structure != "kron":
        options = {key: value for key, value in options.items() if key != "damping"}
    case, seen, scores = BASIC[1], [], iter([3.0, 2.0, 1.0, 2.0, 3.0, 4.0])
    la = fitted(case, structure, temperature=1.4, **options)
    grid_search(la, case, loss=lambda mean, cov, y: seen.append(cov) or next(scores))
    J = case.problem().jacobian(case.data(n_rows=9, shift=3)[0]).flatten(0, 1)
    chosen = {"temperature": 1.4, "fisher": "backend" in options, "damping": "damping" in options}
    for delta, cov in zip((10.0 ** torch.arange(-2.0, 4.0)).tolist(), seen, strict=True):
        assert_close(cov, reference.output_covariance(J, posterior(case, structure, delta=delta, **chosen)))


@every_structure
@basic_cases
def test_a_loss_of_the_users_own_sees_every_point_and_decides(case, structure):
    la = fitted(case, structure)
    scores = iter([5.0, float("nan"), 1.0, float("inf"), 2.0, 3.0])
    seen = []

    def loss(*arguments):
        seen.append([a.shape for a in arguments])
        return next(scores)

    grid_search(la, case, loss=loss)
    assert_close(la.prior_precision, torch.tensor([1.0]))
    C = case.n_outputs
    expected = [(9, C), (9,)] if case.likelihood == "classification" else [(9, C), (9, C, C), (9, C)]
    assert seen == [expected] * 6


@every_structure
def test_grid_search_gives_every_precision_the_same_value(structure):
    la = fitted(BASIC[0], structure)
    scores = iter([3.0, 2.0, 1.0, 2.0, 3.0, 4.0])
    grid_search(la, BASIC[0], loss=lambda *_: next(scores), prior_structure="layerwise")
    assert_close(la.prior_precision, torch.tensor([1.0, 1.0]))


@every_structure
@pytest.mark.parametrize(
    "loss",
    [lambda *_: 1 / 0, lambda *_: float("nan"), lambda *_: "no number"],
    ids=["raises", "never finite", "returns no number"],
)
def test_what_fails_leaves_the_prior_as_it_was(structure, loss):
    case = BASIC[0]
    model = case.model()
    la = fitted(case, structure, model, prior_precision=2.5)
    before = la(case.test_inputs())
    with model_untouched(model), pytest.raises((ZeroDivisionError, InputError, ValueError, TypeError)):
        grid_search(la, case, loss=loss)
    assert_close(la.prior_precision, torch.tensor([2.5]))
    assert_close(la(case.test_inputs()), before)


@every_structure
def test_grid_search_runs_the_model_once_a_batch(structure):
    case = BASIC[0]
    model = case.model()
    la, calls = fitted(case, structure, model), []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    grid_search(la, case, validation(case, 3, 3), grid_size=20, loss=lambda *_: float(len(calls) * 0 + torch.rand(())))
    handle.remove()
    assert len(calls) == 3


@pytest.mark.parametrize("options", [{"link_approx": "mc"}, {"link_approx": "bridge"}, {"pred_type": "nn"}])
def test_grid_search_scores_the_predictions_that_are_asked_for(options):
    case = BASIC[0]
    la, expected, seen = fitted(case, "full", prior_precision=1.0), {}, {}

    def loss(probabilities, targets):
        seen[len(seen)] = probabilities
        return (len(seen) - 3) ** 2

    torch.manual_seed(0)
    grid_search(la, case, loss=loss, n_samples=5, **options)
    x = case.data(n_rows=9, shift=3)[0]
    if options == {"link_approx": "bridge"}:
        for index, delta in enumerate(10.0 ** torch.arange(-2.0, 4.0)):
            la.prior_precision = float(delta)
            expected[index] = la(x, **options)
            assert_close(seen[index], expected[index])
    else:  # sampled: differs from the closed form, and from point to point
        la.prior_precision = 1.0
        assert not torch.allclose(seen[2], la(x))


def test_soft_labels_and_masked_positions_can_be_validated():
    soft = named("soft_labels")
    x, y = soft.data(shift=3)
    la, scores = fitted(soft, "diag"), []
    grid_search(
        la, soft, [(x, y)], loss=lambda p, t: scores.append(-(t * p.log()).sum(-1).mean()) or (len(scores) - 3) ** 2
    )
    la.prior_precision = 0.01
    assert_close(scores[0], -(y * la(x).log()).sum(-1).mean())
    masked = named("masked_positions")
    x, y = masked.data(shift=3)
    la = fitted(masked, "diag")
    shapes = []
    scores = iter([2.0, 1.0, 2.0])
    grid_search(la, masked, [(x, y)], loss=lambda p, t: shapes.append((p.shape, t.shape)) or next(scores), grid_size=3)
    kept = int((y != -100).sum())
    assert shapes == [((kept, 4), (kept,))] * 3


def test_grid_search_needs_validation_data_and_a_grid():
    la = fitted(BASIC[0], "diag")
    with pytest.raises(InputError, match="val_loader"):
        la.optimize_prior_precision(method="gridsearch")
    with pytest.raises(InputError, match="empty"):
        grid_search(la, BASIC[0], [])
    with pytest.raises(InputError, match="grid_size"):
        grid_search(la, BASIC[0], grid_size=0)
    with pytest.raises(InputError, match="grid_size"):
        grid_search(la, BASIC[0], log_prior_prec_min=3, log_prior_prec_max=-3)


def test_unknown_names_list_the_choices():
    la = fitted(BASIC[0], "diag")
    with pytest.raises(UnsupportedError, match="'marglik', 'gridsearch'"):
        la.optimize_prior_precision(method="evidence")
    with pytest.raises(UnsupportedError, match="'scalar', 'layerwise', 'diag'"):
        la.optimize_prior_precision(prior_structure="all")
    with pytest.raises(UnsupportedError, match="pred_type"):
        la.optimize_prior_precision(pred_type="gp")


@pytest.mark.parametrize("method", ["marglik", "gridsearch"])
def test_results_are_told_and_progress_is_shown_on_request(method, capsys):
    case = BASIC[0]
    la = fitted(case, "diag")
    scores = iter([3.0, 2.0, 1.0, 2.0, 3.0, 4.0] * 3)
    options = (
        {} if method == "marglik" else {"val_loader": validation(case), "grid_size": 6, "loss": lambda *_: next(scores)}
    )
    la.optimize_prior_precision(method=method, **options)
    assert capsys.readouterr() == ("", "")
    la.optimize_prior_precision(method=method, verbose=True, progress_bar=True, **options)
    out, err = capsys.readouterr()
    assert "prior precision" in out
    assert "it/s" in err


def test_exponents_are_those_of_the_base():
    """Not every power of a base is exact: the ends are, the middle is what logspace gives."""
    case, asked = BASIC[0], []
    la = estimator(case, "diag")
    la.fit(case.batches(4))
    scores = iter([1.0, 0.5, 1.0])
    grid_search(
        la,
        case,
        loss=lambda *_: asked.append(1) or next(scores),
        log_prior_prec_min=-1,
        log_prior_prec_max=2,
        grid_size=3,
    )
    assert math.isclose(float(la.prior_precision), 10**0.5)
    assert len(asked) == 3
