"""The border of inducing points: their number, outputs and locations, checked and chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from laplace import checks
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.gp.subsample import Reservoir, k_means
from laplace.network import Batch
from laplace.network.batches import count_rows
from laplace.types import Inputs

STRATEGIES = ("random", "kmeans")
"""How locations can be chosen from the training data."""

CANDIDATES = 100
"""Data a center that clusters are made of."""


def count_inducing(locations: Inputs, number: Any) -> int:
    """M, the number of inducing points.

    Parameters
    ----------
    locations, number
        ``inducing_locations`` and ``num_inducing`` of ``VaLLA``.

    Raises
    ------
    InputError
        If the number is no positive whole number, is missing, or there are no locations.
    ShapeError
        If it is not that of the locations.
    UnsupportedError
        If the way to choose locations is unknown.
    """
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
    """Outputs of the inducing points, ``[M]``.

    Parameters
    ----------
    classes
        What was passed.
    number
        M.

    Raises
    ------
    ShapeError
        If there is not one for each inducing point.
    InputError
        If they are no whole numbers from 0 on.
    """
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
    """Locations of inducing points, chosen from the training data.

    Parameters
    ----------
    strategy
        ``"random"`` or ``"kmeans"``.
    number
        M.
    batches
        The training data.
    seed
        Of the choice.

    Raises
    ------
    InputError
        If there are fewer data, or cluster centers of other inputs than one floating-point tensor are asked for, or
        random inputs have different shapes.
    """
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
    pieces = reservoir.pieces(at_most=clusters, at_once=reservoir.size)
    if len(pieces) > 1:
        msg = "Training inputs have different shapes, so that some of them are no batch. Pass inducing_locations."
        raise InputError(msg)
    x = pieces[0].x
    return k_means(x.flatten(1), number, seed).reshape(number, *x.shape[1:]) if clusters else x
