"""Training the weights of a network by their posterior density (``marglik_training``): the objective and its steps.

The one place that writes to the user's model: in the body of ``trained_in_place``, which brings back what has to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from laplace.errors import InputError, UnsupportedError
from laplace.likelihoods import AbstractLikelihood
from laplace.network import Batch, WholeNetwork, training
from laplace.network.batches import differentiable
from laplace.prior import GaussianPrior
from laplace.types import Scalar


@dataclass(frozen=True)
class MAPObjective:
    """``−log p(D|θ) − log p(θ)`` without constants, ``s · nll + ½ (θ − μ₀)ᵀ diag(δ) (θ − μ₀)``, estimated from batches.

    It is divided by the number of rows and by s, so that steps do not grow where the noise shrinks, and is in the units
    of the usual loss: cross-entropy, or mean squared error (twice the negative log-likelihood over C).
    """

    network: WholeNetwork
    """The model; all its random weights are trained."""
    likelihood: AbstractLikelihood
    """With its noise and temperature, which make s = 1/(σ² T)."""
    prior: GaussianPrior
    """Over the weights."""
    n_rows: int
    """N, the number of rows of all batches."""

    def __call__(self, batch: Batch) -> Scalar:
        """Estimate from a batch, in expectation over equally likely batches that of all rows."""
        theta = torch.cat([parameter.reshape(-1) for parameter in self.network.subset.parameters])
        penalty = 0.5 * self.prior.scatter(theta) / self.likelihood.scale
        _check_finite(penalty, "weights")
        x, y = differentiable((batch.x, batch.y))
        f = self.network(x)
        positions = self.likelihood.flatten(f, self.network.reading.targets(y))
        positions = positions.to(torch.promote_types(f.dtype, torch.float32))
        nll = self.likelihood.nll(positions.f, positions.y)
        loss = nll / len(y) + penalty / self.n_rows
        _check_finite(loss, "loss")
        return loss * self.likelihood.training_factor(f.shape[-1])


def _check_finite(value: Tensor, what: str) -> None:
    if not math.isfinite(float(value.detach())):
        msg = (
            f"Training diverged: the {what} became infinite or NaN. Lower the learning rate of the weights "
            "(optimizer_kwargs={'lr': ...}), and check inputs and targets for extreme values."
        )
        raise InputError(msg)


def train_epoch(
    objective: MAPObjective,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None = None,
) -> float:
    """Take a step of the weights for each batch."""
    total, n_rows = 0.0, 0
    for batch in batches:
        seen: list[float] = []

        def closure(batch: Batch = batch, seen: list[float] = seen) -> Any:
            optimizer.zero_grad()
            loss = objective(batch)
            loss.backward()
            seen.append(float(loss.detach()))
            return loss

        optimizer.step(closure)
        if scheduler is not None:
            scheduler.step()
        total, n_rows = total + seen[0] * len(batch.y), n_rows + len(batch.y)
    if not n_rows:
        msg = (
            "train_loader yields nothing when it is read again. It has to begin anew in every epoch: use a DataLoader, "
            "a list of batches, or an object whose __iter__ starts from the first batch."
        )
        raise InputError(msg)
    return total / n_rows


def make_optimizer(parameters: Iterable[Tensor], cls: Any, options: dict[str, Any] | None) -> torch.optim.Optimizer:
    """Construct the optimizer of the weights."""
    construct: Callable[..., torch.optim.Optimizer] = cls
    if not callable(cls):
        msg = f"optimizer_cls must be a class of torch.optim, such as torch.optim.Adam; got {cls!r}."
        raise UnsupportedError(msg)
    try:
        optimizer = construct(list(parameters), **(options or {}))
    except (TypeError, ValueError) as error:
        msg = f"optimizer_cls={cls!r} cannot be constructed with the weights and optimizer_kwargs={options}: {error}"
        raise InputError(msg) from error
    if not hasattr(optimizer, "param_groups"):
        msg = f"optimizer_cls must be a class of torch.optim, such as torch.optim.Adam; it makes a {type(optimizer)}."
        raise UnsupportedError(msg)
    decay = [group["weight_decay"] for group in optimizer.param_groups if group.get("weight_decay")]
    if decay:
        msg = (
            f"{type(optimizer).__name__} decays weights (weight_decay={decay[0]:g}): a second prior that the evidence "
            "does not know. The prior precision is learned: pass optimizer_kwargs={'weight_decay': 0.0}."
        )
        raise UnsupportedError(msg)
    return optimizer


def make_scheduler(optimizer: torch.optim.Optimizer, cls: Any, options: dict[str, Any] | None) -> LRScheduler | None:
    """Construct the scheduler of the learning rate."""
    if cls is None:
        if options:
            msg = "scheduler_kwargs are keywords of a scheduler; pass its class as scheduler_cls."
            raise UnsupportedError(msg)
        return None
    construct: Callable[..., LRScheduler] = cls
    try:
        scheduler = construct(optimizer, **(options or {})) if callable(cls) else None
    except (TypeError, ValueError) as error:
        msg = f"scheduler_cls={cls!r} cannot be constructed with the optimizer and scheduler_kwargs={options}: {error}"
        raise InputError(msg) from error
    if scheduler is None or isinstance(scheduler, ReduceLROnPlateau):
        msg = (
            "scheduler_cls must be a class of torch.optim.lr_scheduler that steps after each batch, without arguments, "
            f"such as CosineAnnealingLR; got {cls!r}."
        )
        raise UnsupportedError(msg)
    return scheduler


class Snapshot:
    """Copies of the weights and buffers of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
        # By name, too: a module may replace a buffer instead of writing into it.
        self._buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]

    def restore(self) -> None:
        """Write them into the tensors they were copied from."""
        with torch.no_grad():
            for parameter, copy in self._parameters:
                parameter.copy_(copy)
            for module, name, buffer, copy in self._buffers:
                setattr(module, name, buffer.copy_(copy))


@contextmanager
def trained_in_place(model: nn.Module) -> Generator[None, None, None]:
    """Train a model in the body, in training mode and with gradients (see ``training``)."""
    before, gradients = Snapshot(model), [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        with training(model):
            for parameter, _ in gradients:
                parameter.grad = None
            yield
    except BaseException:
        before.restore()
        raise
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


__all__ = ["MAPObjective", "Snapshot", "make_optimizer", "make_scheduler", "train_epoch", "trained_in_place"]
