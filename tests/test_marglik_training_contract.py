"""What training by the evidence leaves alone, what it refuses, and that every keyword has an effect."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace
from laplace import marglik_training
from laplace.curvature import AutogradEF
from laplace.errors import InputError, ShapeError, UnsupportedError
from tests.cases import Case, named
from tests.contracts import generator
from tests.test_marglik_training import CLASSIFICATION, REGRESSION, everything, same, short, weights

# -- what is left alone -----------------------------------------------------------------------------------------------


def test_modes_and_gradients_and_frozen_weights_are_left_alone():
    model = named("conv_classification").model()
    model.train()
    model.body[1].eval()
    model.body[0].bias.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    modes, frozen, before = [m.training for m in model.modules()], model.body[0].bias.clone(), weights(model)
    statistics = model.body[1].running_mean.clone()
    la, returned, _, _ = short(named("conv_classification"), model)
    assert returned is model
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert model.head.bias.grad is None
    assert torch.equal(model.body[0].bias, frozen)
    assert torch.equal(model.body[1].running_mean, statistics), "normalization that was kept in evaluation mode"
    assert not torch.equal(weights(model), before)
    assert la.n_params == len(before) - len(frozen)


def test_a_model_in_evaluation_mode_is_trained_in_training_mode():
    case = named("conv_classification")
    model = case.model()
    statistics = model.body[1].running_mean.clone()
    short(case, model)
    assert not torch.equal(model.body[1].running_mean, statistics)
    assert not any(module.training for module in model.modules())


def test_no_random_number_is_drawn_here():
    state = torch.get_rng_state()
    short(CLASSIFICATION)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_runs_where_gradients_are_off():
    expected = everything(short(REGRESSION))
    for context in (torch.no_grad, torch.inference_mode):
        model = REGRESSION.model()
        with context():
            found = everything(short(REGRESSION, model))
        assert same(found, expected)


class Failing:
    """A loader that raises in a later pass."""

    def __init__(self, case: Case, passes: int, error: BaseException):
        self.case, self.passes, self.error = case, passes, error

    def __iter__(self) -> Iterator[Any]:
        self.passes -= 1
        batches = self.case.batches(4)
        yield batches[0]
        if self.passes < 0:
            raise self.error
        yield from batches[1:]


@pytest.mark.parametrize("passes", [1, 2, 5], ids=["while training", "while fitting", "later"])
@pytest.mark.parametrize("error", [OSError("gone"), KeyboardInterrupt()], ids=repr)
def test_a_model_is_what_it_was_when_something_is_raised(passes, error):
    case = named("conv_classification")
    model = case.model()
    before = [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]
    with pytest.raises(type(error)):
        short(case, model, Failing(case, passes, error))
    assert same([*model.parameters(), *model.buffers()], before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"optimizer_cls": torch.optim.SGD, "optimizer_kwargs": {"lr": 1e30}, "marglik_frequency": 3},
            "Training diverged: the .* Lower the learning rate",
        ),
        ({"lr_hyp": 1e4, "n_hypersteps": 3}, "log marginal likelihood became|must be positive and finite"),
    ],
)
def test_training_that_diverges_says_what_to_do_and_changes_nothing(options, says):
    model = REGRESSION.model()
    before = weights(model)
    with pytest.raises(InputError, match=says):
        short(REGRESSION, model, **options)
    assert torch.equal(weights(model), before)


# -- what is refused --------------------------------------------------------------------------------------------------


class Once:
    """Begins only once, which no type tells."""

    def __init__(self, batches: list[Any]):
        self.left = iter(batches)

    def __iter__(self) -> Iterator[Any]:
        return self.left


@pytest.mark.parametrize(
    ("loader", "says"),
    [
        (iter(REGRESSION.batches(4)), "an iterator .list_iterator. can be read once only"),
        ((batch for batch in REGRESSION.batches(4)), "an iterator .generator. can be read once only"),
        (Once(REGRESSION.batches(4)), "yields nothing when it is read again"),
        ([], "is empty"),
        (3, "Expected a DataLoader"),
        ([torch.ones(3)], "must yield .x, y."),
        ([(torch.ones(4, 3).double(), torch.ones(4, 3).double())], "must have the shape of the model's outputs"),
    ],
    ids=["iterator", "generator", "once", "empty", "number", "inputs alone", "shape"],
)
def test_data_that_cannot_be_used_are_refused(loader, says):
    model = REGRESSION.model()
    before = weights(model)
    with pytest.raises((InputError, ShapeError), match=says):
        short(REGRESSION, model, loader)
    assert torch.equal(weights(model), before)
    assert not model.training


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n_epochs": 0}, "n_epochs must be a positive whole number; got 0"),
        ({"n_epochs": 2.0}, "n_epochs must be a positive whole number; got 2.0"),
        ({"n_epochs_burnin": -1}, "n_epochs_burnin must be a whole number that is not negative"),
        ({"n_hypersteps": 0}, "n_hypersteps must be"),
        ({"marglik_frequency": True}, "marglik_frequency must be"),
        ({"n_epochs": 5, "marglik_frequency": 6}, "no epoch ends with a fit"),
        ({"n_epochs": 5, "marglik_frequency": 3, "n_epochs_burnin": 4}, "no epoch ends with a fit"),
        ({"optimizer_cls": torch.optim.AdamW}, "AdamW decays weights"),
        ({"scheduler_kwargs": {"gamma": 0.5}}, "scheduler_cls"),
        ({"likelihood": "regressio"}, "Did you mean 'regression'"),
        ({"hessian_structure": "gp"}, "structure over weights"),
        ({"prior_structure": "layer"}, "prior_structure must be one of"),
        ({"prior_prec_init": -1.0}, "prior_precision must be positive"),
        ({"sigma_noise_init": 0.0}, "sigma_noise must be positive"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"backend": "AsdlGGN"}, "backend must be a subclass of CurvatureInterface"),
        ({"asdl_fisher_kwargs": {"fisher_type": "mc"}}, "options of the ASDL back ends"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_that_cannot_be_used_are_refused_before_the_data_are_read(options, says):
    class Unread:
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("read")

    with pytest.raises((InputError, UnsupportedError), match=says):
        short(REGRESSION, loader=Unread(), **options)


# -- keywords ---------------------------------------------------------------------------------------------------------

RECORDED = {
    "model": inspect.Parameter.empty,
    "train_loader": inspect.Parameter.empty,
    "likelihood": "classification",
    "hessian_structure": "kron",
    "backend": None,
    "optimizer_cls": torch.optim.Adam,
    "optimizer_kwargs": None,
    "scheduler_cls": None,
    "scheduler_kwargs": None,
    "n_epochs": 300,
    "lr_hyp": 0.1,
    "prior_structure": "layerwise",
    "n_epochs_burnin": 0,
    "n_hypersteps": 10,
    "marglik_frequency": 1,
    "prior_prec_init": 1.0,
    "sigma_noise_init": 1.0,
    "temperature": 1.0,
    "fix_sigma_noise": False,
    "progress_bar": False,
    "enable_backprop": False,
    "dict_key_x": "input_ids",
    "dict_key_y": "labels",
}
"""The arguments of laplace-torch 0.3, in order; its default back end is another one."""


def test_the_signature_begins_with_the_recorded_one():
    parameters = list(inspect.signature(marglik_training).parameters.values())
    assert {p.name: p.default for p in parameters[: len(RECORDED)]} == RECORDED
    assert [p.name for p in parameters[: len(RECORDED)]] == list(RECORDED)
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[len(RECORDED) :])


def test_the_name_is_that_of_the_function_wherever_it_is_imported_from():
    from laplace.marglik_training import marglik_training as from_its_module

    assert laplace.marglik_training is marglik_training is from_its_module
    assert "marglik_training" in laplace.__all__


CHANGED = {
    "likelihood": {"likelihood": "classification", "loader": [(x, y.softmax(-1)) for x, y in REGRESSION.batches(2, 4)]},
    "hessian_structure": {"hessian_structure": "diag"},
    "backend": {"backend": AutogradEF},
    "optimizer_cls": {"optimizer_cls": torch.optim.SGD},
    "optimizer_kwargs": {"optimizer_kwargs": {"lr": 0.01}},
    "scheduler_cls": {"scheduler_cls": torch.optim.lr_scheduler.ExponentialLR, "scheduler_kwargs": {"gamma": 0.5}},
    "scheduler_kwargs": {"scheduler_cls": torch.optim.lr_scheduler.StepLR, "scheduler_kwargs": {"step_size": 1}},
    "n_epochs": {"n_epochs": 4},
    "lr_hyp": {"lr_hyp": 0.05},
    "prior_structure": {"prior_structure": "scalar"},
    "n_epochs_burnin": {"n_epochs_burnin": 2},
    "n_hypersteps": {"n_hypersteps": 3},
    "marglik_frequency": {"marglik_frequency": 2},
    "prior_prec_init": {"prior_prec_init": 2.0},
    "sigma_noise_init": {"sigma_noise_init": 0.5},
    "temperature": {"temperature": 2.0},
    "fix_sigma_noise": {"fix_sigma_noise": True},
    "prior_mean": {"prior_mean": 0.5},
    "backend_kwargs": {"backend_kwargs": {"stochastic": True, "generator": generator(0)}},
}
"""Keyword -> a choice that changes the numbers."""
ELSEWHERE = {
    "model",
    "train_loader",
    "progress_bar",
    "enable_backprop",
    "dict_key_x",
    "dict_key_y",
    "curvature_dtype",
    "asdl_fisher_kwargs",
    "output_key",
    "output_fn",
    "output_dim",
    "shift_labels",
}
"""Keywords with a test of their own."""


def test_the_tables_cover_every_keyword():
    assert set(inspect.signature(marglik_training).parameters) == set(CHANGED) | ELSEWHERE


@pytest.mark.parametrize("keyword", CHANGED)
def test_every_keyword_has_an_effect(keyword):
    assert not same_numbers(short(REGRESSION, **CHANGED[keyword]), short(REGRESSION))


def same_numbers(first: Any, second: Any) -> bool:
    a, b = everything(first), everything(second)
    return all(x.shape == y.shape and torch.allclose(x, y, rtol=1e-6) for x, y in zip(a, b, strict=True))


def test_batches_may_be_mappings_under_other_keys():
    class Named(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, pixels: Tensor) -> Tensor:
            return self.inner(pixels)

    loader = [{"pixels": x, "truth": y} for x, y in REGRESSION.batches(2, 4)]
    found = short(REGRESSION, Named(REGRESSION.model()), loader, dict_key_x="pixels", dict_key_y="truth")
    assert same_numbers(found, short(REGRESSION))
    with pytest.raises(InputError, match="dict_key_y"):
        short(REGRESSION, Named(REGRESSION.model()), loader, dict_key_x="pixels")
    assert same_numbers(short(REGRESSION, Named(REGRESSION.model()), loader, dict_key_y="truth"), found)


def test_outputs_may_be_anywhere_in_what_the_model_returns():
    class Returns(nn.Module):
        """Outputs with positions, as the model has them or with channels first, beside something else."""

        def __init__(self, axis: int):
            super().__init__()
            self.axis, self.layer = axis, nn.Linear(3, 2).double()
            with torch.no_grad():
                self.layer.weight.fill_(0.1)
                self.layer.bias.zero_()

        def forward(self, x: Tensor) -> Any:
            f = self.layer(x)
            return f if self.axis == -1 else (x, f.movedim(-1, self.axis))

    x = torch.linspace(-1, 1, 60).double().reshape(5, 4, 3)
    y = x[..., :2].square()
    options: dict[str, Any] = {"n_epochs": 3, "n_epochs_burnin": 1, "marglik_frequency": 1, "n_hypersteps": 2}
    plain = marglik_training(Returns(-1), [(x, y)], "regression", **options)
    for told in ({"output_key": 1}, {"output_fn": lambda returned: returned[1], "output_dim": 1}):
        found = marglik_training(Returns(1), [(x, y.movedim(-1, 1))], "regression", **options, **told)
        assert found[2] == pytest.approx(plain[2])
        assert found[3] == pytest.approx(plain[3])
        assert torch.allclose(found[0].mean, plain[0].mean)
        assert torch.allclose(found[0](x)[0], plain[0](x)[0].movedim(-1, 1))


def test_predictions_are_differentiable_on_request():
    x = REGRESSION.test_inputs().requires_grad_()
    assert not short(REGRESSION)[0](x)[0].requires_grad
    assert short(REGRESSION, enable_backprop=True)[0](x)[0].requires_grad


def test_curvature_and_hyperparameters_have_the_precision_that_was_asked_for():
    loader = [(x.float(), y.float()) for x, y in REGRESSION.batches(2, 4)]
    for dtype, expected in ((None, torch.float32), (torch.float64, torch.float64)):
        la, model, _, _ = short(REGRESSION, REGRESSION.model().float(), loader, curvature_dtype=dtype)
        assert la.prior_precision.dtype is la.log_marginal_likelihood().dtype is expected
        assert next(model.parameters()).dtype is torch.float32


def test_the_bar_counts_epochs(capsys):
    short(REGRESSION)
    assert "marginal likelihood" not in capsys.readouterr().err
    short(REGRESSION, progress_bar=True)
    assert "[Training by the marginal likelihood]: 100%" in capsys.readouterr().err
