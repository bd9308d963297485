"""The two interfaces every structure implements: a curvature that adds up, and a precision that is factorized.

They are two types on purpose: a log-determinant before the prior is added, or a merge after factorizing, is a type
error instead of a branch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import linalg
from laplace.enums import HessianStructure
from laplace.errors import OutOfMemoryError, UnsupportedError
from laplace.free_memory import amount, limited_by
from laplace.prior import GaussianPrior
from laplace.schema import Table
from laplace.structures.accumulate import add_up, require_finite
from laplace.structures.dense_jacobian import check_jacobians, dense_rows
from laplace.structures.jacobian import JacobianBlock
from laplace.structures.supports import SupportsCurvature
from laplace.types import Scalar


class AbstractCurvature(ABC):
    """Curvature of the data term at unit noise and temperature: additive over data, without prior, maybe singular.

    Immutable: every operation returns a new one.
    """

    name: ClassVar[HessianStructure]
    entries: ClassVar[Table]
    """What the entries of ``state`` must be."""

    @classmethod
    @abstractmethod
    def from_batch(
        cls, backend: SupportsCurvature, x: Any, y: Tensor, **options: Any
    ) -> tuple[Tensor, AbstractCurvature]:
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
        Negative log-likelihood ``[]`` (or ``[C]``, by output), in nats, and curvature, at unit noise and temperature.
        """

    @classmethod
    def accumulate(
        cls, backend: SupportsCurvature, batches: Iterable[tuple[Any, Tensor]], **options: Any
    ) -> tuple[Tensor, AbstractCurvature] | None:
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
        found = add_up(
            batches, lambda x, y: cls.from_batch(backend, x, y, **options), lambda total, new: total.absorbing(new)
        )
        require_finite(found is None or found[1].is_finite)
        return found

    @classmethod
    def check_merge(cls) -> None:
        """Raise where two curvatures cannot be merged, before the second is made.

        Raises
        ------
        UnsupportedError
            If they cannot.
        """
        return

    @classmethod
    def check_exact(cls) -> None:
        """Raise where the sum of two curvatures is not exactly that of all their data.

        Raises
        ------
        UnsupportedError
            If it is not.
        """
        cls.check_merge()

    @classmethod
    def of_head(cls, n_outputs: int) -> type[AbstractCurvature]:  # noqa: ARG003 - the same for any number
        """The kind of curvature that holds a last layer of so many outputs.

        Parameters
        ----------
        n_outputs
            C.

        Raises
        ------
        UnsupportedError
            If the structure needs a C×C matrix that is too large.
        """
        return cls

    @classmethod
    @abstractmethod
    def bytes_needed(cls, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> int:
        """Memory that curvature, factorization and one more copy take.

        Parameters
        ----------
        shapes
            Shapes of the parameter groups.
        dtype
            Floating-point type of the curvature.
        """

    @classmethod
    def check_memory(cls, parameters: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Raise if the curvature cannot fit the memory that is free on the device.

        Parameters
        ----------
        parameters
            The random weights.
        dtype
            Floating-point type of the curvature.

        Raises
        ------
        OutOfMemoryError
            If it cannot; the message says what would be needed and what fits.
        """
        needed = cls.bytes_needed([tuple(parameter.shape) for parameter in parameters], dtype)
        device = parameters[0].device
        available = linalg.memory_of(device)
        if available is not None and needed > available:
            n_params = sum(parameter.numel() for parameter in parameters)
            msg = (
                f"hessian_structure={cls.name.value!r} for {n_params} weights takes about {amount(needed)}; "
                f"{amount(available)} are free{limited_by(device)}. What takes less: hessian_structure='diag' "
                f"({amount(3 * n_params * dtype.itemsize)}), 'kron' unless a layer is very wide, or fewer random "
                "weights (subset_of_weights='last_layer', or requires_grad_(False) on some layers). la.plan(loader) "
                "says what each would take."
            )
            raise OutOfMemoryError(msg)

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

    def absorbing(self, other: Any) -> AbstractCurvature:
        """What ``merge`` gives, where this curvature is not used any more and may be written to.

        Parameters
        ----------
        other
            As of ``merge``; it stays as it is.
        """
        return self.merge(other)

    def summands(self) -> list[Tensor]:
        """The tensors that add up when data of several processes are merged.

        Raises
        ------
        UnsupportedError
            If the structure does not say it.
        """
        msg = (
            f"{type(self).__name__} does not say how it adds up over processes (summands, with_summands). Fit in "
            "each alone, within laplace.processes.within(None)."
        )
        raise UnsupportedError(msg)

    def with_summands(self, parts: Sequence[Tensor]) -> AbstractCurvature:
        """The same curvature with other tensors, in the order of ``summands``."""
        del parts
        raise NotImplementedError

    def subtract(self, other: Any, *, squares: bool = True) -> AbstractCurvature:
        """Curvature of the data that are not among those of another one, exactly; the inverse of ``merge``.

        Parameters
        ----------
        other
            A curvature of the same structure and size, unscaled, of some of the data of this one.
        squares
            Whether curvatures are sums of squares, whose diagonal cannot be negative; not so of a Hessian.

        Raises
        ------
        InputError
            If the other data cannot be part of these, since something would be negative.
        UnsupportedError
            If the structure keeps no sums.
        """
        del other, squares
        msg = f"hessian_structure={self.name.value!r} does not say what is left when data are removed: fit the others."
        raise UnsupportedError(msg)

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
            Options of the structure: ``damping``.
        """

    def posterior_logdet(self, prior: GaussianPrior, **options: Any) -> Scalar:
        """``log |H + diag(prior)|``; overridden where it costs less than the factorization.

        Parameters
        ----------
        prior, **options
            As in ``posterior``.
        """
        return self.posterior(prior, **options).logdet()

    def scale_weights(self, factors: Float[Tensor, " params"]) -> AbstractCurvature:
        """``√f_i H_ij √f_j``: what a noise for each output does to the weights of a linear head."""
        del factors
        msg = f"hessian_structure={self.name.value!r} takes one sigma_noise for all outputs."
        raise UnsupportedError(msg)

    def basis(self, prior: GaussianPrior) -> Any:  # noqa: ARG002
        """The ``Basis`` that posteriors share under all priors of a shape, if there is one."""
        return None

    def log_det_ratio(self, prior: GaussianPrior, **options: Any) -> Scalar:
        """``log |H + diag(prior)| − log |diag(prior)|``; overridden where the two need not be subtracted.

        Parameters
        ----------
        prior, **options
            As in ``posterior``.
        """
        return self.posterior_logdet(prior, **options) - prior.logdet()

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

    def block_variance(self, blocks: Sequence[JacobianBlock]) -> Float[Tensor, "columns batch"]:
        """J_qb A⁻¹ J_qbᵀ for derivatives that are kept in factors; structures override it so that J is never whole.

        Parameters
        ----------
        blocks
            One for each parameter group.
        """
        return torch.cat([self.functional_variance(J).diagonal(dim1=1, dim2=2) for J in dense_rows(blocks)]).T

    def block_covariance(self, blocks: Sequence[JacobianBlock]) -> Float[Tensor, "batch columns columns"]:
        """The same between the columns of each datum.

        Parameters
        ----------
        blocks
            One for each parameter group.
        """
        return torch.cat([self.functional_variance(J) for J in dense_rows(blocks)])

    def block_kernel(self, blocks: Sequence[JacobianBlock]) -> Float[Tensor, "joint joint"]:
        """The same between all columns of all data, ``[batch·columns, batch·columns]``, datum by datum.

        Parameters
        ----------
        blocks
            One for each parameter group.
        """
        return self.functional_covariance(torch.cat(list(dense_rows(blocks))))
