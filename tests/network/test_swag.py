"""Variances of weights along a path of stochastic gradient descent."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from laplace.errors import InputError, UnsupportedError
from laplace.network.swag import fit_diagonal_swag_var
from tests.cases import ConvNet, KeywordInputs, Net
from tests.contracts import generator, model_untouched
from tests.tools import assert_close

MSE = nn.MSELoss()


def regression(n_inputs: int = 3, n_outputs: int = 2):
    noise = generator(0)
    x, y = torch.randn(6, n_inputs, generator=noise), torch.randn(6, n_outputs, generator=noise)
    return Net(n_inputs, 4, n_outputs), [(x[:4], y[:4]), (x[4:], y[4:])]


def trained_path(model, batches, criterion, n_passes, *, lr=0.01, momentum=0.9, weight_decay=3e-4) -> torch.Tensor:
    """The weights after each pass, by training a copy of the model as one trains a model."""
    twin = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    path = []
    for _ in range(n_passes):
        for x, y in batches:
            optimizer.zero_grad()
            criterion(twin(x), y).backward()
            optimizer.step()
        path.append(parameters_to_vector(twin.parameters()).detach().clone())
    return torch.stack(path)


def variance(path: torch.Tensor) -> torch.Tensor:
    """The definition: mean of the squares minus square of the mean."""
    return path.square().mean(0) - path.mean(0).square()


def test_variances_are_those_of_the_weights_of_a_trained_copy():
    model, batches = regression()
    assert_close(fit_diagonal_swag_var(model, batches, MSE), variance(trained_path(model, batches, MSE, 40)))


def test_every_option_says_which_path():
    model, batches = regression()
    options = {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.1}
    found = fit_diagonal_swag_var(model, batches, MSE, 4, 3, **options)
    assert_close(found, variance(trained_path(model, batches, MSE, 12, **options)[2::3]))
    assert bool((fit_diagonal_swag_var(model, batches, MSE, 4, min_var=1e3) == 1e3).all())


def test_a_quadratic_loss_has_the_variance_of_a_geometric_sequence():
    """Plain descent on (w − 1)²/2 from w = 0: 1 − w_t = (1 − lr)^t."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    loss = lambda f, y: 0.5 * (f - y).square().sum()  # noqa: E731
    found = fit_diagonal_swag_var(
        model, [(torch.ones(1, 1), torch.ones(1, 1))], loss, 5, lr=0.3, momentum=0, weight_decay=0
    )
    assert_close(found, (0.7 ** torch.arange(1.0, 6)).var(correction=0).reshape(1))


def test_batch_normalization_and_dropout_train_on_copies():
    model, noise = ConvNet(3), generator(0)
    batches = [(torch.randn(4, 1, 4, 4, generator=noise), torch.tensor([0, 1, 2, 1]))]
    model.eval()  # flags that are to be found again
    torch.manual_seed(3)
    expected = variance(trained_path(model, batches, nn.CrossEntropyLoss(), 4))
    torch.manual_seed(3)
    with model_untouched(model):
        found = fit_diagonal_swag_var(model, batches, nn.CrossEntropyLoss(), 4)
    assert_close(found, expected)


def test_frozen_weights_stay_and_have_the_least_variance():
    model, batches = regression()
    model.body.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    with model_untouched(model), torch.inference_mode():
        found = fit_diagonal_swag_var(model, batches, MSE, 3)
    assert bool((found[:16] == 1e-30).all())
    assert bool((found[16:] > 1e-30).all())
    assert not found.is_inference()


def test_in_low_precision_the_variance_is_not_rounding():
    model, batches = regression()
    with torch.no_grad():
        model.head.bias += 1e3  # its square has no digits left for the variance in float32
        batches = [(x, y + 1e3) for x, y in batches]
    exact = fit_diagonal_swag_var(model, batches, MSE, 5, lr=1e-3)
    single = fit_diagonal_swag_var(model.float(), [(x.float(), y.float()) for x, y in batches], MSE, 5, lr=1e-3)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single[-2:].double(), exact[-2:], rtol=0.1, atol=0)


def test_mappings_enter_by_their_keys():
    model = KeywordInputs(3, 4, 2)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    options = {"dict_key_x": "input_ids", "dict_key_y": "target"}
    found = fit_diagonal_swag_var(model, [{"input_ids": x, "target": y}], nn.CrossEntropyLoss(), 2, **options)
    assert found.shape == (parameters_to_vector(model.parameters()).numel(),)
    assert bool((found > 1e-30).any())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_snapshots_total": 1}, "at least 2"),
        ({"snapshot_freq": 0}, "snapshot_freq must be a positive whole number"),
        ({"lr": 0.0}, "lr must be one positive finite number"),
        ({"lr": float("nan")}, "lr must be one positive finite number"),
        ({"min_var": -1.0}, "min_var"),
        ({"lr": 1e200}, "smaller lr"),
    ],
)
def test_a_path_that_is_none_is_refused_and_the_model_left_alone(options, message):
    model, batches = regression()
    with model_untouched(model), pytest.raises(InputError, match=message):
        fit_diagonal_swag_var(model, batches, MSE, **options)


def test_a_loader_that_ends_after_one_pass_is_refused():
    model, batches = regression()
    with pytest.raises(InputError, match=r"nothing in pass 2.*not a generator"):
        fit_diagonal_swag_var(model, iter(batches), MSE)


def test_a_model_without_weights_to_move_is_refused():
    model, batches = regression()
    with pytest.raises(UnsupportedError, match="requires_grad_"):
        fit_diagonal_swag_var(model.requires_grad_(False), batches, MSE)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weights_that_are_made_before_each_pass_are_put_back():
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))
    _, batches = regression()
    model(batches[0][0])
    made = model[0].weight
    fit_diagonal_swag_var(model, batches, MSE, 2, lr=0.1)
    assert model[0].weight is made


def test_weights_that_run_away_in_the_last_step_are_refused():
    _, batches = regression()
    with pytest.raises(InputError, match=r"no numbers any more: take a smaller lr than 1e\+100"):
        fit_diagonal_swag_var(nn.Linear(3, 2), batches[:1], MSE, 2, lr=1e100, momentum=0)
