"""The derivatives of outputs in a weight that multiplies its inputs: gradients and inputs, never their product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from laplace import pending
from laplace.linalg import CHUNK_ELEMENTS, piece_elements
from laplace.structures.jacobian import DenseBlock, JacobianBlock


class Shared:
    """What the columns of one pass share, of which there are ``n_columns`` in all: see the attributes."""

    def __init__(self, n_columns: int = 1) -> None:
        self.n_columns = n_columns
        self.rotations: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        """Products of inputs with a matrix, by the ids of both."""
        self._buffer: Tensor | None = None

    def buffer(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory for a piece of J, which the next piece overwrites: it stays in the cache, and is mapped once."""
        n, have = prod(shape), self._buffer
        inside = torch.is_inference_mode_enabled()
        if have is None or len(have) < n or have.dtype != like.dtype or have.is_inference() != inside:
            self._buffer = have = like.new_empty(n)
        return have[:n].view(*shape)


@dataclass(frozen=True)
class ProductBlock(JacobianBlock):
    """``J_qb = Σ_t g_qbt ⊗ a_bt``, one product for each group of channels (groups = 1 but for grouped convolutions).

    Attributes
    ----------
    left
        g, ``[columns, batch, groups, positions, outputs of a group]``.
    right
        a, ``[batch, groups, positions, inputs of a group]``.
    transposed
        The weight is stored inputs first: ``a ⊗ g``.
    counted
        Which positions of a count (are neither masked nor there to fill up), ``[batch, positions]``; all when ``None``.
    basis
        J is returned in this basis of the weights, ``Lᵀ J R``.
    shared
        What other columns use, too; ``None`` when there is nothing.
    is_kept
        The inputs are those of other columns, too.
    """

    left: Float[Tensor, "columns batch groups positions o"]
    right: Float[Tensor, "batch groups positions i"]
    transposed: bool = False
    counted: Bool[Tensor, "batch positions"] | None = None
    basis: tuple[Tensor | None, Tensor | None] = (None, None)
    shared: Shared | None = field(default=None, compare=False, repr=False)
    is_kept: bool = field(default=False, compare=False, repr=False)

    @property
    def n_columns(self) -> int:
        """Q."""
        return self.left.shape[0]

    @property
    def n_rows(self) -> int:
        """B."""
        return self.left.shape[1]

    @property
    def count(self) -> int | Tensor:
        """Number of rows of a that count: data times positions times groups."""
        each = self.right.shape[1]
        if self.counted is None:
            return self.n_rows * self.right.shape[2] * each
        return pending.count(self.counted.sum() * each)

    @property
    def counts(self) -> Int[Tensor, " batch"]:
        """Number of positions of each datum that count."""
        if self.counted is not None:
            return self.counted.sum(1)
        return torch.full((self.n_rows,), self.right.shape[2], device=self.right.device)

    @staticmethod
    def counted_together(blocks: Sequence[ProductBlock]) -> Tensor | None:
        """Which positions count where the positions of several blocks follow one another."""
        if all(block.counted is None for block in blocks):
            return None
        every = [b.right.new_ones(b.n_rows, b.right.shape[2], dtype=torch.bool) for b in blocks]
        return torch.cat([e if b.counted is None else b.counted for b, e in zip(blocks, every, strict=True)], 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(outputs, inputs of a group)``; transposed ``(inputs, outputs of a group)``."""
        groups, o, i = self.left.shape[2], self.left.shape[4], self.right.shape[3]
        return (groups * i, o) if self.transposed else (groups * o, i)

    @property
    def sample(self) -> Tensor:
        """g."""
        return self.left

    @property
    def _rotated(self) -> bool:
        return any(side is not None for side in self.basis)

    @property
    def _single(self) -> bool:
        """One group and one position: J is one outer product, and sums over it are matrix products."""
        return self.left.shape[2] == self.left.shape[3] == 1 and not self._rotated

    @property
    def n_units(self) -> int:
        """Groups, or rows of the weight; all of it at once in another basis."""
        if self._rotated:
            return 1
        return self.left.shape[2] if self.left.shape[2] > 1 else self.shape[0]

    def _part(self, rows: slice, units: slice) -> tuple[Tensor, Tensor]:
        """The gradients and inputs of which some units of J are made."""
        left, right = self.left[:, rows], self.right[rows]
        if self._rotated:
            return left, right
        if left.shape[2] > 1:
            return left[:, :, units], right[:, units]
        return (left, right[..., units]) if self.transposed else (left[..., units], right)

    def piece(self, rows: slice, units: slice) -> Float[Tensor, "columns batch part"]:
        """One batched product over positions."""
        left, right = self._part(rows, units)
        J = right.mT @ left if self.transposed else left.mT @ right
        if self._rotated:
            (outer, inner), matrix = self.basis, J.flatten(2, 3)
            half = matrix if inner is None else matrix @ inner
            return (half if outer is None else outer.T @ half).flatten(2)
        return J.flatten(2)

    def entries(self, rows: slice, index: Int[Tensor, " part"]) -> Float[Tensor, "columns batch part"]:
        """The pairs of an output and an input that belong to these weights, a bounded number at a time."""
        if self._rotated:
            return super().entries(rows, index)
        left = self.left[:, rows].transpose(2, 3).flatten(3)
        right = self.right[rows].transpose(1, 2).flatten(2)
        i, o = self.right.shape[3], self.left.shape[4]
        row, column = index // self.shape[1], index % self.shape[1]
        outputs, inputs = (row // i * o + column, row) if self.transposed else (row, row // o * i + column)
        step = max(1, piece_elements(left.device) // max(1, left.shape[:3].numel()))
        pairs = zip(outputs.split(step), inputs.split(step), strict=True)
        return torch.cat([(left[..., first] * right[..., second]).sum(2) for first, second in pairs], -1)

    def mix(self, weights: Float[Tensor, "mixtures columns"]) -> ProductBlock:
        """Of the gradients."""
        return replace(self, left=torch.einsum("mq,q...->m...", weights, self.left))

    @property
    def size(self) -> int:
        """That of the gradients and the inputs."""
        return self.left.numel() + self.right.numel()

    def compact(self) -> JacobianBlock:
        """Written out where there are so many positions that this takes fewer numbers, as in most convolutions."""
        if self.n_columns * self.n_rows * self.n_params >= self.size:
            return self
        values = self.left.new_empty(self.n_columns, self.n_rows, self.n_params)
        for rows, weights, J in self.pieces():
            values[:, rows, weights] = J
        return DenseBlock(values)

    def by_column(self) -> Iterator[ProductBlock]:
        """One column at a time: the inputs then enter a batched product as they are."""
        for q in range(self.n_columns):
            yield replace(self, left=self.left[q : q + 1])

    @property
    def _in_buffer(self) -> bool:
        """Whether pieces may overwrite each other: in the basis they come in and without a graph."""
        if self._rotated:
            return False
        return not (torch.is_grad_enabled() and (self.left.requires_grad or self.right.requires_grad))

    def products(self) -> Iterator[tuple[int, slice, slice, Float[Tensor, "rows part"]]]:
        """Pieces of one column each, batched products that are made in one buffer: each overwrites the one before."""
        shared, grouped = self.shared or Shared(), self.left.shape[2] > 1
        cuts = list(self.cuts(1))
        for q, left in enumerate(self.left):
            first, second = (self.right, left) if self.transposed else (left, self.right)
            for rows, units, weights in cuts:
                x, y = first[rows], second[rows]
                x, y = (x[:, units], y[:, units]) if grouped else (x[..., units], y)
                x, y = x.flatten(0, 1), y.flatten(0, 1)
                J = shared.buffer((len(x), x.shape[2], y.shape[2]), x)
                torch.bmm(x.mT, y, out=J)
                yield q, rows, weights, J.view(rows.stop - rows.start, -1)

    def squared(self, J: Tensor) -> Tensor:
        """In place where that is allowed: a piece is made for this and stays in the cache."""
        return J.square() if J.requires_grad else J.square_()

    def rotate(self, sides: Sequence[Tensor | None], shape: Sequence[int]) -> ProductBlock:  # noqa: ARG002
        """Rotate the factors, or their product where that is less work."""
        if all(side is None for side in sides):
            return self  # in these coordinates already
        outer, inner = reversed(sides) if self.transposed else sides
        columns, _, groups, positions, o = self.left.shape
        i = self.right.shape[3]
        # Inputs that are kept are turned once for all columns.
        portion = min(1.0, columns / self.shared.n_columns) if self.shared and self.is_kept else 1.0
        factors_first = positions * (columns * o * o + portion * i * i) <= columns * o * i * (o + i)
        if groups > 1 or self._rotated or not factors_first:
            assert not self._rotated, "rotated once"
            first, second = sides
            return replace(self, basis=(first, second))
        left = self.left if outer is None else self.left @ outer
        right = self.right if inner is None else self._rotated_inputs(inner)
        return replace(self, left=left, right=right, is_kept=False)

    def _rotated_inputs(self, inner: Tensor) -> Tensor:
        if self.shared is None or not self.is_kept:
            return self.right @ inner
        known, key = self.shared.rotations, (id(self.right), id(inner))
        if key not in known:
            # Both are kept with the product, so that their ids are not used again.
            known[key] = (self.right, inner, self.right @ inner)
        return known[key][2]

    def _strength(self, w: Tensor) -> Float[Tensor, "batch o"]:
        """Σ_i a_bi² w_oi, with one position."""
        matrix = w.view(self.shape)
        return self.right.flatten(1).square() @ (matrix if self.transposed else matrix.T)

    def squares(self) -> Float[Tensor, " params"]:
        """With one position a product of squares."""
        if not self._single and not self._in_buffer:
            return super().squares()
        if not self._single:
            total = self.left.new_zeros(self.n_params)
            self.add_squares(total)
            return total
        left, right = self.left.square().sum(0).flatten(1), self.right.flatten(1).square()
        return (right.T @ left if self.transposed else left.T @ right).flatten()

    def add_squares(self, total: Float[Tensor, " params"]) -> None:
        """Column by column: each piece is squared in place and summed by a product with ones."""
        if self._single or not self._in_buffer:
            super().add_squares(total)
            return
        ones = self.right.new_ones(self.n_rows)
        for _, rows, weights, J in self.products():
            total[weights].addmv_(J.square_().T, ones[rows])

    def variance(self, w: Float[Tensor, " params"]) -> Float[Tensor, "columns batch"]:
        """With one position a product of squares."""
        differentiated = torch.is_grad_enabled() and w.requires_grad  # its graph keeps every piece of J
        if not self._single and (differentiated or not self._in_buffer):
            return super().variance(w)
        if not self._single:
            total = self.left.new_zeros(self.n_columns, self.n_rows)
            for q, rows, weights, J in self.products():
                total[q, rows].addmv_(J.square_(), w[weights])
            return total
        return (self.left.flatten(2).square() * self._strength(w)).sum(-1)

    def covariance(self, w: Float[Tensor, " params"]) -> Float[Tensor, "batch columns columns"]:
        """With one position the inputs only weigh the gradients."""
        if not self._single:
            return super().covariance(w)
        left = self.left.flatten(2).transpose(0, 1)
        return (left * self._strength(w).unsqueeze(1)) @ left.mT

    def apply(self, v: Float[Tensor, "samples params"]) -> Float[Tensor, "samples columns batch"]:
        """Inputs times weights, then gradients: J is not formed."""
        if self._rotated or self.left.shape[2] > 1:
            return super().apply(v)
        matrix = v.view(-1, *self.shape)
        hidden = torch.einsum("bti,soi->sbto", self.right.squeeze(1), matrix.mT if self.transposed else matrix)
        return torch.einsum("sbto,qbto->sqb", hidden, self.left.squeeze(2))

    def apply_transposed(self, w: Float[Tensor, "samples columns batch"]) -> Float[Tensor, "samples params"]:
        """Gradients weighed, then times inputs: J is not formed, but where there are very many positions."""
        large = len(w) * self.left[0].numel() > CHUNK_ELEMENTS
        if self._rotated or self.left.shape[2] > 1 or large:
            return super().apply_transposed(w)
        weighed = torch.einsum("sqb,qbto->sobt", w, self.left.squeeze(2)).flatten(2)
        matrix = weighed @ self.right.squeeze(1).flatten(0, 1)
        return (matrix.mT if self.transposed else matrix).flatten(1)

    def cross(self, other: JacobianBlock) -> Float[Tensor, "columns batch others points"]:
        """``Σ (g·g')(a·a')`` over pairs of positions, where that is less work than writing the other block out."""
        if not (isinstance(other, ProductBlock) and self._factors_are_cheaper(other)):
            return super().cross(other)
        a, b = self.right.squeeze(1), other.right.squeeze(1)  # [batch, positions, inputs]
        g, h = self.left.squeeze(2), other.left.squeeze(2)  # [columns, batch, positions, outputs]
        if self._single and other._single:
            inputs = a.squeeze(1) @ b.squeeze(1).T
            outputs = (g.flatten(0, 2) @ h.flatten(0, 2).T).view(len(g), len(a), len(h), len(b))
            return outputs * inputs.unsqueeze(1)
        per_point = len(g) * len(h) * a.shape[0] * a.shape[1] * b.shape[1]
        step = max(1, piece_elements(a.device) // per_point)
        parts: list[Tensor] = []
        for start in range(0, len(b), step):
            rows = slice(start, start + step)
            inputs = torch.einsum("bti,zui->btzu", a, b[rows])
            outputs = torch.einsum("qbto,pzuo->qbtpzu", g, h[:, rows])
            parts.append((outputs * inputs.unsqueeze(2)).sum((2, 5)))
        return torch.cat(parts, 3)

    def _factors_are_cheaper(self, other: ProductBlock) -> bool:
        """Whether both are plain products in the same basis, and pairs of positions fewer than weights to write out."""
        if self.left.shape[2] > 1 or self._rotated or other._rotated or self.transposed != other.transposed:
            return False
        outputs, inputs, positions = self.left.shape[-1], self.right.shape[-1], other.right.shape[2]
        together = positions * (inputs + self.n_columns * other.n_columns * (outputs + 1))
        return self.shape == other.shape and together <= other.n_columns * outputs * (inputs + self.n_columns)
