"""What ELLA and VaLLA learn, as curvatures: ``posterior`` adds the prior, and gives a precision of their features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.enums import HessianStructure
from laplace.errors import UnsupportedError
from laplace.gp.nystrom import log_det_ratio
from laplace.gp.posterior import FeaturePrecision
from laplace.network.batches import in_precision, plain, to_device
from laplace.prior import GaussianPrior
from laplace.schema import Table, anything, indices, symmetric, tensor
from laplace.structures import AbstractCurvature
from laplace.structures.supports import SupportsCurvature
from laplace.types import Inputs, Scalar

NO_EVIDENCE = (
    'The objective of VaLLA is fit_history_["objective"]; with alpha=0 its negative is a lower bound of the '
    "log evidence. For the Laplace evidence use another hessian_structure, or ELLA."
)


@dataclass(frozen=True)
class FeatureCurvature(AbstractCurvature):
    """A matrix ``A`` over the weights of features, of which the weights of the network are combinations."""

    name: ClassVar[HessianStructure] = HessianStructure.GP

    @classmethod
    def from_batch(
        cls, backend: SupportsCurvature, x: Any, y: Tensor, **options: Any
    ) -> tuple[Tensor, FeatureCurvature]:
        """Not available: features are made of all data first."""
        del backend, x, y, options
        msg = "Features are made of all data before any batch says something about them: call fit(train_loader)."
        raise UnsupportedError(msg)

    @classmethod
    def bytes_needed(cls, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> int:  # noqa: ARG003
        """None that depends on weights alone."""
        return 0

    @property
    def public(self) -> FeatureCurvature:
        """Itself: no matrix over the weights is built."""
        return self

    @classmethod
    def check_exact(cls) -> None:
        """Other data have other features: raises."""
        msg = "What was learned of different features does not add: fit to all data at once."
        raise UnsupportedError(msg)

    def merge(self, other: Any) -> FeatureCurvature:
        """Not available."""
        del other
        self.check_exact()
        raise AssertionError


@dataclass(frozen=True)
class NystromCurvature(FeatureCurvature):
    """The curvature along orthonormal directions of the weights: ``V A Vᵀ``, and nothing outside them."""

    directions: Float[Tensor, "k params"]
    """Vᵀ, ``[K, P]``."""
    gram: Float[Tensor, "k k"]
    """``Σ φᵀ Λ φ`` at unit noise and temperature, ``[K, K]``."""
    scale: Scalar | float = 1.0
    """Factor of it."""

    entries: ClassVar[Table] = {"directions": tensor(("features", "P")), "gram": symmetric("features")}

    @property
    def n_params(self) -> int:
        """P."""
        return self.directions.shape[1]

    @property
    def is_finite(self) -> bool:
        """Whether the matrix is."""
        return bool(torch.isfinite(self.gram).all())

    def state(self) -> dict[str, Any]:
        """Directions and matrix."""
        return {"directions": self.directions, "gram": self.gram}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], dtype: torch.dtype) -> NystromCurvature:
        """In a precision."""
        return cls(state["directions"].to(dtype), state["gram"].to(dtype))

    def __mul__(self, factor: float | Tensor) -> NystromCurvature:
        """Scale it."""
        return replace(self, scale=self.scale * factor)

    def posterior(self, prior: GaussianPrior, **options: Any) -> FeaturePrecision:
        """``A + δ I``, ``[K, K]``; the prior is isotropic."""
        assert not options, "there are no options"
        return FeaturePrecision.of(self.gram * self.scale, prior.precision.squeeze(0))

    def log_det_ratio(self, prior: GaussianPrior, **options: Any) -> Scalar:
        """``log |A + δ I| − K log δ``: at most that of all weights, and equal to it where the directions span them."""
        return log_det_ratio(self.posterior(prior, **options))

    def posterior_logdet(self, prior: GaussianPrior, **options: Any) -> Scalar:
        """``log |V A Vᵀ + δ I|`` over all weights."""
        return prior.logdet() + self.log_det_ratio(prior, **options)

    def to_dense(self) -> Float[Tensor, "params params"]:
        """``V A Vᵀ``, for small problems and tests."""
        return self.directions.T @ (self.gram * self.scale) @ self.directions


@dataclass(frozen=True)
class InducingCurvature(FeatureCurvature):
    """What was trained at inducing points, ``U A Uᵀ`` with ``U = J_Zᵀ R⁻ᵀ`` and ``A = L Lᵀ``; U is made of the network.

    It belongs to the noise and temperature at which it was trained, and does not scale.
    """

    inducing_locations: Inputs
    """Z, inputs."""
    inducing_classes: Tensor
    """Output of each, ``[M]``."""
    kernel_root: Float[Tensor, "points points"]
    """R, lower triangular, ``[M, M]``: the kernel of the inducing points is ``R Rᵀ``."""
    root: Float[Tensor, "points points"]
    """L, lower triangular, ``[M, M]``."""
    size: int
    """P."""

    entries: ClassVar[Table] = {
        "inducing_locations": anything,
        "inducing_classes": indices("points"),
        "kernel_root": tensor(("points", "points")),
        "root": tensor(("points", "points")),
    }

    @property
    def n_params(self) -> int:
        """P."""
        return self.size

    @property
    def is_finite(self) -> bool:
        """Whether L is."""
        return bool(torch.isfinite(self.root).all())

    def state(self) -> dict[str, Any]:
        """Inputs in plain containers, and tensors; not P, which is that of the model."""
        found = {name: getattr(self, name) for name in self.entries}
        return {**found, "inducing_locations": plain(self.inducing_locations)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], dtype: torch.dtype, size: int = 0) -> InducingCurvature:
        """In a precision; of a model with so many weights."""
        kernel_root, root = state["kernel_root"].to(dtype), state["root"].to(dtype)
        return cls(state["inducing_locations"], state["inducing_classes"], kernel_root, root, size)

    def moved(self, device: torch.device, dtype: torch.dtype) -> InducingCurvature:
        """The same elsewhere, inputs in their containers: the model is given what the loader yielded."""
        values = {name: getattr(self, name) for name in self.entries}
        return replace(self, **in_precision(to_device(values, device), self.root.dtype, dtype))

    def __mul__(self, factor: float | Tensor) -> InducingCurvature:
        """Itself, whatever the noise is."""
        del factor
        return self

    def posterior(self, prior: GaussianPrior, **options: Any) -> FeaturePrecision:
        """``A + δ I``, ``[M, M]``; the prior is isotropic."""
        assert not options, "there are no options"
        return FeaturePrecision.of(self.root @ self.root.T, prior.precision.squeeze(0))

    def log_det_ratio(self, prior: GaussianPrior, **options: Any) -> Scalar:
        """Not available: what is trained is a bound or a divergence."""
        del prior, options
        raise UnsupportedError(NO_EVIDENCE)

    def posterior_logdet(self, prior: GaussianPrior, **options: Any) -> Scalar:
        """Not available, as ``log_det_ratio``."""
        return self.log_det_ratio(prior, **options)

    def to_dense(self) -> Float[Tensor, "params params"]:
        """Not available: U is made of the network's derivatives, which no curvature holds."""
        msg = "The curvature of inducing points is made of the network's derivatives: ask for functional_covariance."
        raise UnsupportedError(msg)


__all__ = ["FeatureCurvature", "InducingCurvature", "NystromCurvature"]
