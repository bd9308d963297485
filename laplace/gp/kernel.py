"""Kernels of the linearized network, ``k(x, x') = J(x) J(x')ᵀ``, between the data of a subset and other inputs.

All of this is at unit prior precision: with an isotropic prior of precision δ the kernel is ``k / δ``. A *row* is one
position of a datum with its C outputs. The likelihood enters by roots of its Hessians at the rows of the subset,
``Λ = r rᵀ``: whole ones, ``[rows, C, k]``, or square roots of diagonals, ``[rows, C]`` (``[rows, 1]`` where outputs
share them), where outputs are independent of each other given the data.

Gram matrices and whatever is multiplied with them have a leading axis of *parts*, one for outputs that meet, else one
for each output, or for all outputs that share one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.errors import UnsupportedError
from laplace.predictive import Linearization, NetworkLinearization
from laplace.schema import Known, Table, refuse, tensor, whole
from laplace.structures.head_block import HeadBlock, head_of


def _width(value: Any, where: str, known: Known) -> None:
    """The saved number of outputs, each of which has a weight for each feature."""
    whole(1, "width")(value, where, known)
    if value * known["augmented"] != known["P"]:
        refuse(where, f"outputs with {known['augmented']} of {known['P']} weights each", value)


def _bias(value: Any, where: str, known: Known) -> None:
    """Whether the last feature is the constant of a bias."""
    if value is not known["bias"]:
        refuse(where, f"{known['bias']}, as the last layer of the model says", value)


class SubsetKernel(ABC):
    """The rows of a subset of the data, and kernels with them."""

    separates: bool
    """Whether kernels are between equal outputs only, the others being zero or left out."""

    @property
    @abstractmethod
    def n_rows(self) -> int:
        """Number of rows of the subset."""

    @property
    @abstractmethod
    def n_outputs(self) -> int:
        """C."""

    @property
    @abstractmethod
    def n_params(self) -> int:
        """P."""

    @abstractmethod
    def gram(self, root: Tensor) -> Float[Tensor, "parts columns columns"]:
        """``Rᵀ K R``, with K the kernel of the subset and R the roots."""

    @abstractmethod
    def cross(self, inputs: Linearization, dtype: torch.dtype) -> Tensor:
        """Kernel between other inputs and the subset, in the form that ``project`` takes."""

    @abstractmethod
    def project(
        self, cross: Tensor, root: Tensor, basis: Float[Tensor, "parts columns rank"] | None = None
    ) -> Float[Tensor, "parts points kept"]:
        """``k(x, ·) R``, times a basis if there is one."""

    @abstractmethod
    def apply(self, vectors: Float[Tensor, "vectors params"]) -> Float[Tensor, "vectors rows outputs"]:
        """J v at the rows of the subset."""

    @abstractmethod
    def combine(self, weights: Float[Tensor, "vectors rows outputs"]) -> Float[Tensor, "vectors params"]:
        """Jᵀ u, from the outputs of the rows of the subset to weights."""

    @abstractmethod
    def union(self, other: Any) -> SubsetKernel:
        """The rows of both."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Tensors and plain values that describe it."""


def whitened_gram(kernel: Tensor, root: Tensor) -> Float[Tensor, "parts columns columns"]:
    """``Rᵀ K R`` from K written out."""
    if root.dim() == 2:
        half = root.T.unsqueeze(2)
        return half * kernel * half.mT
    n, width, k = root.shape
    left = (root.mT @ kernel.view(n, width, -1)).view(n * k, n, width)
    return (left.transpose(0, 1) @ root).transpose(0, 1).reshape(1, n * k, n * k)


@dataclass(frozen=True)
class FeatureKernel(SubsetKernel):
    """A linear last layer: ``k(x, x') = φ̃ᵀφ̃' · I``, one product of features that all outputs share."""

    head: HeadBlock
    """Derivatives at the rows, as one block."""

    separates = True

    @cached_property
    def phi(self) -> Float[Tensor, "rows augmented"]:
        """Features of the rows, and what multiplies the bias (1; 0 in differences of features), ``[rows, D̃]``."""
        return self.head.augmented

    @property
    def n_rows(self) -> int:
        """Rows."""
        return len(self.phi)

    @property
    def n_outputs(self) -> int:
        """C."""
        return self.head.n_outputs

    @property
    def n_params(self) -> int:
        """P."""
        return self.head.n_params

    @property
    def is_finite(self) -> bool:
        """Whether products of features are."""
        return bool(torch.isfinite(self.phi.square().sum()))

    def gram(self, root: Tensor) -> Float[Tensor, "parts columns columns"]:
        """One product of features; with whole roots, entry by entry times one of roots."""
        kernel = self.phi @ self.phi.T
        if root.dim() == 2:
            return whitened_gram(kernel.unsqueeze(0), root)
        n, _, k = root.shape
        flat = root.transpose(1, 2).flatten(0, 1)
        products = (flat @ flat.T).view(n, k, n, k)
        return (products * kernel.view(n, 1, n, 1)).view(1, n * k, n * k)

    def cross(self, inputs: Linearization, dtype: torch.dtype) -> Float[Tensor, "rows augmented"]:
        """The features themselves: products with those of the subset are made where they are used."""
        head = head_of(inputs.blocks(dtype)) if isinstance(inputs, NetworkLinearization) else None
        if head is None:
            msg = f"A last layer needs features; got {type(inputs).__name__}."
            raise UnsupportedError(msg)
        return head.augmented

    def project(
        self, cross: Tensor, root: Tensor, basis: Float[Tensor, "parts columns rank"] | None = None
    ) -> Float[Tensor, "parts points kept"]:
        """Kernels times roots; a basis is first brought to the smaller of features and rows."""
        if root.dim() == 2 and basis is None:
            return (cross @ self.phi.T) * root.T.unsqueeze(1)
        if root.dim() == 3 and basis is None:
            kernel, (n, width, k) = cross @ self.phi.T, root.shape
            return torch.einsum("bn,nck->bcnk", kernel, root).reshape(1, len(cross) * width, n * k)
        assert basis is not None, "the other cases are above"
        if root.dim() == 2:
            return self.through(cross) @ self._reduced(root.T.unsqueeze(2) * basis)
        columns = torch.einsum("nck,nkr->cnr", root, basis[0].view(len(root), root.shape[2], -1))
        return (self.through(cross) @ self._reduced(columns)).transpose(0, 1).flatten(0, 1).unsqueeze(0)

    @property
    def _features_are_fewer(self) -> bool:
        return self.phi.shape[1] <= self.n_rows

    def _reduced(self, columns: Float[Tensor, "parts rows rank"]) -> Float[Tensor, "parts smaller rank"]:
        """Columns over rows, as ones over features where these are fewer."""
        return self.phi.T @ columns if self._features_are_fewer else columns

    def through(self, cross: Float[Tensor, "points augmented"]) -> Float[Tensor, "points smaller"]:
        """Features of other inputs, or their kernels with the rows of the subset where those are fewer."""
        return cross if self._features_are_fewer else cross @ self.phi.T

    def sides(self, root: Tensor) -> Iterator[Float[Tensor, "columns smaller"]]:
        """For each part, or output where outputs meet: what turns ``through`` into ``project``."""
        rows = self.phi if self._features_are_fewer else torch.eye(self.n_rows).to(self.phi)
        for output in root.unbind(1):
            if root.dim() == 2:
                yield output.unsqueeze(1) * rows
            else:
                yield (output.unsqueeze(2) * rows.unsqueeze(1)).flatten(0, 1)

    def apply(self, vectors: Float[Tensor, "vectors params"]) -> Float[Tensor, "vectors rows outputs"]:
        """Products with features."""
        return self.head.apply(vectors).mT

    def combine(self, weights: Float[Tensor, "vectors rows outputs"]) -> Float[Tensor, "vectors params"]:
        """Products with features, in public order: the weight row by row, then the bias."""
        return self.head.apply_transposed(weights.mT)

    def union(self, other: FeatureKernel) -> FeatureKernel:
        """Features one after the other."""
        pairs = zip(self.head.phis, other.head.phis, strict=True)
        return FeatureKernel(replace(self.head, phis=tuple(torch.cat(pair) for pair in pairs)))

    entries: ClassVar[Table] = {"phi": tensor(("rows", "augmented")), "n_outputs": _width, "bias": _bias}

    def state(self) -> dict[str, Any]:
        """Features."""
        return {"phi": self.phi, "n_outputs": self.n_outputs, "bias": len(self.head.phis) > 1}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], dtype: torch.dtype) -> FeatureKernel:
        """From features."""
        phi, n_outputs = state["phi"].to(dtype), int(state["n_outputs"])
        phis = (phi[:, :-1], phi[:, -1:]) if state["bias"] else (phi,)
        groups = ((n_outputs, phis[0].shape[1]), (n_outputs,))
        return cls(HeadBlock(phis, groups[: len(phis)]))


__all__ = ["FeatureKernel", "SubsetKernel", "whitened_gram"]
