"""The optimizers of our own reach the optima of functions that are known."""

import pytest
import torch

from laplace.optimizers import SGD, Adam, lbfgs
from tests.tools import assert_close

F64 = torch.float64


def counted(function):
    """The function, and a list with an entry for each time it is asked."""
    asked = []

    def call(x):
        asked.append(1)
        return function(x)

    return call, asked


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


@pytest.mark.parametrize("n", [1, 2, 20])
def test_a_quadratic_function_is_minimized(n):
    scales, center = torch.logspace(-1, 2, n, dtype=F64), torch.linspace(-3, 2, n, dtype=F64)
    function, asked = counted(lambda x: 0.5 * (scales * (x - center) ** 2).sum())
    found = lbfgs(function, torch.zeros(n, dtype=F64), max_iter=200, tolerance_grad=1e-9, tolerance_change=0)
    torch.testing.assert_close(found, center, rtol=0, atol=1e-6)
    assert len(asked) < 200


def test_a_narrow_valley_is_followed_to_its_end():
    function, asked = counted(rosenbrock)
    found = lbfgs(function, torch.tensor([-1.2, 1.0, -1.0, 1.5], dtype=F64), max_iter=200, tolerance_grad=1e-8)
    torch.testing.assert_close(found, torch.ones(4, dtype=F64), rtol=0, atol=1e-6)
    assert len(asked) < 150


@pytest.mark.parametrize("first_step", [1e-4, 1e-2, 1.0, 100.0])
def test_any_first_step_leads_there(first_step):
    found = lbfgs(lambda x: x.exp().sum() - 3 * x.sum(), torch.zeros(1), max_iter=50, first_step=first_step)
    torch.testing.assert_close(found, torch.tensor([3.0], dtype=F64).log(), rtol=0, atol=1e-5)


def test_the_start_is_left_as_it_is_and_no_step_returns_it():
    start = torch.tensor([2.0, 3.0])
    assert_close(lbfgs(lambda x: x.square().sum(), start, max_iter=0), start.double())
    lbfgs(lambda x: x.square().sum(), start, max_iter=5)
    assert start.tolist() == [2.0, 3.0]


def test_values_in_float32_end_where_rounding_begins():
    function, asked = counted(lambda x: 1000 + (x.float() - 1.5).square().sum())
    found = lbfgs(function, torch.zeros(3), max_iter=500)
    torch.testing.assert_close(found, torch.full((3,), 1.5, dtype=F64), rtol=0, atol=1e-2)
    assert len(asked) < 40


def test_flat_parts_end_the_search():
    function, asked = counted(lambda x: x.clamp(min=1.0).sum())
    lbfgs(function, torch.tensor([3.0], dtype=F64), max_iter=50)
    assert len(asked) < 40


def test_no_gradient_is_needed_around_it():
    with torch.no_grad():
        found = lbfgs(lambda x: (x - 1).square().sum(), torch.zeros(1), max_iter=20)
    torch.testing.assert_close(found, torch.ones(1, dtype=F64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_descent_takes_the_steps_of_pytorch(momentum):
    ours, theirs = torch.ones(3), torch.ones(3, requires_grad=True)
    descent = SGD([ours], 0.1, momentum, 0.01)
    optimizer = torch.optim.SGD([theirs], lr=0.1, momentum=momentum, weight_decay=0.01)
    for _ in range(20):
        theirs.grad = torch.tensor([1.0, -2.0, 0.1]) * theirs.detach()
        descent.step([torch.tensor([1.0, -2.0, 0.1]) * ours])
        optimizer.step()
        torch.testing.assert_close(ours, theirs.detach())


def test_adam_takes_the_steps_of_pytorch():
    ours, theirs = torch.ones(3), torch.ones(3, requires_grad=True)
    adam, optimizer = Adam([ours], 0.1), torch.optim.Adam([theirs], lr=0.1)
    for step in range(20):
        theirs.grad = torch.tensor([1.0, -2.0, 0.1]) * theirs.detach() + step
        adam.step([torch.tensor([1.0, -2.0, 0.1]) * ours + step])
        optimizer.step()
        torch.testing.assert_close(ours, theirs.detach())
