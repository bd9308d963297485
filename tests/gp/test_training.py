"""Training of the sparse Gaussian process: what is trained, what is kept, what is refused."""

import itertools

import pytest
import torch

from laplace.errors import InputError
from laplace.gp.training import Parameters, Validation, train, value_of
from laplace.gp.variational import Objective, Statistics
from laplace.likelihoods import resolve

ONE = torch.ones(())


def start(*, sigma: bool = True) -> Parameters:
    root = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).tril()
    return Parameters(root, torch.tensor(0.2), torch.tensor(-0.1) if sigma else None)


def batch(seed: int = 0) -> Statistics:
    noise = torch.Generator().manual_seed(seed)
    f, y, phi = (torch.randn(*shape, generator=noise) for shape in ((6, 2), (6, 2), (6, 2, 3)))
    return Statistics(f, y, phi, 0.1 * torch.eye(2).expand(6, 2, 2))


def objective(alpha: float = 0.0) -> Objective:
    return Objective(alpha, 6, torch.tensor(1.0), 0, torch.Generator())


def likelihood(sigma):
    return resolve("regression", ONE if sigma is None else sigma, ONE)


def run(first: Parameters, **options):
    options = {"iterations": 40, "lr": 0.1, "hyperparameters": True, "monotone": True, **options}
    return train(objective(), itertools.repeat(batch()), first, likelihood, **options)


@pytest.mark.slow
def test_a_deterministic_objective_never_rises_and_comes_to_rest():
    found, values, _ = run(start(), iterations=800)
    assert all(b <= a for a, b in itertools.pairwise(values))
    free = [tensor.clone().requires_grad_() for tensor in found.free(hyperparameters=True)]
    gradients = torch.autograd.grad(value_of(objective(), batch(), Parameters(*free), likelihood), free)
    assert max(float(g.abs().max()) for g in gradients) < 1e-2


def test_plain_adam_may_rise_and_is_the_optimizer_of_torch():
    first = start()
    found, values, _ = run(first, iterations=5, monotone=False)
    free = [tensor.clone().requires_grad_() for tensor in start().free(hyperparameters=True)]
    adam = torch.optim.Adam(free, lr=0.1)
    for expected in values:
        adam.zero_grad()
        loss = value_of(objective(), batch(), Parameters(*free), likelihood)
        assert abs(float(loss.detach()) - expected) < 1e-12
        loss.backward()
        adam.step()
    for ours, theirs in zip(found.free(hyperparameters=True), free, strict=True):
        torch.testing.assert_close(ours, theirs.detach().tril() if ours.dim() else theirs.detach())
    assert torch.equal(first.root, start().root)  # where it started is not changed


def test_hyperparameters_are_left_alone_when_asked():
    found, _, _ = run(start(), hyperparameters=False)
    assert found.log_sigma is not None
    assert (float(found.log_delta), float(found.log_sigma)) == (0.2, -0.1)
    assert len(start(sigma=False).free(hyperparameters=True)) == 2


def test_the_parameters_with_the_best_validation_score_are_kept():
    seen = []

    def score(now: Parameters) -> float:
        seen.append(now)
        return [3.0, 1.0, 2.0][len(seen) - 1]

    found, _, scores = run(start(), iterations=7, validation=Validation(score, 3))
    assert scores == [3.0, 1.0, 2.0]  # after 3, 6 and 7
    assert torch.equal(found.root, seen[1].root)


def test_an_objective_that_is_not_finite_is_refused():
    bad = Parameters(start().root * torch.nan, torch.tensor(0.2), None)
    with pytest.raises((InputError, torch.linalg.LinAlgError), match=r"NaN|nan"):
        run(bad)
    far = Parameters(start().root, torch.tensor(0.2), torch.tensor(-1000.0))
    with pytest.raises(InputError, match=r"objective is (inf|nan) at iteration 1"):
        run(far)
