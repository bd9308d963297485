"""Outputs of a network and their derivatives at some inputs: computed once, they serve any prior or noise.

Of a linear head the derivatives are blocks of features, one row for each position, and the outputs are linear in them;
of a whole network one row for each datum, with a column for each output at each position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.errors import UnsupportedError
from laplace.likelihoods.draws import chunks, draw
from laplace.network.parameters import split_sizes
from laplace.predictive.base import Linearization
from laplace.predictive.spectral import SpectralLinearization
from laplace.structures import AbstractPrecision
from laplace.structures.basis import Basis, DenseBasis
from laplace.structures.head_block import HeadBlock, follow, head_blocks
from laplace.structures.jacobian import JacobianBlock, sum_parts


@runtime_checkable
class Derivatives(Protocol):
    """Derivatives of outputs in all random weights, made when they are asked for."""

    def columns(self, mix: Float[Tensor, "columns all"]) -> list[JacobianBlock]:
        """Blocks of mixtures of the outputs of each datum, ``[columns, positions·C]``."""
        ...

    @property
    def n_columns_at_once(self) -> int:
        """How many columns fit the memory that chunks may take."""
        ...


@dataclass(frozen=True)
class StoredDerivatives:
    """All columns, kept: one block for each parameter group."""

    blocks: Sequence[JacobianBlock]

    def columns(self, mix: Float[Tensor, "columns all"]) -> list[JacobianBlock]:
        """Mixtures of them."""
        return [block.to(mix.dtype).mix(mix) for block in self.blocks]

    @property
    def n_columns_at_once(self) -> int:
        """All of them are there already."""
        return self.blocks[0].n_columns


@dataclass(frozen=True)
class NetworkLinearization(Linearization):
    """Outputs and derivatives: ``f(θ) ≈ f + J (θ − θ*)``, of a head exactly.

    Attributes
    ----------
    f
        Outputs, ``[batch, *positions, C]``.
    derivatives
        In the random weights; ``None`` where only the network itself is asked for.
    evaluate
        The network's outputs at other weights ``[P]``; ``None`` of a head, which is linear in its weights.
    theta
        The weights it is linearized at, ``[P]``; ``None`` of a head.
    seen
        Runs a network once more for its features, ``[rows, D]``.
    """

    f: Tensor
    derivatives: Derivatives | None
    evaluate: Callable[[Tensor], Tensor] | None = None
    theta: Tensor | None = None
    seen: Callable[[], Tensor] | None = None

    @classmethod
    def of_head(cls, f: Tensor, phi: Tensor, shapes: Sequence[tuple[int, ...]]) -> NetworkLinearization:
        """Outputs and features ``[batch, *positions, D]`` of a head with parameter groups of these shapes."""
        return cls(f, StoredDerivatives(head_blocks(phi if phi.dim() == 2 else phi.flatten(0, -2), shapes)))

    @property
    def is_linear(self) -> bool:
        """Whether outputs are linear in the random weights: those of a head."""
        return self.evaluate is None

    @property
    def n_columns(self) -> int:
        """Number of columns: C of a head, whose rows are positions; else C at each position of a datum."""
        return self.n_outputs if self.is_linear else self.f[0].numel()

    @property
    def _derivatives(self) -> Derivatives:
        if self.derivatives is None:
            msg = "These outputs were computed without derivatives."
            raise UnsupportedError(msg)
        return self.derivatives

    def blocks(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> list[JacobianBlock]:
        """Derivatives of some of the columns, all by default."""
        derivatives, n = self._derivatives, self.n_columns
        stop = n if stop is None else min(stop, n)
        if isinstance(derivatives, StoredDerivatives) and (start, stop) == (0, n):
            return [block.to(dtype) for block in derivatives.blocks]
        mix = torch.zeros(stop - start, n, dtype=dtype, device=self.f.device)
        mix.diagonal(start).fill_(1)
        return derivatives.columns(mix)

    @property
    def head(self) -> list[HeadBlock]:
        """The blocks of a head."""
        assert self.is_linear and isinstance(self.derivatives, StoredDerivatives), "of a head"
        return [block for block in self.derivatives.blocks if isinstance(block, HeadBlock)]

    @property
    def features(self) -> Tensor | None:
        """Of a head; of a network by another forward pass."""
        if self.is_linear:
            return self.head[0].phi
        return None if self.seen is None else self.seen()

    def with_weights(self, theta: Float[Tensor, " params"]) -> NetworkLinearization:
        """Of a head: the same features with outputs at other weights."""
        rows = sum_parts(
            [
                block.apply(v)
                for block, v in zip(
                    self.blocks(theta.dtype),
                    split_sizes(theta.unsqueeze(0), [block.n_params for block in self.head]),
                    strict=True,
                )
            ]
        )
        return replace(self, f=rows[0].T.reshape(self.f.shape).to(self.f.dtype))

    def select(self, rows: Tensor) -> NetworkLinearization:
        """Some positions of a head, flattened, ``[rows, ...]``."""
        f = self.f.reshape(-1, self.n_outputs)[rows]
        return replace(self, f=f, derivatives=StoredDerivatives([block.select(rows) for block in self.head]))

    def followed_by(self, others: Sequence[Linearization]) -> NetworkLinearization:
        """Row after row, of a head; positions are flattened where batches have different numbers of them."""
        parts = [self, *(other for other in others if isinstance(other, NetworkLinearization))]
        f = [part.f for part in parts]
        if len({part.shape[1:] for part in f}) > 1:
            f = [part.reshape(-1, self.n_outputs) for part in f]
        return replace(self, f=torch.cat(f), derivatives=StoredDerivatives(follow([part.head for part in parts])))

    def variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs"]:
        """A few outputs at a time."""
        step = self._derivatives.n_columns_at_once
        starts = range(0, self.n_columns, step)
        parts = [precision.block_variance(self.blocks(dtype, start, start + step)) for start in starts]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).T.reshape(-1, self.n_outputs)

    def covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs outputs"]:
        """All outputs of a position at a time."""
        step = self.n_outputs
        starts = range(0, self.n_columns, step)
        parts = [precision.block_covariance(self.blocks(dtype, start, start + step)) for start in starts]
        return parts[0] if len(parts) == 1 else torch.stack(parts, 1).flatten(0, 1)

    def joint_covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "joint joint"]:
        """All outputs at once."""
        return precision.block_kernel(self.blocks(dtype))

    def differences(self, dtype: torch.dtype) -> list[JacobianBlock]:
        """Derivatives of the difference of the two scores of each pair, one column."""
        if self.is_linear:
            return [block.to(dtype).differences() for block in self.head]
        return self._derivatives.columns(torch.tensor([[1.0, -1.0]], dtype=dtype, device=self.f.device))

    def pair_variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "pairs one"]:
        """One column, the difference."""
        return precision.block_variance(self.differences(dtype)).T

    def functions(
        self, precision: AbstractPrecision, n_samples: int, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Iterator[Float[Tensor, "samples rows outputs"]]:
        """Through the weights; of a network in function space where there are fewer outputs than samples."""
        mean = self.mean(dtype)
        if not self.is_linear and mean.numel() <= n_samples:
            cov = self.joint_covariance(precision, dtype).unsqueeze(0)
            for part in draw(mean.reshape(1, -1), cov, n_samples, generator):
                yield part.reshape(-1, *mean.shape)
            return
        step = self._derivatives.n_columns_at_once
        for size in chunks(n_samples, max(precision.n_params, mean.numel())):
            theta = precision.sample(size, generator)
            rows: list[Tensor] = []
            for start in range(0, self.n_columns, step):
                blocks = self.blocks(dtype, start, start + step)
                parts = split_sizes(theta, [block.n_params for block in blocks])
                rows.append(sum_parts([b.apply(v) for b, v in zip(blocks, parts, strict=True)]))
            moved = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
            yield mean + moved.transpose(1, 2).reshape(size, *mean.shape)

    def network_functions(
        self, precision: AbstractPrecision, n_samples: int, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Iterator[Float[Tensor, "samples rows outputs"]]:
        """One forward pass for each sample, by functional calls; of a head the same as ``functions``."""
        evaluate, center = self.evaluate, self.theta
        if evaluate is None or center is None:
            yield from self.functions(precision, n_samples, generator, dtype)
            return
        mean = self.mean(dtype)
        for size in chunks(n_samples, max(precision.n_params, mean.numel())):
            thetas = center + precision.sample(size, generator)
            yield torch.stack([evaluate(theta).reshape(mean.shape).to(dtype) for theta in thetas])

    def rotated(self, basis: Basis, dtype: torch.dtype) -> Linearization:
        """Derivatives in other coordinates, group by group or all weights at once."""
        if isinstance(basis, DenseBasis):
            return SpectralLinearization(self.f, lambda: basis.blocks(self.blocks(dtype)))
        return replace(self, derivatives=StoredDerivatives(basis.blocks(self.blocks(dtype))))

    def kept(self, limit: int) -> tuple[Linearization, int] | None:
        """All columns, each group in factors or written out, whichever is smaller, if they fit; a head has few."""
        if self.derivatives is None or self.is_linear:
            return super().kept(limit)
        dtype = torch.promote_types(self.f.dtype, torch.float32)
        blocks, n_columns = self.blocks(dtype, 0, 1), self.n_columns
        least = sum(min(block.size, block.n_rows * block.n_params) for block in blocks) * n_columns
        if least + self.f.numel() > limit:
            return None
        blocks = [block.compact() for block in (blocks if n_columns == 1 else self.blocks(dtype))]
        size, stored = sum(block.size for block in blocks) + self.f.numel(), StoredDerivatives(blocks)
        return replace(self, derivatives=stored), size
