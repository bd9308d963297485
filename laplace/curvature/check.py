"""Whether the formulas of a recorded pass hold: its derivatives against autograd's, at the precision of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from laplace.structures.jacobian import JacobianBlock

LOW_PRECISION = 1e-3
"""Precision from which on several projections are compared, since with a wide tolerance one may agree by chance."""
PROJECTIONS = 8
"""Number of projections then."""


def norms_of(gradients: Sequence[Tensor | None], dtype: torch.dtype) -> list[float]:
    """Norms of gradients, read together; zero of one that is not there."""
    found = [gradient.to(dtype).norm() for gradient in gradients if gradient is not None]
    read = iter(torch.stack(found).tolist() if found else [])
    return [0.0 if gradient is None else next(read) for gradient in gradients]


def agrees(
    truth: Tensor,
    blocks: Sequence[JacobianBlock],
    scale: Callable[[], float],
    largest: float,
    eps: float,
    noise: torch.Generator,
) -> bool:
    """Whether the derivatives of all data and uses add up to autograd's gradient, projected on random weights.

    ``scale`` gives the norm of all the terms of the gradient, which its rounding is relative to, and is called in doubt
    only; ``largest`` is the norm of the largest gradient of any group, ``eps`` the precision of the model.
    """
    like = blocks[0].sample
    tolerance = max(3 * min(eps, torch.finfo(torch.float32).eps) ** 0.5, 16 * eps)
    # Sums whose terms cancel everywhere, such as the gradient of the bias of attention's keys, are only rounding.
    floor = min(100 * eps, 1e-4) * largest * truth.numel() ** 0.5
    flat = truth.reshape(-1).to(like.dtype)
    differences, sizes = [], []
    for _ in range(PROJECTIONS if eps >= LOW_PRECISION else 1):
        v = torch.randn(1, truth.numel(), generator=noise, dtype=torch.float32)
        v = v.to(like.device, like.dtype, non_blocking=True)
        terms = torch.stack([block.apply(v).flatten() for block in blocks]).sum(0)
        differences.append(terms.sum() - flat @ v[0])
        sizes.append(torch.linalg.vector_norm(terms))
    means = (torch.stack(values).square().mean().sqrt() for values in (differences, sizes))
    difference, size, norm = torch.stack([*means, flat.norm()]).tolist()
    # A NaN difference agrees with nothing.
    if difference <= tolerance * (size + norm) + floor:
        return True
    return difference <= tolerance * scale() + floor


def proves(norm: float, largest: float, eps: float) -> bool:
    """Whether a gradient is large enough to judge by, beside the largest of any group."""
    return norm > min(1e3 * eps, 0.1) * largest
