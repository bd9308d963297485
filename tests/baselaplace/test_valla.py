"""VaLLA, of all weights and of a last layer: exact limits, an objective that never rises, states, bad input."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch

from laplace import LLELLA, LLVaLLA, VaLLA
from laplace.baselaplace import variational
from laplace.baselaplace.statefile import digest
from laplace.errors import InputError, NotFittedError, NumericalWarning, ShapeError, StateError, UnsupportedError
from tests import reference
from tests.cases import named as case_named
from tests.contracts import generator, model_untouched
from tests.functions import DELTA, batches, build, full, jacobian, new_inputs, noise
from tests.networks import named
from tests.tools import LargestTensor, assert_close, assert_covariance_of, assert_same

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
GAUSSIAN = [named("mlp_regression"), case_named("regression"), case_named("positions_regression")]
THINGS = [named("mlp"), named("conv2d"), case_named("classification"), case_named("masked_positions")]
FIXED = {"iterations": 2, "train_hyperparameters": False}


def fitted(thing, m: int = 4, cuts=(2,), model=None, fit=None, **options):
    if "inducing_locations" not in options:
        options["inducing_locations"] = thing.data(n_rows=m, shift=4)[0]
    la = build(thing, "variational", model, **options)
    la.fit(batches(thing, *cuts), **{"iterations": 3, **(fit or {})})
    return la


def every_output(thing):
    """All outputs of all training inputs: inducing points that say everything about the data."""
    x = thing.data()[0]
    n, n_outputs = len(x), jacobian(thing, x[:1]).shape[1]
    return {
        "inducing_locations": reference.rows_of(x, [row for row in range(n) for _ in range(n_outputs)]),
        "inducing_classes": [output for _ in range(n) for output in range(n_outputs)],
    }


# -- limits in which it is exact --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The kernel of the:laplace.errors.NumericalWarning")
@pytest.mark.parametrize("thing", GAUSSIAN, ids=str)
def test_with_the_data_as_inducing_points_it_is_the_posterior_over_weights(thing):
    """And, at α = 0, its objective is minus the log evidence of the linearized network."""
    la = fitted(thing, fit=FIXED, alpha=0.0, cuts=(99,), **every_output(thing))
    exact, x = full(thing), new_inputs(thing)
    for ours, theirs in zip(la(x), exact(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # of the jitter
    expected = -float(exact.log_marginal_likelihood())
    assert math.isclose(la.fit_history_["objective"][0], expected, rel_tol=1e-6)


@pytest.mark.parametrize("thing", THINGS, ids=str)
def test_it_starts_at_the_optimum_of_titsias(thing):
    """q(u) with the precision K⁻¹ + K⁻¹ K_ZX Λ K_XZ K⁻¹, by brute force over kernels."""
    la, x = fitted(thing, fit={**FIXED, "iterations": 1, "lr": 1e-12}), new_inputs(thing)
    at = thing.data(n_rows=4, shift=4)[0]
    Jz = jacobian(thing, at)
    Z = Jz[torch.arange(4), torch.arange(4) % Jz.shape[1]]
    K = Z @ Z.T / DELTA
    precision = sum((Z @ d.J.T) @ d.output_hessian @ (d.J @ Z.T) / DELTA**2 for d in thing.problem().data)
    S = (K.inverse() + K.inverse() @ precision @ K.inverse()).inverse()
    J = jacobian(thing, x)
    flat = J.flatten(0, 1)
    projected = flat @ Z.T / DELTA @ K.inverse()
    joint = flat @ flat.T / DELTA - projected @ (K - S) @ projected.T
    assert_close(la.predictive_moments(x, joint=True)[1], joint)
    assert_close(la.functional_covariance(J), joint)
    n, C = J.shape[:2]
    each = torch.stack([joint[C * i : C * (i + 1), C * i : C * (i + 1)] for i in range(n)])
    assert_close(la.functional_variance(J), each)


def test_far_from_its_points_it_is_the_prior():
    """Outputs of which no inducing point knows keep their prior variance."""
    thing = case_named("regression")
    la = fitted(thing, inducing_classes=[0, 0, 0, 0])
    x = new_inputs(thing)
    prior = jacobian(thing, x)[:, 1].square().sum(-1) / la.prior_precision
    variance = la(x, diagonal_output=True)[1]
    assert_close(variance[:, 1], prior)
    assert bool((variance[:, 0] < 0.9 * prior).all())


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("hyperparameters", [False, True], ids=["fixed", "trained"])
@pytest.mark.parametrize("thing", [named("mlp"), case_named("regression"), case_named("preferences")], ids=str)
def test_with_one_batch_the_objective_never_rises(thing, hyperparameters, alpha):
    """By Adam whose steps are taken back when they would raise it; at α = 0 its negative is the evidence lower bound."""
    at = thing.data(n_rows=4, shift=4)[0]
    at = at[:, 0] if thing.likelihood == "reward_modeling" else at
    fit = {"iterations": 30, "lr": 0.1, "train_hyperparameters": hyperparameters}
    la = fitted(thing, cuts=(99,), alpha=alpha, fit=fit, inducing_locations=at)
    history = la.fit_history_["objective"]
    assert len(history) == 30
    assert all(later <= earlier for earlier, later in itertools.pairwise(history))
    trained = alpha > 0 or hyperparameters or thing.likelihood != "regression"  # else it starts at the optimum
    assert (history[0] - history[-1] > 1e-8) == trained
    moved = float(la.prior_precision) != DELTA
    assert moved == hyperparameters


def test_the_bound_is_one_and_more_inducing_points_tighten_it():
    thing = named("mlp_regression")
    evidence = float(full(thing).log_marginal_likelihood())
    x = thing.data()[0]
    bounds = []
    for m in (1, 3, 5):
        la = fitted(thing, cuts=(99,), alpha=0.0, fit=FIXED, inducing_locations=x[:m])
        bounds.append(-la.fit_history_["objective"][0])
    assert bounds[0] < bounds[1] < bounds[2] <= evidence


@pytest.mark.slow
def test_by_the_bound_the_prior_is_that_of_the_evidence():
    thing = case_named("squeezed_regression")
    fit = {"iterations": 600, "lr": 0.05}
    with pytest.warns(NumericalWarning, match="jitter"):
        la = fitted(thing, cuts=(99,), alpha=0.0, fit=fit, **every_output(thing))
    exact = full(thing)
    exact.optimize_prior_precision(method="marglik", noise="scalar")
    torch.testing.assert_close(la.prior_precision, exact.prior_precision, rtol=0.02, atol=0)  # of the optimizer
    torch.testing.assert_close(la.sigma_noise, exact.sigma_noise, rtol=0.02, atol=0)


@pytest.mark.parametrize("thing", [named("mlp"), case_named("masked_rows")], ids=str)
def test_the_start_does_not_depend_on_the_batches(thing):
    x = new_inputs(thing)
    fit = {"iterations": 1, "lr": 1e-12}
    expected = fitted(thing, cuts=(99,), fit=fit).predictive_moments(x)[1]
    for cuts in ((1, 1), (3,)):
        assert_close(fitted(thing, cuts=cuts, fit=fit).predictive_moments(x)[1], expected)


def test_kernels_that_are_not_kept_are_made_again(monkeypatch):
    thing = named("mlp")
    expected = fitted(thing)
    monkeypatch.setattr(variational, "KEPT_ELEMENTS", 0)
    found = fitted(thing)
    assert found.fit_history_ == expected.fit_history_
    assert_same([found(new_inputs(thing))], [expected(new_inputs(thing))])
    once = build(thing, "variational", inducing_locations=new_inputs(thing))
    with pytest.raises(InputError, match="more than once"):
        once.fit(iter(batches(thing, 2)), iterations=5)


def test_training_goes_on_where_it_was():
    thing = named("mlp")
    la = fitted(thing)
    first, objective = la.prior_precision, la.fit_history_["objective"]
    la.fit(batches(thing, 2), iterations=4, override=False)
    assert len(la.fit_history_["objective"]) == 7
    assert la.fit_history_["objective"][:3] == objective
    assert float(la.prior_precision) != float(first)
    again = fitted(thing)
    again.fit(batches(thing, 2), iterations=3)
    assert again.fit_history_["objective"] != objective  # it starts again, from the prior that was trained


def test_sampled_logits_are_those_of_the_seed_and_agree_with_the_closed_form():
    thing, fit = named("mlp"), {"iterations": 1, "lr": 1e-12}
    values = [
        fitted(thing, cuts=(99,), fit=fit, mc_softmax_samples=n, seed=seed, alpha=1.0, prior_precision=20.0).fit_history_["objective"][0]
        for n, seed in ((4000, 0), (4000, 0), (4000, 1), (0, 0))
    ]  # fmt: skip
    assert values[0] == values[1] != values[2]
    assert abs(values[0] - values[3]) < 0.05


def test_validation_data_keep_the_best():
    thing = named("mlp_regression")
    x, y = thing.data(shift=9)
    la = fitted(thing, fit={"iterations": 12, "lr": 0.3, "val_loader": [(x, y)], "val_steps": 5})
    scores = la.fit_history_["val_nll"]
    assert len(scores) == 3  # after 5, 10 and 12
    mean, cov = la(x)
    noisy = cov + la.sigma_noise**2 * torch.eye(2)
    nll = -torch.distributions.MultivariateNormal(mean, noisy).log_prob(y).mean()
    assert_close(nll, torch.tensor(min(scores)))


# -- inducing points --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["random", "kmeans"])
def test_locations_are_chosen_from_the_data_by_the_seed(strategy):
    thing = named("mlp")
    la = fitted(thing, inducing_locations=strategy, num_inducing=3)
    assert la.inducing_locations.shape == (3, 3)
    assert la.inducing_classes.tolist() == [0, 1, 2]
    assert torch.equal(fitted(thing, inducing_locations=strategy, num_inducing=3).inducing_locations, la.inducing_locations)  # fmt: skip
    if strategy == "random":
        assert all(any(torch.equal(z, x) for x in thing.data()[0]) for z in la.inducing_locations)
        assert not torch.equal(fitted(thing, inducing_locations=strategy, num_inducing=3, seed=3).inducing_locations, la.inducing_locations)  # fmt: skip


def test_classes_choose_outputs():
    thing = named("mlp")
    la = fitted(thing, inducing_classes=torch.tensor([2, 2, 0, 1]))
    assert la.inducing_classes.tolist() == [2, 2, 0, 1]
    assert not torch.equal(la(new_inputs(thing)), fitted(thing)(new_inputs(thing)))


def test_repeated_points_are_announced():
    thing = named("mlp")
    z = new_inputs(thing)
    with pytest.warns(NumericalWarning, match="a jitter of about"):
        la = fitted(thing, inducing_locations=torch.cat([z, z]), inducing_classes=[0, 1, 2, 0, 1, 2])
    assert bool(torch.isfinite(la(z)).all())


# -- predictions and states -------------------------------------------------------------------------------------------


def test_samples_have_the_moments_of_the_posterior():
    thing = named("mlp_regression")
    la, x = fitted(thing), new_inputs(thing)
    mean, cov = la.predictive_moments(x, joint=True)
    samples = la.functional_samples(x, n_samples=20000, joint=True, generator=generator(0))
    assert_covariance_of(samples.flatten(1), mean, cov)


@pytest.mark.parametrize("thing", [named("mlp"), case_named("classification")], ids=str)
def test_predictions_are_differentiable_in_the_inputs(thing):
    la = fitted(thing, enable_backprop=True)
    assert torch.autograd.gradcheck(lambda x: la(x), (new_inputs(thing).requires_grad_(),))


@pytest.mark.parametrize("thing", [named("mlp"), named("mlp_regression"), case_named("classification")], ids=str)
def test_a_state_makes_the_same_object(thing):
    la, x = fitted(thing, prior_mean=0.1, alpha=0.5), new_inputs(thing)
    file = io.BytesIO()
    torch.save(la.state_dict(), file)
    file.seek(0)
    other = build(thing, "variational", inducing_locations="random", num_inducing=2)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(list(other.predictive_moments(x)), list(la.predictive_moments(x)))
    assert (other.alpha, other.num_inducing, other.fit_history_) == (0.5, 4, la.fit_history_)
    assert float(other.prior_precision) == float(la.prior_precision)
    for twin in (copy.deepcopy(la), pickle.loads(pickle.dumps(la)) if thing.name != "classification" else la.to("cpu")):
        assert_same(list(twin.predictive_moments(x)), list(la.predictive_moments(x)))
    other.fit(batches(thing, 2), iterations=2, override=False)
    assert len(other.fit_history_["objective"]) == 5


def test_a_state_without_its_points_changes_nothing():
    la, x = fitted(named("mlp")), new_inputs(named("mlp"))
    before, state = la(x), la.state_dict()
    learned = {key: value for key, value in state["learned"].items() if key != "kernel_root"}
    with pytest.raises(StateError, match="has no entry 'kernel_root'"):
        la.load_state_dict({**state, "learned": learned, "digest": digest({**state, "learned": learned})})
    assert torch.equal(la(x), before)


# -- the user's things ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thing", [named("batch_norm"), case_named("conv_classification")], ids=str)
def test_the_model_and_the_random_numbers_of_the_user_are_untouched(thing):
    model = thing.model().train()
    state = torch.get_rng_state()
    with model_untouched(model):
        la = fitted(thing, 3, model=model, fit={"val_loader": batches(thing, 3)}, mc_softmax_samples=3)
        la(new_inputs(thing))
    assert torch.equal(state, torch.get_rng_state())


def test_whole_networks_need_no_jacobians():
    with LargestTensor() as largest:
        model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Tanh(), torch.nn.Linear(300, 10))
        x, y = torch.randn(200, 300), torch.randint(10, (200,))
        la = VaLLA(model, "classification", x[:30])
        la.fit([(x[:100], y[:100]), (x[100:], y[100:])], iterations=2)
        la(x[:50])
    P = sum(p.numel() for p in model.parameters())
    assert largest.numel < 10 * P, largest.operation  # 30 rows of J are never whole, and the 1000 of a batch even less


def test_many_outputs_need_no_covariances_between_them():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 300))
    x, y = torch.randn(20, 3), torch.randint(300, (20,))
    for la, options in (
        (LLVaLLA(model, "classification", x[:5]), {"iterations": 2}),
        (LLELLA(model, "classification", 5, 4), {}),
    ):
        with LargestTensor() as largest:
            la.fit([(x, y)], **options)
            la(x)
        assert largest.numel < 20 * 300 * 300 / 2, largest.operation


def test_a_failing_fit_changes_nothing():
    la, x = fitted(named("mlp")), new_inputs(named("mlp"))
    before, history, delta = la(x), la.fit_history_, la.prior_precision
    bad = batches(named("mlp"), 2)
    bad[1] = (bad[1][0], bad[1][1] + 10)
    with pytest.raises(InputError, match="Class indices"):
        la.fit(bad)
    assert torch.equal(la(x), before)
    assert la.fit_history_ is history
    assert torch.equal(la.prior_precision, delta)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"num_inducing": 5}, ShapeError, "holds 3 inputs, num_inducing says 5"),
        ({"num_inducing": 0}, InputError, "num_inducing must be a positive whole number"),
        ({"inducing_locations": "kmean"}, UnsupportedError, "one of 'random', 'kmeans'; got 'kmean'"),
        ({"inducing_locations": "random"}, InputError, "pass num_inducing="),
        ({"inducing_locations": None}, InputError, "must be a batch of inputs.*NoneType"),
        ({"inducing_locations": torch.zeros(0, 3)}, InputError, "empty batch"),
        ({"inducing_classes": [0, 1]}, ShapeError, "one output for each of the 3 inducing points"),
        ({"inducing_classes": [0, 1, -1]}, InputError, "indices of outputs"),
        ({"inducing_classes": [0.0, 1.0, 2.0]}, InputError, "indices of outputs"),
        ({"alpha": 1.5}, InputError, r"alpha must lie in \[0, 1\]"),
        ({"alpha": -0.1}, InputError, r"alpha must lie in \[0, 1\]"),
        ({"mc_softmax_samples": -1}, InputError, "mc_softmax_samples must be"),
        ({"prior_precision": torch.ones(4)}, UnsupportedError, "isotropic prior"),
    ],
)
def test_bad_options_are_refused(options, error, says):
    thing = named("mlp")
    with pytest.raises(error, match=says):
        build(thing, "variational", **{"inducing_locations": new_inputs(thing), **options})


@pytest.mark.parametrize(
    ("options", "fit", "error", "says"),
    [
        ({"inducing_classes": [0, 1, 3]}, {}, InputError, r"indices of the 3 outputs of an input, 0\.\.2; got 3"),
        ({"inducing_locations": torch.zeros(3, 2).double()}, {}, InputError, "cannot run on the inducing inputs: .*mat1 and mat2"),
        ({"inducing_locations": "random", "num_inducing": 9}, {}, InputError, "fewer than num_inducing=9"),
        ({}, {"iterations": 0}, InputError, "iterations must be"),
        ({}, {"lr": 0.0}, InputError, "lr must be"),
        ({}, {"val_steps": 3}, InputError, "pass val_loader="),
        ({}, {"train_loader": []}, InputError, "nothing to learn from: the training loader is empty"),
        ({}, {"train_loader": [(torch.zeros(2, 3).double(), torch.tensor([-100, -100]))]}, InputError, "2 rows of training data are masked"),
    ],
)  # fmt: skip
def test_bad_fits_are_refused(options, fit, error, says):
    thing = named("mlp")
    la = build(thing, "variational", **{"inducing_locations": new_inputs(thing), **options})
    with pytest.raises(error, match=says):
        la.fit(**{"train_loader": batches(thing, 2), "iterations": 2, **fit})
    with pytest.raises(NotFittedError):
        la(new_inputs(thing))


def test_what_fit_does_is_not_done_twice():
    la = fitted(named("mlp"))
    with pytest.raises(UnsupportedError, match=r"trains its prior precision in fit"):
        la.optimize_prior_precision(method="marglik")
    with pytest.raises(UnsupportedError, match="lower bound of the log evidence"):
        la.log_marginal_likelihood()
    with pytest.raises(UnsupportedError, match="exact without"):
        build(named("mlp_regression"), "variational", inducing_locations=torch.zeros(2, 3), mc_softmax_samples=4)


def test_cluster_centers_need_tensors_of_numbers():
    thing = named("embedding")
    la = build(thing, "variational", inducing_locations="kmeans", num_inducing=2)
    with pytest.raises(InputError, match="one floating-point tensor"):
        la.fit(batches(thing, 2))


def test_single_precision_stays_single_and_close(device):
    thing = named("mlp_regression")
    x, y = thing.data()
    z = thing.data(n_rows=4, shift=4)[0]
    fit = {"iterations": 1, "lr": 1e-9}
    precise = fitted(thing, fit=fit)
    la = VaLLA(
        thing.model().float().to(device), "regression", z.float().to(device), prior_precision=DELTA, **noise(thing)
    )
    la.fit([(x.float().to(device), y.float().to(device))], **fit)
    mean, cov = la(new_inputs(thing).float().to(device))
    assert mean.dtype == cov.dtype == torch.float32
    assert_close(cov, precise(new_inputs(thing))[1].to(device))
