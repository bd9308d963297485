"""What users say about inducing points, their number, outputs and locations: checked, and chosen from the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from laplace import checks
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.gp.subsample import Reservoir, k_means
from laplace.likelihoods.base import check_outputs
from laplace.network import Batch
from laplace.network.batches import count_rows
from laplace.types import Inputs

STRATEGIES = ("random", "kmeans")
"""How locations can be chosen from the training data."""

CANDIDATES = 100
"""Data a center that clusters are made of."""

NO_TUNING = (
    "VaLLA trains its prior precision in fit(train_loader, iterations=…, lr=…): what was trained at the "
    "inducing points belongs to it. Go on with fit(…, override=False), or assign la.prior_precision."
)
"""Why methods that choose a prior precision after fitting are refused."""


def count_inducing(locations: Inputs, number: Any) -> int:
    """M, the number of inducing points."""
    if number is not None:
        checks.whole("num_inducing", number)
    if isinstance(locations, str):
        if locations not in STRATEGIES:
            names = ", ".join(map(repr, STRATEGIES))
            msg = f"inducing_locations must be a batch of inputs, or one of {names}; got {locations!r}."
            raise UnsupportedError(msg)
        if number is None:
            msg = f"inducing_locations={locations!r} chooses from the training data: pass num_inducing= with it."
            raise InputError(msg)
        return int(number)
    if not _tensors_in(locations):
        msg = (
            "inducing_locations must be a batch of inputs (a tensor or any nesting of tensors), 'random' or 'kmeans'; "
            f"got {type(locations).__name__}."
        )
        raise InputError(msg)
    found = count_rows(locations)
    if not found:
        msg = "inducing_locations is an empty batch: pass at least one inducing input."
        raise InputError(msg)
    if number not in (None, found):
        msg = f"inducing_locations holds {found} inputs, num_inducing says {number}. Leave num_inducing out."
        raise ShapeError(msg)
    return found


def _tensors_in(x: Any) -> bool:
    if isinstance(x, Tensor):
        return x.dim() > 0
    values = x.values() if hasattr(x, "values") else x if isinstance(x, (tuple, list)) else ()
    return any(_tensors_in(value) for value in values)


def checked_classes(classes: Tensor | Sequence[int] | None, number: int) -> Tensor | None:
    """Outputs of the inducing points, ``[M]``."""
    if classes is None:
        return None
    try:
        tensor = torch.as_tensor(classes).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        msg = f"inducing_classes must be indices of outputs, whole numbers from 0 on; got {classes!r}."
        raise InputError(msg) from error
    if tensor.shape != (number,):
        msg = (
            f"inducing_classes must hold one output for each of the {number} inducing points; got {list(tensor.shape)}."
        )
        raise ShapeError(msg)
    if tensor.is_floating_point() or tensor.dtype is torch.bool or bool((tensor < 0).any()):
        msg = f"inducing_classes must be indices of outputs, whole numbers from 0 on; got {tensor.tolist()[:5]}."
        raise InputError(msg)
    return tensor.long().clone()


def choose_inducing(strategy: str, number: int, batches: Iterator[Batch], seed: int) -> Inputs:
    """Locations of inducing points, chosen from the training data."""
    clusters = strategy == "kmeans"
    reservoir = Reservoir(CANDIDATES * number if clusters else number, seed)
    for batch in batches:
        if clusters and not (isinstance(batch.x, Tensor) and batch.x.is_floating_point()):
            msg = 'Cluster centers need inputs that are one floating-point tensor. Use "random", or pass locations.'
            raise InputError(msg)
        reservoir.add(batch.x, batch.y)
    if not reservoir.n_seen:
        msg = "The training loader is empty: there is nothing to choose inducing points from."
        raise InputError(msg)
    if reservoir.n_seen < number:
        msg = (
            f"There are {reservoir.n_seen} training data, fewer than num_inducing={number}. Use fewer inducing points."
        )
        raise InputError(msg)
    drawn = reservoir.batches(at_most=clusters, at_once=reservoir.size)
    if len(drawn) > 1:
        msg = "Training inputs have different shapes, so that some of them are no batch. Pass inducing_locations."
        raise InputError(msg)
    x = drawn[0].x
    return k_means(x.flatten(1), number, seed).reshape(number, *x.shape[1:]) if clusters else x


def drawn(
    strategy: str, number: int, loader: Iterable[Any], read: Callable[[Iterable[Any]], Iterator[Batch]], seed: int
) -> Inputs:
    """Locations chosen from a user's loader, which training goes over again."""
    if isinstance(loader, Iterator):
        msg = (
            f"inducing_locations={strategy!r} goes over the training data once more than training, and this loader "
            "can be used once only. Pass a DataLoader or a list of batches."
        )
        raise InputError(msg)
    return choose_inducing(strategy, number, read(loader), seed)


def outputs_at(run: Callable[[], Tensor], number: int) -> Tensor:
    """Outputs at the inducing inputs, one row for each."""
    try:
        f = run()
    except RuntimeError as error:
        msg = (
            f"The model cannot run on the inducing inputs: {str(error).rstrip('.')}. inducing_locations must be a "
            "batch such as the training loader yields, without targets."
        )
        raise InputError(msg) from error
    check_outputs(f)
    if len(f) != number:
        msg = f"The model gives {len(f)} rows of outputs for {number} inducing inputs; one each is needed."
        raise InputError(msg)
    return f


def classes_of(classes: Tensor | None, f: Tensor) -> Tensor:
    """Which of the flattened outputs each inducing point is, ``[M]``; dealt in turn where nobody said it."""
    n_columns = f[0].numel()
    if classes is None:
        return torch.arange(len(f), device=f.device) % n_columns
    if bool((classes >= n_columns).any()):
        msg = (
            f"inducing_classes are indices of the {n_columns} outputs of an input, 0..{n_columns - 1}; got "
            f"{int(classes.max())}."
        )
        raise InputError(msg)
    return classes.to(f.device)


def checked_alpha(alpha: float) -> float:
    """Which divergence is minimized, in [0, 1]."""
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not 0 <= alpha <= 1:
        msg = f"alpha must lie in [0, 1]: 0 is variational inference, 1 fits the predictive density; got {alpha!r}."
        raise InputError(msg)
    return float(alpha)
