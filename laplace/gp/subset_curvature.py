"""The curvature of a subset of the data: additive, not scaled and without a prior; see ``gp/subset_of_data.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import linalg
from laplace.enums import HessianStructure
from laplace.errors import UnsupportedError
from laplace.gp.kernel import Linearize, SubsetKernel
from laplace.gp.subset import Subset
from laplace.gp.subset_of_data import SubsetPrecision, weight_rows
from laplace.prior import GaussianPrior
from laplace.schema import Table, finite, nested, tensor
from laplace.structures import AbstractCurvature, DiagPrecision
from laplace.structures.basis import Basis
from laplace.structures.supports import SupportsCurvature
from laplace.types import Scalar


@dataclass(frozen=True)
class SubsetCurvature(AbstractCurvature):
    """The curvature of a subset of the data, as a kernel and roots of output Hessians: additive over data."""

    kernel: SubsetKernel
    """Of the rows of the subset."""
    root: Tensor
    """Of their Hessians: ``[rows, C, k]``, or of diagonals, ``[rows, C]`` or ``[rows, 1]``."""
    ratio: float = 1.0
    """N/M, how many data there are for each of the subset."""
    scale: Scalar | float = 1.0
    """Factor of the curvature, at unit noise and temperature."""
    _cache: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    name: ClassVar[HessianStructure] = HessianStructure.GP

    @classmethod
    def from_batch(
        cls, backend: SupportsCurvature, x: Any, y: Tensor, *, subset: Subset, **options: Any
    ) -> tuple[Tensor, SubsetCurvature]:
        """Loss of the whole batch, and the curvature of its data that are in the subset."""
        assert not options, "the subset says all"
        nll, kernel, root = subset.take(backend, x, y)
        return nll, cls(kernel, root)

    @classmethod
    def bytes_needed(cls, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> int:  # noqa: ARG003
        """None that depends on weights; what the subset takes is checked when the outputs are known."""
        return 0

    @property
    def n_params(self) -> int:
        """P."""
        return self.kernel.n_params

    @property
    def is_finite(self) -> bool:
        """Whether roots are, and features where there are some."""
        return bool(torch.isfinite(self.root).all()) and self.kernel.is_finite

    @property
    def public(self) -> SubsetCurvature:
        """Itself: the matrix is never built (``to_dense()`` does it for small problems)."""
        return self

    entries: ClassVar[Table] = {
        "kernel": nested(SubsetKernel.head_entries),
        "root": tensor(("rows", "width"), ("rows", 1), ("rows", "width", "columns")),
        "ratio": finite(above=0),
    }

    def state(self) -> dict[str, Any]:
        """Kernel, roots and N/M."""
        return {"kernel": self.kernel.state(), "root": self.root, "ratio": self.ratio}

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], dtype: torch.dtype, linearize: Linearize | None = None
    ) -> SubsetCurvature:
        """Of a last layer; that of all weights is made of inputs, which only an estimator can linearize."""
        kernel = SubsetKernel.from_state(state["kernel"], dtype, linearize)
        return cls(kernel, state["root"].to(dtype), float(state["ratio"]))

    def summands(self) -> list[Tensor]:
        """None: rows of processes follow each other when all are there."""
        return []

    def with_summands(self, parts: Sequence[Tensor]) -> SubsetCurvature:
        """Itself."""
        del parts
        return self

    @classmethod
    def check_exact(cls) -> None:
        """Two random subsets are not one of all data: raises."""
        msg = (
            'hessian_structure="gp" is the posterior of a random subset of the data, and subsets of two data sets are '
            'none of their union. Fit all data at once, or use a posterior over weights ("kron", "diag", "full", ...).'
        )
        raise UnsupportedError(msg)

    def merge(self, other: SubsetCurvature) -> SubsetCurvature:
        """The rows of both."""
        assert isinstance(self.scale, float) and isinstance(other.scale, float), "curvatures are merged unscaled"
        root = torch.cat([self.root, other.root])
        return replace(self, kernel=self.kernel.union(other.kernel), root=root, _cache={})

    def __mul__(self, factor: float | Tensor) -> SubsetCurvature:
        """Scale it; the Gram matrix is shared."""
        return replace(self, scale=self.scale * factor)

    def scale_weights(self, factors: Float[Tensor, " params"]) -> SubsetCurvature:
        """One factor for all weights of an output, of a last layer: it scales the roots of that output."""
        assert self.kernel.shares, "weights of a last layer belong to outputs"
        of_output = self.kernel.head.matrices(factors)[0][:, 0].sqrt()
        root = self.root * (of_output if self.root.dim() == 2 else of_output.unsqueeze(1))
        return replace(self, root=root, _cache={})

    @property
    def gram(self) -> Float[Tensor, "parts columns columns"]:
        """``Rᵀ K R``, unscaled; computed once."""
        if self.root.requires_grad:
            return self.kernel.gram(self.root)
        return self._cached("gram", lambda: self.kernel.gram(self.root))

    @linalg.lasting
    def _cached(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        if key not in self._cache:
            with torch.no_grad():
                self._cache[key] = make()
        return self._cache[key]

    @property
    def eigenvalues(self) -> Float[Tensor, "parts columns"]:
        """Of the Gram matrices, not negative; computed once, O(columns³)."""
        return self._cached("eigenvalues", lambda: torch.linalg.eigvalsh(self.gram).clamp(min=0))

    @property
    def eigenvectors(self) -> Float[Tensor, "parts columns columns"]:
        """Of the Gram matrices; computed once with the eigenvalues."""
        if "eigenvectors" not in self._cache:
            values, vectors = torch.linalg.eigh(self.gram.detach())
            self._cache.update(eigenvalues=values.clamp(min=0), eigenvectors=vectors)
        return self._cache["eigenvectors"]

    @property
    def repeats(self) -> int:
        """For how many outputs each part stands: all where they share one, one where there is a part for each."""
        return self.kernel.n_outputs // len(self.gram) if self.root.dim() == 2 else 1

    def posterior(self, prior: GaussianPrior, **options: Any) -> SubsetPrecision:
        """Add an isotropic prior, its precision times N/M."""
        assert not options, "there are no options"
        assert prior.precision.numel() == 1, "the estimator checks this"
        scale = torch.as_tensor(self.scale).to(self.root)
        variance = 1 / (prior.precision.squeeze(0) * self.ratio)
        return SubsetPrecision(self.kernel, self.root * scale.sqrt(), self.gram * scale, variance)

    def posterior_logdet(self, prior: GaussianPrior, **options: Any) -> Scalar:
        """``log |H + (N/M) δ I|``: that of ``posterior``."""
        delta = prior.precision.squeeze(0) * self.ratio
        return self.n_params * delta.log() + self._log_det(self.scale / delta, **options)

    def log_det_ratio(self, prior: GaussianPrior, **options: Any) -> Scalar:
        """``log |(N/M) H + δ I| − log |δ I|``: that of the curvature of all data, for which the subset stands."""
        return self._log_det(self.ratio * self.scale / prior.precision.squeeze(0), **options)

    def _log_det(self, factor: Tensor, **options: Any) -> Scalar:
        """``log |I + factor · G|``: O(columns) once eigenvalues are known; differentiable in the factor."""
        assert not options, "there are no options"
        if not self.root.requires_grad:
            return self.repeats * torch.log1p(factor * self.eigenvalues).sum()
        eye = torch.eye(self.gram.shape[1]).to(self.root)
        factors = linalg.cholesky(eye + factor * self.gram, "kernel of the subset")
        return 2 * self.repeats * factors.diagonal(dim1=1, dim2=2).log().sum()

    def basis(self, prior: GaussianPrior) -> KernelBasis:  # noqa: ARG002
        """Eigenvectors of the Gram matrix, which prior and noise leave alone."""
        vectors = self.eigenvectors
        return KernelBasis(self.kernel, self.root, self.eigenvalues, vectors)

    def to_dense(self) -> Float[Tensor, "params params"]:
        """``s Jᵀ R Rᵀ J``, for small problems and tests."""
        rows = torch.cat(list(weight_rows(self.kernel, self.root)))
        return self.scale * rows.T @ rows


@dataclass(frozen=True)
class KernelBasis(Basis):
    """Coordinates of the functions that the subset spans: all posteriors with isotropic priors are diagonal in them.

    The first coordinate stands for what they leave of the prior: its precision is that of the prior.
    """

    kernel: SubsetKernel
    root: Tensor
    eigenvalues: Float[Tensor, "parts columns"]
    eigenvectors: Float[Tensor, "parts columns columns"]

    def posterior(self, curvature: SubsetCurvature, prior: GaussianPrior, **options: Any) -> DiagPrecision:  # pyright: ignore[reportIncompatibleVariableOverride]
        """``δ'`` and ``δ' + s λ``, part by part."""
        assert not options, "there are no options"
        delta = prior.precision * curvature.ratio
        spanned = delta + curvature.scale * self.eigenvalues
        return DiagPrecision(torch.cat([delta.expand(len(spanned), 1), spanned], 1).flatten())

    @cached_property
    def whitening(self) -> Float[Tensor, "parts columns columns"]:
        """``Q λ^(−½)``; zero for eigenvalues that are rounding, where nothing is spanned."""
        level = 10 * self.eigenvalues.shape[1] * torch.finfo(self.eigenvalues.dtype).eps
        kept = self.eigenvalues > level * self.eigenvalues.amax(1, keepdim=True)
        inverse = torch.where(kept, self.eigenvalues.clamp(min=torch.finfo(self.root.dtype).tiny).rsqrt(), 0.0)
        return self.eigenvectors * inverse.unsqueeze(1)

    def blocks(self, blocks: Sequence[Any]) -> Any:  # noqa: ARG002
        """Not asked for: inputs of a process are rotated through their kernel."""
        msg = "Inputs of a Gaussian process are rotated as ProcessLinearization."
        raise UnsupportedError(msg)


__all__ = ["KernelBasis", "SubsetCurvature"]
