"""The two interfaces every structure implements: a curvature that adds up, and a precision that is factorized.

They are two types on purpose: a log-determinant before the prior is added, or a merge after factorizing, is a type
error instead of a branch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.errors import InputError, ShapeError
from laplace.prior import GaussianPrior
from laplace.types import Scalar


@runtime_checkable
class SupportsCurvature(Protocol):
    """What a structure asks of a curvature back end."""

    full: Callable[..., tuple[Tensor, Tensor]]
    diag: Callable[..., tuple[Tensor, Tensor]]
    kron: Callable[..., tuple[Tensor, Any]]

    def count(self, y: Tensor) -> int:
        """Number of unmasked positions among targets.

        Parameters
        ----------
        y
            Targets of a batch.
        """
        ...


class AbstractCurvature(ABC):
    """Curvature of the data term at unit noise and temperature: additive over data, without prior, maybe singular.

    Immutable: every operation returns a new one.
    """

    @classmethod
    @abstractmethod
    def from_batch(
        cls, backend: SupportsCurvature, x: Any, y: Tensor, **options: Any
    ) -> tuple[Scalar, AbstractCurvature]:
        """Negative log-likelihood and curvature of one batch, asked of the back end in its own structure.

        Parameters
        ----------
        backend
            Computes the curvature.
        x, y
            A batch of inputs and targets.
        **options
            Passed to the back end.

        Returns
        -------
        Negative log-likelihood ``[]``, in nats, and curvature, both at unit noise and temperature.
        """

    @classmethod
    def accumulate(
        cls, backend: SupportsCurvature, batches: Iterable[tuple[Any, Tensor]], **options: Any
    ) -> tuple[Scalar, AbstractCurvature] | None:
        """Negative log-likelihood and curvature of a whole data set; ``None`` when it is empty.

        Parameters
        ----------
        backend
            Computes the curvature.
        batches
            Inputs and targets.
        **options
            Passed to the back end.

        Raises
        ------
        InputError
            If a batch cannot be used, or its negative log-likelihood or the curvature is not finite.
        """
        total: tuple[Scalar, AbstractCurvature] | None = None
        for index, (x, y) in enumerate(batches):
            try:
                nll, curvature = cls.from_batch(backend, x, y, **options)
            except InputError as error:
                msg = f"Batch {index} of the loader (counting from 0): {error}"
                raise type(error)(msg) from error
            if not bool(torch.isfinite(nll)):
                msg = (
                    f"The negative log-likelihood of batch {index} (counting from 0) is {float(nll)}. Its inputs or "
                    "targets, or the outputs of the model for them, are NaN or infinite (or overflow when squared): "
                    "look for them in the data."
                )
                raise InputError(msg)
            total = (nll, curvature) if total is None else (total[0] + nll, total[1].merge(curvature))
        if total is not None and not total[1].is_finite:
            msg = (
                "The curvature of the training data is not finite: features of the last layer overflow when squared. "
                "Scale the inputs, or pass curvature_dtype=torch.float64."
            )
            raise InputError(msg)
        return total

    @property
    @abstractmethod
    def n_params(self) -> int:
        """P, the number of random weights."""

    @property
    @abstractmethod
    def is_finite(self) -> bool:
        """Whether the diagonal is finite, and with it, the matrix being a sum of outer products, every entry."""

    @property
    @abstractmethod
    def public(self) -> Any:
        """What users find under ``H``."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Tensors and plain values from which ``from_state`` makes an equal curvature."""

    @classmethod
    @abstractmethod
    def from_state(cls, state: Mapping[str, Any], dtype: torch.dtype) -> AbstractCurvature:
        """The curvature that ``state`` described, for use in a precision.

        Parameters
        ----------
        state
            Made by ``state``.

        Raises
        ------
        KeyError
            If an entry is missing.
        """

    @abstractmethod
    def merge(self, other: Any) -> AbstractCurvature:
        """Curvature of the union of two data sets; ``other`` has the same structure.

        Parameters
        ----------
        other
            A curvature of the same structure and size, unscaled as this one.
        """

    @abstractmethod
    def __mul__(self, factor: float | Tensor) -> AbstractCurvature:
        """``factor · H``, differentiable in ``factor``."""

    @abstractmethod
    def posterior(self, prior: GaussianPrior, **options: Any) -> AbstractPrecision:
        """Factorize ``H + diag(prior)``, once; differentiable in the prior.

        Parameters
        ----------
        prior
            Over the same weights.
        **options
            Of the structure: ``damping``.
        """

    def posterior_logdet(self, prior: GaussianPrior, **options: Any) -> Scalar:
        """``log |H + diag(prior)|``; overridden where it costs less than the factorization.

        Parameters
        ----------
        prior, **options
            As in ``posterior``.
        """
        return self.posterior(prior, **options).logdet()

    @abstractmethod
    def to_dense(self) -> Float[Tensor, "params params"]:
        """The matrix, ``[P, P]``: for small problems and tests."""


class AbstractPrecision(ABC):
    """A symmetric positive definite P×P matrix ``A``, factorized. Immutable.

    The methods that are not abstract are slow and correct; a structure overrides them to be fast.
    """

    @property
    @abstractmethod
    def n_params(self) -> int:
        """P, the number of random weights."""

    @property
    @abstractmethod
    def public(self) -> Any:
        """What users find under ``posterior_precision``."""

    @abstractmethod
    def solve(self, v: Float[Tensor, "*batch params"]) -> Float[Tensor, "*batch params"]:
        """A⁻¹ v.

        Parameters
        ----------
        v
            Weights, ``[..., P]``.
        """

    @abstractmethod
    def quadratic(self, v: Float[Tensor, "*batch params"]) -> Float[Tensor, "*batch"]:
        """vᵀ A v.

        Parameters
        ----------
        v
            Weights, ``[..., P]``.
        """

    @abstractmethod
    def logdet(self) -> Scalar:
        """Log |A|."""

    @abstractmethod
    def diagonal_of_inverse(self) -> Float[Tensor, " params"]:
        """Marginal variances of the weights."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "samples params"]:
        """Draws from N(0, A⁻¹), ``[n, P]``.

        Parameters
        ----------
        n
            How many.
        generator
            Source of randomness.
        """

    @abstractmethod
    def to_dense(self) -> Float[Tensor, "params params"]:
        """A, ``[P, P]``: for small problems and tests."""

    def functional_variance(self, J: Tensor) -> Float[Tensor, "batch outputs outputs"]:
        """Covariance of the linearized outputs at each input, J_b A⁻¹ J_bᵀ.

        Parameters
        ----------
        J
            Jacobians, ``[batch, outputs, P]``.

        Returns
        -------
        ``[batch, outputs, outputs]``, output units squared, symmetric positive semi-definite.

        Raises
        ------
        ShapeError
            If the Jacobians are not ``[batch, outputs, P]``.
        """
        check_jacobians(J, self.n_params)
        return torch.einsum("bcp,bkp->bck", J, self.solve(J))

    def functional_covariance(self, J: Tensor) -> Float[Tensor, "joint joint"]:
        """Covariance of the linearized outputs across inputs, ``[batch·outputs, batch·outputs]``.

        Parameters
        ----------
        J
            Jacobians, ``[batch, outputs, P]``.

        Raises
        ------
        ShapeError
            If the Jacobians are not ``[batch, outputs, P]``.
        """
        check_jacobians(J, self.n_params)
        flat = J.flatten(0, 1)
        return flat @ self.solve(flat).mT

    def feature_variance(
        self, phi: Float[Tensor, "rows features"], n_outputs: int, bias: bool, *, diagonal: bool = False
    ) -> Float[Tensor, "rows outputs outputs"] | Float[Tensor, "rows outputs"]:
        """The same for a linear last layer, ``J = [I ⊗ φᵀ, I]``; structures override it so that J is never built.

        Parameters
        ----------
        phi
            Features, ``[rows, D]``.
        n_outputs
            C.
        bias
            Whether the layer has a bias.
        diagonal
            Return variances ``[rows, C]`` instead of covariances ``[rows, C, C]``.

        Returns
        -------
        Output units squared, without observation noise.
        """
        cov = self.functional_variance(head_jacobians(phi, n_outputs, bias))
        return cov.diagonal(dim1=-2, dim2=-1) if diagonal else cov

    def feature_covariance(
        self, phi: Float[Tensor, "rows features"], n_outputs: int, bias: bool
    ) -> Float[Tensor, "joint joint"]:
        """Covariance across inputs for a linear last layer, ``[rows·C, rows·C]``.

        Parameters
        ----------
        phi
            Features, ``[rows, D]``.
        n_outputs
            C.
        bias
            Whether the layer has a bias.
        """
        return self.functional_covariance(head_jacobians(phi, n_outputs, bias))


def head_jacobians(
    phi: Float[Tensor, "rows features"], n_outputs: int, bias: bool
) -> Float[Tensor, "rows outputs params"]:
    """The Jacobian of a linear layer in its own weights, written out: ``[I_C ⊗ φᵀ, I_C]``.

    Its size is C times that of the outputs' gradients: only the generic paths use it.
    """
    eye = torch.eye(n_outputs, dtype=phi.dtype, device=phi.device)
    weight = torch.einsum("ck,nd->nckd", eye, phi).flatten(2)
    return torch.cat([weight, eye.expand(len(phi), -1, -1)], -1) if bias else weight


def check_jacobians(J: Tensor, n_params: int) -> None:
    """Raise unless Jacobians are ``[batch, outputs, P]``.

    Parameters
    ----------
    J
        What should be Jacobians.
    n_params
        P.

    Raises
    ------
    ShapeError
        If they are not.
    """
    if J.dim() != 3 or J.shape[-1] != n_params:
        msg = f"Jacobians must have the shape [batch, outputs, {n_params}]; got {list(J.shape)}."
        raise ShapeError(msg)
