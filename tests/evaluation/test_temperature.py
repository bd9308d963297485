"""The fitted temperature is the minimum of the validation likelihood, where there is one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.evaluation import SoftmaxPredictor, best_temperature, fit_temperature


def overconfident(seed: int = 0, factor: float = 5.0, rows: int = 200) -> tuple[Tensor, Tensor]:
    """Logits whose targets are drawn at temperature `factor`."""
    generator = torch.Generator().manual_seed(seed)
    honest = 1.5 * torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    y = torch.multinomial(honest.softmax(-1), 1, generator=generator).squeeze(-1)
    return factor * honest, y


@pytest.mark.parametrize("seed", range(5))
def test_the_likelihood_is_stationary_at_the_temperature(seed: int) -> None:
    logits, y = overconfident(seed)
    log_t = torch.tensor(best_temperature(logits, y)).log().requires_grad_()
    F.cross_entropy(logits / log_t.exp(), y).backward()
    assert log_t.grad is not None
    assert abs(float(log_t.grad)) < 1e-6  # the line search compares losses, so it sees gradients above √eps ≈ 1e-8


def test_no_temperature_of_a_fine_grid_is_better() -> None:
    logits, y = overconfident()
    best = float(F.cross_entropy(logits / best_temperature(logits, y), y))
    grid = torch.logspace(-2, 2, 2001)
    losses = torch.stack([F.cross_entropy(logits / t, y) for t in grid])
    assert best <= float(losses.min())
    assert float(grid[losses.argmin()]) == pytest.approx(best_temperature(logits, y), rel=5e-3)


def test_the_temperature_that_made_the_data_is_found() -> None:
    logits, y = overconfident(factor=3.0, rows=20_000)
    assert best_temperature(logits, y) == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize("factor", [1e-4, 0.1, 7.0, 1e4])
def test_the_temperature_is_proportional_to_the_logits(factor: float) -> None:
    logits, y = overconfident()
    assert best_temperature(factor * logits, y) == pytest.approx(factor * best_temperature(logits, y), rel=1e-6)


def test_masked_rows_are_left_out() -> None:
    logits, y = overconfident()
    masked = y.clone()
    masked[::4] = -100
    kept = masked != -100
    assert best_temperature(logits, masked) == best_temperature(logits[kept], y[kept])


def test_gradients_may_be_switched_off() -> None:
    logits, y = overconfident()
    with torch.no_grad():
        assert best_temperature(logits, y) == best_temperature(logits.requires_grad_(), y)


def test_no_temperature_is_best_when_every_row_is_right() -> None:
    with pytest.raises(InputError, match="classified correctly"):
        best_temperature(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))


def test_no_temperature_is_best_when_the_logits_are_wrong() -> None:
    with pytest.raises(InputError, match="do not favor the right classes"):
        best_temperature(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 1]))


def test_wrong_input_is_explained() -> None:
    with pytest.raises(ShapeError, match="3 rows of logits and 2 targets"):
        best_temperature(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(InputError, match="finite logits"):
        best_temperature(torch.full((2, 2), torch.nan), torch.zeros(2, dtype=torch.long))
    with pytest.raises(InputError, match="at least one row"):
        best_temperature(torch.zeros(2, 2), torch.full((2,), -100))
    with pytest.raises(InputError, match="empty"):
        fit_temperature(nn.Linear(2, 2), [])


class WithLogits(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(x)}


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 4)).train()


def test_a_model_is_fitted_batch_by_batch_and_left_as_it_was(model: nn.Module) -> None:
    x, y = torch.randn(50, 3), torch.randint(4, (50,))
    with torch.no_grad():
        logits = model.eval()(x)
        y = torch.where(torch.rand(50) < 0.7, logits.argmax(-1), y)
        model.train()
    fitted = fit_temperature(model, [(x[:30], y[:30]), (x[30:], y[30:])])
    assert model.training
    assert fitted.temperature == pytest.approx(best_temperature(logits, y), rel=1e-6)
    torch.testing.assert_close(fitted(x), (logits / fitted.temperature).softmax(-1))


def test_probabilities_of_a_network_are_float64() -> None:
    probs = SoftmaxPredictor(nn.Linear(3, 4).float())(1000 * torch.randn(5, 3, dtype=torch.float32))
    assert probs.dtype == torch.float64


def test_logits_may_come_in_a_mapping(model: nn.Module) -> None:
    x = torch.randn(5, 3)
    torch.testing.assert_close(SoftmaxPredictor(WithLogits(model))(x), SoftmaxPredictor(model)(x))


def test_a_model_without_logits_is_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(UnsupportedError, match="returns a tuple of 2"):
        SoftmaxPredictor(Pair())(torch.ones(2, 2))


class OneLogit(nn.Module):
    """One logit, with its axis or without."""

    def __init__(self, *, squeezed: bool) -> None:
        super().__init__()
        self.squeezed = squeezed

    def forward(self, x: Tensor) -> Tensor:
        return x if self.squeezed else x.unsqueeze(-1)


@pytest.mark.parametrize("squeezed", [False, True])
@pytest.mark.parametrize("as_targets", [lambda y: y, lambda y: y.double(), lambda y: y.unsqueeze(-1)])
def test_one_logit_is_that_of_two_classes(squeezed, as_targets) -> None:
    generator = torch.Generator().manual_seed(0)
    honest = 1.5 * torch.randn(300, generator=generator, dtype=torch.float64)
    f, y = 4 * honest, torch.bernoulli(honest.sigmoid(), generator=generator).long()
    fitted = fit_temperature(
        OneLogit(squeezed=squeezed), [(f[:100], as_targets(y)[:100]), (f[100:], as_targets(y)[100:])]
    )
    log_t = torch.tensor(fitted.temperature).double().log().requires_grad_()
    F.binary_cross_entropy_with_logits(f / log_t.exp(), y.double()).backward()
    assert log_t.grad is not None
    assert abs(float(log_t.grad)) < 1e-6
    p = (f / fitted.temperature).sigmoid()
    torch.testing.assert_close(fitted(f), torch.stack([1 - p, p], -1))
    assert best_temperature(f.unsqueeze(-1), y) == pytest.approx(fitted.temperature)


def test_targets_that_are_no_class_indices_are_refused_by_name() -> None:
    x = torch.randn(4, 3)
    for y, error, words in (
        (torch.tensor([0, 1, 2, 3]), InputError, "from 0 to 2"),
        (torch.tensor([0.0, 1.0, 0.5, 1.0]), InputError, "whole numbers"),
        (torch.tensor([0.0, 1.0, torch.nan, 1.0]), InputError, "NaN"),
        (torch.ones(4, 3).long(), ShapeError, "multilabel"),
    ):
        with pytest.raises(error, match=words):
            fit_temperature(nn.Identity(), [(x, y)])
    with pytest.raises(InputError, match="from 0 to 1"):
        fit_temperature(OneLogit(squeezed=False), [(x[:, 0], torch.tensor([0, 1, 2, 1]))])
