"""``hessian_structure="ekfac"``: the eigenbasis of Kronecker factors, with the curvature's own diagonal in it.

    weight of a layer:  (U ⊗ V) diag(s_ij) (U ⊗ V)ᵀ,   s_ij = Σ ((Uᵀ r)_i (Vᵀ φ)_j)²  over data and roots r of Λ

U and V are the eigenvectors of the Kronecker factors G and A. In the Frobenius norm no other diagonal in that basis is
closer to the curvature, γ_i λ_j of ``"kron"`` included. It takes two passes over the data: one finds the basis.

References
----------
George, Laurent, Bouthillier, Ballas & Vincent (2018), "Fast approximate natural gradient descent in a
Kronecker-factored eigenbasis", arXiv:1806.03884.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import linalg, processes
from laplace.enums import HessianStructure
from laplace.errors import UnsupportedError
from laplace.network.parameters import split_sizes
from laplace.prior import GaussianPrior
from laplace.schema import Known, Table, groups, refuse, tensor
from laplace.structures.accumulate import add_up, check_same_data, require_finite
from laplace.structures.base import AbstractCurvature, SupportsCurvature
from laplace.structures.basis import RotatedGroups
from laplace.structures.kron import KronCurvature
from laplace.structures.rotated import RotatedPrecision
from laplace.structures.wide_kron import WideKronCurvature, refuse_wide
from laplace.types import Scalar


def _diagonal(value: Any, where: str, known: Known) -> None:
    """The saved diagonal of a group."""
    tensor(("rows",), ("rows", "columns"), low=0)(value, where, {"dtype": known["dtype"]})
    if value.numel() != known["p"]:
        refuse(where, f"one number for each of the {known['p']} weights", value)
    known[f"shape {known['group']}"] = list(value.shape)


def _basis(value: Any, where: str, known: Known) -> None:
    """The saved eigenvectors of a group, which go with its diagonal."""
    shape = known[f"shape {known['group']}"]
    if not isinstance(value, list) or len(value) != len(shape):
        refuse(where, f"a list of {len(shape)} matrices", value)
    for index, (vectors, size) in enumerate(zip(value, shape, strict=True)):
        if vectors is not None:
            tensor((size, size))(vectors, f"{where}[{index}]", known)
            eye = torch.eye(size, dtype=vectors.dtype, device=vectors.device)
            if not torch.allclose(vectors.mT @ vectors, eye, atol=1e-2):
                refuse(f"{where}[{index}]", "an orthogonal matrix", vectors)


@dataclass(frozen=True)
class EKFACCurvature(AbstractCurvature):
    """Eigenvectors of the factors of each group, and the diagonal of the curvature in their basis.

    Attributes
    ----------
    eigenvectors
        For each group one or two orthogonal matrices; ``None`` is the identity.
    diagonals
        s for each group: ``[rows, columns]``, or ``[rows]`` with one matrix.
    scale
        Factor of it.
    """

    eigenvectors: Sequence[Sequence[Tensor | None]]
    diagonals: Sequence[Tensor]
    scale: Tensor | float = 1.0

    name: ClassVar[HessianStructure] = HessianStructure.EKFAC

    @classmethod
    def from_batch(cls, backend: SupportsCurvature, x: Any, y: Tensor, **options: Any) -> tuple[Tensor, EKFACCurvature]:
        """That of one batch, in a basis of its own."""
        found = cls.accumulate(backend, [(x, y)], **options)
        assert found is not None, "there is a batch"
        return found

    @classmethod
    def accumulate(
        cls, backend: SupportsCurvature, batches: Iterable[tuple[Any, Tensor]], **options: Any
    ) -> tuple[Tensor, EKFACCurvature] | None:
        """Two passes: the factors, then the diagonal in their eigenbasis."""
        batches = backend.repeatable(batches, cls.name)
        found = add_up(batches, partial(_dense_factors, backend, **options), lambda total, new: total.merge(new))
        if found is None:
            return None
        nll, factors = found
        require_finite(factors.is_finite)
        vectors, shapes = basis_of(factors), factors.decomposed.shapes
        second = add_up(
            batches,
            lambda x, y: backend.ekfac(x, y, vectors, shapes, **options),
            lambda total, new: [ours + theirs for ours, theirs in zip(total, new, strict=True)],
        )
        assert second is not None, "the first pass saw data"
        check_same_data(nll, second[0])
        curvature = cls(vectors, second[1])
        require_finite(curvature.is_finite)
        return nll, curvature

    @classmethod
    def check_merge(cls) -> None:
        """Two bases have no common one."""
        refuse_merge()

    @classmethod
    def of_head(cls, n_outputs: int) -> type[EKFACCurvature]:
        """None with very many outputs."""
        refuse_wide(n_outputs, "hessian_structure='ekfac'")
        return cls

    @classmethod
    def bytes_needed(cls, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> int:
        """The factors, and three vectors."""
        n_params = sum(torch.Size(shape).numel() for shape in shapes)
        return KronCurvature.bytes_needed(shapes, dtype) + 3 * dtype.itemsize * n_params

    @property
    def n_params(self) -> int:
        """P."""
        return sum(diagonal.numel() for diagonal in self.diagonals)

    @property
    def is_finite(self) -> bool:
        """Whether the diagonal in the eigenbasis is."""
        return all(bool(torch.isfinite(diagonal).all()) for diagonal in self.diagonals)

    @property
    def public(self) -> EKFACPrecision:
        """The matrix in its eigenbasis."""
        return EKFACPrecision(self.eigenvectors, self.diagonals)

    entries: ClassVar[Table] = {"diagonals": groups(_diagonal), "eigenvectors": groups(_basis)}

    def state(self) -> dict[str, Any]:
        """Bases and diagonals."""
        return {"eigenvectors": [list(block) for block in self.eigenvectors], "diagonals": list(self.diagonals)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], dtype: torch.dtype) -> EKFACCurvature:
        """From bases and diagonals; a basis that groups share stays one."""
        known = {id(side): side.to(dtype) for block in state["eigenvectors"] for side in block if side is not None}
        vectors = [[None if side is None else known[id(side)] for side in block] for block in state["eigenvectors"]]
        return cls(vectors, [diagonal.to(dtype) for diagonal in state["diagonals"]])

    def merge(self, other: EKFACCurvature) -> NoReturn:
        """Two bases have no common one: raises."""
        del other
        refuse_merge()

    def __mul__(self, factor: float | Tensor) -> EKFACCurvature:
        """Scale the diagonals; the bases are shared."""
        return replace(self, scale=self.scale * factor)

    def scale_weights(self, factors: Float[Tensor, " params"]) -> EKFACCurvature:
        """F s where outputs keep their own axes, as those of a Gaussian with independent noise do."""
        if any(block[0] is not None for block in self.eigenvectors):
            msg = (
                'With hessian_structure="ekfac" a noise for each output needs a curvature with independent outputs '
                "(that of a GGN or Hessian back end); the basis of this one mixes them. Pass one sigma_noise."
            )
            raise UnsupportedError(msg)
        parts = split_sizes(factors, [diagonal.numel() for diagonal in self.diagonals])
        scaled = [s * f.reshape(s.shape) for s, f in zip(self.diagonals, parts, strict=True)]
        return replace(self, diagonals=scaled)

    def posterior(self, prior: GaussianPrior, **options: Any) -> EKFACPrecision:
        """Add the prior in the eigenbasis: O(P)."""
        assert not options, "the eigenvalue-corrected structure has no options"
        deltas = prior.per_layer()
        shifted = [diagonal * self.scale + d for diagonal, d in zip(self.diagonals, deltas, strict=True)]
        for values in (diagonal.detach() for diagonal in shifted if diagonal.numel()):
            # A diagonal is a sum of squares: what should be zero in it is the square of rounding.
            rounding = torch.finfo(values.dtype).eps
            linalg.warn_of_condition(float(values.max() / values.min().clamp(min=0)) * rounding, values.dtype)
        return EKFACPrecision(self.eigenvectors, shifted)

    def basis(self, prior: GaussianPrior) -> RotatedGroups:  # noqa: ARG002
        """The eigenvectors."""
        return RotatedGroups.of(self.eigenvectors, [tuple(d.shape) for d in self.diagonals])

    def log_det_ratio(self, prior: GaussianPrior, **options: Any) -> Scalar:
        """Σ log(1 + s/δ)."""
        assert not options, "the eigenvalue-corrected structure has no options"
        groups = zip(self.diagonals, prior.per_layer(), strict=True)
        return torch.stack([torch.log1p(diagonal * self.scale / d).sum() for diagonal, d in groups]).sum()

    def to_dense(self) -> Float[Tensor, "params params"]:
        """The block-diagonal matrix."""
        return self.public.to_dense() * self.scale


@dataclass(frozen=True)
class EKFACPrecision(RotatedPrecision):
    """Bases and eigenvalues."""

    eigenvectors: Sequence[Sequence[Tensor | None]]
    """For each group one or two orthogonal matrices; ``None`` is the identity."""
    eigenvalues: Sequence[Tensor]
    """For each group ``[rows, columns]``, or ``[rows]`` with one matrix."""

    def __len__(self) -> int:
        """Number of groups."""
        return len(self.eigenvalues)

    @property
    def spectrum(self) -> list[Tensor]:
        """The eigenvalues."""
        return list(self.eigenvalues)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Sizes of the bases of each group."""
        return [tuple(values.shape) for values in self.eigenvalues]


def _dense_factors(backend: SupportsCurvature, x: Any, y: Tensor, **options: Any) -> tuple[Tensor, KronCurvature]:
    """The factors of a batch, refused where that of the outputs is no matrix."""
    nll, found = KronCurvature.from_batch(backend, x, y, **options)
    if isinstance(found, WideKronCurvature):
        refuse_wide(len(found.sums.diagonal), "hessian_structure='ekfac'")
    assert isinstance(found, KronCurvature), "of the back end"
    return nll, found


def basis_of(curvature: KronCurvature) -> list[list[Tensor | None]]:
    """Eigenvectors of the factors; the identity for those that are diagonal, where any order of them would do."""
    found: list[list[Tensor | None]] = []
    for sides, vectors in zip(curvature.sums.kfacs, curvature.decomposed.eigenvectors, strict=True):
        pairs = zip(sides, vectors, strict=True)
        found.append([None if side.dim() == 1 or linalg.is_diagonal(side) else basis for side, basis in pairs])
    every = [basis for block in found for basis in block if basis is not None]
    same = dict(zip(map(id, every), processes.shared(every), strict=True))
    return [[None if basis is None else same[id(basis)] for basis in block] for block in found]


def refuse_merge() -> NoReturn:
    """Raise: the eigenbases of two data sets are not that of their union."""
    msg = (
        'hessian_structure="ekfac" cannot add to an earlier fit (override=False, merge): the eigenbases of two data '
        'sets are not that of their union. Fit all data at once (one iterable over both loaders), or use "kron", which '
        "adds."
    )
    raise UnsupportedError(msg)
