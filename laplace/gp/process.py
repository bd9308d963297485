"""Inputs of a Gaussian process: outputs, and their kernels with the subset that the posterior knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import pending
from laplace.errors import NumericalWarning, warn
from laplace.gp.derivatives import clamped_diagonal, jacobian
from laplace.gp.kernel import SubsetKernel
from laplace.gp.subset_curvature import KernelBasis
from laplace.gp.subset_of_data import SubsetPrecision
from laplace.likelihoods.draws import draw
from laplace.linalg import chunk_elements
from laplace.predictive.base import Linearization
from laplace.structures import AbstractPrecision, DiagPrecision
from laplace.structures.basis import Basis

LOST = 1000
"""Variances below so many roundings of the prior's have few digits left."""

KEPT_SQUARES = 2**27
"""Numbers of squared coordinates that one batch keeps between posteriors: 512 MB in float32."""


class Process(Linearization):
    """Outputs with their prior covariances at unit precision, split into parts as the kernel is."""

    kernel: SubsetKernel
    inputs: Linearization
    dtype: torch.dtype

    @property
    def f(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride] - read only here
        """Outputs, ``[batch, *positions, C]``."""
        return self.inputs.f

    @cached_property
    def prior_variance(self) -> Float[Tensor, "rows outputs"]:
        """``k(x, x)``, its diagonal."""
        return jacobian(self.inputs, self.dtype).variance()

    @cached_property
    def prior_covariance(self) -> Float[Tensor, "rows outputs outputs"]:
        """``k(x, x)``."""
        if self.kernel.separates:
            return torch.diag_embed(self.prior_variance)
        return jacobian(self.inputs, self.dtype).covariance()

    def prior_joint(self) -> Float[Tensor, "joint joint"]:
        """``k(x, x')``."""
        joint, C = jacobian(self.inputs, self.dtype).joint(), self.n_outputs
        if not self.kernel.independent:
            return joint
        same = torch.eye(C, dtype=joint.dtype, device=joint.device)
        return joint * same.repeat(len(joint) // C, len(joint) // C)

    def spread(self, parts: Float[Tensor, "parts points columns"]) -> Float[Tensor, "rows outputs columns"]:
        """By output, where outputs meet."""
        return parts[0].unflatten(0, (-1, self.n_outputs))

    def products(self, parts: Float[Tensor, "parts points columns"], *, met: bool) -> Tensor:
        """``z zᵀ`` between the outputs of each row, ``[rows, C, C]``."""
        if met:
            z = self.spread(parts)
            return z @ z.mT
        return torch.diag_embed(self.squares(parts, met=False))

    def squares(self, parts: Float[Tensor, "parts points columns"], *, met: bool) -> Float[Tensor, "rows outputs"]:
        """Diagonals of ``products``; parameters as there."""
        squares = parts.square().sum(-1)
        return squares.reshape(-1, self.n_outputs) if met else squares.T.expand(-1, self.n_outputs)

    def joint_products(
        self, parts: Float[Tensor, "parts points columns"], *, met: bool
    ) -> Float[Tensor, "joint joint"]:
        """``z zᵀ`` across rows."""
        if met:
            return parts[0] @ parts[0].T
        C, blocks = self.n_outputs, parts @ parts.mT
        blocks = blocks.expand(C, -1, -1)
        same = torch.eye(C, dtype=blocks.dtype, device=blocks.device)
        return torch.einsum("ck,cnm->ncmk", same, blocks).flatten(2).flatten(0, 1)

    def functions(
        self, precision: AbstractPrecision, n_samples: int, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Iterator[Float[Tensor, "samples rows outputs"]]:
        """In function space, by a root of the covariance across inputs: O((rows · C)³)."""
        mean = self.mean(dtype)
        cov = self.joint_covariance(precision, dtype).unsqueeze(0)
        for part in draw(mean.reshape(1, -1), cov, n_samples, generator):
            yield part.reshape(-1, *mean.shape)


@dataclass(frozen=True)
class ProcessLinearization(Process):
    """Inputs and their kernels with the subset, for posteriors that are factorized."""

    inputs: Linearization
    """Linearized in the weights."""
    kernel: SubsetKernel
    """Of the subset."""
    dtype: torch.dtype
    """To compute in."""
    known: Tensor | None = None
    """Kernels with the subset, where they have been computed."""

    @cached_property
    def cross(self) -> Tensor:
        """Kernels with the subset; they depend on no hyperparameter."""
        return self.kernel.cross(self.inputs, self.dtype) if self.known is None else self.known

    def _whitened(self, precision: SubsetPrecision) -> Float[Tensor, "parts points columns"]:
        return precision.whitened(self.kernel.project(self.cross, precision.root))

    def variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs"]:
        """What the prior gives minus what the data take; of features by products with matrices that are kept."""
        known = _checked(precision)
        prior = known.variance * self.prior_variance
        if self.kernel.shares:
            taken = ((self.cross @ known.taken) * self.cross).sum(-1).T.expand(-1, self.n_outputs)
        else:
            taken = self.squares(self._whitened(known), met=known.root.dim() == 3)
        return self._left(prior, prior - taken).clamp(min=0).to(dtype)

    def _left(self, prior: Tensor, left: Tensor) -> Tensor:
        """Variances that are left, if they can be told from the rounding of what they are differences of."""
        resolution = torch.finfo(torch.promote_types(self.f.dtype, torch.float32)).eps
        lost, n, dtype = (left.detach() < LOST * resolution * prior.detach()).sum(), left.numel(), self.f.dtype

        def tell(n_lost: float) -> None:
            msg = (
                f"{int(n_lost)} of {n} variances are less than {LOST * resolution:.1e} of the prior's, of which "
                f"they are differences: {str(dtype).removeprefix('torch.')} leaves them few digits or none. Use "
                'the model in float64 (model.double()), a stronger prior, or hessian_structure="full".'
            )
            warn(msg, NumericalWarning)

        pending.when(lost > 0, tell, lambda: [lost])
        return left

    def _left_between(self, prior: Tensor, taken: Tensor) -> Tensor:
        """The same for covariances."""
        left = prior - taken
        self._left(prior.diagonal(dim1=-2, dim2=-1), left.diagonal(dim1=-2, dim2=-1))
        return clamped_diagonal(left)

    def covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs outputs"]:
        """The same between outputs."""
        known = _checked(precision)
        if known.root.dim() == 2:
            return torch.diag_embed(self.variance(precision, dtype))
        prior, taken = known.variance * self.prior_covariance, self.products(self._whitened(known), met=True)
        return self._left_between(prior, taken).to(dtype)

    def joint_covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "joint joint"]:
        """The same across inputs."""
        known = _checked(precision)
        taken = self.joint_products(self._whitened(known), met=known.root.dim() == 3)
        return self._left_between(known.variance * self.prior_joint(), taken).to(dtype)

    def pair_variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "pairs one"]:
        """Of differences, from those of what is whitened."""
        known = _checked(precision)
        first, second = self._whitened(known)[0].unflatten(0, (-1, 2)).unbind(1)
        prior = known.variance * jacobian(self.inputs, self.dtype).pair_variance()
        return (prior - (first - second).square().sum(-1)).clamp(min=0).unsqueeze(-1).to(dtype)

    def rotated(self, basis: Basis, dtype: torch.dtype) -> Linearization:
        """In the eigenbasis of the Gram matrix of the subset."""
        assert isinstance(basis, KernelBasis), "made by the curvature of the subset"
        return RotatedProcess(self.inputs, self.kernel, dtype, basis, self.cross, self.prior_variance)

    def kept(self, limit: int) -> tuple[Linearization, int] | None:
        """Kernels with the subset and what priors need, if they fit."""
        found = self.inputs.kept(limit - self.cross.numel())
        if found is None:
            return None
        size = found[1] + self.cross.numel()
        return ProcessLinearization(found[0], self.kernel, self.dtype, self.cross), size


@dataclass(frozen=True)
class RotatedProcess(Process):
    """Inputs in the coordinates of a ``KernelBasis``, where posteriors under all priors are diagonal."""

    inputs: Linearization
    kernel: SubsetKernel
    dtype: torch.dtype
    basis: KernelBasis
    """The coordinates."""
    cross: Tensor
    """Kernels with the subset."""
    unit_variance: Float[Tensor, "rows outputs"]
    """Prior variances at unit precision."""
    _squares: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    @property
    def _met(self) -> bool:
        return self.basis.root.dim() == 3

    def _coordinates(self) -> Float[Tensor, "parts points columns"]:
        return self.kernel.project(self.cross, self.basis.root, self.basis.whitening)

    def _squared(self) -> Iterator[Float[Tensor, "rows outputs columns"]]:
        """What is left of the prior, and squared coordinates, by chunks of rows; kept if they fit."""
        if self._squares:
            yield from self._squares
            return
        columns = self.basis.eigenvalues.shape[1]
        n_rows, C = self.unit_variance.shape
        parts = 1 if self._met else len(self.basis.eigenvalues)
        keep = n_rows * (C if self._met else parts) * columns <= KEPT_SQUARES
        step = max(1, chunk_elements(self.unit_variance.device) // max(1, C * columns))
        for start in range(0, n_rows, step):
            rows = slice(start, start + step)
            z = self.kernel.project(self._cross_rows(rows), self.basis.root, self.basis.whitening).square()
            z = z[0].unflatten(0, (-1, C)) if self._met else z.transpose(0, 1)  # [rows, C or parts, columns]
            rest = (self.unit_variance[rows, : z.shape[1]] - z.sum(-1)).clamp(min=0)
            squares = torch.cat([rest.unsqueeze(-1), z], -1)
            if keep:
                self._squares.append(squares)
            yield squares

    def _cross_rows(self, rows: slice) -> Tensor:
        if self.kernel.separates:
            return self.cross[:, rows]
        return self.cross.unflatten(1, (-1, self.n_outputs))[:, rows].flatten(1, 2)

    def _inverse(self, precisions: Sequence[AbstractPrecision]) -> Float[Tensor, "parts coordinates posteriors"]:
        spectra = [_diagonal(precision).vector.view(len(self.basis.eigenvalues), -1) for precision in precisions]
        return (1 / torch.stack(spectra, -1)).to(self.dtype)

    def variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs"]:
        """Squared coordinates over the spectrum."""
        (only,) = self.variances([precision], dtype)
        return only

    def variances(
        self, precisions: Sequence[AbstractPrecision], dtype: torch.dtype
    ) -> Iterator[Float[Tensor, "rows outputs"]]:
        """One product of the squares with all inverse spectra."""
        inverse = self._inverse(precisions)
        found = torch.cat(
            [
                torch.einsum("rck,ckp->rcp", squares, inverse.expand(squares.shape[1], -1, -1))
                for squares in self._squared()
            ]
        )
        for variance in found.unbind(-1):
            yield variance.expand(-1, self.n_outputs).to(dtype)

    def _weighted(self, precision: AbstractPrecision) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates over roots of their precisions, the coordinates, and the inverse precision of the prior."""
        inverse = self._inverse([precision]).squeeze(-1)
        z = self._coordinates()
        return z * inverse[:, None, 1:].sqrt(), z, inverse[0, 0]

    def covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs outputs"]:
        """The same between outputs."""
        if not self._met:
            return torch.diag_embed(self.variance(precision, dtype))
        weighted, z, v = self._weighted(precision)
        rest = self.prior_covariance - self.products(z, met=True)
        return (v * rest + self.products(weighted, met=True)).to(dtype)

    def joint_covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "joint joint"]:
        """The same across inputs."""
        weighted, z, v = self._weighted(precision)
        rest = self.prior_joint() - self.joint_products(z, met=self._met)
        return (v * rest + self.joint_products(weighted, met=self._met)).to(dtype)

    def pair_variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "pairs one"]:
        """Of differences of coordinates."""
        weighted, z, v = self._weighted(precision)
        difference, plain = (part[0].unflatten(0, (-1, 2)).diff(dim=1).squeeze(1) for part in (weighted, z))
        rest = jacobian(self.inputs, self.dtype).pair_variance() - plain.square().sum(-1)
        return (v * rest.clamp(min=0) + difference.square().sum(-1)).unsqueeze(-1).to(dtype)

    def rotated(self, basis: Basis, dtype: torch.dtype) -> Linearization:  # noqa: ARG002
        """Already rotated."""
        return self


def _checked(precision: AbstractPrecision) -> SubsetPrecision:
    assert isinstance(precision, SubsetPrecision), "of the subset whose kernel these inputs hold"
    return precision


def _diagonal(precision: AbstractPrecision) -> DiagPrecision:
    assert isinstance(precision, DiagPrecision), "made by the basis these inputs were rotated into"
    return precision


__all__ = ["Process", "ProcessLinearization", "RotatedProcess"]
