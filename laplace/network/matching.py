"""Whether outputs of a model are those of a head, and which positions it picks: by comparing values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace import pending
from laplace.enums import FeatureReduction
from laplace.errors import UnsupportedError, warn
from laplace.network import heads
from laplace.network.heads import head_of
from laplace.network.modes import full_precision


def unsqueezed(f: Tensor, phi: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Outputs and features of one row with the axis of the batch, where the model squeezes all axes of one entry."""
    phi = phi.unsqueeze(0) if phi.dim() == 1 else phi
    n, (batch, *positions) = heads.n_outputs(layer), phi.shape[:-1]
    orders = ((batch, *positions, n), (batch, n, *positions))
    squeezed = [tuple(size for size in sizes if size != 1) for sizes in orders]
    return (f.unsqueeze(0) if tuple(f.shape) in squeezed and len(phi) == 1 else f), phi


def reduce(phi: Tensor, reduction: FeatureReduction, position: Tensor | None = None) -> Float[Tensor, "batch features"]:
    """Reduce features ``[batch, *positions, features]`` to one row each: the average, or those of one position."""
    flat = phi.flatten(1, -2)
    if reduction is FeatureReduction.AVERAGE:
        return flat.mean(1)
    if position is None:
        return flat[:, 0 if reduction is FeatureReduction.PICK_FIRST else -1]
    return flat[torch.arange(flat.shape[0], device=flat.device), position]


def picked(f: Tensor, made: Tensor, reduction: FeatureReduction, *, first: bool) -> Tensor | None:
    """Which position a model picks for each row, ``[batch]``, where it is not the first or last of all rows.

    Found by value: that whose outputs of the head ``[batch, *positions, C]`` are the outputs ``[batch, C]``; of equal
    ones that nearest to the end that is asked for. Padding moves the position, and no mask is asked for it. Of the
    ``first`` batch not all may be at the other end: what was said is wrong then.
    """
    if reduction is FeatureReduction.AVERAGE or made.dim() < 3 or made.shape[0] != f.shape[0]:
        return None
    with torch.no_grad():
        flat = made.detach().flatten(1, -2)
        fixed = flat[:, 0 if reduction is FeatureReduction.PICK_FIRST else -1]
        # What was said fits: found out where reading is free, and else in the same way as any other position.
        if fixed.shape != f.shape or (pending.is_free(f.device) and close(f, fixed, f.dtype)):
            return None
        distance = (flat - f.detach().unsqueeze(1)).abs().amax(-1)
        last = distance.shape[1] - 1
        if reduction is FeatureReduction.PICK_FIRST:
            position, other_end = distance.argmin(1), last
        else:
            position, other_end = last - distance.flip(1).argmin(1), 0
        return None if not torch.compiler.is_compiling() and first and bool((position == other_end).all()) else position


def check_useful(reduction: FeatureReduction, phi: Tensor) -> None:
    """Raise or warn where features are not reduced although a reduction was asked for."""
    if phi.dim() >= 3:
        msg = (
            f"feature_reduction={reduction.value!r} was given, but the model returns one output for each position; "
            "leave it out to treat positions as they are."
        )
        raise UnsupportedError(msg)
    msg = (
        f"feature_reduction={reduction.value!r} has nothing to reduce: the features of the last layer have the shape "
        f"{list(phi.shape)} already."
    )
    warn(msg, UserWarning)


def matches(f: Tensor, phi: Tensor, layer: nn.Module) -> bool:
    """Whether ``f`` equals ``layer`` applied to ``phi``, to the square root of the coarsest dtype's precision."""
    with torch.no_grad(), full_precision(f.device):
        head = head_of(layer)
        dtype = head.parameters(layer)[0].dtype
        return close(
            f, head.outputs(layer, phi.to(dtype)), max(f.dtype, dtype, phi.dtype, key=lambda d: torch.finfo(d).eps)
        )


def close(f: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether outputs agree, relative to the largest and to the square root of a dtype's precision.

    NaN equals NaN here: what is not finite is reported by whoever uses the outputs, in its own words.
    """
    if expected.shape != f.shape:
        return False
    if is_same(f, expected) or (expected.dtype is f.dtype and torch.equal(f, expected)):
        return True
    return not bool(are_far(f, expected, dtype))


def require_close(f: Tensor, expected: Tensor, message: Callable[[], str]) -> None:
    """Raise unless outputs agree: see ``close``."""
    if not is_same(f, expected):
        pending.refuse(are_far(f, expected, f.dtype), UnsupportedError, message)


def is_same(f: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory, as outputs of a model are those that its head made."""
    if torch.compiler.is_compiling() or f.dtype is not expected.dtype:
        return False
    try:
        return f.is_set_to(expected)
    except RuntimeError:  # within transformations of functions tensors have no memory
        return False


def are_far(f: Tensor, expected: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether some outputs do not agree, ``[]``: see ``close``."""
    with torch.no_grad():
        f, expected = f.detach().double(), expected.detach().double()
        size = torch.where(torch.isfinite(expected), expected.abs(), 0.0).amax() if expected.numel() else expected.sum()
        alike = (f == expected) | (f.isnan() & expected.isnan())
        return ~(alike | ((f - expected).abs() <= torch.finfo(dtype).eps ** 0.5 * size)).all()
