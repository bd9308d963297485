"""Function space with a subset of the data: with all data that of the weights, with some that of dense algebra."""

import copy
import pickle

import pytest
import torch

from laplace import FullLaplace, FullLLLaplace, FunctionalLaplace, FunctionalLLLaplace, Laplace
from laplace.curvature import AutogradEF, AutogradGGN, AutogradHessian, BackPackGGN
from laplace.errors import InputError, NotFittedError, ShapeError, StateError, UnsupportedError
from tests import reference
from tests.cases import BASIC, CASES, Case, named
from tests.contracts import generator, model_untouched
from tests.estimators import PREDICTIONS
from tests.networks import NETWORKS
from tests.tools import assert_close, assert_covariance_of, assert_mean_is

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
both = pytest.mark.parametrize("weights", ["last_layer", "all"])
basic = pytest.mark.parametrize("case", BASIC, ids=str)
DELTA, T, M = 0.7, 1.3, 6


def estimator(case: Case, weights: str, structure="gp", model=None, **options):
    given = {
        key: value for key, value in case.laplace_options().items() if weights != "all" or key != "feature_reduction"
    }
    if structure == "gp":
        options = {"n_subset": case.n_rows, **options}
    model = case.model() if model is None else model
    options = {"prior_precision": DELTA, "temperature": T, **given, **options}
    return Laplace(model, case.likelihood, weights, structure, **options)


def fitted(case: Case, weights: str, structure="gp", model=None, **options):
    la = estimator(case, weights, structure, model, **options)
    la.fit(case.batches(1, 3))
    return la


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


# -- with all data -----------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("case", CASES, ids=str)
def test_with_all_data_it_is_the_full_posterior(case, weights):
    full, gp = fitted(case, weights, "full"), fitted(case, weights)
    assert_close(gp.log_marginal_likelihood(), full.log_marginal_likelihood(), "evidence")
    assert_close(gp.log_det_ratio, full.log_det_ratio)
    assert_close(gp.scatter, full.scatter)
    x = case.test_inputs()
    for options in PREDICTIONS[case.likelihood]:
        if options.get("pred_type") == "nn" or (options.get("joint") and options.get("link_approx") == "mc"):
            continue
        ours, theirs = (la(x, generator=generator(0), n_samples=7, **options) for la in (gp, full))
        for first, second in zip(tensors(ours), tensors(theirs), strict=True):
            assert_close(first, second, str(options))


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_networks_of_every_kind(network):
    x, y = network.data()
    options = {"prior_precision": DELTA}
    gp = Laplace(network.model(), network.likelihood, "all", "gp", n_subset=len(y), **options)
    full = Laplace(network.model(), network.likelihood, "all", "full", **options)
    for la in (gp, full):
        la.fit([(x[:2], y[:2]), (x[2:], y[2:])])
    at = network.data(shift=2, n_rows=3)[0]
    kind = {} if network.likelihood == "classification" else {"joint": True}
    for first, second in zip(tensors(gp(at, **kind)), tensors(full(at, **kind)), strict=True):
        assert_close(first, second)
    assert_close(gp.log_marginal_likelihood(), full.log_marginal_likelihood())


def test_classes_are_what_the_table_says():
    case = BASIC[0]
    assert type(fitted(case, "all")) is FunctionalLaplace
    la = fitted(case, "last_layer", last_layer_name="head")
    assert type(la) is FunctionalLLLaplace
    assert isinstance(la, FunctionalLaplace)
    assert not isinstance(la, (FullLaplace, FullLLLaplace))


def test_joint_probabilities_average_over_functions():
    case = BASIC[0]
    la, x = fitted(case, "last_layer"), case.test_inputs()
    one = la(x, joint=True, link_approx="mc", n_samples=40_000, generator=generator(0))
    assert_close(one.sum(-1), torch.ones(len(x)))
    mean, cov = la.predictive_moments(x)
    assert float((one - reference.expected_softmax(mean, cov)).abs().max()) < 5 / 40_000**0.5


@both
def test_a_noise_by_output_is_that_of_the_full_posterior(weights):
    case = named("regression")
    full, gp = (fitted(case, weights, s, sigma_noise=torch.tensor([0.4, 1.7])) for s in ("full", "gp"))
    assert_close(gp.log_marginal_likelihood(), full.log_marginal_likelihood())
    for first, second in zip(gp(case.test_inputs()), full(case.test_inputs()), strict=True):
        assert_close(first, second)


# -- with some of the data ---------------------------------------------------------------------------------------------


def dense(case: Case, rows, *, diagonal=False):
    """The posterior precision of some data with the prior times N/M, and that which stands for all data."""
    problem = case.problem()
    H = 0.0
    for row in rows:
        datum = problem.data[row]
        Lambda = datum.output_hessian
        H = H + datum.J.T @ (Lambda.diagonal().diag() if diagonal else Lambda) @ datum.J
    H, eye = H * case.scale / T, torch.eye(len(problem.theta()))
    ratio = case.n_rows / len(rows)
    return H + DELTA * ratio * eye, H * ratio + DELTA * eye


def drawn(case: Case):
    import numpy as np

    return np.random.default_rng(2).choice(case.n_rows, M, replace=False)


@basic
@pytest.mark.parametrize("diagonal", [False, True])
def test_a_subset_is_dense_algebra_with_the_prior_times_n_over_m(case, diagonal):
    la = fitted(case, "last_layer", n_subset=M, seed=2, diagonal_hessian=diagonal)
    P, all_data = dense(case, drawn(case), diagonal=diagonal)
    x = case.test_inputs()
    J = case.problem().jacobian(x).flatten(0, 1)
    mean, cov = la.predictive_moments(x)
    assert_close(cov, reference.output_covariance(J, P))
    assert_close(mean, case.problem().outputs(la.mean, x).flatten(0, 1).detach())
    joint = la.predictive_moments(x, joint=True)
    assert_close(joint[1], reference.joint_covariance(J, P))
    assert_close(joint[0], mean.flatten())
    assert_close(la.functional_variance(J), reference.output_covariance(J, P))
    assert_close(la.functional_covariance(J), reference.joint_covariance(J, P))
    prior = DELTA * torch.eye(len(P))
    assert_close(la.log_det_ratio, all_data.logdet() - prior.logdet(), "evidence of all data")
    assert_close(la.gp_kernel_prior_variance, torch.tensor([M / (case.n_rows * DELTA)]))


def test_the_evidence_of_subsets_scatters_around_that_of_all_data():
    case = named("classification")
    truth = fitted(case, "last_layer", "full").log_marginal_likelihood()
    found = torch.stack([fitted(case, "last_layer", n_subset=9, seed=s).log_marginal_likelihood() for s in range(20)])
    assert float((found.mean() - truth).abs()) < 0.1


@both
def test_independent_outputs_are_processes_of_their_own(weights):
    case = named("classification")
    la, x = fitted(case, weights, independent_outputs=True), case.test_inputs()
    problem = (
        case.problem()
        if weights == "last_layer"
        else reference.Problem(
            case.model(),
            case.forward,
            tuple(name for name, _ in case.model().named_parameters()),
            *case.data(),
            case.likelihood,
            4,
        )
    )
    J_x, expected = problem.jacobian(x).flatten(0, 1), []
    for c in range(4):
        J = torch.stack([datum.J[c] for datum in problem.data])
        d = torch.stack([datum.output_hessian[c, c] for datum in problem.data]) / T
        P = J.T @ (d.unsqueeze(1) * J) + DELTA * torch.eye(J.shape[1])
        expected.append(torch.einsum("bp,pq,bq->b", J_x[:, c], P.inverse(), J_x[:, c]))
    _, cov = la.predictive_moments(x)
    assert_close(cov, torch.diag_embed(torch.stack(expected, 1)))
    assert_close(la.functional_variance(J_x), cov)
    assert_close(la(x), reference.probit(la.predictive_moments(x)[0], cov))


# -- samples -----------------------------------------------------------------------------------------------------------


@both
@basic
def test_samples_have_the_moments_of_the_process(case, weights):
    la, x = fitted(case, weights, n_subset=M), case.test_inputs()[:2]
    mean, cov = la.predictive_moments(x, joint=True)
    n = 20_000
    whole = la.functional_samples(x, "gp", n, joint=True, generator=generator(1))
    assert whole.shape == (n, 2, case.n_outputs)
    assert_covariance_of(whole.flatten(1), mean, cov)
    each = la.functional_samples(x, n_samples=n, generator=generator(1))
    for row in range(2):
        part = slice(row * case.n_outputs, (row + 1) * case.n_outputs)
        assert_covariance_of(each[:, row], mean[part], cov[part, part])
    alone = la.functional_samples(x, n_samples=n, diagonal_output=True, generator=generator(1))
    assert_mean_is((alone.flatten(1) - mean).square(), cov.diagonal().clone())
    expected = whole.softmax(-1) if case.likelihood == "classification" else whole
    assert_close(la.predictive_samples(x, n_samples=n, joint=True, generator=generator(1)), expected)
    again = la.functional_samples(x, "gp", n, joint=True, generator=generator(1))
    assert torch.equal(again, whole)


@basic
def test_weights_drawn_give_the_functions(case):
    la, x = fitted(case, "last_layer", n_subset=M), case.test_inputs()[:2]
    theta = la.sample(20_000, generator(0))
    J = case.problem().jacobian(x).flatten(0, 2)
    mean, cov = la.predictive_moments(x, joint=True)
    assert_covariance_of(mean + (theta - la.mean) @ J.T, mean, cov)


def test_pairs_of_scores():
    case = named("preferences")
    la, full, x = fitted(case, "last_layer"), fitted(case, "last_layer", "full"), case.test_inputs()
    assert_close(la(x, fitting=True), full(x, fitting=True))
    sampled = la.predictive_samples(x, n_samples=20_000, fitting=True, generator=generator(0))
    exact = full(x, fitting=True, link_approx="mc", n_samples=200_000, generator=generator(1))
    assert float((sampled.mean(0) - exact).abs().max()) < 0.02
    la.optimize_prior_precision(method="gridsearch", val_loader=case.batches(4), grid_size=5)


# -- tuning ------------------------------------------------------------------------------------------------------------


@both
@basic
@pytest.mark.filterwarnings("ignore:The best prior precision:UserWarning")
def test_tuning_is_that_of_the_full_posterior(case, weights):
    full, gp = fitted(case, weights, "full"), fitted(case, weights)
    options = {"method": "gridsearch", "val_loader": case.batches(4), "grid_size": 7}
    for link in ("probit", "bridge") if case.likelihood == "classification" else ("probit",):
        for la in (full, gp):
            la.optimize_prior_precision(**options, link_approx=link)
        assert_close(gp.tuning_.values, full.tuning_.values, f"grid, {link}")
    for la in (full, gp):
        la.optimize_prior_precision()
    assert_close(gp.log_marginal_likelihood(), full.log_marginal_likelihood(), "evidence at its maximum")
    for factor in (0.9, 1.1):
        worse = gp.log_marginal_likelihood(gp.prior_precision * factor)
        assert worse < full.log_marginal_likelihood()
        gp.prior_precision = full.prior_precision


@both
def test_the_evidence_is_differentiable(weights):
    case = named("regression")
    slopes = []
    for structure in ("full", "gp"):
        la = fitted(case, weights, structure)
        delta, sigma = torch.tensor(0.9, requires_grad=True), torch.tensor(0.6, requires_grad=True)
        slopes.append(torch.autograd.grad(la.log_marginal_likelihood(delta, sigma), (delta, sigma)))
    for first, second in zip(*slopes, strict=True):
        assert_close(first, second)


@both
@pytest.mark.filterwarnings("ignore:The best prior precision:UserWarning")
def test_a_grid_takes_one_pass_over_the_validation_data(weights):
    case = named("classification")
    model = case.model()
    la = fitted(case, weights, model=model, n_subset=M)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    la.optimize_prior_precision(method="gridsearch", val_loader=case.batches(6), grid_size=21, log_prior_prec_min=-1)
    handle.remove()
    n_subset_batches = 0 if weights == "last_layer" else len(la.H.kernel.batches)
    assert len(calls) == len(case.batches(6)) + n_subset_batches


# -- state and side effects --------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "name", ["classification", "positions_regression", "preferences", "keyword_inputs", "two_inputs"]
)
def test_a_state_can_be_saved_and_loaded(name, weights, tmp_path):
    case = named(name)
    la = fitted(case, weights, n_subset=4, seed=5, independent_outputs=name == "classification")
    la.save(tmp_path / "state.pt")
    other = estimator(case, weights, n_subset=2)
    other.load(tmp_path / "state.pt")
    assert (other.n_subset, other.seed, other.independent_outputs) == (4, 5, la.independent_outputs)
    x = case.test_inputs()
    for copied in (other, pickle.loads(pickle.dumps(la)), copy.deepcopy(la), la.to("cpu")):
        for first, second in zip(tensors(copied(x)), tensors(la(x)), strict=True):
            assert torch.equal(first, second)
        assert torch.equal(copied.log_marginal_likelihood(), la.log_marginal_likelihood())
    model = case.model()
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(StateError, match="weights of the model differ"):
        estimator(case, weights, model=model).load(tmp_path / "state.pt")


@both
@basic
def test_the_model_is_untouched_and_a_failing_fit_changes_nothing(case, weights):
    model = case.model().train()
    with model_untouched(model):
        la = fitted(case, weights, model=model, n_subset=M)
        la(case.test_inputs())
        la.optimize_prior_precision()
        before = la._fit
        with pytest.raises(InputError, match="loader is empty"):
            la.fit([])
        with pytest.raises(InputError, match="n_subset"):
            la.fit(case.batches(1, 3)[:2])
        assert la._fit is before


@both
def test_predictions_are_differentiable_in_the_inputs(weights):
    case = named("regression")
    la = fitted(case, weights, n_subset=M, enable_backprop=True)
    x = case.test_inputs().requires_grad_(True)

    def variance(x: torch.Tensor) -> torch.Tensor:
        return la(x, diagonal_output=True)[1]

    assert torch.autograd.gradcheck(variance, (x,))


# -- options and refusals ----------------------------------------------------------------------------------------------


@both
def test_back_ends(weights):
    case = named("classification")
    expected = fitted(case, weights, n_subset=M)(case.test_inputs())
    assert_close(fitted(case, weights, n_subset=M, backend=BackPackGGN)(case.test_inputs()), expected)
    for backend, matrix in ((AutogradEF, "empirical Fisher"), (AutogradHessian, "Hessian")):
        with pytest.raises(UnsupportedError, match=f"computes an? {matrix}"):
            fitted(case, weights, n_subset=M, backend=backend)
    options = {"backend": AutogradGGN, "backend_kwargs": {"stochastic": True, "generator": generator(0)}}
    sampled = fitted(case, weights, n_subset=M, **options)
    assert sampled.H.root.shape[-1] == 1
    assert not torch.allclose(sampled(case.test_inputs()), expected)


@pytest.mark.parametrize("bad", [0, -1, 2.5, True, "5", None])
def test_counts_that_are_none_are_refused(bad):
    with pytest.raises(InputError, match="n_subset must be a positive whole number"):
        estimator(BASIC[0], "all", n_subset=bad)
    if bad != 0:
        with pytest.raises(InputError, match="seed must be a whole number"):
            estimator(BASIC[0], "all", seed=bad)


@both
def test_priors_that_are_not_isotropic_are_refused(weights):
    case = BASIC[0]
    with pytest.raises(UnsupportedError, match="isotropic prior"):
        estimator(case, weights, prior_precision=torch.ones(2 if weights == "last_layer" else 4))
    la = fitted(case, weights, n_subset=M)
    with pytest.raises(UnsupportedError, match="isotropic prior"):
        la.prior_precision = torch.ones(la.n_layers)
    for structure in ("layerwise", "diag"):
        with pytest.raises(UnsupportedError, match="isotropic prior"):
            la.optimize_prior_precision(prior_structure=structure)
    assert_close(la.prior_precision, torch.tensor([DELTA]))


def test_what_has_no_meaning_is_refused():
    case = BASIC[0]
    la, x = estimator(case, "last_layer", n_subset=M), case.test_inputs()
    with pytest.raises(NotFittedError):
        la(x)
    with pytest.raises(NotFittedError):
        la.state_dict()
    la.fit(case.batches(4))
    for call in (la, la.functional_samples, la.predictive_samples):
        with pytest.raises(UnsupportedError, match='"nn" runs the network at sampled weights'):
            call(x, pred_type="nn")
    with pytest.raises(UnsupportedError, match="nn"):
        la.optimize_prior_precision(pred_type="nn", method="gridsearch", val_loader=case.batches(4))
    for method in ("loo", "cv"):
        with pytest.raises(UnsupportedError, match="leaves out training data"):
            la.optimize_prior_precision(method=method, train_loader=case.batches(4))
    with pytest.raises(UnsupportedError, match="pass one of them"):
        la.functional_samples(x, joint=True, diagonal_output=True)
    with pytest.raises(ShapeError):
        la.functional_variance(torch.zeros(2, 4, 3))
    with pytest.raises(UnsupportedError, match="leave out diagonal_hessian"):
        estimator(named("preferences"), "last_layer", diagonal_hessian=True)
    with pytest.raises(UnsupportedError, match="over no weights"):
        fitted(case, "all", independent_outputs=True).sample(2)
    with pytest.raises(UnsupportedError, match="functional_approximation: "):
        Laplace(case.model(), "classification", "subnetwork", "gp", n_subset=3)
    with pytest.raises(TypeError, match="n_subset"):
        Laplace(case.model(), "classification", "all", "gp", n_subsets=3)
