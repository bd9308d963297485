"""Hyperparameters chosen together, on validation data or by evidence."""

import math
import warnings

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.curvature import AutogradEF
from laplace.errors import InputError, ShapeError, UnsupportedError
from tests import networks, reference
from tests.cases import BASIC, CASES, named
from tests.contracts import generator, model_untouched
from tests.estimators import basic_cases, estimator, every_structure, fitted
from tests.tools import assert_close

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:The validation score is best", "ignore:The best .* stays at its limits")


def validation(case, n_rows=60, shift=3):
    x, y = case.data(n_rows=n_rows, shift=shift)
    return (
        [case.batch(x, y)]
        if not isinstance(x, torch.Tensor)
        else [(x[p], y[p]) for p in torch.arange(n_rows).split(17)]
    )


def validation_score(la, case, loader) -> float:
    """Mean negative log predictive density, from the predictions that users get."""
    total, count = 0.0, 0
    for x, y in loader:
        if case.likelihood == "regression":
            mean, cov = la(x)
            noise = torch.diag_embed(la.sigma_noise.square().expand(mean.shape[-1]))
            total -= float(torch.distributions.MultivariateNormal(mean, cov + noise).log_prob(y).sum())
        else:
            options = {"fitting": True} if case.likelihood == "reward_modeling" else {}
            total -= float(la(x, **options)[torch.arange(len(y)), y].log().sum())
        count += len(y)
    return total / count


def map_score(case, model, loader, value=None) -> float:
    """The same of the network alone: at an output temperature, or at a noise."""
    f = torch.cat([case.forward(model, x) for x, _ in loader]).detach()
    y = torch.cat([y for _, y in loader])
    if case.likelihood == "regression":
        return float(-torch.distributions.Normal(f, case.sigma if value is None else value).log_prob(y).sum(-1).mean())
    f = f.reshape(len(y), -1)
    return float(nn.functional.cross_entropy(f / (value or 1.0), y))


# -- by validation ----------------------------------------------------------------------------------------------------


@every_structure
@pytest.mark.parametrize("case", [*BASIC, named("preferences"), named("no_bias_regression")], ids=str)
def test_the_result_is_never_worse_than_the_network_at_its_best_temperature_or_noise(case, structure):
    model = case.model()
    la, loader = fitted(case, structure, model), validation(case)
    with model_untouched(model):
        found = la.tune(loader)
    score = validation_score(la, case, loader)
    assert score == pytest.approx(found.value, abs=1e-6)
    values = torch.logspace(-2, 2, 400, dtype=F64).tolist()
    best = min(map_score(case, model, loader, value) for value in values)
    assert score <= min(map_score(case, model, loader), best) + 1e-6
    assert found.candidates["MAP"] == pytest.approx(map_score(case, model, loader), abs=1e-6)
    assert found is la.tuning_


@every_structure
@basic_cases
def test_no_point_nearby_is_better(case, structure):
    la, loader = fitted(case, structure), validation(case)
    found = la.tune(loader)
    name = "sigma_noise" if case.likelihood == "regression" else "output_temperature"
    precision, second = float(la.prior_precision), float(getattr(la, name))
    for factor in (0.9, 1.1):
        for first_moves in (True, False):
            la.prior_precision = min(precision * (factor if first_moves else 1), 1e12)
            setattr(la, name, second * (1 if first_moves else factor))
            assert validation_score(la, case, loader) >= found.value - 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "masked_rows"], ids=str)
def test_every_kind_of_data_can_be_tuned_on(case):
    la = fitted(case, "kron")
    x, y = case.data(shift=3)
    found = la.tune([case.batch(x, y)])
    assert math.isfinite(found.value)
    assert found.value <= found.candidates["MAP"] + 1e-9


@pytest.mark.parametrize("name", ["mlp", "mlp_regression"])
@every_structure
def test_all_weights_are_tuned_by_the_predictions_of_the_linearized_network(name, structure):
    network = networks.named(name)
    la = Laplace(network.model(), network.likelihood, "all", structure)
    x, y = network.data()
    la.fit([(x, y)])
    found = la.tune([(x, y)])
    assert validation_score(la, network, [(x, y)]) == pytest.approx(found.value, abs=1e-6)
    assert found.value <= found.candidates["MAP"] + 1e-9


def test_layerwise_precisions_reach_at_least_what_one_reaches():
    for case in BASIC:
        for structure in ("kron", "diag"):
            la, loader = fitted(case, structure), validation(case)
            one, two = la.tune(loader).value, la.tune(loader, prior_structure="layerwise").value
            assert la.prior_precision.shape in ((2,), (1,))
            assert two <= one + 1e-6


@pytest.mark.parametrize("score", ["brier", lambda p, y: -(p.gather(1, y[:, None]).log().mean())], ids=["brier", "own"])
def test_other_differentiable_scores_are_minimized(score):
    la, loader = fitted(BASIC[0], "kron"), validation(BASIC[0])
    found = la.tune(loader, score=score)
    assert found.value <= min(found.candidates.values()) + 1e-12
    if callable(score):
        assert found.value == pytest.approx(la.tune(loader).value, abs=1e-6)


@pytest.mark.parametrize("options", [{"link_approx": "mc"}, {"link_approx": "bridge"}, {"pred_type": "nn"}])
def test_other_predictions_are_tuned_with_the_same_random_numbers_at_every_step(options):
    la, loader = fitted(BASIC[0], "kron"), validation(BASIC[0])
    first = la.tune(loader, n_samples=20, generator=generator(1), **options)
    second = la.tune(loader, n_samples=20, generator=generator(1), **options)
    assert first.value == second.value
    assert_close(first.hyperparameters["prior_precision"], second.hyperparameters["prior_precision"])


def test_brackets_extend_to_their_limits_and_stay_there_with_a_warning():
    case = BASIC[0]
    x, _ = case.data(n_rows=60, shift=3)
    model = case.model()
    right = case.forward(model, x).argmax(-1)  # every prediction is right: no temperature is cold enough
    la = fitted(case, "diag", model)
    with pytest.warns(UserWarning, match="output temperature stays at its limits"):
        la.tune([(x, right)])
    assert la.output_temperature == pytest.approx(1e-3)
    with pytest.warns(UserWarning, match="stays at its limits"):
        la.tune([(x, right)], limits={"output_temperature": (0.5, 2.0)})
    assert la.output_temperature == pytest.approx(0.5)


def test_what_is_not_asked_for_is_left_alone():
    la, loader = fitted(BASIC[0], "diag", temperature=1.3), validation(BASIC[0])
    la.output_temperature = 1.7
    la.tune(loader, output_temperature=False)
    assert (la.output_temperature, float(la.temperature)) == (1.7, 1.3)
    la = fitted(BASIC[1], "diag", prior_mean=0.2)
    la.tune(validation(BASIC[1]), noise="keep")
    assert float(la.sigma_noise) == pytest.approx(BASIC[1].sigma)
    assert float(la.prior_mean) == pytest.approx(0.2)


@every_structure
def test_the_model_runs_once_a_batch(structure):
    case = BASIC[0]
    model, calls = case.model(), []
    la = fitted(case, structure, model)
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    la.tune(validation(case))
    handle.remove()
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"score": "ece"}, "proper score"),
        ({"score": "mse"}, "must be one of"),
        ({"score": lambda p, y: p.detach().sum()}, "without a gradient"),
        ({"score": lambda p, y: p.sum() * torch.nan}, "not finite at any"),
        ({"prior_structure": "diag"}, "evidence"),
        ({"limits": {"prior_precision": (2.0, 1.0)}}, "low < high"),
        ({"limits": {"precision": (1.0, 2.0)}}, "'prior_precision'"),
        ({"noise": "scalar"}, "classification has none"),
        ({"noise": "some"}, "'keep', 'scalar' or 'per_output'"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_changes(options, says):
    la = fitted(BASIC[0], "diag", prior_precision=2.5)
    with pytest.raises((InputError, UnsupportedError), match=says):
        la.tune(validation(BASIC[0]), **options)
    assert (float(la.prior_precision), la.output_temperature, la.tuning_) == (2.5, 1.0, None)


def test_validation_data_that_do_not_fit_are_refused():
    la = fitted(BASIC[0], "diag")
    x, y = BASIC[0].data()
    for loader, error, says in (
        (None, InputError, "val_loader"),
        ([], InputError, "empty"),
        ([(x, y + 100)], InputError, "lie in"),
        ([(x, y[:, None])], ShapeError, "shape"),
    ):
        with pytest.raises(error, match=says):
            la.tune(loader)
    with pytest.raises(UnsupportedError, match="noise is chosen instead"):
        fitted(BASIC[1], "diag").tune(validation(BASIC[1]), output_temperature=True)


def test_a_failure_while_assigning_brings_all_hyperparameters_back(monkeypatch):
    la = fitted(BASIC[1], "diag", prior_precision=2.5, sigma_noise=0.4)
    before = la(BASIC[1].test_inputs())

    def fails(self, value):
        raise RuntimeError("no")

    monkeypatch.setattr(type(la), "sigma_noise", property(type(la).sigma_noise.fget, fails))
    with pytest.raises(RuntimeError, match="no"):
        la.tune(validation(BASIC[1]))
    assert float(la.prior_precision) == 2.5
    for ours, theirs in zip(la(BASIC[1].test_inputs()), before, strict=True):
        assert_close(ours, theirs)


def test_the_result_prints_as_one_line_and_draws_its_curve(capsys):
    la = fitted(BASIC[0], "kron")
    found = la.tune(validation(BASIC[0]), verbose=True)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "prior precision" in out
    assert "output temperature" in out
    assert f"MAP {found.candidates['MAP']:.4f}" in out
    axes = found.plot()
    assert axes.get_xscale() == "log"
    assert len(axes.lines[0].get_xdata()) == len(found.points)
    assert found.value <= float(found.values.min()) + 1e-9


# -- output temperature -----------------------------------------------------------------------------------------------


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
        from laplace.predictive.gaussian import normal_samples

        expected = (normal_samples(mean, covariance, 7, generator(0)) / 0.6).softmax(-1).mean(0)
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


# -- by evidence ------------------------------------------------------------------------------------------------------


def adam(la, start, n_steps=1000):
    """The evidence that a thousand steps of Adam reach."""
    log_values = start.log().clone().requires_grad_(True)
    optimizer, best = torch.optim.Adam([log_values], lr=0.1), -math.inf
    for _ in range(n_steps):
        optimizer.zero_grad()
        value = la.log_marginal_likelihood(log_values.exp())
        (-value).backward()
        optimizer.step()
        best = max(best, float(value.detach()))
    return best


@every_structure
@pytest.mark.parametrize("prior_structure", ["scalar", "layerwise", "diag"])
@basic_cases
def test_the_evidence_reached_is_at_least_that_of_a_thousand_steps_of_adam(case, structure, prior_structure):
    if (structure, prior_structure) == ("kron", "diag"):
        with pytest.raises(UnsupportedError, match="parameter group"):
            fitted(case, structure).optimize_prior_precision(prior_structure=prior_structure)
        return
    la = fitted(case, structure)
    la.optimize_prior_precision(prior_structure=prior_structure)
    reached = float(la.log_marginal_likelihood())
    assert reached == pytest.approx(la.tuning_.value)
    assert reached >= adam(la, torch.ones_like(la.prior_precision)) - 1e-3


def test_evidence_is_maximized_in_few_evaluations():
    la, calls = fitted(BASIC[0], "full"), []
    problem = la._problem()
    object.__setattr__(problem, "evidence", lambda *a, _e=problem.evidence: calls.append(1) or _e(*a))
    la._problem = lambda: problem
    la.optimize_prior_precision(n_steps=1000)
    assert len(calls) < 60


@every_structure
def test_noise_and_prior_reach_the_joint_optimum(structure):
    case = BASIC[1]
    la = fitted(case, structure, sigma_noise=3.0)
    la.optimize_prior_precision(noise="scalar")
    best = float(la.log_marginal_likelihood())
    for factor in (0.97, 1.03):
        for precision, sigma in ((factor, 1.0), (1.0, factor), (factor, factor), (factor, 1 / factor)):
            value = la._problem().evidence(la.prior_precision * precision, la.sigma_noise * sigma)
            assert float(value) <= best + 1e-9


def test_exact_bayesian_linear_regression_has_the_evidence_and_optimum_of_its_closed_form():
    X = torch.randn(40, 3, dtype=F64, generator=generator(0))
    Y = (X @ torch.tensor([1.0, -0.5, 0.2], dtype=F64) + 0.3 * torch.randn(40, dtype=F64, generator=generator(1)))[
        :, None
    ]
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 1)).double()
    la = Laplace(model, "regression", hessian_structure="full", last_layer_name="1")
    ones = torch.cat([X, torch.ones(40, 1, dtype=F64)], 1)
    for _ in range(25):  # evidence at the mode of the hyperparameters, which moves the mode
        mean, _, _ = reference.linear_regression(X, Y, float(la.sigma_noise), float(la.prior_precision))
        with torch.no_grad():
            model[1].weight.copy_(mean.reshape(-1)[:3])
            model[1].bias.copy_(mean.reshape(-1)[3:])
        la.fit([(X, Y)])
        la.optimize_prior_precision(noise="scalar", init_prior_prec=la.prior_precision)

    def density(delta, sigma):
        cov = ones @ ones.T / delta + sigma**2 * torch.eye(40, dtype=F64)
        return float(torch.distributions.MultivariateNormal(torch.zeros(40, dtype=F64), cov).log_prob(Y[:, 0]))

    delta, sigma = float(la.prior_precision), float(la.sigma_noise)
    assert float(la.log_marginal_likelihood()) == pytest.approx(density(delta, sigma))
    for d, s in ((1.02, 1), (0.98, 1), (1, 1.02), (1, 0.98)):
        assert density(delta * d, sigma * s) < density(delta, sigma) + 1e-6


def test_the_noise_starts_at_the_residuals():
    case = BASIC[1]
    la = fitted(case, "diag")
    x, y = case.data()
    residuals = (case.forward(la.model.model, x) - y).detach()
    assert_close(la._problem().residual_noise(), residuals.square().mean().sqrt())
    assert_close(la._problem().residual_noise(per_output=True), residuals.square().mean(0).sqrt())
    la.optimize_prior_precision(noise="per_output", n_steps=0)
    assert_close(la.sigma_noise, residuals.square().mean(0).sqrt())


def test_diagonal_precisions_are_clipped_to_the_stated_bounds_and_counted():
    case = BASIC[1]
    la = fitted(case, "diag")
    la.optimize_prior_precision(prior_structure="diag", bounds=(0.5, 5.0))
    h, theta = case.scale * case.problem().ggn().diagonal(), case.problem().theta()
    optimum = (-h + (h**2 + 4 * h / theta**2).sqrt()) / 2
    assert_close(la.prior_precision, optimum.clamp(0.5, 5.0))
    assert la.tuning_.n_clipped == int(((optimum < 0.5) | (optimum > 5.0)).sum()) > 0
    assert "clipped" in str(la.tuning_)


@pytest.mark.parametrize("bounds", [(1.0, 0.5), (0.0, 1.0), 3.0])
def test_bounds_that_are_none_are_refused(bounds):
    with pytest.raises(InputError, match="bounds must be"):
        fitted(BASIC[0], "diag").optimize_prior_precision(bounds=bounds)


def test_temperatures_are_never_tuned_by_evidence():
    la = fitted(BASIC[0], "diag")
    with pytest.raises(UnsupportedError, match="grows without end"):
        la.optimize_prior_precision(temperature=True)


# -- a noise for each output ------------------------------------------------------------------------------------------

SIGMAS = torch.tensor([0.4, 1.7], dtype=F64)


def heteroscedastic(case, structure, fisher):
    """The posterior precision with a noise of each output, by brute force: every output's Jacobian over its noise."""
    problem = case.problem()
    H = torch.zeros(len(problem.theta()), len(problem.theta()), dtype=F64)
    x, y = case.data()
    J = problem.jacobian(x).flatten(0, 1)
    residual = case.forward(case.model(), x).detach() - y
    for Jn, rn in zip(J, residual, strict=True):
        root = (Jn.T @ (rn / SIGMAS**2))[:, None] if fisher else Jn.T / SIGMAS
        H += root @ root.T
    return H.diagonal().diag() if structure == "diag" else H


@pytest.mark.parametrize("fisher", [False, True], ids=["GGN", "EF"])
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_a_noise_for_each_output_is_exact_without_fitting_again(structure, fisher):
    case = BASIC[1]
    la = fitted(case, structure, **({"backend": AutogradEF} if fisher else {}))
    la.sigma_noise = SIGMAS
    H = heteroscedastic(case, structure, fisher)
    precision = H + torch.eye(len(H), dtype=F64)
    shown = la.posterior_precision
    assert_close(shown if shown.dim() == 2 else shown.diag(), precision)
    x, y = case.data()
    residual = case.forward(case.model(), x).detach() - y
    log_likelihood = torch.distributions.Normal(torch.zeros_like(residual), SIGMAS).log_prob(residual).sum()
    assert_close(la.log_likelihood, log_likelihood)
    theta = case.problem().theta()
    evidence = log_likelihood - 0.5 * (precision.logdet() + theta.square().sum())
    assert_close(la.log_marginal_likelihood(), evidence)


@pytest.mark.parametrize("fisher", [False, True], ids=["GGN", "EF"])
def test_kronecker_factors_scale_with_the_noise_of_each_output(fisher):
    case = BASIC[1]
    la = fitted(case, "kron", **({"backend": AutogradEF} if fisher else {}))
    G, A = la.H_facs.kfacs[0]
    power = 2 if fisher else 1
    root = SIGMAS ** -float(power)
    la.sigma_noise = SIGMAS
    scaled = root[:, None] * G * root
    expected = torch.block_diag(torch.kron(scaled, A), scaled) + torch.eye(la.n_params, dtype=F64)
    assert_close(la.posterior_precision.to_matrix(), expected)


@every_structure
def test_equal_noise_of_all_outputs_is_one_noise(structure):
    case = BASIC[1]
    one, each = fitted(case, structure, sigma_noise=0.7), fitted(case, structure, sigma_noise=torch.full((2,), 0.7))
    assert_close(each.log_marginal_likelihood(), one.log_marginal_likelihood())
    for ours, theirs in zip(each(case.test_inputs()), one(case.test_inputs()), strict=True):
        assert_close(ours, theirs)


@every_structure
def test_evidence_is_differentiable_in_the_noise_of_each_output(structure):
    la = fitted(BASIC[1], structure)
    problem = la._problem()
    inputs = torch.tensor([0.7], dtype=F64, requires_grad=True), SIGMAS.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(problem.evidence, inputs)


@every_structure
@pytest.mark.parametrize("by", ["evidence", "validation"])
def test_outputs_of_different_noise_get_their_own(by, structure):
    X = torch.randn(400, 3, dtype=F64, generator=generator(0))
    W = torch.randn(2, 3, dtype=F64, generator=generator(1))
    Y = X @ W.T + torch.tensor([0.1, 1.0]) * torch.randn(400, 2, dtype=F64, generator=generator(2))
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.linalg.lstsq(X[:200], Y[:200]).solution.T)
        model[1].bias.zero_()
    la = Laplace(model, "regression", hessian_structure=structure, last_layer_name="1")
    la.fit([(X[:200], Y[:200])])
    if by == "evidence":
        la.optimize_prior_precision(noise="per_output")
    else:
        la.tune([(X[200:], Y[200:])], noise="per_output")
    assert bool(((la.sigma_noise / torch.tensor([0.1, 1.0]) - 1).abs() < 0.15).all())
    la2 = Laplace(model, "regression", hessian_structure=structure, last_layer_name="1")
    la2.load_state_dict(la.state_dict())
    assert_close(la2.sigma_noise, la.sigma_noise)


def test_noise_of_each_output_is_refused_where_it_has_no_meaning():
    la = fitted(BASIC[1], "diag")
    with pytest.raises(InputError, match="each of the 2 outputs"):
        la.sigma_noise = torch.ones(3)
    with pytest.raises(ShapeError, match="the model has 2"):
        fitted(BASIC[1], "diag", sigma_noise=torch.ones(3))
    with pytest.raises(UnsupportedError, match="last_layer"):
        Laplace(BASIC[1].model(), "regression", "all", "diag", sigma_noise=torch.ones(2))
    with pytest.raises(UnsupportedError, match="leave it at 1"):
        fitted(BASIC[0], "diag").sigma_noise = torch.full((4,), 2.0)


def test_the_state_of_tuning_survives_copies():
    import copy
    import pickle

    la = fitted(BASIC[0], "diag")
    la.tune(validation(BASIC[0]))
    for other in (copy.deepcopy(la), pickle.loads(pickle.dumps(la))):
        assert other.tuning_.value == la.tuning_.value


def test_warnings_are_silent_where_the_optimum_is_inside():
    la = fitted(BASIC[1], "diag")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la.optimize_prior_precision(noise="scalar")
