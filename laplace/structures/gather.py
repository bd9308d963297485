"""The derivatives of outputs in the weight of an embedding: only the rows that a datum names are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace.linalg import chunk_elements
from laplace.structures.jacobian import DenseBlock, JacobianBlock


def looked_up(block: DenseBlock, tokens: Int[Tensor, "..."], n_tokens: int) -> GatherBlock:
    """From derivatives in rows that all data look up, ``[columns, batch, rows·features]``, to those in the table."""
    rows = block.values.unflatten(2, (tokens.numel(), -1))
    token, place = torch.unique(tokens.flatten(), return_inverse=True)
    values = rows.new_zeros(rows.shape[0], rows.shape[1], len(token), rows.shape[3]).index_add(2, place, rows)
    datum = torch.arange(block.n_rows, device=token.device).repeat_interleave(len(token))
    token = token.repeat(block.n_rows)
    flat = values.flatten(1, 2)
    return GatherBlock(flat, datum, token, block.n_rows, n_tokens, flat, token)


@dataclass(frozen=True)
class GatherBlock(JacobianBlock):
    """The block of an embedding: rows of the weight that no token of a datum names have no derivative.

    Attributes
    ----------
    values
        Gradients summed over the positions of a datum that hold the same token, ``[columns, pairs, features]``.
    datum, token
        Datum and token of each pair, ``[pairs]``.
    batch_size, n_tokens
        B, and the number of rows of the weight.
    left, row_token
        Gradients and token of each position that counts, before they are summed.
    """

    values: Float[Tensor, "columns pairs features"]
    datum: Int[Tensor, " pairs"]
    token: Int[Tensor, " pairs"]
    batch_size: int
    n_tokens: int
    left: Float[Tensor, "columns rows features"]
    row_token: Int[Tensor, " rows"]

    @classmethod
    def union(cls, tables: Sequence[GatherBlock]) -> GatherBlock:
        """The sum of several look-ups in one table."""
        first = tables[0]
        keys = torch.cat([table.datum * table.n_tokens + table.token for table in tables])
        pairs, place = torch.unique(keys, return_inverse=True)
        gradients = torch.cat([table.values for table in tables], 1)
        values = gradients.new_zeros(first.n_columns, len(pairs), gradients.shape[-1]).index_add(1, place, gradients)
        left, row_token = torch.cat([t.left for t in tables], 1), torch.cat([t.row_token for t in tables])
        datum, token = pairs // first.n_tokens, pairs % first.n_tokens
        return cls(values, datum, token, first.batch_size, first.n_tokens, left, row_token)

    @property
    def n_columns(self) -> int:
        """Q."""
        return self.values.shape[0]

    @property
    def n_rows(self) -> int:
        """B."""
        return self.batch_size

    @property
    def shape(self) -> tuple[int, ...]:
        """``(tokens, features)``."""
        return (self.n_tokens, self.values.shape[2])

    @property
    def sample(self) -> Tensor:
        """The gradients."""
        return self.values

    @property
    def n_units(self) -> int:
        """Each token is one."""
        return self.n_tokens

    def piece(self, rows: slice, units: slice) -> Float[Tensor, "columns batch part"]:
        """Zeros, with the gradients where they belong."""
        first_row, last_row, _ = rows.indices(self.n_rows)
        first, last, _ = units.indices(self.n_tokens)
        here = (self.datum >= first_row) & (self.datum < last_row) & (self.token >= first) & (self.token < last)
        flat = (self.datum[here] - first_row) * (last - first) + self.token[here] - first
        empty = self.values.new_zeros(self.n_columns, (last_row - first_row) * (last - first), self.values.shape[2])
        filled = empty.index_add(1, flat, self.values[:, here])
        return filled.unflatten(1, (last_row - first_row, last - first)).flatten(2)

    def entries(self, rows: slice, index: Int[Tensor, " part"]) -> Float[Tensor, "columns batch part"]:
        """Looked up: a datum names a token in one pair at most."""
        first_row, last_row, _ = rows.indices(self.n_rows)
        token, feature = index // self.shape[1], index % self.shape[1]
        tokens, which = torch.unique(token, return_inverse=True)
        place = torch.searchsorted(tokens, self.token).clamp_max(len(tokens) - 1)
        here = (self.datum >= first_row) & (self.datum < last_row) & (tokens[place] == self.token)
        pair = self.token.new_full((last_row - first_row, len(tokens)), -1)
        pair[self.datum[here] - first_row, place[here]] = here.nonzero().flatten()
        named = pair[:, which]
        if not len(self.token):  # nothing but padding
            return self.values.new_zeros(self.n_columns, *named.shape)
        return self.values[:, named.clamp_min(0), feature] * (named >= 0)

    def mix(self, weights: Float[Tensor, "mixtures columns"]) -> GatherBlock:
        """Of the gradients."""
        values, left = (torch.einsum("mq,qnd->mnd", weights, part) for part in (self.values, self.left))
        return replace(self, values=values, left=left)

    @property
    def size(self) -> int:
        """That of the gradients."""
        return self.values.numel() + self.left.numel()

    def rotate(self, sides: Sequence[Tensor | None], shape: Sequence[int]) -> JacobianBlock:
        """On the side of the features; with our own factors the side of the tokens is diagonal."""
        if len(sides) == 1 or sides[0] is not None:
            return DenseBlock(self.dense()).rotate(sides, shape)
        features = sides[1]
        return self if features is None else replace(self, values=self.values @ features)

    def squares(self) -> Float[Tensor, " params"]:
        """Added token by token."""
        total = self.values.new_zeros(self.shape)
        return total.index_add(0, self.token, self.values.square().sum(0)).flatten()

    def variance(self, w: Float[Tensor, " params"]) -> Float[Tensor, "columns batch"]:
        """Added datum by datum."""
        pairs = (self.values.square() * w.view(self.shape)[self.token]).sum(-1)
        return pairs.new_zeros(self.n_columns, self.n_rows).index_add(1, self.datum, pairs)

    def covariance(self, w: Float[Tensor, " params"]) -> Float[Tensor, "batch columns columns"]:
        """Added datum by datum."""
        total = self.values.new_zeros(self.n_rows, self.n_columns, self.n_columns)
        step = max(
            1, chunk_elements(self.values.device) // max(self.n_columns**2, self.n_columns * self.values.shape[2])
        )
        half = w.view(self.shape).sqrt()
        for start in range(0, len(self.token), step):
            part = slice(start, start + step)
            rows = (self.values[:, part] * half[self.token[part]]).transpose(0, 1)
            total = total.index_add(0, self.datum[part], rows @ rows.mT)
        return total

    def apply(self, v: Float[Tensor, "samples params"]) -> Float[Tensor, "samples columns batch"]:
        """Only the rows that are named."""
        named = v.view(-1, *self.shape)[:, self.token]
        pairs = torch.einsum("qnd,snd->sqn", self.values, named)
        return pairs.new_zeros(len(v), self.n_columns, self.n_rows).index_add(2, self.datum, pairs)

    def apply_transposed(self, w: Float[Tensor, "samples columns batch"]) -> Float[Tensor, "samples params"]:
        """Only the rows that are named."""
        rows = torch.einsum("sqn,qnd->snd", w[:, :, self.datum], self.values)
        return rows.new_zeros(len(w), *self.shape).index_add(1, self.token, rows).flatten(1)

    def cross(self, other: JacobianBlock) -> Float[Tensor, "columns batch others points"]:
        """Over the tokens that both name; other rows of the table have no derivative."""
        if not isinstance(other, GatherBlock):
            return super().cross(other)
        named = torch.unique(torch.cat([self.token, other.token]))
        first, second = (
            replace(block, token=torch.searchsorted(named, block.token), n_tokens=len(named)) for block in (self, other)
        )
        return super(GatherBlock, first).cross(second)
