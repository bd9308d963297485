"""Kernels of a whole network, from derivatives in factors: ``J`` is never whole.

Derivatives at the subset are kept while they fit a bound on memory, else made again whenever they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace.errors import UnsupportedError
from laplace.gp.kernel import SubsetKernel, whitened_gram
from laplace.network.batches import count_rows, join_rows, plain, signature
from laplace.network.parameters import split_sizes
from laplace.predictive import Linearization, NetworkLinearization
from laplace.schema import Known, Table, flag, refuse, whole
from laplace.structures.jacobian import JacobianBlock, sum_parts
from laplace.types import Inputs

KEPT_ELEMENTS = 2**29
"""Numbers kept of the derivatives of a subset: 2 GB in float32."""

Linearize = Callable[[Inputs], Linearization]


@dataclass(frozen=True)
class Piece:
    """Derivatives of some outputs of some data."""

    index: Int[Tensor, " outputs"]
    """Where these outputs are among those of their part, datum by datum."""
    part: int
    """Which output they are, where kernels are between equal ones; else 0."""
    blocks: list[JacobianBlock]
    """One for each parameter group."""

    def against(self, other: Piece) -> Float[Tensor, "outputs others"]:
        """``J J'ᵀ``."""
        product = sum_parts([a.cross(b) for a, b in zip(self.blocks, other.blocks, strict=True)])
        return product.permute(1, 0, 3, 2).flatten(2).flatten(0, 1)


def pieces(
    inputs: NetworkLinearization, width: int, dtype: torch.dtype, *, separate: bool, start: int = 0
) -> Iterator[Piece]:
    """Derivatives of a batch, a bounded number of its outputs at a time."""
    assert inputs.derivatives is not None, "linearized with derivatives"
    batch, n_columns, device = len(inputs.f), inputs.f[0].numel(), inputs.f.device
    eye = torch.eye(n_columns, dtype=dtype, device=device)
    all_columns = torch.arange(n_columns, device=device)
    step = 1 if separate else max(1, inputs.derivatives.n_columns_at_once)
    groups = all_columns.view(-1, width).unbind(1) if separate else all_columns.split(step)
    data = torch.arange(batch, device=device).unsqueeze(1)
    for number, columns in enumerate(groups):
        blocks = inputs.derivatives.columns(eye[columns])
        if separate:
            n_each = n_columns // width
            index = start + data * n_each + torch.arange(n_each, device=device)
            yield Piece(index.flatten(), number, blocks)
        else:
            yield Piece((start * width + data * n_columns + columns).flatten(), 0, blocks)


def _sizes(value: Any, where: str, known: Known) -> None:
    """Saved sizes of batches, of which the number of rows becomes known."""
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        refuse(where, "a list of pairs of numbers", value)
    for index, pair in enumerate(value):
        for each in pair:
            whole(1)(each, f"{where}[{index}]", known)
    known["batches"], known["rows"] = [data for data, _ in value], sum(data * rows for data, rows in value)


def _inputs(value: Any, where: str, known: Known) -> None:
    """Saved inputs, as many in each batch as its size says."""
    if not isinstance(value, list) or [count_rows(x) for x in value] != known["batches"]:
        refuse(where, f"a list of batches with {known['batches']} inputs", value)


@dataclass(frozen=True)
class NetworkKernel(SubsetKernel):
    """All weights: the subset is kept as inputs, and linearized."""

    batches: tuple[Inputs, ...]
    """Inputs of the subset."""
    sizes: tuple[tuple[int, int], ...]
    """Data in each batch, and rows of each of these data."""
    width: int
    """C."""
    weights: int
    """P."""
    separates: bool
    """Leave out what outputs have in common."""
    dtype: torch.dtype
    """To compute in."""
    linearize: Linearize = field(repr=False, compare=False)
    """From inputs to outputs and their derivatives."""
    _kept: dict[int, tuple[NetworkLinearization, int]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def n_rows(self) -> int:
        """Rows of all data."""
        return sum(data * rows for data, rows in self.sizes)

    @property
    def n_outputs(self) -> int:
        """C."""
        return self.width

    @property
    def n_params(self) -> int:
        """P."""
        return self.weights

    def _at(self, number: int) -> NetworkLinearization:
        """One batch of the subset, linearized; kept if it fits."""
        if number not in self._kept:
            inputs = self.linearize(self.batches[number])
            assert isinstance(inputs, NetworkLinearization), "of all weights"
            found = inputs.kept(KEPT_ELEMENTS - sum(size for _, size in self._kept.values()))
            if found is None:
                return inputs
            assert isinstance(found[0], NetworkLinearization), "what is kept is of the same kind"
            self._kept[number] = found[0], found[1]
        return self._kept[number][0]

    def _pieces(self, part: int | None = None, n_batches: int | None = None) -> Iterator[tuple[int, Piece]]:
        """Pieces of the subset (of one part), with the number of their batch."""
        start = 0
        for number, (data, rows) in enumerate(self.sizes[:n_batches]):
            for piece in pieces(self._at(number), self.width, self.dtype, separate=self.separates, start=start):
                if part in (None, piece.part):
                    yield number, piece
            start += data * rows

    def gram(self, root: Tensor) -> Float[Tensor, "parts columns columns"]:
        """Batch by batch; of two batches, one of the two halves."""
        n_parts, size = (self.width, self.n_rows) if self.separates else (1, self.n_rows * self.width)
        kernel = root.new_zeros(n_parts, size, size)
        for number, piece in self._pieces():
            for _, other in self._pieces(piece.part if self.separates else None, number + 1):
                block = piece.against(other)
                kernel[piece.part, piece.index.unsqueeze(1), other.index] = block
                kernel[piece.part, other.index.unsqueeze(1), piece.index] = block.T
        return whitened_gram(kernel if self.separates else kernel[0], root)

    def cross(self, inputs: Linearization, dtype: torch.dtype) -> Tensor:
        """``[rows·C, rows'·C]``; ``[C, rows, rows']`` between equal outputs."""
        if not isinstance(inputs, NetworkLinearization) or inputs.is_linear:
            msg = f"All weights need derivatives; got {type(inputs).__name__}."
            raise UnsupportedError(msg)
        C = inputs.n_outputs
        n_rows = inputs.f.numel() // C
        shape = (C, n_rows, self.n_rows) if self.separates else (1, n_rows * C, self.n_rows * self.width)
        total = torch.zeros(shape, dtype=dtype, device=inputs.f.device)
        for piece in pieces(inputs, C, dtype, separate=self.separates):
            for _, other in self._pieces(piece.part if self.separates else None):
                total[piece.part, piece.index.unsqueeze(1), other.index] = piece.against(other)
        return total if self.separates else total[0]

    def project(
        self, cross: Tensor, root: Tensor, basis: Float[Tensor, "parts columns rank"] | None = None
    ) -> Float[Tensor, "parts points kept"]:
        """Row by row of the subset."""
        if self.separates:
            result = cross * root.T.unsqueeze(1)
        else:
            n, width, _ = root.shape
            result = (cross.view(-1, n, width).transpose(0, 1) @ root).transpose(0, 1).flatten(1).unsqueeze(0)
        return result if basis is None else result @ basis

    def apply(self, vectors: Float[Tensor, "vectors params"]) -> Float[Tensor, "vectors rows outputs"]:
        """Block by block."""
        result = vectors.new_zeros(len(vectors), self.n_rows, self.width)
        for _, piece in self._pieces():
            parts = split_sizes(vectors, [block.n_params for block in piece.blocks])
            # Derivatives are kept in the precision of the network; [vectors, columns, batch].
            values = sum_parts([b.apply(v.to(b.sample)) for b, v in zip(piece.blocks, parts, strict=True)]).to(vectors)
            target = result[..., piece.part] if self.separates else result.flatten(1)
            target[:, piece.index] = values.mT.flatten(1)
        return result

    def combine(self, weights: Float[Tensor, "vectors rows outputs"]) -> Float[Tensor, "vectors params"]:
        """Piece by piece: no more of J at a time than chunks may take."""
        total: list[Tensor] | None = None
        for _, piece in self._pieces():
            some = weights[..., piece.part] if self.separates else weights.flatten(1)
            first = piece.blocks[0]
            u = some[:, piece.index].view(len(weights), first.n_rows, first.n_columns)
            if total is None:
                total = [u.new_zeros(len(u), block.n_params) for block in piece.blocks]
            for group, block in zip(total, piece.blocks, strict=True):
                for rows, part, J in block.pieces():
                    group[:, part] += torch.einsum("vbq,qbp->vp", u[:, rows], J.to(u))
        assert total is not None, "there are data"
        return torch.cat(total, 1)

    def union(self, other: NetworkKernel) -> NetworkKernel:
        """Batches one after the other."""
        batches, sizes = self.batches + other.batches, self.sizes + other.sizes
        return replace(self, batches=batches, sizes=sizes, _kept={})

    def joined(self, n_data: int) -> NetworkKernel:
        """The same with fewer batches: those that fit together and follow each other are one."""
        groups: list[list[int]] = []
        key: Any = None
        for number, (x, size) in enumerate(zip(self.batches, self.sizes, strict=True)):
            same = (signature(x, size[0]), size[1])
            room = groups and sum(self.sizes[i][0] for i in groups[-1]) + size[0] <= n_data
            if room and same == key:
                groups[-1].append(number)
            else:
                groups.append([number])
            key = same
        batches = tuple(
            join_rows([self.batches[i] for i in group], [self.sizes[i][0] for i in group]) for group in groups
        )
        sizes = tuple((sum(self.sizes[i][0] for i in group), self.sizes[group[0]][1]) for group in groups)
        return replace(self, batches=batches, sizes=sizes, _kept={})

    entries: ClassVar[Table] = {
        "sizes": _sizes,
        "inputs": _inputs,
        "n_outputs": whole(1, "width"),
        "n_params": whole(1, "P"),
        "separates": flag,
    }

    def state(self) -> dict[str, Any]:
        """The inputs of the subset."""
        return {
            "inputs": [plain(x) for x in self.batches],
            "sizes": [list(size) for size in self.sizes],
            "n_outputs": self.width,
            "n_params": self.weights,
            "separates": self.separates,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], dtype: torch.dtype, linearize: Linearize) -> NetworkKernel:
        """From inputs."""
        sizes = tuple((int(data), int(rows)) for data, rows in state["sizes"])
        width, weights = int(state["n_outputs"]), int(state["n_params"])
        return cls(tuple(state["inputs"]), sizes, width, weights, bool(state["separates"]), dtype, linearize)

    def __getstate__(self) -> dict[str, Any]:
        """What pickling takes along: not the derivatives."""
        return {**self.__dict__, "_kept": {}}


__all__ = ["KEPT_ELEMENTS", "NetworkKernel", "Piece", "pieces"]
