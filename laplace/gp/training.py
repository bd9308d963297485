"""Training of the sparse Gaussian process of VaLLA: Adam, and for one deterministic batch Adam that never goes up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from laplace.errors import InputError
from laplace.gp.variational import Objective, Statistics
from laplace.likelihoods import AbstractLikelihood
from laplace.optimizers import Adam


@dataclass(frozen=True)
class Parameters:
    """All that is trained."""

    root: Float[Tensor, "points points"]
    """L, lower triangular, ``[M, M]``: what the data say at the inducing points is ``L Lᵀ``."""
    log_delta: Tensor
    """Log of the prior precision, ``[]``."""
    log_sigma: Tensor | None
    """Log of the observation noise, ``[]``; ``None`` where there is none."""

    def free(self, *, hyperparameters: bool) -> list[Tensor]:
        """The tensors to train."""
        others = [self.log_delta, self.log_sigma] if hyperparameters else []
        return [self.root, *(tensor for tensor in others if tensor is not None)]

    def copy(self) -> Parameters:
        """Detached copies; the root lower triangular."""
        log_sigma = None if self.log_sigma is None else self.log_sigma.detach().clone()
        return Parameters(self.root.detach().tril().clone(), self.log_delta.detach().clone(), log_sigma)


def value_of(
    objective: Objective,
    batch: Statistics,
    parameters: Parameters,
    likelihood: Callable[[Tensor | None], AbstractLikelihood],
) -> Tensor:
    """The objective at some parameters, in nats."""
    sigma = None if parameters.log_sigma is None else parameters.log_sigma.exp()
    return objective(batch, parameters.root.tril(), parameters.log_delta.exp(), likelihood(sigma))


@dataclass(frozen=True)
class Validation:
    """How training is watched."""

    score: Callable[[Parameters], float]
    """Mean negative log predictive density of validation data, in nats."""
    every: int
    """Iterations between two looks."""


def train(
    objective: Objective,
    batches: Iterator[Statistics],
    start: Parameters,
    likelihood: Callable[[Tensor | None], AbstractLikelihood],
    *,
    iterations: int,
    lr: float,
    hyperparameters: bool,
    monotone: bool,
    validation: Validation | None = None,
    progress_bar: bool = False,
) -> tuple[Parameters, list[float], list[float]]:
    """Minimize the objective."""
    now = start.copy()
    free = now.free(hyperparameters=hyperparameters)
    for tensor in free:
        tensor.requires_grad_()
    optimizer = Adam(free, lr)
    values: list[float] = []
    scores: list[float] = []
    best, lowest = now.copy(), math.inf
    for iteration in tqdm(range(1, iterations + 1), desc="[Training]", disable=not progress_bar):
        batch = next(batches)
        with torch.enable_grad():
            value = value_of(objective, batch, now, likelihood)
        values.append(float(value.detach()))
        if not math.isfinite(values[-1]):
            msg = (
                f"The objective is {values[-1]} at iteration {iteration}. Look for extreme values in the data, or "
                f"lower lr (it is {optimizer.lr:.3g})."
            )
            raise InputError(msg)
        gradients = torch.autograd.grad(value, free)
        before = [tensor.detach().clone() for tensor in free]
        optimizer.step(gradients)
        if monotone:
            with torch.no_grad():
                after = float(value_of(objective, batch, now, likelihood))
                if not after <= values[-1]:
                    for tensor, old in zip(free, before, strict=True):
                        tensor.copy_(old)
                    optimizer = Adam(free, optimizer.lr / 2)
        if validation is not None and (iteration % validation.every == 0 or iteration == iterations):
            scores.append(validation.score(now.copy()))
            if scores[-1] < lowest:
                best, lowest = now.copy(), scores[-1]
    return (best if math.isfinite(lowest) else now.copy()), values, scores
