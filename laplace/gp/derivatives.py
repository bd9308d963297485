"""Derivatives as kernels need them, in blocks: products of ``J`` with vectors, with itself and with chosen rows.

The prior is isotropic, so that the kernel is ``J Jᵀ / δ``; here is ``J Jᵀ``. ``J [rows, C, P]`` has a row for each
position and is never whole; that of a last layer is one more block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace.errors import UnsupportedError
from laplace.network.parameters import split_sizes
from laplace.predictive.linearization import Linearization, NetworkLinearization, StoredDerivatives
from laplace.predictive.pairs import Pairs
from laplace.structures.head_block import OneOutputBlock, head_of, joined
from laplace.structures.jacobian import DenseBlock, JacobianBlock, sum_parts

Blocks = Sequence[JacobianBlock]
"""One for each parameter group; a last layer as a whole is one."""


# -- products of rows --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Some columns of a batch, and where their kernels are written."""

    blocks: Blocks
    place: slice
    """Where the batch is in the kernel: ``batch · width`` rows of it, datum by datum."""
    width: int = 1
    """How many columns the batch has there."""
    columns: slice = field(default_factory=lambda: slice(None))
    """Which of them these are."""
    part: int = 0
    """Of several kernels that of these."""


def product(first: Blocks, second: Blocks) -> Float[Tensor, "columns batch others points"]:
    """``J₁ J₂ᵀ``."""
    return sum_parts([a.cross(b) for a, b in zip(first, second, strict=True)])


def write(kernel: Float[Tensor, "parts n m"], first: Rows, second: Rows) -> None:
    """``J₁ J₂ᵀ``, into a kernel."""
    target = kernel[first.part, first.place, second.place]
    target = target.unflatten(1, (-1, second.width)).unflatten(0, (-1, first.width))
    target[:, first.columns, :, second.columns] = product(first.blocks, second.blocks).permute(1, 0, 3, 2)


def write_lower(
    kernel: Float[Tensor, "parts n n"], rows: Callable[[int | None, int | None], Iterator[tuple[int, Rows]]]
) -> Float[Tensor, "parts n n"]:
    """``J Jᵀ``, batch by batch; of two batches, one of the two halves."""
    for number, first in rows(None, None):
        for _, second in rows(first.part, number + 1):
            write(kernel, first, second)
    return kernel.tril() + kernel.tril(-1).mT


# -- chosen rows -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InducingPoints:
    """M chosen rows of ``J``, one output each of some data: blocks of one column, for several batches."""

    batches: Sequence[Callable[[], Blocks]]
    """How to get the blocks of each batch."""
    sizes: Sequence[int]
    """Number of points in each batch."""

    @property
    def n_points(self) -> int:
        """M."""
        return sum(self.sizes)

    def _rows(self, part: int | None, n_batches: int | None) -> Iterator[tuple[int, Rows]]:  # noqa: ARG002 - one part
        start = 0
        for number, (blocks, size) in enumerate(zip(self.batches[:n_batches], self.sizes, strict=False)):
            yield number, Rows(blocks(), slice(start, start + size))
            start += size

    def gram(self) -> Float[Tensor, "points points"]:
        """``J_M J_Mᵀ``, ``[M, M]``, in output units squared times weight^−2."""
        sample = self.batches[0]()[0].sample
        return write_lower(sample.new_zeros(1, self.n_points, self.n_points), self._rows)[0]

    def combine(self, weights: Float[Tensor, "vectors points"]) -> Float[Tensor, "vectors params"]:
        """Linear combinations of the rows, ``W J_M``."""
        parts = zip(weights.split(list(self.sizes), 1), self.batches, strict=True)
        return summed(combined(blocks(), part.unsqueeze(1)) for part, blocks in parts)


def combined(blocks: Blocks, weights: Float[Tensor, "vectors columns batch"]) -> Float[Tensor, "vectors params"]:
    """``W J``."""
    # Derivatives are kept in the precision of the network.
    return torch.cat([b.apply_transposed(weights.to(b.sample)).to(weights) for b in blocks], 1)


def summed(parts: Iterator[Tensor]) -> Tensor:
    """Sum of tensors that are made one after the other, in place."""
    total = next(parts)
    for part in parts:
        total += part
    return total


@runtime_checkable
class Directional(Protocol):
    """Derivatives that can be taken in another direction for each datum."""

    def blocks(self, directions: Sequence[Tensor]) -> list[JacobianBlock]:
        """Of directions in the outputs, ``[batch, *positions, C]`` each: the columns."""
        ...


def one_output(inputs: Linearization, column: Int[Tensor, " batch"], dtype: torch.dtype) -> Blocks:
    """Derivatives of one output of each datum, of its ``positions · C``: blocks of one column.

    One backward pass for a whole network; where a back end cannot differentiate another output of each datum at once,
    one for each output that is chosen, and rows are written out.
    """
    inputs = differentiated(inputs)
    if inputs.is_linear:
        head, n_outputs = head_of(inputs.blocks(dtype)), inputs.n_outputs
        assert head is not None, "outputs are linear in the weights of a head"
        start = torch.arange(len(column), device=column.device) * (head.n_rows // len(column))
        return [OneOutputBlock(head.select(start + column // n_outputs), column % n_outputs)]
    if isinstance(inputs.derivatives, Directional):
        one_hot = torch.nn.functional.one_hot(column, inputs.n_columns).to(inputs.f.dtype)
        return inputs.derivatives.blocks([one_hot.reshape(inputs.f.shape)])
    result: list[Tensor] = []
    for c in column.unique().tolist():
        rows = (column == c).nonzero().squeeze(1)
        of_c = inputs.blocks(dtype, c, c + 1)
        result = result or [block.sample.new_zeros(1, len(column), block.n_params) for block in of_c]
        for values, block in zip(result, of_c, strict=True):
            for row in rows.tolist():
                values[:, row] = block.dense(slice(row, row + 1))[:, 0]
    return [DenseBlock(values) for values in result]


# -- all outputs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Jacobian:
    """``J`` at some inputs, ``[rows, C, P]``, a few columns at a time."""

    inputs: NetworkLinearization
    """With derivatives."""
    dtype: torch.dtype
    """To compute in."""

    def blocks(self, start: int = 0, stop: int | None = None) -> Blocks:
        """Of some columns, all by default."""
        return joined(self.inputs.blocks(self.dtype, start, stop))

    def by_column(self, step: int | None = None) -> Iterator[tuple[slice, Blocks]]:
        """As many columns at a time as fit the memory that chunks may take, or so many."""
        assert self.inputs.derivatives is not None, "checked where this was made"
        step = self.inputs.derivatives.n_columns_at_once if step is None else step
        for start in range(0, self.inputs.n_columns, step):
            yield slice(start, start + step), self.blocks(start, start + step)

    def every(self, step: int, start: int) -> Blocks:
        """Of every so many-th column from one on."""
        columns = torch.arange(start, self.inputs.n_columns, step, device=self.inputs.f.device)
        if len(columns) == self.inputs.n_columns:
            return self.blocks()
        assert self.inputs.derivatives is not None, "checked where this was made"
        mix = torch.nn.functional.one_hot(columns, self.inputs.n_columns).to(self.dtype)
        return joined(self.inputs.derivatives.columns(mix))

    def _rows(self, parts: Sequence[Float[Tensor, "columns batch k"]]) -> Float[Tensor, "rows outputs k"]:
        columns = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return columns.transpose(0, 1).reshape(-1, self.inputs.n_outputs, columns.shape[-1])

    def times(self, vectors: Float[Tensor, "vectors params"]) -> Float[Tensor, "rows outputs vectors"]:
        """J v for several vectors of weights."""
        columns = []
        for _, blocks in self.by_column():
            parts = split_sizes(vectors, [block.n_params for block in blocks])
            # Derivatives are kept in the precision of the network.
            moved = [b.apply(v.to(b.sample)) for b, v in zip(blocks, parts, strict=True)]
            columns.append(sum_parts(moved).to(vectors).permute(1, 2, 0))
        return self._rows(columns)

    def combine(self, weights: Float[Tensor, "vectors rows outputs"]) -> Float[Tensor, "vectors params"]:
        """Jᵀ u for several weighings of the outputs."""
        u = weights.reshape(len(weights), -1, self.inputs.n_columns).mT
        return summed(combined(blocks, u[:, columns]) for columns, blocks in self.by_column())

    def cross(self, points: InducingPoints) -> Float[Tensor, "rows outputs points"]:
        """``J J_Mᵀ``."""
        columns = []
        for _, blocks in self.by_column():
            parts = [product(blocks, others())[:, :, 0] for others in points.batches]
            columns.append(parts[0] if len(parts) == 1 else torch.cat(parts, 2))
        return self._rows(columns)

    def _ones(self, block: JacobianBlock) -> Tensor:
        return block.sample.new_ones(1, dtype=self.dtype).expand(block.n_params)

    def variance(self) -> Float[Tensor, "rows outputs"]:
        """The diagonal of ``J Jᵀ``, ``[rows, C]``."""
        parts = [sum_parts([b.variance(self._ones(b)) for b in blocks]) for _, blocks in self.by_column()]
        return self._rows([part.unsqueeze(-1) for part in parts]).squeeze(-1)

    def covariance(self) -> Float[Tensor, "rows outputs outputs"]:
        """``J Jᵀ`` of each row, ``[rows, C, C]``: all outputs of a position at a time."""
        each = self.by_column(self.inputs.n_outputs)
        parts = [sum_parts([b.covariance(self._ones(b)) for b in blocks]) for _, blocks in each]
        return parts[0] if len(parts) == 1 else torch.stack(parts, 1).flatten(0, 1)

    def joint(self) -> Float[Tensor, "joint joint"]:
        """``J Jᵀ`` across rows, ``[rows·C, rows·C]``, row by row: all outputs at once."""
        return sum_parts([b.kernel(self._ones(b)) for b in self.blocks()])

    def pair_variance(self) -> Float[Tensor, " pairs"]:
        """``‖J₀ − J₁‖²`` of pairs of scores, one after the other, ``[pairs]``: one column, the difference."""
        blocks = self.inputs.differences(self.dtype)
        return sum_parts([b.variance(self._ones(b)) for b in blocks]).squeeze(0)


def differentiated(inputs: Linearization) -> NetworkLinearization:
    """Inputs with derivatives, or an error."""
    if isinstance(inputs, NetworkLinearization) and inputs.derivatives is not None:
        return inputs
    msg = f"{type(inputs).__name__} holds no derivatives that a kernel could be made of."
    raise UnsupportedError(msg)


def jacobian(inputs: Linearization, dtype: torch.dtype) -> Jacobian:
    """The derivatives at some inputs; of pairs of reward modeling those of the logits (f₀ − f₁, 0)."""
    if not isinstance(inputs, Pairs):
        return Jacobian(differentiated(inputs), dtype)
    logits = torch.tensor([[1.0], [0.0]], dtype=dtype, device=inputs.f.device)
    blocks = [block.mix(logits.to(block.sample)) for block in differentiated(inputs.scores).differences(dtype)]
    return Jacobian(NetworkLinearization(inputs.f, StoredDerivatives(blocks)), dtype)


def clamped_diagonal(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """The matrix with negative diagonal entries, which rounding leaves, set to zero."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    return matrix + torch.diag_embed(diagonal.clamp(min=0) - diagonal)
