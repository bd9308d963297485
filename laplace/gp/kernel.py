"""Kernels of the linearized network, ``k(x, x') = J(x) J(x')ᵀ``, between the data of a subset and other inputs.

All of this is at unit prior precision: with an isotropic prior of precision δ the kernel is ``k / δ``. A *row* is one
position of a datum with its C outputs. The likelihood enters by roots of its Hessians at the rows of the subset,
``Λ = r rᵀ``: whole ones, ``[rows, C, k]``, or square roots of diagonals, ``[rows, C]`` (``[rows, 1]`` where outputs
share them), where outputs are independent of each other given the data.

Gram matrices and whatever is multiplied with them have a leading axis of *parts*, one for outputs that meet, else one
for each output, or for all outputs that share one: of a last layer the kernel is ``φφ'ᵀ · I``, and one output stands
for all. Derivatives at the subset are kept while they fit a bound on memory, else made again whenever they are asked
for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace.errors import UnsupportedError
from laplace.gp.derivatives import Jacobian, Rows, summed, write, write_lower
from laplace.network.batches import count_rows, join_rows, plain, rows_of, signature
from laplace.predictive import Linearization, NetworkLinearization
from laplace.predictive.linearization import StoredDerivatives
from laplace.schema import Known, Table, flag, refuse, tensor, whole
from laplace.structures.head_block import HeadBlock, head_of
from laplace.types import Inputs

KEPT_ELEMENTS = 2**29
"""Numbers kept of the derivatives of a subset: 2 GB in float32."""

Linearize = Callable[[Inputs], Linearization]


def _width(value: Any, where: str, known: Known) -> None:
    """The saved number of outputs, each of which has a weight for each feature."""
    whole(1, "width")(value, where, known)
    if value * known["augmented"] != known["P"]:
        refuse(where, f"outputs with {known['augmented']} of {known['P']} weights each", value)


def _bias(value: Any, where: str, known: Known) -> None:
    """Whether the last feature is the constant of a bias."""
    if value is not known["bias"]:
        refuse(where, f"{known['bias']}, as the last layer of the model says", value)


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
class SubsetKernel:
    """The rows of a subset of the data, and kernels with them: the subset is kept as inputs, and linearized.

    The inputs of a last layer are its features.
    """

    batches: tuple[Inputs, ...]
    """Inputs of the subset; of a last layer ``[rows, D̃]``, with what multiplies the bias (0 in differences)."""
    sizes: tuple[tuple[int, int], ...]
    """Data in each batch, and rows of each of these data."""
    n_outputs: int
    """C."""
    n_params: int
    """P."""
    separates: bool
    """Whether kernels are between equal outputs only, the others being zero or left out."""
    dtype: torch.dtype
    """To compute in."""
    linearize: Linearize | None = field(default=None, repr=False, compare=False)
    """From inputs to outputs and their derivatives, of a whole network."""
    groups: tuple[tuple[int, ...], ...] = ()
    """Shapes of the parameter groups of a last layer."""
    _kept: dict[int, tuple[NetworkLinearization, int]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of_head(cls, head: HeadBlock) -> SubsetKernel:
        """Of the features of a last layer, one row for each datum."""
        phi = head.augmented
        batches, sizes = ((phi,), ((len(phi), 1),)) if len(phi) else ((), ())
        return cls(batches, sizes, head.n_outputs, head.n_params, True, phi.dtype, groups=head.groups)

    @property
    def n_rows(self) -> int:
        """Rows of all data."""
        return sum(data * rows for data, rows in self.sizes)

    @property
    def shares(self) -> bool:
        """Whether all outputs have the same kernel: those of a last layer."""
        return bool(self.groups)

    @property
    def independent(self) -> bool:
        """Whether what outputs have in common is left out."""
        return self.separates and not self.shares

    @property
    def head(self) -> HeadBlock:
        """Derivatives at the rows of a last layer, as one block."""
        features = self.batches[0] if len(self.batches) == 1 else torch.cat(self.batches)
        return self._head_at(features)

    def _head_at(self, features: Float[Tensor, "rows augmented"]) -> HeadBlock:
        sizes = [shape[1] if len(shape) > 1 else 1 for shape in self.groups]
        return HeadBlock(features.split(sizes, 1), self.groups)

    @property
    def is_finite(self) -> bool:
        """Whether products of features are, where there are some."""
        return not self.shares or all(bool(torch.isfinite(phi.square().sum())) for phi in self.batches)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _at(self, number: int) -> NetworkLinearization:
        """One batch of the subset, linearized; kept if it fits."""
        if number not in self._kept:
            x = self.batches[number]
            if self.linearize is None:
                f = x.new_zeros(1, 1).expand(len(x), self.n_outputs)  # what they are is not asked for
                return NetworkLinearization(f, StoredDerivatives([self._head_at(x)]))
            inputs = self.linearize(x)
            assert isinstance(inputs, NetworkLinearization), "of all weights"
            found = inputs.kept(KEPT_ELEMENTS - sum(size for _, size in self._kept.values()))
            if found is None:
                return inputs
            assert isinstance(found[0], NetworkLinearization), "what is kept is of the same kind"
            self._kept[number] = found[0], found[1]
        return self._kept[number][0]

    def _rows_of(self, inputs: NetworkLinearization, part: int | None = None, start: int = 0) -> Iterator[Rows]:
        """Derivatives of a batch (for one part): one output at a time where these are apart, else a bounded number."""
        J, n_columns, n_rows = Jacobian(inputs, self.dtype), inputs.n_columns, inputs.f.numel() // self.n_outputs
        if not self.separates:
            place = slice(start * self.n_outputs, (start + n_rows) * self.n_outputs)
            for columns, blocks in J.by_column():
                yield Rows(blocks, place, n_columns, columns)
            return
        for c in range(self.n_outputs) if part is None else (part,):
            blocks = J.every(self.n_outputs, c)
            yield Rows(blocks, slice(start, start + n_rows), n_columns // self.n_outputs, part=c)

    def _rows(self, part: int | None = None, n_batches: int | None = None) -> Iterator[tuple[int, Rows]]:
        """The same of the subset, with the number of the batch."""
        start = 0
        for number, (data, rows) in enumerate(self.sizes[:n_batches]):
            for some in self._rows_of(self._at(number), part, start):
                yield number, some
            start += data * rows

    def _empty(self, like: Tensor, n_rows: int) -> Float[Tensor, "kernels points subset"]:
        """To write kernels with the subset into."""
        if self.separates:
            return like.new_zeros(self.n_outputs, n_rows, self.n_rows)
        return like.new_zeros(1, n_rows * self.n_outputs, self.n_rows * self.n_outputs)

    # -- kernels -------------------------------------------------------------------------------------------------------

    def gram(self, root: Tensor) -> Float[Tensor, "parts columns columns"]:
        """``Rᵀ K R``, with K the kernel of the subset and R the roots."""
        if self.shares:
            kernel = self.head.products(self.head).unsqueeze(0)
        else:
            kernel = write_lower(self._empty(root, self.n_rows), self._rows)
        if root.dim() == 2:
            half = root.T.unsqueeze(2)
            return half * kernel * half.mT
        n, width, k = root.shape
        if self.shares:  # entry by entry times products of roots
            flat = root.transpose(1, 2).flatten(0, 1)
            products = (flat @ flat.T).view(n, k, n, k)
            return (products * kernel.view(n, 1, n, 1)).view(1, n * k, n * k)
        left = (root.mT @ kernel.view(n, width, -1)).view(n * k, n, width)
        return (left.transpose(0, 1) @ root).transpose(0, 1).reshape(1, n * k, n * k)

    @cached_property
    def features(self) -> Float[Tensor, "rows augmented"] | None:
        """Of a last layer where they are fewer than rows: kernels with other inputs are products of features."""
        return self.head.augmented if self.shares and self.n_params <= self.n_rows * self.n_outputs else None

    def cross(self, inputs: Linearization, dtype: torch.dtype) -> Float[Tensor, "kernels rows smaller"]:
        """Kernel between other inputs and the subset, or the features of these inputs where those are fewer."""
        if not isinstance(inputs, NetworkLinearization) or inputs.is_linear is not self.shares:
            needs = "A last layer needs features" if self.shares else "All weights need derivatives"
            msg = f"{needs}; got {type(inputs).__name__}."
            raise UnsupportedError(msg)
        if self.shares:
            head = head_of(inputs.blocks(dtype))
            assert head is not None, "outputs are linear in the weights of a head"
            return (head.products(self.head) if self.features is None else head.augmented).unsqueeze(0)
        total = self._empty(torch.zeros((), dtype=dtype, device=inputs.f.device), inputs.f.numel() // self.n_outputs)
        for first in self._rows_of(inputs):
            for _, second in self._rows(first.part):
                write(total, first, second)
        return total

    def project(
        self,
        cross: Float[Tensor, "kernels rows smaller"],
        root: Tensor,
        basis: Float[Tensor, "parts columns rank"] | None = None,
    ) -> Float[Tensor, "parts points kept"]:
        """``k(x, ·) R``, times a basis if there is one, which is first brought to features where those are fewer."""
        if not self.separates:
            n, width, _ = root.shape
            result = (cross.view(-1, n, width).transpose(0, 1) @ root).transpose(0, 1).flatten(1).unsqueeze(0)
            return result if basis is None else result @ basis
        if basis is None:
            kernel = cross if self.features is None else cross @ self.features.T
            if root.dim() == 2:
                return kernel * root.T.unsqueeze(1)
            return torch.einsum("bn,nck->bcnk", kernel[0], root).flatten(2).flatten(0, 1).unsqueeze(0)
        if root.dim() == 2:
            return cross @ self._reduced(root.T.unsqueeze(2) * basis)
        columns = torch.einsum("nck,nkr->cnr", root, basis[0].view(len(root), root.shape[2], -1))
        return (cross @ self._reduced(columns)).transpose(0, 1).flatten(0, 1).unsqueeze(0)

    def _reduced(self, columns: Float[Tensor, "parts rows rank"]) -> Float[Tensor, "parts smaller rank"]:
        """Columns over rows, as ones over features where these are fewer."""
        return columns if self.features is None else self.features.T @ columns

    def sides(self, root: Tensor) -> Iterator[Float[Tensor, "columns smaller"]]:
        """Of a last layer, for each part, or output where outputs meet: what turns ``cross`` into ``project``."""
        rows = torch.eye(self.n_rows).to(root) if self.features is None else self.features
        for output in root.unbind(1):
            if root.dim() == 2:
                yield output.unsqueeze(1) * rows
            else:
                yield (output.unsqueeze(2) * rows.unsqueeze(1)).flatten(0, 1)

    def apply(self, vectors: Float[Tensor, "vectors params"]) -> Float[Tensor, "vectors rows outputs"]:
        """J v at the rows of the subset."""
        found = [Jacobian(self._at(number), self.dtype).times(vectors) for number in range(len(self.batches))]
        # The outputs of pairs are their scores, which a model gives one after the other.
        return torch.cat(found).reshape(-1, self.n_outputs, len(vectors)).permute(2, 0, 1)

    def combine(self, weights: Float[Tensor, "vectors rows outputs"]) -> Float[Tensor, "vectors params"]:
        """Jᵀ u, from the outputs of the rows of the subset to weights."""
        parts = enumerate(weights.split([data * rows for data, rows in self.sizes], 1))
        return summed(Jacobian(self._at(number), self.dtype).combine(part) for number, part in parts)

    # -- data ----------------------------------------------------------------------------------------------------------

    def union(self, other: SubsetKernel) -> SubsetKernel:
        """The rows of both, batches one after the other."""
        return replace(self, batches=self.batches + other.batches, sizes=self.sizes + other.sizes, _kept={})

    def restricted(self, data: Int[Tensor, " subset"]) -> SubsetKernel:
        """To some data."""
        batches, sizes, start = [], [], 0
        for x, (n_data, rows) in zip(self.batches, self.sizes, strict=True):
            local = data[(data >= start) & (data < start + n_data)] - start
            start += n_data
            if len(local):
                batches.append(rows_of(x, local, n_data))
                sizes.append((len(local), rows))
        return replace(self, batches=tuple(batches), sizes=tuple(sizes), _kept={})

    def joined(self, n_data: int) -> SubsetKernel:
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

    # -- states --------------------------------------------------------------------------------------------------------

    head_entries: ClassVar[Table] = {"phi": tensor(("rows", "augmented")), "n_outputs": _width, "bias": _bias}
    network_entries: ClassVar[Table] = {
        "sizes": _sizes,
        "inputs": _inputs,
        "n_outputs": whole(1, "width"),
        "n_params": whole(1, "P"),
        "separates": flag,
    }

    def state(self) -> dict[str, Any]:
        """The inputs of the subset; of a last layer features."""
        if self.shares:
            return {"phi": self.head.augmented, "n_outputs": self.n_outputs, "bias": len(self.groups) > 1}
        sizes = [list(size) for size in self.sizes]
        found = {name: getattr(self, name) for name in ("n_outputs", "n_params", "separates")}
        return {"inputs": [plain(x) for x in self.batches], "sizes": sizes, **found}

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], dtype: torch.dtype, linearize: Linearize | None = None
    ) -> SubsetKernel:
        """From inputs, which only an estimator can linearize; or from features."""
        C = int(state["n_outputs"])
        if "phi" in state:
            phi = state["phi"].to(dtype)
            phis = (phi[:, :-1], phi[:, -1:]) if state["bias"] else (phi,)
            groups = ((C, phis[0].shape[1]), (C,))
            return cls.of_head(HeadBlock(phis, groups[: len(phis)]))
        sizes = tuple((int(data), int(rows)) for data, rows in state["sizes"])
        P, separates = int(state["n_params"]), bool(state["separates"])
        return cls(tuple(state["inputs"]), sizes, C, P, separates, dtype, linearize)

    def __getstate__(self) -> dict[str, Any]:
        """What pickling takes along: not the derivatives."""
        return {**self.__dict__, "_kept": {}}


__all__ = ["KEPT_ELEMENTS", "SubsetKernel"]
