"""``SoDSampler``: a random subset of the data, drawn once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from laplace.errors import InputError


class SoDSampler(Sampler[int]):
    """M of N indices, without replacement, the same in every pass.

    Parameters
    ----------
    N
        Size of the data set.
    M
        Size of the subset.
    seed
        Seed of ``numpy.random.default_rng``.

    Raises
    ------
    InputError
        If M is not between 1 and N.
    """

    def __init__(self, N: int, M: int, seed: int = 0) -> None:
        if not 1 <= M <= N:
            msg = f"The subset must have between 1 and {N} data; got {M}."
            raise InputError(msg)
        self.indices = [int(index) for index in np.random.default_rng(seed).choice(N, M, replace=False)]

    def __iter__(self) -> Iterator[int]:
        """Iterate over the indices."""
        return iter(self.indices)

    def __len__(self) -> int:
        """M."""
        return len(self.indices)
