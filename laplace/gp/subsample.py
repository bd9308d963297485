"""Which data and outputs become points: drawn in one pass over any loader, the same however it is cut into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace.errors import InputError
from laplace.likelihoods.categorical import IGNORED
from laplace.network.batches import join_rows, rows_of, signature
from laplace.types import Inputs


@dataclass(frozen=True)
class Drawn:
    """Some of the drawn data, a batch."""

    x: Inputs
    y: Tensor
    noise: np.ndarray[Any, np.dtype[np.float64]]
    """Uniform random numbers that belong to each datum, ``[n, 2]``: they choose its output."""

    @property
    def n_rows(self) -> int:
        """Number of data."""
        return len(self.y)


class Reservoir:
    """A random subset of the data that pass by, without replacement and of a given size.

    Each datum gets a random key; the lowest are kept. A balanced subset takes the lowest of each class in turn. Memory
    is that of the subset and of one batch.
    """

    def __init__(self, size: int, seed: int, *, balanced: bool = False) -> None:
        self.size, self.balanced = size, balanced
        self.n_seen = 0
        self._rng = np.random.default_rng(seed)
        self._batches: list[Drawn] = []
        self._keys: list[np.ndarray[Any, np.dtype[np.float64]]] = []
        self._largest_batch = 1

    def add(self, x: Inputs, y: Tensor) -> None:
        """Consider a batch."""
        if self.balanced and (y.dim() != 1 or y.is_floating_point()):
            msg = (
                "balanced=True draws equal numbers of each class, so targets must be one class index a datum; got "
                f"{y.dtype} of shape {list(y.shape)}. Leave it out."
            )
            raise InputError(msg)
        if self.balanced and bool((y == IGNORED).any()):
            # Masked is no class: such a row has no target to balance.
            rows = (y != IGNORED).nonzero().flatten()
            x, y = rows_of(x, rows, len(y)), y[rows]
        if not len(y):
            return
        self.n_seen += len(y)
        self._largest_batch = max(self._largest_batch, len(y))
        numbers = self._rng.random((len(y), 3))
        self._batches.append(Drawn(x, y, numbers[:, 1:]))
        self._keys.append(numbers[:, 0])
        self._prune()

    def _prune(self) -> None:
        """Keep the best ``size`` of what is there."""
        keys = np.concatenate(self._keys)
        rank = np.zeros(len(keys), dtype=np.int64)
        if self.balanced:
            labels = torch.cat([batch.y for batch in self._batches]).cpu().numpy()
            for label in np.unique(labels):
                of_label = np.flatnonzero(labels == label)
                rank[of_label[np.argsort(keys[of_label])]] = np.arange(len(of_label))
        kept = np.zeros(len(keys), dtype=bool)
        kept[np.lexsort((keys, rank))[: self.size]] = True
        batches, start = [], 0
        for batch, key in zip(self._batches, self._keys, strict=True):
            rows = np.flatnonzero(kept[start : start + len(key)])
            start += len(key)
            if len(rows) == len(key) and batch is not self._batches[-1]:
                batches.append((batch, key))
            elif len(rows):
                # The rows of a new batch are copied even if all are kept: loaders may fill the same tensor again.
                index = torch.as_tensor(rows, device=batch.y.device)
                x = rows_of(batch.x, index, batch.n_rows)
                batches.append((Drawn(x, batch.y[index], batch.noise[rows]), key[rows]))
        self._batches, self._keys = [p for p, _ in batches], [k for _, k in batches]

    def batches(self, *, at_most: bool = False, at_once: int | None = None) -> list[Drawn]:
        """What was kept, in batches."""
        if self.n_seen < self.size and not at_most:
            data = "unmasked training data" if self.balanced else "training data"
            msg = (
                f"A subsample of {self.size} of {self.n_seen} {data} was asked for; it can have between 1 and "
                f"{self.n_seen}."
            )
            raise InputError(msg)
        limit = self._largest_batch if at_once is None else at_once
        result: list[Drawn] = []
        group: list[Drawn] = []

        def flush() -> None:
            if group:
                sizes = [batch.n_rows for batch in group]
                x = join_rows([batch.x for batch in group], sizes)
                noise = np.concatenate([batch.noise for batch in group])
                result.append(Drawn(x, torch.cat([batch.y for batch in group]), noise))
                group.clear()

        for batch in self._batches:
            together = sum(p.n_rows for p in group) + batch.n_rows
            same = group and signature(batch.x, batch.n_rows) == signature(group[0].x, group[0].n_rows)
            if group and (not same or together > limit or batch.y.shape[1:] != group[0].y.shape[1:]):
                flush()
            group.append(batch)
        flush()
        return result


def choose_columns(
    noise: np.ndarray[Any, np.dtype[np.float64]],
    kept: Sequence[Sequence[int]],
    n_outputs: int,
    turns: Sequence[int] | None = None,
) -> Int[Tensor, " batch"]:
    """One output of each datum, at one of its unmasked positions."""
    columns = []
    for row, (u, v) in enumerate(noise.tolist()):
        position = kept[row][int(u * len(kept[row]))]
        output = int(v * n_outputs) if turns is None else turns[row] % n_outputs
        columns.append(position * n_outputs + output)
    return torch.tensor(columns, dtype=torch.int64)


def k_means(
    x: Float[Tensor, "data features"], n_centers: int, seed: int, n_steps: int = 25
) -> Float[Tensor, "centers features"]:
    """Cluster centers: Lloyd's algorithm from a k-means++ start.

    References
    ----------
    Arthur & Vassilvitskii (2007), "k-means++: the advantages of careful seeding".
    """
    rng = np.random.default_rng(seed)
    centers = x[rng.integers(len(x))].unsqueeze(0)
    for _ in range(n_centers - 1):
        distance = torch.cdist(x, centers).amin(1).double().square().cpu().numpy()
        total = distance.sum()
        index = rng.choice(len(x), p=distance / total) if total > 0 else rng.integers(len(x))
        centers = torch.cat([centers, x[index].unsqueeze(0)])
    assigned: Tensor | None = None
    for _ in range(n_steps):
        nearest = torch.cdist(x, centers).argmin(1)
        if assigned is not None and torch.equal(nearest, assigned):
            break
        assigned = nearest
        counts = torch.bincount(nearest, minlength=n_centers).unsqueeze(1)
        sums = torch.zeros_like(centers).index_add_(0, nearest, x)
        centers = torch.where(counts > 0, sums / counts.clamp(min=1), centers)
    return centers
