"""Reward modeling: fitted on pairs, scores of single inputs predicted, probabilities of pairs with `fitting=True`."""

import math

import pytest
import torch

from laplace import Laplace
from laplace.curvature import AutogradEF, AutogradGGN
from laplace.errors import InputError, ShapeError, UnsupportedError
from tests import reference
from tests.cases import Net, named
from tests.contracts import generator, model_untouched
from tests.estimators import additive_structures, dense, estimator, every_structure, evidence, fitted, posterior
from tests.tools import assert_close, assert_covariance_of, assert_within

CASES = [named(name) for name in ("preferences", "no_bias_preferences", "compared_preferences")]
PREFERENCES = CASES[0]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def singles(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, generator=generator(1))


def brute_force(case, structure, x, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [rows, T] and their joint covariance [rows, T, T] at each row of x: T = 2 for pairs."""
    problem = case.problem()
    J = problem.jacobian(x).flatten(1, 2)
    f = problem.outputs(problem.theta(), x).flatten(1).detach()
    return f, reference.output_covariance(J, posterior(case, structure, **options))


def sigmoid_of_the_margin(f: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """MacKay's approximation for the difference of two correlated scores."""
    variance = V[:, 0, 0] + V[:, 1, 1] - 2 * V[:, 0, 1]
    p = torch.sigmoid((f[:, 0] - f[:, 1]) / (1 + math.pi / 8 * variance).sqrt())
    return torch.stack([p, 1 - p], -1)


# -- fit --------------------------------------------------------------------------------------------------------------


@every_structure
@every_case
@pytest.mark.parametrize("backend", [AutogradGGN, AutogradEF])
def test_the_posterior_is_that_of_the_definition(case, structure, backend):
    fisher = backend is AutogradEF
    la = fitted(case, structure, backend=backend, prior_precision=0.3, temperature=2.0)
    expected = posterior(case, structure, fisher=fisher, delta=0.3, temperature=2.0)
    assert_close(dense(la.posterior_precision), expected)
    assert_close(la.log_marginal_likelihood(), evidence(case, expected, delta=0.3, temperature=2.0))
    assert (la.n_data, la.n_outputs) == (case.n_rows, 1)
    assert_close(la.loss, case.problem().nll())


def test_the_damped_kronecker_posterior_is_that_of_the_definition():
    la = fitted(PREFERENCES, "kron", damping=True, prior_precision=0.3)
    assert_close(dense(la.posterior_precision), posterior(PREFERENCES, "kron", delta=0.3, damping=True))


@every_structure
def test_the_bias_learns_nothing(structure):
    """It cancels in the difference of two scores: its posterior is its prior."""
    la = fitted(PREFERENCES, structure, prior_precision=0.3)
    H, precision = dense(la.H), dense(la.posterior_precision)
    for side in (H[-1], H[:, -1]):
        assert_close(side, torch.zeros(len(H)))  # exactly 0 but for eigenvectors
    assert float(precision[-1, -1]) == pytest.approx(0.3)


@every_structure
def test_the_curvature_is_that_of_a_logistic_regression_on_differences_of_features(structure):
    """With two classes, logits (w d, 0) and the weights of the first class alone random."""
    case = PREFERENCES
    model, (x, y) = case.model(), case.data()
    with torch.no_grad():
        first, second = model.body(x).unbind(1)
        d = first - second
        p = torch.sigmoid(d @ model.head.weight[0])
    Lambda = p * (1 - p)
    H = dense(fitted(case, structure).H)[:-1, :-1]
    exact = (d.T * Lambda) @ d
    V = torch.linalg.eigh(d.T @ d)[1]
    expected = {
        "diag": exact.diagonal().diag(),
        "kron": Lambda.sum() * d.T @ d / len(y),
        "ekfac": V @ (V.T @ exact @ V).diagonal().diag() @ V.T,
    }
    assert_close(H, expected.get(structure, exact))


@every_case
def test_the_sampled_fisher_has_the_curvature_as_its_expectation(case):
    n, x = 3000, case.data()[0]
    problem = case.problem()
    mean, variance = problem.sampled_fisher()
    options = {"stochastic": True, "num_samples": n, "generator": generator(0)}
    H = fitted(case, "full", backend_kwargs=options).H
    assert_within(H, mean, (variance / n).sqrt())
    p = problem.outputs(problem.theta(), x).flatten(1).softmax(-1).prod(-1).detach()
    G = fitted(case, "kron", backend_kwargs=options).H.to_matrix().diagonal()[0] / (problem.factors()[1][0, 0])
    # The square of the sampled gradient lies in [0, 1]: its variance is at most its mean.
    assert_within(G, p.sum(), (p.sum() / n).sqrt())


@additive_structures
def test_data_in_two_calls_are_the_data_in_one(structure):
    la = estimator(PREFERENCES, structure)
    for batch in PREFERENCES.batches(4):
        la.fit([batch], override=False)
    assert_close(dense(la.H), dense(fitted(PREFERENCES, structure).H))


@every_structure
def test_the_order_of_a_pair_does_not_matter(structure):
    x, y = PREFERENCES.data()
    la = estimator(PREFERENCES, structure)
    la.fit([(x.flip(1), 1 - y)])
    assert_close(dense(la.H), dense(fitted(PREFERENCES, structure).H))
    assert_close(la.loss, fitted(PREFERENCES, structure).loss)


# -- scores of single inputs ------------------------------------------------------------------------------------------


@every_structure
@every_case
def test_scores_of_single_inputs_are_predicted_as_in_regression(case, structure):
    la, x = fitted(case, structure, prior_precision=0.3), singles()
    f, V = brute_force(case, structure, x, delta=0.3)
    mean, covariance = la(x)
    assert_close(mean, f)
    assert_close(covariance, V)
    mean, variance = la(x, diagonal_output=True)
    assert_close(mean, f)
    assert_close(variance, V.flatten(1))
    J = case.problem().jacobian(x).flatten(1, 2)
    mean, joint = la(x, joint=True)
    assert_close(mean, f.flatten())
    assert_close(joint, reference.joint_covariance(J, posterior(case, structure, delta=0.3)))
    for part, expected in zip(la.functional_variance_fast(x), (f, V.flatten(1)), strict=True):
        assert_close(part, expected)


@every_structure
def test_samples_of_single_inputs_are_scores(structure):
    la, x, n = fitted(PREFERENCES, structure), singles(), 20_000
    f, joint = la(x, joint=True)
    samples = la.functional_samples(x, n_samples=n, generator=generator(0))
    assert samples.shape == (n, 4, 1)
    assert_covariance_of(samples.squeeze(-1), f, joint)
    assert samples.equal(la.predictive_samples(x, n_samples=n, generator=generator(0)))
    mean, variance = la(x, pred_type="nn", n_samples=n, generator=generator(0))
    assert_close(mean, samples.mean(0))
    assert_close(variance, samples.var(0))


# -- probabilities of pairs -------------------------------------------------------------------------------------------


@every_structure
@every_case
def test_probabilities_come_from_the_joint_posterior_of_both_scores(case, structure):
    la, x = fitted(case, structure, prior_precision=0.3), case.test_inputs()
    probabilities = la(x, fitting=True)
    assert_close(probabilities, sigmoid_of_the_margin(*brute_force(case, structure, x, delta=0.3)))
    assert_close(probabilities.sum(-1), torch.ones(4))


@every_structure
@pytest.mark.parametrize(
    "options", [{"link_approx": "mc"}, {"link_approx": "mc", "joint": True}, {"pred_type": "nn"}], ids=str
)
def test_sampled_probabilities_converge_to_the_integral(options, structure):
    la, x, n = fitted(PREFERENCES, structure, prior_precision=0.3), PREFERENCES.test_inputs(), 20_000
    integral = reference.expected_softmax(*brute_force(PREFERENCES, structure, x, delta=0.3))
    p = la(x, fitting=True, n_samples=n, generator=generator(0), **options)
    assert_within(p, integral, (integral.prod(-1, keepdim=True) / n).sqrt().expand(4, 2))
    assert p.equal(la(x, fitting=True, n_samples=n, generator=generator(0), **options))
    assert not p.equal(la(x, fitting=True, n_samples=n, generator=generator(1), **options))
    assert not torch.allclose(p, la(x, fitting=True))


def test_averaged_functions_are_those_that_are_sampled():
    la, x = fitted(PREFERENCES, "full"), PREFERENCES.test_inputs()
    functions = la.functional_samples(x, n_samples=50, generator=generator(0)).squeeze(-1)
    p = la(x, fitting=True, pred_type="nn", n_samples=50, generator=generator(0))
    assert_close(p, functions.softmax(-1).mean(0))


@every_structure
@pytest.mark.parametrize("link", ["probit", "mc"])
def test_the_other_order_has_the_other_probability(structure, link):
    la, x = fitted(PREFERENCES, structure), PREFERENCES.test_inputs()
    how = {"fitting": True, "link_approx": link, "n_samples": 20_000}
    first, second = (la(inputs, generator=generator(0), **how) for inputs in (x, x.flip(1)))
    if link == "probit":
        assert_close(second, first.flip(-1))
    else:
        assert_within(second, first.flip(-1), torch.full((4, 2), (0.5 / 20_000) ** 0.5))


@every_structure
@pytest.mark.parametrize("options", [{}, {"link_approx": "mc"}, {"pred_type": "nn"}], ids=str)
def test_the_same_item_twice_is_preferred_with_probability_one_half(structure, options):
    """Whatever the uncertainty of its score: the two are the same number."""
    la = fitted(PREFERENCES, structure, prior_precision=1e-3)
    x = singles().unsqueeze(1).expand(-1, 2, -1)
    assert_close(la(x, fitting=True, **options), torch.full((4, 2), 0.5))


@every_structure
def test_without_uncertainty_probabilities_are_those_of_the_network(structure):
    la, x = fitted(PREFERENCES, structure, prior_precision=1e12), PREFERENCES.test_inputs()
    with torch.no_grad():
        expected = PREFERENCES.model()(x).squeeze(-1).softmax(-1)
    for options in ({}, {"link_approx": "mc"}, {"pred_type": "nn"}):
        torch.testing.assert_close(la(x, fitting=True, **options), expected, rtol=1e-4, atol=1e-5)


def test_probabilities_are_differentiable_in_the_inputs():
    la = fitted(PREFERENCES, "full", enable_backprop=True)
    x = PREFERENCES.test_inputs().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: la(x, fitting=True), (x,))


def test_float32_predictions_agree_with_float64():
    la = Laplace(PREFERENCES.model().float(), "reward_modeling", hessian_structure="kron")
    la.fit([(x.float(), y) for x, y in PREFERENCES.batches(4)])
    x = PREFERENCES.test_inputs()
    p = la(x.float(), fitting=True)
    assert p.dtype is torch.float32
    torch.testing.assert_close(p.double(), fitted(PREFERENCES, "kron")(x, fitting=True), rtol=1e-4, atol=1e-6)


# -- tuning and saving ------------------------------------------------------------------------------------------------


@every_structure
def test_the_evidence_rises_and_is_differentiable(structure):
    la = fitted(PREFERENCES, structure, prior_precision=5.0)
    before = la.log_marginal_likelihood().detach()
    la.optimize_prior_precision(n_steps=50)
    assert la.log_marginal_likelihood() > before
    assert torch.autograd.gradcheck(la.log_marginal_likelihood, (torch.tensor([0.7], requires_grad=True),))


@every_structure
@pytest.mark.parametrize("link", ["probit", "mc"])
@pytest.mark.filterwarnings("ignore:The best prior precision")  # these preferences are drawn by lot
def test_grid_search_scores_the_preferences(structure, link):
    """The best of the grid has the lowest mean -log p of the preferred item, and a loss sees those probabilities."""
    la, (x, y) = fitted(PREFERENCES, structure), PREFERENCES.data(n_rows=30, shift=3)
    loader, seen = [(x[:20], y[:20]), (x[20:], y[20:])], []

    def loss(probabilities, targets):
        seen.append(probabilities)
        assert targets.equal(y)
        return torch.nn.functional.nll_loss(probabilities.log(), targets)

    options = {"method": "gridsearch", "val_loader": loader, "grid_size": 5, "link_approx": link}
    chosen = []
    for criterion in (None, loss):
        la.optimize_prior_precision(**options, loss=criterion, generator=generator(0), log_prior_prec_min=-2, log_prior_prec_max=2)  # fmt: skip
        chosen.append(float(la.prior_precision))
    assert chosen[0] == chosen[1]
    assert len(seen) == 5
    grid = torch.logspace(-2, 2, 5)
    if link == "probit":
        expected = [sigmoid_of_the_margin(*brute_force(PREFERENCES, structure, x, delta=float(d))) for d in grid]
        for ours, theirs in zip(seen, expected, strict=True):
            assert_close(ours, theirs)
        scores = torch.stack([-p[torch.arange(30), y].log().mean() for p in expected])
        assert chosen[0] == pytest.approx(float(grid[scores.argmin()]))


@every_structure
def test_a_saved_approximation_predicts_the_same(structure, tmp_path):
    la, x = fitted(PREFERENCES, structure, prior_precision=0.3), PREFERENCES.test_inputs()
    la.save(tmp_path / "la.pt")
    other = estimator(PREFERENCES, structure)
    other.load(tmp_path / "la.pt")
    third = estimator(PREFERENCES, structure)
    third.load_state_dict(la.state_dict())
    for loaded in (other, third):
        assert loaded(x, fitting=True).equal(la(x, fitting=True))
        assert loaded(singles())[1].equal(la(singles())[1])


# -- the border -------------------------------------------------------------------------------------------------------


@every_structure
def test_fit_and_predictions_leave_the_model_alone(structure):
    model, x = PREFERENCES.model().train(), PREFERENCES.test_inputs()
    with model_untouched(model):
        la = fitted(PREFERENCES, structure, model)
        for options in ({}, {"link_approx": "mc"}, {"pred_type": "nn"}):
            la(x, fitting=True, **options)
        with pytest.raises(ShapeError):
            la(singles(), fitting=True)


@every_structure
@pytest.mark.parametrize(
    ("x", "y", "error", "says"),
    [
        (torch.ones(4, 2, 3), torch.tensor([0, 1, 2, 0]), InputError, r"Preferences must be 0 or 1.*got 0\.\.2"),
        (torch.ones(4, 2, 3), torch.tensor([0, 1, -100, 0]), InputError, r"Preferences must be 0 or 1"),
        (torch.ones(4, 2, 3), torch.tensor([0.0, 1.0, 1.0, 0.0]), InputError, r"y\.long"),
        (torch.ones(4, 3), torch.tensor([0, 1, 1, 0]), ShapeError, r"fitted on pairs.*Stack the two items"),
        (torch.ones(4, 3, 3), torch.tensor([0, 1, 1, 0]), ShapeError, r"fitted on pairs.*\[4, 3, 1\]"),
        (torch.ones(4, 2, 3), torch.tensor([[0], [1], [1], [0]]), ShapeError, r"targets \[4, 1\]"),
    ],
    ids=["label 2", "masked", "float labels", "single inputs", "triples", "extra axis"],
)
def test_data_that_are_no_preferences_are_refused_and_the_fit_stays(structure, x, y, error, says):
    la, test = fitted(PREFERENCES, structure), PREFERENCES.test_inputs()
    before = la(test, fitting=True)
    with model_untouched(la.model.model), pytest.raises(error, match=says):
        la.fit([(x.double(), y)])
    with pytest.raises(error if x.dim() == 3 and x.shape[1] == 2 else ShapeError):
        la.optimize_prior_precision(method="gridsearch", val_loader=[(x.double(), y)])
    assert la(test, fitting=True).equal(before)
    assert la.prior_precision.equal(torch.ones(1))


@every_structure
@pytest.mark.parametrize("shape", [(4, 2, 3), (4, 3), (5, 3)], ids=["pairs", "single inputs", "an odd number of them"])
def test_a_head_with_two_outputs_is_refused(structure, shape):
    la = Laplace(Net(3, 5, 2), "reward_modeling", hessian_structure=structure)
    with pytest.raises(UnsupportedError, match=r"one score each.*has 2 outputs.*Give it one output"):
        la.fit([(torch.ones(shape), torch.ones(shape[0], dtype=torch.long))])


def test_probabilities_of_single_inputs_are_refused():
    la = fitted(PREFERENCES, "kron")
    with pytest.raises(ShapeError, match=r"inputs \[batch, 2, ...\].*returns \[4, 1\].*leave it out"):
        la(singles(), fitting=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fitting": True, "link_approx": "bridge"}, 'for pairs use "probit" or "mc"'),
        ({"fitting": True, "link_approx": "bridge_norm"}, 'for pairs use "probit" or "mc"'),
        ({"fitting": True, "diagonal_output": True}, "need the covariance of both scores"),
        ({"fitting": True, "joint": True}, 'link_approx="mc"'),
        ({"fitting": True, "pred_type": "gp"}, 'use "glm" or "nn"'),
        ({"link_approx": "bridge"}, "scores have none"),
        ({"joint": True, "diagonal_output": True}, "pass one of them"),
    ],
    ids=str,
)
def test_options_without_a_meaning_for_pairs_or_scores_are_refused(options, says):
    with pytest.raises(UnsupportedError, match=says):
        fitted(PREFERENCES, "kron")(PREFERENCES.test_inputs(), **options)


def test_there_is_no_observation_noise_of_scores():
    with pytest.raises(UnsupportedError, match="leave it at 1 for reward_modeling"):
        Laplace(Net(3, 5, 1), "reward_modeling", sigma_noise=0.5)
