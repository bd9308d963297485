"""The user's model is as it was found when a call breaks off midway, and the object, too; inference mode; neighbors."""

import itertools

import pytest
import torch
from torch import nn

from laplace.baselaplace import fitted as room
from laplace.baselaplace import states
from laplace.curvature import AutogradEF
from laplace.tuning import problem
from laplace.utils import RunningNLLMetric, validate
from tests.cases import ADDITIVE, BASIC, named
from tests.contracts import model_untouched
from tests.estimators import basic_cases, estimator, every_structure, everything, fitted
from tests.tools import assert_close, assert_same


class InterruptedMidwayError(Exception):
    """Raised by a test in the middle of a call."""


class Fragile(nn.Module):
    """The identity, which raises on the pass `fails_on`, counting from 1."""

    counts = itertools.count()
    fails_on = 0

    def forward(self, x):
        if next(type(self).counts) == type(self).fails_on:
            raise InterruptedMidwayError
        return x


@pytest.fixture
def fragile():
    """A switch: the k-th pass from now raises."""

    def arm(k: int) -> None:
        Fragile.counts, Fragile.fails_on = itertools.count(1), k

    arm(0)
    yield arm
    arm(0)


def model_of(case, where: str) -> nn.Module:
    """The model of a case in training mode, with gradients, and a fragile module before or after the features."""
    model = case.model().train()
    model.body.insert(0 if where == "first" else len(model.body), Fragile())
    model.body.append(nn.Dropout(0.5))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


def broken_loader(batches: list, k: int):
    """Raises instead of the batch `k`."""
    for index, batch in enumerate(batches):
        if index == k:
            raise InterruptedMidwayError
        yield batch
    raise InterruptedMidwayError


def requests(la, case) -> dict:
    """Public calls that run the model."""
    x, batches = case.test_inputs(), case.batches(3, 3)
    grid = {"method": "gridsearch", "val_loader": batches, "grid_size": 3}
    return {
        "call": lambda: la(x),
        "joint": lambda: la(x, joint=True, link_approx="mc" if case.likelihood == "classification" else "probit"),
        "weight samples": lambda: la(x, pred_type="nn"),
        "predictive": lambda: la.predictive(x, "glm", "probit", 3),
        "functional samples": lambda: la.functional_samples(x, n_samples=3),
        "predictive samples": lambda: la.predictive_samples(x, "nn", 3),
        "variances": lambda: la.functional_variance_fast(x),
        "fit": lambda: la.fit(batches),
        "fit more": lambda: la.fit(batches, override=la.curvature_type.name.value not in ADDITIVE),
        "grid search": lambda: la.optimize_prior_precision(**grid),
        "validate": lambda: validate(la, batches, lambda *results: 0.0),
    }


PASSES = {"fit": 3, "fit more": 3, "grid search": 3, "validate": 3}
CALLS = [(name, k) for name in requests(None, BASIC[0]) for k in range(1, PASSES.get(name, 1) + 1)]


@pytest.mark.every(3)
@every_structure
@basic_cases
@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("backprop", [False, True], ids=["", "backprop"])
def test_every_call_may_break_in_any_forward_pass(case, structure, where, backprop, fragile):
    model = model_of(case, where)
    la = fitted(case, structure, model, enable_backprop=backprop)
    before = everything(la, case)
    for name, k in CALLS:
        fragile(k)
        with model_untouched(model), pytest.raises(InterruptedMidwayError):
            requests(la, case)[name]()
        fragile(0)
        assert torch.is_grad_enabled()
        assert la(case.test_inputs()) is not None, name
    assert_same(everything(la, case), before)


@pytest.mark.every(3)
@every_structure
@basic_cases
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_first_fit_that_breaks_leaves_an_object_that_can_be_fitted(case, structure, k, fragile):
    model = model_of(case, "last")
    la = estimator(case, structure, model)
    fragile(k)
    with model_untouched(model), pytest.raises(InterruptedMidwayError):
        la.fit(case.batches(3, 3))
    fragile(0)
    with model_untouched(model):
        la.fit(case.batches(1, 3))
    assert_same(everything(la, case), everything(fitted(case, structure), case))


@pytest.mark.every(3)
@every_structure
@basic_cases
@pytest.mark.parametrize("k", [0, 1, 3])
def test_a_loader_may_break_after_any_batch(case, structure, k):
    model = case.model().train()
    la = fitted(case, structure, model)
    before, batches = everything(la, case), case.batches(3, 3)
    for consume in (
        la.fit,
        lambda loader: la.fit(loader, override=structure not in ADDITIVE),
        lambda loader: la.fit(loader, progress_bar=False),
        lambda loader: la.optimize_prior_precision(method="gridsearch", val_loader=loader),
        lambda loader: validate(la, loader, lambda *results: 0.0),
    ):
        with model_untouched(model), pytest.raises(InterruptedMidwayError):
            consume(broken_loader(batches, k))
    assert_same(everything(la, case), before)


@every_structure
@basic_cases
@pytest.mark.parametrize("k", [1, 2])
def test_a_loss_may_break_at_any_point_of_the_grid(case, structure, k):
    model = case.model().train()
    la = fitted(case, structure, model)
    before, counts = everything(la, case), itertools.count(1)

    def loss(*results):
        if next(counts) == k:
            raise InterruptedMidwayError
        return 1.0

    with model_untouched(model), pytest.raises(InterruptedMidwayError):
        la.optimize_prior_precision(method="gridsearch", val_loader=case.batches(3), loss=loss, grid_size=3)
    assert_same(everything(la, case), before)


class Breaking(AutogradEF):
    """A back end that raises on its second batch."""

    def full(self, x, y, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 2:
            raise InterruptedMidwayError
        return super().full(x, y, **kwargs)


def test_a_back_end_may_break():
    case, model = BASIC[0], BASIC[0].model().train()
    la = estimator(case, "full", model, backend=Breaking)
    with model_untouched(model), pytest.raises(InterruptedMidwayError):
        la.fit(case.batches(3, 3))
    with model_untouched(model):
        la.fit(case.batches(1, 3))
    assert_same(everything(la, case), everything(fitted(case, "full", backend=AutogradEF), case))


@every_structure
@pytest.mark.parametrize("step", [1, 3])
def test_tuning_and_evidence_may_break_at_any_step(structure, step, monkeypatch):
    case, model = BASIC[0], BASIC[0].model().train()
    la = fitted(case, structure, model)
    before, counts, true = everything(la, case), itertools.count(1), problem.log_marginal_likelihood

    def evidence(*args, **options):
        if next(counts) == step:
            raise InterruptedMidwayError
        return true(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(problem, "log_marginal_likelihood", evidence)
        with model_untouched(model), pytest.raises(InterruptedMidwayError):
            la.optimize_prior_precision(n_steps=5)
    assert_same(everything(la, case), before)


@pytest.mark.every(2)
@every_structure
@pytest.mark.parametrize(
    ("where", "broken"), [(room, "move"), (states, "Fit"), (room, "GaussianPrior"), (room, "fingerprint")]
)
def test_loading_and_saving_may_break_at_any_point(structure, where, broken, monkeypatch, tmp_path):
    case, model = BASIC[0], BASIC[0].model().train()
    la = fitted(case, structure, model)
    fitted(case, structure, prior_precision=9.0, temperature=3.0).save(tmp_path / "state")
    before = everything(la, case)

    def fails(*args, **kwargs):
        raise InterruptedMidwayError

    with monkeypatch.context() as patch:
        patch.setattr(where, broken, fails)
        with model_untouched(model), pytest.raises(InterruptedMidwayError):
            la.load(tmp_path / "state")
        if broken == "fingerprint":
            with model_untouched(model), pytest.raises(InterruptedMidwayError):
                la.save(tmp_path / "other")
    assert_same(everything(la, case), before)
    assert [file.name for file in tmp_path.iterdir()] == ["state"]
    with model_untouched(model):
        la.load(tmp_path / "state")
        la.save(tmp_path / "state")
    assert la.temperature == 3.0


# -- other modes of autograd ------------------------------------------------------------------------------------------

MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])


@pytest.mark.every(3)
@MODES
@every_structure
@pytest.mark.parametrize("case", [*BASIC, named("masked_positions"), named("conv_regression")], ids=str)
def test_everything_works_without_gradients_and_says_the_same(case, structure, mode, tmp_path):
    expected = fitted(case, structure, enable_backprop=True)
    numbers = everything(expected, case)
    expected.save(tmp_path / "state")
    model = case.model()
    with model_untouched(model), mode():
        la = fitted(case, structure, model, enable_backprop=True)
        found = everything(la, case)
        loaded = estimator(case, structure, model)
        loaded.load(tmp_path / "state")
        loaded_numbers = everything(loaded, case)
        tuned = fitted(case, structure, model, prior_precision=torch.tensor(1.0))
        tuned.optimize_prior_precision(n_steps=5)
        tuned.optimize_prior_precision(
            method="gridsearch", val_loader=case.batches(3), grid_size=1, log_prior_prec_max=-4
        )
        tuned.optimize_prior_precision(n_steps=5)
    for ours in (found, loaded_numbers):
        for a, b in zip(ours, numbers, strict=True):
            assert_close(a, b)
    expected.optimize_prior_precision(n_steps=5)
    assert_close(tuned.prior_precision, expected.prior_precision)


@pytest.mark.every(3)
@MODES
@every_structure
@basic_cases
def test_what_was_made_without_gradients_can_be_differentiated_later(case, structure, mode, tmp_path):
    """In inputs, Jacobians, weights and every hyperparameter: nothing that is kept is an inference tensor."""
    fitted(case, structure).save(tmp_path / "state")
    model, options = case.model(), {"enable_backprop": True}
    with mode():
        predicted = fitted(case, structure, model, prior_precision=torch.tensor(0.7), **options)
        everything(predicted, case)
        weighed = fitted(case, structure, model, **options)
        weighed.square_norm(weighed.mean)
        loaded = estimator(case, structure, model)
        loaded.load(tmp_path / "state")
        loaded.enable_backprop = True
        everything(loaded, case)
        moved = fitted(case, structure, model, **options).to("cpu")
        if structure == "full":
            assert len(weighed.posterior_scale) == len(weighed.posterior_covariance) == weighed.n_params
    for la in (predicted, weighed, loaded, moved):
        shape = (2, case.n_outputs, la.n_params)
        v = torch.ones(la.n_params)
        differentiable(la.functional_variance, torch.ones(shape))
        differentiable(la.log_prob, v)
        differentiable(lambda v, la=la: v * la.mean, v)
        if structure == "full":
            differentiable(lambda v, la=la: v @ la.posterior_scale @ la.posterior_covariance, v)
        differentiable(lambda x, la=la: la(x, diagonal_output=case.likelihood == "regression"), case.test_inputs())
        differentiable(lambda x, la=la: la.functional_samples(x, n_samples=2), case.test_inputs())
        for name, value in (
            ("prior_mean", torch.ones(())),
            ("temperature", torch.ones(())),
            ("prior_precision", torch.ones(2)),
        ):
            differentiable(
                lambda value, la=la, name=name: setattr(la, name, value) or la.log_marginal_likelihood(), value
            )
            setattr(la, name, value)
        la.optimize_prior_precision(n_steps=2)


def differentiable(function, at: torch.Tensor) -> None:
    at = at.clone().requires_grad_()
    result = function(at)
    result = result if isinstance(result, torch.Tensor) else result[1]
    assert bool(torch.autograd.grad(result.square().sum(), at)[0].abs().sum() > 0)


# -- neighbors --------------------------------------------------------------------------------------------------------


@basic_cases
def test_approximations_of_one_model_live_side_by_side(case):
    """Of every structure, interleaved call by call: each says what it says alone."""
    model = case.model()
    options = {"full": {"prior_precision": 3.0}, "kron": {"temperature": 0.5}, "diag": {"backend": AutogradEF}}
    alone = {structure: everything(fitted(case, structure, **chosen), case) for structure, chosen in options.items()}
    together = {structure: estimator(case, structure, model, **chosen) for structure, chosen in options.items()}
    with model_untouched(model):
        for la in together.values():
            la.fit(case.batches(5))
        for la in together.values():
            la.fit(case.batches(1, 3))
            la(case.test_inputs())
        together["full"].enable_backprop = True
        together["full"](case.test_inputs())
        together["full"].enable_backprop = False
        for structure, la in together.items():
            assert_same(everything(la, case), alone[structure])
            assert la.model.model is model, "the user's model itself, not a copy"


def test_one_object_may_predict_while_another_fits():
    """A loader whose batches are made with predictions of another approximation of the same model."""
    case, model = BASIC[0], BASIC[0].model()
    first = fitted(case, "full", model)

    def loader():
        for x, y in case.batches(1, 3):
            assert validate(first, [(x, y)], RunningNLLMetric()) > 0
            yield x, y

    second = estimator(case, "kron", model)
    with model_untouched(model):
        second.fit(loader())
    assert_same(everything(second, case), everything(fitted(case, "kron"), case))
