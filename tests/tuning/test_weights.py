"""The objective of the weights, its steps, and a model that is trained in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace.errors import InputError, UnsupportedError
from laplace.likelihoods import resolve
from laplace.network import WholeNetwork
from laplace.network.batches import split
from laplace.prior import GaussianPrior
from laplace.tuning.weights import (
    MAPObjective,
    Snapshot,
    make_optimizer,
    make_scheduler,
    train_epoch,
    trained_in_place,
)
from tests import reference
from tests.cases import CASES, Case, named
from tests.contracts import model_untouched
from tests.tools import assert_close

SIGMA, T, MU = 0.7, 1.6, 0.2
REGRESSION = named("regression")


def keys(case: Case) -> dict[str, str]:
    return {"dict_key_x": "input_ids", "dict_key_y": "labels", **{k: v for k, v in case.options.items() if "dict" in k}}


def objective(case: Case, model: nn.Module) -> MAPObjective:
    network = WholeNetwork(model, **keys(case))
    sizes = network.subset.sizes
    prior = GaussianPrior(torch.tensor(MU), 0.3 + torch.arange(float(len(sizes))), sizes)
    noise = {"sigma_noise": SIGMA} if case.likelihood == "regression" else {}
    return MAPObjective(network, resolve(case.likelihood, temperature=T, **noise), prior, case.n_rows)


def batches(case: Case, *sizes: int) -> list:
    return [split(batch, keys(case)["dict_key_y"], torch.device("cpu")) for batch in case.batches(*sizes)]


def log_joint(case: Case, model: nn.Module) -> torch.Tensor:
    """−s Σ nll − ½ Σ δ_g ‖θ_g − μ‖² over all data, by the definitions."""
    x, y = case.data()
    f = case.forward(model, x).reshape(len(y), -1, case.n_outputs)
    scale = 1 / (SIGMA**2 * T) if case.likelihood == "regression" else 1 / T
    nll = sum(reference.datum_nll(case.likelihood, row, target) for row, target in zip(f, y, strict=True))
    prior = sum(0.5 * (0.3 + g) * ((p - MU) ** 2).sum() for g, p in enumerate(model.parameters()))
    return -scale * nll - prior


def units(case: Case, f: torch.Tensor) -> float:
    """What turns −log p(D, θ) into the usual loss a row."""
    if case.likelihood != "regression":
        return T / case.n_rows
    return T * SIGMA**2 * 2 / (f.shape[-1] if f.dim() > 1 else 1) / case.n_rows


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_objective_is_the_log_joint_density_and_so_is_its_gradient(case):
    model = case.model()
    unit = units(case, case.forward(model, case.data()[0]))
    actual, expected = objective(case, model)(*batches(case)), -unit * log_joint(case, model)
    assert_close(actual, expected)
    weights = list(model.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(value, weights) for value in (actual, expected)), strict=True):
        assert_close(ours, theirs, "gradient")


@pytest.mark.parametrize("name", ["regression", "classification", "masked_rows", "preferences"])
def test_the_objective_of_batches_averages_to_that_of_all_rows(name):
    case = named(name)
    model = case.model()
    parts = batches(case, 1, 3)
    total = sum(objective(case, model)(batch) * len(batch.y) for batch in parts) / case.n_rows
    assert_close(total, objective(case, model)(*batches(case)))


def test_for_one_output_without_a_prior_the_objective_is_the_loss_of_torch():
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    model = nn.Linear(3, 2)
    network = WholeNetwork(model)
    flat = GaussianPrior(torch.zeros(()), torch.full((1,), 1e-30), network.subset.sizes)
    for name, target, loss in (
        ("regression", y, nn.functional.mse_loss),
        ("classification", torch.tensor([0, 1, 1, 0, 1]), nn.functional.cross_entropy),
    ):
        value = MAPObjective(network, resolve(name), flat, 5)(split((x, target), "", torch.device("cpu")))
        assert_close(value, loss(model(x), target))


def test_half_precision_outputs_are_scored_in_single_precision():
    model = nn.Linear(3, 2).bfloat16()
    network = WholeNetwork(model)
    prior = GaussianPrior(torch.zeros((), dtype=torch.float32), torch.ones(1), network.subset.sizes)
    batch = split((torch.randn(5, 3).bfloat16(), torch.zeros(5, dtype=torch.long)), "", torch.device("cpu"))
    loss = MAPObjective(network, resolve("classification"), prior, 5)(batch)
    loss.backward()
    assert loss.dtype is not torch.bfloat16
    assert model.weight.grad.dtype is torch.bfloat16


@pytest.mark.parametrize("what", ["weights", "loss"])
def test_numbers_that_are_none_say_what_to_do(what):
    model = REGRESSION.model()
    (batch,) = batches(REGRESSION)
    if what == "weights":
        with torch.no_grad():
            model.head.bias.fill_(float("inf"))
    else:
        batch.y[0] = 1e200  # a number whose square is none
    with pytest.raises(InputError, match=f"the {what} became infinite or NaN. Lower the learning rate"):
        objective(REGRESSION, model)(batch)


# -- steps ------------------------------------------------------------------------------------------------------------


def test_an_epoch_is_gradient_descent_batch_by_batch():
    model, twin = REGRESSION.model(), REGRESSION.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for batch in batches(REGRESSION, 3, 4):
        loss = objective(REGRESSION, twin)(batch)
        losses.append(float(loss.detach()) * len(batch.y) / REGRESSION.n_rows)
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
                parameter -= 0.01 * gradient
    with torch.enable_grad():
        value = train_epoch(objective(REGRESSION, model), batches(REGRESSION, 3, 4), optimizer)
    assert value == pytest.approx(sum(losses))
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(ours, theirs)


def test_an_optimizer_may_ask_for_the_loss_again():
    model = REGRESSION.model()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    start = objective(REGRESSION, model)(*batches(REGRESSION)).detach()
    assert train_epoch(objective(REGRESSION, model), batches(REGRESSION), optimizer) == pytest.approx(float(start))
    gradients = torch.autograd.grad(log_joint(REGRESSION, model), list(model.parameters()))
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-3


def test_the_scheduler_steps_after_each_batch():
    model = REGRESSION.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = make_scheduler(optimizer, torch.optim.lr_scheduler.StepLR, {"step_size": 1, "gamma": 0.1})
    optimizer.param_groups[0]["lr"] = 1e-3
    train_epoch(objective(REGRESSION, model), batches(REGRESSION, 3, 4), optimizer, scheduler)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-6)
    assert make_scheduler(optimizer, None, None) is None


def test_an_epoch_without_batches_is_refused():
    model = REGRESSION.model()
    with pytest.raises(InputError, match="yields nothing when it is read again"):
        train_epoch(objective(REGRESSION, model), [], torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("cls", "options", "says"),
    [
        ("Adam", None, "must be a class of torch.optim.*got 'Adam'"),
        (torch.optim.AdamW, None, "AdamW decays weights.*a second prior.*'weight_decay': 0.0"),
        (torch.optim.SGD, {"lr": 0.1, "weight_decay": 1e-3}, "SGD decays weights .weight_decay=0.001"),
    ],
)
def test_optimizers_that_do_not_fit_are_refused(cls, options, says):
    with pytest.raises(UnsupportedError, match=says):
        make_optimizer(nn.Linear(2, 2).parameters(), cls, options)
    allowed = make_optimizer(nn.Linear(2, 2).parameters(), torch.optim.AdamW, {"weight_decay": 0.0})
    assert isinstance(allowed, torch.optim.AdamW)


@pytest.mark.parametrize(
    ("cls", "options", "says"),
    [
        (None, {"gamma": 0.9}, "pass its class as scheduler_cls"),
        ("StepLR", None, "must be a class of torch.optim.lr_scheduler.*got 'StepLR'"),
        (torch.optim.lr_scheduler.ReduceLROnPlateau, None, "without arguments"),
    ],
)
def test_schedulers_that_do_not_fit_are_refused(cls, options, says):
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(UnsupportedError, match=says):
        make_scheduler(optimizer, cls, options)


# -- in place ---------------------------------------------------------------------------------------------------------


class Replacing(nn.Module):
    """Puts another tensor in the place of a buffer, as some running averages do."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.seen = self.seen + len(x)
        return self.inner(x)


def state(model: nn.Module) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]


def disturb(model: nn.Module) -> None:
    model(torch.randn(5, 2)).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)


def test_a_snapshot_brings_back_weights_and_buffers_in_their_tensors():
    model = Replacing()
    before, tensors = state(model), [*model.parameters(), *model.buffers()]
    snapshot = Snapshot(model)
    disturb(model)
    assert any(not torch.equal(a, b) for a, b in zip(state(model), before, strict=True))
    for _ in range(2):  # a snapshot can be used again
        snapshot.restore()
        assert all(torch.equal(a, b) for a, b in zip(state(model), before, strict=True))
        assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], tensors, strict=True))
        disturb(model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_model_is_what_it_was_when_the_body_raises(error):
    model = Replacing().eval()
    model.inner[0].weight.grad = torch.ones(2, 2)
    before, gradient = state(model), model.inner[0].weight.grad

    def body():
        with trained_in_place(model):
            assert model.inner[0].weight.grad is None
            disturb(model)
            raise error

    with pytest.raises(error):
        body()
    assert all(torch.equal(a, b) for a, b in zip(state(model), before, strict=True))
    assert model.inner[0].weight.grad is gradient
    assert torch.equal(gradient, torch.ones(2, 2)), "not added to"
    assert model.inner[0].bias.grad is None
    assert not any(module.training for module in model.modules())


def test_a_model_keeps_what_was_learned_and_nothing_else():
    model = Replacing().eval()
    before = state(model)
    with torch.no_grad(), trained_in_place(model):
        disturb(model)
    assert all(not torch.equal(a, b) for a, b in zip(state(model), before, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


def test_nothing_is_done_by_itself():
    model = Replacing()
    with model_untouched(model), trained_in_place(model):
        pass
