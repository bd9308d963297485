"""How far weights move when training goes on (SWAG-Diag): ``fit_diagonal_swag_var``, for one of the masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace import checks
from laplace.errors import InputError, UnsupportedError, numbered
from laplace.linalg import lasting
from laplace.network.batches import Batch, arguments, differentiable, iterate
from laplace.network.failures import explained
from laplace.network.modes import attributes_restored, training
from laplace.network.outputs import AS_RETURNED
from laplace.network.threads import alone
from laplace.network.whole_network import unwrap
from laplace.optimizers import SGD


@lasting
def fit_diagonal_swag_var(
    model: nn.Module,
    train_loader: Iterable[Any],
    criterion: Callable[[Tensor, Tensor], Tensor],
    n_snapshots_total: int = 40,
    snapshot_freq: int = 1,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 3e-4,
    min_var: float = 1e-30,
    *,
    dict_key_x: str = "input_ids",
    dict_key_y: str = "labels",
) -> Float[Tensor, " params"]:
    """Variances of the weights along a path of stochastic gradient descent that starts at the trained ones.

    ``Σ_diag = mean_t θ_t² − (mean_t θ_t)²`` over snapshots θ_1, …, θ_T, one after every ``snapshot_freq`` passes.

    Parameters
    ----------
    model
        The trained network; it is read, never written: copies of its weights and buffers are trained.
    train_loader
        Yields batches; it is looped over ``n_snapshots_total · snapshot_freq`` times.
    criterion
        ``criterion(outputs, targets)``, the loss of a batch, as the model was trained with.
    n_snapshots_total
        T.
    snapshot_freq
        Passes over the data for each snapshot.
    lr, momentum, weight_decay
        Options of ``torch.optim.SGD``.
    min_var
        Lower bound of the variances.
    dict_key_x, dict_key_y
        Entries of mapping batches that hold the main input and the targets.

    Returns
    -------
    ``[P]``, in units of a weight squared and the order of ``parameters_to_vector(model.parameters())``; ``min_var`` for
    weights that do not require a gradient, which stay where they are.

    Raises
    ------
    InputError
        If a number is out of range, the loader yields nothing in some pass, or the loss or a weight is not finite.
    UnsupportedError
        If no weight requires a gradient.

    Notes
    -----
    As when training, the model runs in training mode: dropout draws from PyTorch's global generator, and batch
    normalization uses the batch. Time is that of the passes; memory O(P). The variance is summed by updates of the mean
    (Welford), since in low precision the difference of the two means would be rounding.

    References
    ----------
    Maddox, Garipov, Izmailov, Vetrov & Wilson (2019), "A simple baseline for Bayesian uncertainty in deep learning",
    section 3.2. arXiv:1902.02476
    """
    check(n_snapshots_total, snapshot_freq, lr, min_var)
    module = unwrap(model)
    weights = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in module.named_parameters()}
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    trained = [weight for weight in weights.values() if weight.requires_grad]
    if not trained:
        msg = "No weight of the model requires a gradient: unfreeze those that should move with requires_grad_(True)."
        raise UnsupportedError(msg)
    optimizer = SGD(trained, lr, momentum, weight_decay)
    path = Path(weights)

    def step(batch: Batch) -> None:
        x = differentiable(batch.x)
        args, kwargs = arguments(module, x, dict_key_x=dict_key_x, dict_key_y=dict_key_y)
        with alone(module), attributes_restored(module), explained(module, x, args, kwargs):
            f = AS_RETURNED.tensor(torch.func.functional_call(module, (weights, buffers), args, kwargs))
        loss = criterion(f, differentiable(batch.y))
        if not bool(torch.isfinite(loss)):
            value = float(loss.detach())
            msg = f"The loss along the path is {value}: look for NaN in the data, or take a smaller lr than {lr}."
            raise InputError(msg)
        # Nothing but the copies gets a gradient, whatever the model holds on to.
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        optimizer.step(gradients)

    with training(module):
        for number in range(1, n_snapshots_total * snapshot_freq + 1):
            n_batches = 0
            for index, batch in enumerate(iterate(train_loader, dict_key_y=dict_key_y, device=trained[0].device)):
                with numbered(index, batch.x):
                    step(batch)
                n_batches += 1
            if not n_batches:
                msg = (
                    f"train_loader yields nothing in pass {number}. It is looped over several times: pass a DataLoader "
                    "or a list of batches, not a generator."
                )
                raise InputError(msg)
            if number % snapshot_freq == 0:
                path.add()
    variances = path.variance()
    if not bool(torch.isfinite(variances).all()):
        msg = f"The weights along the path are no numbers any more: take a smaller lr than {lr}."
        raise InputError(msg)
    return variances.clamp_min(min_var)


class Path:
    """Mean and variance over snapshots of weights, which change in between."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._weights = weights
        self._n_snapshots = 0
        self._mean = torch.zeros_like(self._vector())
        self._squares = torch.zeros_like(self._mean)

    def _vector(self) -> Tensor:
        vector = torch.cat([weight.detach().reshape(-1) for weight in self._weights.values()])
        return vector.to(torch.promote_types(vector.dtype, torch.float32))

    def add(self) -> None:
        """Take a snapshot."""
        self._n_snapshots += 1
        theta = self._vector()
        step = theta - self._mean
        self._mean += step / self._n_snapshots
        self._squares += step * (theta - self._mean)

    def variance(self) -> Float[Tensor, " params"]:
        """Mean squared distance from the mean of the snapshots."""
        return self._squares / self._n_snapshots


def check(n_snapshots_total: int, snapshot_freq: int, lr: float, min_var: float) -> None:
    """Raise unless the numbers are in range."""
    checks.whole("n_snapshots_total", n_snapshots_total, 2)  # one snapshot has no variance
    checks.whole("snapshot_freq", snapshot_freq)
    checks.number("lr", lr, positive=True)
    if not checks.number("min_var", min_var) >= 0:
        msg = f"min_var is a lower bound of variances and must not be negative; got {min_var}."
        raise InputError(msg)
