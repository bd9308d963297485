"""Two data sets' worth of curvature for a linear layer with C outputs and D features, and priors of every shape."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace.prior import GaussianPrior

C, D = 3, 4
SIZES = (C * D, C)
P = sum(SIZES)


def psd(size: int, seed: int, rank: int = 2) -> Tensor:
    """A random positive semi-definite matrix; singular when `rank` < `size`."""
    root = torch.randn(size, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.T


def uniform(size: int, seed: int = 0) -> Tensor:
    return 0.5 + torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def prior(precision: Tensor, sizes: tuple[int, ...] = SIZES) -> GaussianPrior:
    return GaussianPrior(torch.zeros((), dtype=torch.float64), precision, sizes)


SCALAR, PER_LAYER, PER_WEIGHT = uniform(1), uniform(len(SIZES)), uniform(P)
