"""ELLA, of all weights and of a last layer: limits in which it is exact, early stopping, tuning, states, bad input."""

import copy
import io
import pickle

import pytest
import torch

from laplace import ELLA, LLELLA, Laplace
from laplace.baselaplace import features
from laplace.baselaplace.statefile import digest
from laplace.curvature import AutogradEF
from laplace.errors import InputError, NotFittedError, NumericalWarning, ShapeError, StateError, UnsupportedError
from tests import reference
from tests.cases import named as case_named
from tests.contracts import generator, model_untouched
from tests.functions import DELTA, SIGMA, batches, build, full, jacobian, new_inputs, noise
from tests.networks import named
from tests.tools import LargestTensor, assert_close, assert_covariance_of, assert_same

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
ONE_OUTPUT = [named("squeezed"), case_named("squeezed_regression")]
SPANNED = [named("mlp"), named("mlp_regression"), case_named("classification"), case_named("regression"), case_named("preferences")]  # fmt: skip
THINGS = [named("mlp"), named("conv2d"), case_named("classification"), case_named("masked_positions")]


def fitted(thing, m: int = 5, k: int = 3, cuts=(2,), model=None, fit=None, **options):
    la = build(thing, "nystrom", model, subsample_size=m, n_eigenvalues=k, **options)
    la.fit(batches(thing, *cuts), **(fit or {}))
    return la


# -- limits in which it is exact --------------------------------------------------------------------------------------


@pytest.mark.parametrize("thing", ONE_OUTPUT, ids=str)
def test_with_one_output_and_all_data_it_is_exact_at_the_training_data_and_nowhere_larger(thing):
    n = len(thing.data()[1])
    rank = min(n, thing.model().head.weight.numel() + 1 if thing in ONE_OUTPUT[1:] else n)
    la, exact, x = fitted(thing, n, rank), full(thing), thing.data()[0]
    assert_close(la(x)[1], exact(x)[1], "at the training data")
    far = new_inputs(thing) * 3
    assert bool((la(far)[1] <= exact(far)[1] * (1 + 1e-12)).all())
    if thing is ONE_OUTPUT[0]:  # fewer data than weights: something is left out
        assert float((exact(far)[1] - la(far)[1]).max()) > 1e-3
    assert_close(la.log_marginal_likelihood(), exact.log_marginal_likelihood(), "evidence")


@pytest.mark.parametrize("thing", SPANNED, ids=str)
def test_where_features_span_the_weights_it_is_the_posterior_over_weights(thing):
    """Twice the data with other seeds of outputs span all derivatives; the curvature is that of the data alone."""
    x, y = thing.data(n_rows=70, shift=5)
    exact = full(thing)
    la = build(thing, "nystrom", subsample_size=70, n_eigenvalues=70)
    with pytest.warns(NumericalWarning, match="rank"):
        directions = la._directions([(x, y)], balanced=False)
    la._directions = lambda *_: directions
    la.fit(batches(thing, 2))
    at = new_inputs(thing)
    if thing.likelihood == "classification":
        for options in ({}, {"link_approx": "bridge"}, {"link_approx": "mc", "generator": generator(0)}):
            other = {**options, "generator": generator(0)} if "generator" in options else options
            assert_close(la(at, **options), exact(at, **other))
    else:
        for ours, theirs in zip(la(at), exact(at), strict=True):
            assert_close(ours, theirs)
    if thing.likelihood == "reward_modeling":
        assert_close(la(thing.data()[0], fitting=True), exact(thing.data()[0], fitting=True))
    # The bias of scores has no curvature and cancels, so that it is no direction of pairs.
    assert_close(la.log_marginal_likelihood(), exact.log_marginal_likelihood(), "evidence")


@pytest.mark.parametrize("thing", THINGS, ids=str)
def test_it_is_the_posterior_along_its_directions(thing):
    la, x = fitted(thing), new_inputs(thing)
    V = la.state_dict()["learned"]["directions"]
    assert_close(V @ V.T, torch.eye(len(V)))
    S = V.T @ (V @ thing.problem().ggn() @ V.T + DELTA * torch.eye(len(V))).inverse() @ V
    J = jacobian(thing, x)
    mean, cov = la.predictive_moments(x)
    C = mean.shape[-1]
    rows = J.reshape(-1, C, J.shape[-1])
    assert_close(cov.reshape(-1, C, C), rows @ S @ rows.mT)
    assert_close(la.functional_variance(J), J @ S @ J.mT)
    assert_close(la.functional_covariance(J), J.flatten(0, 1) @ S @ J.flatten(0, 1).T)
    joint = la.predictive_moments(x, joint=True)
    assert_close(joint[0], mean.flatten())
    assert_close(joint[1], J.flatten(0, 1) @ S @ J.flatten(0, 1).T)


@pytest.mark.parametrize("thing", THINGS, ids=str)
def test_the_fit_does_not_depend_on_the_batches(thing):
    x, n = new_inputs(thing), len(thing.data()[1])
    expected = fitted(thing).predictive_moments(x)[1]
    for cuts in ((n,), (1, 1), (3,)):
        assert_close(fitted(thing, cuts=cuts).predictive_moments(x)[1], expected)


def test_derivatives_that_are_not_kept_are_made_again(monkeypatch):
    expected = fitted(named("mlp")).state_dict()["learned"]
    monkeypatch.setattr(features, "KEPT_ELEMENTS", 0)
    found = fitted(named("mlp")).state_dict()["learned"]
    assert_same(list(found.values()), list(expected.values()))


def test_noise_temperature_and_prior_are_those_of_the_moment():
    thing = named("mlp_regression")
    la, other = fitted(thing), fitted(thing, sigma_noise=0.3, prior_precision=4.0, temperature=2.0)
    la.sigma_noise, la.prior_precision, la.temperature = 0.3, 4.0, 2.0
    x = new_inputs(thing)
    assert_close(la(x)[1], other(x)[1])
    assert_close(la.log_marginal_likelihood(), other.log_marginal_likelihood())


def test_seeds_choose_and_balanced_classes_are_balanced():
    thing = named("mlp")
    x = new_inputs(thing)
    assert not torch.equal(fitted(thing, 3, 2)(x), fitted(thing, 3, 2, seed=5)(x))
    la = fitted(thing, 3, 2, fit={"balanced": True})
    assert torch.equal(la(x), fitted(thing, 3, 2, fit={"balanced": True})(x))


# -- predictions ------------------------------------------------------------------------------------------------------


def test_samples_have_the_moments_of_the_posterior():
    thing = named("mlp_regression")
    la, x = fitted(thing), new_inputs(thing)
    mean, cov = la.predictive_moments(x, joint=True)
    samples = la.functional_samples(x, n_samples=20000, joint=True, generator=generator(0))
    assert_covariance_of(samples.flatten(1), mean, cov)
    for diagonal in (False, True):
        samples = la.functional_samples(x, n_samples=20000, diagonal_output=diagonal, generator=generator(0))
        f, each = la(x)
        for row in range(len(f)):
            expected = each[row].diagonal().diag() if diagonal else each[row]
            assert_covariance_of(samples[:, row], f[row], expected)


def test_probabilities_are_sampled_and_averaged():
    thing = named("mlp")
    la, x = fitted(thing), new_inputs(thing)
    samples = la.predictive_samples(x, n_samples=7, generator=generator(0))
    assert samples.shape == (7, 3, 3)
    assert_close(samples.sum(-1), torch.ones(7, 3))
    expected = la.functional_samples(x, n_samples=7, generator=generator(0)).softmax(-1)
    assert_close(samples, expected)
    averaged = la(x, link_approx="mc", joint=True, n_samples=4000, generator=generator(0))
    assert float((averaged - la(x, link_approx="mc", n_samples=4000, generator=generator(1))).abs().max()) < 0.03


def test_preferences_are_sampled():
    thing = case_named("preferences")
    la = fitted(thing)
    x = thing.data(n_rows=3, shift=2)[0]
    samples = la.predictive_samples(x, n_samples=4000, fitting=True, joint=True, generator=generator(0))
    assert samples.shape == (4000, 3, 2)
    assert float((samples.mean(0) - la(x, fitting=True, link_approx="mc", n_samples=4000)).abs().max()) < 0.03


@pytest.mark.parametrize("thing", [named("mlp"), case_named("classification")], ids=str)
def test_predictions_are_differentiable_in_the_inputs(thing):
    la = fitted(thing, enable_backprop=True)
    x = new_inputs(thing).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: la(x), (x,))


# -- early stopping and tuning ----------------------------------------------------------------------------------------


def test_validation_data_stop_what_narrows_the_posterior():
    """Outputs that are wrong and certain: with each batch of data the predictive density of these gets worse."""
    torch.manual_seed(0)
    x, model = torch.randn(40, 3), torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    y = model(x).detach()
    data = [(part, target) for part, target in zip(x.split(8), y.split(8), strict=True)]
    la = ELLA(model, "regression", 20, 5, sigma_noise=0.1)
    la.fit(data, val_loader=[(x[:5], y[:5] + 3)])
    history = la.fit_history_
    assert history["processed_examples"] == history["val_examples"] == [8, 16]
    assert history["val_nll"][1] > history["val_nll"][0]
    assert la.n_data == 8
    mean, cov = la(x[:5])
    density = torch.distributions.Normal(mean, (cov.squeeze(-1) + 0.01).sqrt()).log_prob(y[:5] + 3)
    assert_close(-density.mean(), torch.tensor(history["val_nll"][0]))
    la.fit(data, val_loader=[(x[:5], y[:5])], val_steps=2)
    assert la.fit_history_["val_examples"] == [16, 32, 40]  # the last look is at the end
    scores = la.fit_history_["val_nll"]
    assert scores == sorted(scores, reverse=True)
    assert la.n_data == 40
    la.fit(data, val_loader=[(x[:5], y[:5])], val_steps=9)
    assert (la.fit_history_["val_examples"], la.n_data) == ([40], 40)


@pytest.mark.filterwarnings("ignore:The best prior precision:UserWarning")
@pytest.mark.parametrize("thing", [named("mlp"), case_named("regression")], ids=str)
def test_the_grid_is_searched_for_the_best_predictive_density(thing):
    la = fitted(thing)
    x, y = thing.data(shift=7)
    grid = [0.03, 0.3, 3.0, 30.0]

    def nll(delta: float) -> float:
        la.prior_precision = delta
        if thing.likelihood == "classification":
            return float(-la(x).log().gather(1, y.unsqueeze(1)).mean())
        mean, cov = la(x)
        noisy = cov + SIGMA**2 * torch.eye(2)
        return float(-torch.distributions.MultivariateNormal(mean, noisy).log_prob(y).mean())

    scores = [nll(delta) for delta in grid]
    la.optimize_hyperparameters([(x[:2], y[:2]), (x[2:], y[2:])], grid)
    best = grid[min(range(4), key=scores.__getitem__)]
    assert float(la.prior_precision) == best
    assert_close(torch.tensor([tried["val_nll"] for tried in la.fit_history_["tuning"]]), torch.tensor(scores))
    low, high = (float(torch.tensor(edge).log10()) for edge in (grid[0], grid[-1]))
    la.optimize_prior_precision(val_loader=[(x, y)], grid_size=4, log_prior_prec_min=low, log_prior_prec_max=high)
    assert_close(la.prior_precision, torch.tensor([best]))


def test_the_evidence_chooses_what_it_chooses_for_weights():
    thing = case_named("squeezed_regression")
    n = len(thing.data()[1])
    la, exact = fitted(thing, n, 5), full(thing)
    la.optimize_prior_precision(method="marglik")
    exact.optimize_prior_precision(method="marglik")
    torch.testing.assert_close(la.prior_precision, exact.prior_precision, rtol=1e-3, atol=0)  # of the optimizer


def test_the_evidence_is_differentiable():
    la = fitted(named("mlp_regression"))
    delta, sigma = torch.tensor([0.8], requires_grad=True), torch.tensor(0.6, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d, s: la.log_marginal_likelihood(d, s), (delta, sigma))


# -- states -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thing", [named("mlp"), named("mlp_regression"), case_named("classification")], ids=str)
def test_a_state_makes_the_same_object(thing):
    la, x = fitted(thing, prior_mean=0.1), new_inputs(thing)
    file = io.BytesIO()
    torch.save(la.state_dict(), file)
    file.seek(0)
    other = build(thing, "nystrom", subsample_size=2, n_eigenvalues=1)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(list(other.predictive_moments(x)), list(la.predictive_moments(x)))
    assert torch.equal(other.log_marginal_likelihood(), la.log_marginal_likelihood())
    assert (other.subsample_size, other.fit_history_) == (5, la.fit_history_)
    for twin in (copy.deepcopy(la), pickle.loads(pickle.dumps(la)) if thing.name != "classification" else la.to("cpu")):
        assert_same(list(twin.predictive_moments(x)), list(la.predictive_moments(x)))


def test_a_state_of_another_object_or_a_damaged_one_changes_nothing():
    la = fitted(named("mlp"))
    x = new_inputs(named("mlp"))
    before, state = la(x), la.state_dict()
    broken = [
        ({**state, "fingerprint": "0"}, "fingerprint"),
        ({**state, "learned": {"gram": state["learned"]["gram"]}}, "has no entry 'directions'"),
        ({**state, "mean": state["mean"][1:]}, "'mean' must be a tensor of the shape"),
        ({**state, "loss": 1}, "damaged: 'loss'"),
        ({**state, "prior_precision": torch.ones(4)}, "isotropic"),
        (full(named("mlp")).state_dict(), "cls_name"),
    ]
    for bad, says in broken:
        with pytest.raises(StateError, match=says):
            la.load_state_dict({**bad, "digest": digest(bad)})
        assert torch.equal(la(x), before)


# -- the user's things ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thing", [named("batch_norm"), case_named("conv_classification")], ids=str)
def test_the_model_and_the_random_numbers_of_the_user_are_untouched(thing):
    model = thing.model().train()
    x, state = new_inputs(thing), torch.get_rng_state()
    with model_untouched(model):
        la = fitted(thing, 4, 2, model=model, fit={"val_loader": batches(thing, 3)})
        la(x)
        la.optimize_hyperparameters(batches(thing, 3), [1.0, 2.0])
    assert torch.equal(state, torch.get_rng_state())


def test_a_last_layer_needs_no_derivatives_and_whole_networks_no_jacobians():
    with LargestTensor() as largest:
        model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Tanh(), torch.nn.Linear(300, 10))
        x, y = torch.randn(200, 300), torch.randint(10, (200,))
        la = Laplace(model, "classification", "all", "gp", functional_approximation="nystrom", subsample_size=30, n_eigenvalues=4)  # fmt: skip
        la.fit([(x[:100], y[:100]), (x[100:], y[100:])])
        la(x[:50])
    P = sum(p.numel() for p in model.parameters())
    assert largest.numel < 10 * P, largest.operation  # 30 rows of J are never whole, and the 1000 of a batch even less


def test_a_failing_fit_changes_nothing():
    la, x = fitted(named("mlp")), new_inputs(named("mlp"))
    before, history = la(x), la.fit_history_
    bad = batches(named("mlp"), 2)
    bad[1] = (bad[1][0], bad[1][1] + 10)
    with pytest.raises(InputError, match="Class indices"):
        la.fit(bad)
    assert torch.equal(la(x), before)
    assert la.fit_history_ is history


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"n_eigenvalues": 6}, InputError, "n_eigenvalues=6 is above"),
        ({"n_eigenvalues": 0}, InputError, "n_eigenvalues must be a positive whole number; got 0"),
        ({"subsample_size": -1}, InputError, "subsample_size must be"),
        ({"subsample_size": 2.5}, InputError, "subsample_size must be"),
        ({"prior_precision": torch.ones(4)}, UnsupportedError, "isotropic prior"),
        ({"backend": AutogradEF}, UnsupportedError, "empirical Fisher"),
    ],
)
def test_bad_options_are_refused(options, error, says):
    with pytest.raises(error, match=says):
        build(named("mlp"), "nystrom", **{"subsample_size": 5, "n_eigenvalues": 3, **options})


@pytest.mark.parametrize(
    ("data", "fit", "error", "says"),
    [
        ([], {}, InputError, "empty"),
        (None, {"val_steps": 2}, InputError, "pass val_loader="),
        (None, {"val_loader": []}, InputError, "nothing to score"),
        (None, {"val_loader": [1], "val_steps": 0}, InputError, "val_steps must be a positive"),
        (iter([1]), {}, InputError, "goes over the training data twice"),
        ([(torch.randn(3, 3), torch.tensor([0, 1, 2]))], {}, InputError, "subsample of 5 of 3 training data"),
    ],
)
def test_bad_data_are_refused(data, fit, error, says):
    la = build(named("mlp"), "nystrom", subsample_size=5, n_eigenvalues=3)
    with pytest.raises(error, match=says):
        la.fit(batches(named("mlp"), 2) if data is None else data, **fit)
    with pytest.raises(NotFittedError):
        la(new_inputs(named("mlp")))


def test_calls_without_a_meaning_are_refused():
    thing = named("mlp_regression")
    la, x = fitted(thing), new_inputs(thing)
    with pytest.raises(UnsupportedError, match='"nn" runs the network at sampled weights'):
        la(x, pred_type="nn")
    with pytest.raises(UnsupportedError, match="no weights to draw"):
        la.sample()
    with pytest.raises(UnsupportedError, match="pass one of them"):
        la.functional_samples(x, joint=True, diagonal_output=True)
    with pytest.raises(UnsupportedError, match="regression has none"):
        la.fit(batches(thing, 2), balanced=True)
    with pytest.raises(UnsupportedError, match='must be "scalar"'):
        la.optimize_prior_precision(prior_structure="layerwise", val_loader=batches(thing, 2))
    with pytest.raises(InputError, match="pass val_loader="):
        la.optimize_prior_precision()
    with pytest.raises(InputError, match="grid must be positive"):
        la.optimize_hyperparameters(batches(thing, 2), [1.0, -1.0])
    with pytest.raises(ShapeError, match="Jacobians"):
        la.functional_variance(torch.zeros(2, 2, 3))
    last = Laplace(thing.model(), "regression", "last_layer", "gp", functional_approximation="nystrom", subsample_size=3, n_eigenvalues=2)  # fmt: skip
    with pytest.raises(UnsupportedError, match="one sigma_noise for all"):
        last.sigma_noise = torch.ones(2)


def test_masked_data_alone_are_refused():
    thing = case_named("masked_rows")
    x, y = thing.data()
    la = LLELLA(thing.model(), "classification", 3, 2)
    for balanced in (False, True):
        with pytest.raises(InputError, match="All 9 rows of training data are masked"):
            la.fit([(x, torch.full_like(y, reference.IGNORED))], balanced=balanced)


def test_single_precision_stays_single_and_close(device):
    thing = named("mlp_regression")
    x, y = thing.data()
    precise = fitted(thing)
    la = ELLA(thing.model().float().to(device), "regression", 5, 3, prior_precision=DELTA, **noise(thing))
    la.fit([(x.float().to(device), y.float().to(device))])
    mean, cov = la(new_inputs(thing).float().to(device))
    assert cov.dtype == torch.float32
    assert_close(cov, precise(new_inputs(thing))[1].to(device))
