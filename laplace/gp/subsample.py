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
class Piece:
    """Some of the chosen data."""

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
        self._pieces: list[Piece] = []
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
        self._pieces.append(Piece(x, y, numbers[:, 1:]))
        self._keys.append(numbers[:, 0])
        self._prune()

    def _prune(self) -> None:
        """Keep the best ``size`` of what is there."""
        keys = np.concatenate(self._keys)
        rank = np.zeros(len(keys), dtype=np.int64)
        if self.balanced:
            labels = torch.cat([piece.y for piece in self._pieces]).cpu().numpy()
            for label in np.unique(labels):
                of_label = np.flatnonzero(labels == label)
                rank[of_label[np.argsort(keys[of_label])]] = np.arange(len(of_label))
        kept = np.zeros(len(keys), dtype=bool)
        kept[np.lexsort((keys, rank))[: self.size]] = True
        pieces, start = [], 0
        for piece, key in zip(self._pieces, self._keys, strict=True):
            rows = np.flatnonzero(kept[start : start + len(key)])
            start += len(key)
            if len(rows) == len(key) and piece is not self._pieces[-1]:
                pieces.append((piece, key))
            elif len(rows):
                # The rows of a new batch are copied even if all are kept: loaders may fill the same tensor again.
                index = torch.as_tensor(rows, device=piece.y.device)
                x = rows_of(piece.x, index, piece.n_rows)
                pieces.append((Piece(x, piece.y[index], piece.noise[rows]), key[rows]))
        self._pieces, self._keys = [p for p, _ in pieces], [k for _, k in pieces]

    def pieces(self, *, at_most: bool = False, at_once: int | None = None) -> list[Piece]:
        """What was kept, in batches."""
        if self.n_seen < self.size and not at_most:
            data = "unmasked training data" if self.balanced else "training data"
            msg = (
                f"A subsample of {self.size} of {self.n_seen} {data} was asked for; it can have between 1 and "
                f"{self.n_seen}."
            )
            raise InputError(msg)
        limit = self._largest_batch if at_once is None else at_once
        result: list[Piece] = []
        group: list[Piece] = []

        def flush() -> None:
            if group:
                sizes = [piece.n_rows for piece in group]
                x = join_rows([piece.x for piece in group], sizes)
                noise = np.concatenate([piece.noise for piece in group])
                result.append(Piece(x, torch.cat([piece.y for piece in group]), noise))
                group.clear()

        for piece in self._pieces:
            together = sum(p.n_rows for p in group) + piece.n_rows
            same = group and signature(piece.x, piece.n_rows) == signature(group[0].x, group[0].n_rows)
            if group and (not same or together > limit or piece.y.shape[1:] != group[0].y.shape[1:]):
                flush()
            group.append(piece)
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
