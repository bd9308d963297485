"""How GGN and empirical Fisher follow from Jacobians and gradients; and the interface of all back ends.

Subclass ``GGNInterface`` or ``EFInterface``, provide ``jacobians`` or ``gradients``, and the dense and diagonal
structures follow; override ``full``, ``diag`` or ``kron`` where a better way exists. All of them return the negative
log-likelihood at unit noise together with the curvature at unit noise, summed over the batch.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from laplace.curvature.columns import ColumnsInterface, dense_columns
from laplace.curvature.interface import CurvatureInterface
from laplace.curvature.structured import without_count
from laplace.enums import CurvatureKind, Likelihood
from laplace.errors import InputError, UnsupportedError
from laplace.likelihoods import OutputHessian, Positions
from laplace.structures.jacobian import JacobianBlock
from laplace.types import Inputs

__all__ = ["CurvatureInterface", "EFInterface", "GGNInterface"]


def check_generator(generator: torch.Generator | None, model: nn.Module) -> None:
    """Raise if a generator is on another device than a model."""
    device = next(model.parameters()).device
    if generator is not None and generator.device.type != device.type:
        msg = f"The generator is on {generator.device}, the model on {device}; create it on the model's device."
        raise InputError(msg)


class GGNInterface(ColumnsInterface):
    """Generalized Gauss–Newton matrix ``Σ Jᵀ Λ J``, or the Fisher sampled from the model, from Jacobians.

    Parameters
    ----------
    model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y, curvature_dtype
        As in ``CurvatureInterface``.
    stochastic
        Sample the Fisher instead of computing the exact matrix: unbiased, its variance falls as 1/``num_samples``.
    num_samples
        Number of labels drawn for each position.
    generator
        Source of randomness for them.

    Raises
    ------
    UnsupportedError
        If ``num_samples`` is not positive, or sampling options are given without ``stochastic``.
    InputError
        If the generator is on another device than the model.
    """

    matrix: ClassVar[str] = "GGN"

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        stochastic: bool = False,
        num_samples: int = 1,
        *,
        generator: torch.Generator | None = None,
        curvature_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y, curvature_dtype=curvature_dtype
        )
        if num_samples < 1:
            msg = f"num_samples must be at least 1; got {num_samples}."
            raise UnsupportedError(msg)
        if not stochastic and (num_samples != 1 or generator is not None):
            msg = "num_samples and generator belong to the sampled Fisher: pass stochastic=True with them."
            raise UnsupportedError(msg)
        check_generator(generator, model)
        self.stochastic = self.is_sampled = stochastic
        self.num_samples = num_samples
        self.generator = generator

    def _seed(self) -> int:
        """A seed from the generator, for packages that take no generator."""
        device = None if self.generator is None else self.generator.device
        return int(torch.randint(2**31 - 1, (), generator=self.generator, device=device))

    def full(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss and ``Σ Jᵀ Λ J`` from Jacobians."""
        self._refuse(without_count(kwargs))
        loss, J, Lambda = self._jacobians_and_hessians(x, y)
        return loss, torch.einsum("ncp,nck,nkq->pq", J, Lambda, J)

    def diag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss and the diagonal of ``Σ Jᵀ Λ J`` from Jacobians."""
        self._refuse(without_count(kwargs))
        loss, J, Lambda = self._jacobians_and_hessians(x, y)
        return loss, torch.einsum("ncp,nck,nkp->p", J, Lambda, J)

    @contextmanager
    def columns(self, x: Inputs, y: Tensor) -> Generator[tuple[Tensor, Iterator[Sequence[JacobianBlock]]], None, None]:
        """Loss and ``J r`` for the columns r of roots of Λ, written out, from Jacobians."""
        loss, J, positions = self._jacobians_and_positions(x, y)
        columns = torch.einsum("ncq,ncp->qnp", self.output_root(positions), J)
        yield loss, iter([dense_columns(columns, self._sizes)])

    def output_hessian(self, positions: Positions) -> OutputHessian:
        """The likelihood's Hessian, or the mean of ``num_samples`` outer products with that expectation."""
        if self.stochastic:
            return self._sampled(positions, self.num_samples)
        return self.output_likelihood.hessian(self.output_likelihood.observed(positions.f, positions.y))

    def _sampled(self, positions: Positions, num_samples: int) -> OutputHessian:
        """The mean of outer products of gradients at sampled labels."""
        likelihood = self.output_likelihood
        f = likelihood.observed(positions.f, positions.y)
        draws = likelihood.sample_gradient(f, num_samples, self.generator)
        return OutputHessian(positions.f.shape[-1], root=draws.permute(1, 2, 0) / num_samples**0.5)

    def _jacobians_and_hessians(self, x: Inputs, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, Jacobians and output Hessians of the unmasked positions."""
        loss, J, positions = self._jacobians_and_positions(x, y)
        return loss, J, self.output_hessian(positions).dense()

    def _jacobians_and_positions(self, x: Inputs, y: Tensor) -> tuple[Tensor, Tensor, Positions]:
        """Loss, Jacobians and outputs of the unmasked positions."""
        J, f = self.jacobians(x)
        with torch.no_grad():  # Jacobians have a row for each position; targets are shaped as the model's outputs are
            shape = self.outputs(x).shape
        positions = self.positions(f.reshape(*shape[:-1], f.shape[-1]), y)
        return (
            self.output_likelihood.nll(positions.f, positions.y),
            positions.select(J.flatten(1)).unflatten(1, (positions.f.shape[-1], -1)),
            positions,
        )


class EFInterface(ColumnsInterface):
    """Empirical Fisher ``Σ g gᵀ`` with ``g`` the gradient of each datum's negative log-likelihood."""

    kind: ClassVar[CurvatureKind] = CurvatureKind.EF
    matrix: ClassVar[str] = "empirical Fisher"
    adds_over_positions: ClassVar[bool] = True

    def output_hessian(self, positions: Positions) -> OutputHessian:
        """The outer product of the gradient of each position with itself."""
        gradient = self.output_likelihood.gradient(positions.f, positions.y)
        return OutputHessian(positions.f.shape[-1], root=gradient.unsqueeze(-1))

    def full(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss and ``Σ g gᵀ`` from gradients."""
        self._refuse(without_count(kwargs))
        gradients, loss = self.gradients(x, y)
        return loss, gradients.T @ gradients

    def diag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss and ``Σ g²`` from gradients."""
        self._refuse(without_count(kwargs))
        gradients, loss = self.gradients(x, y)
        return loss, gradients.square().sum(0)

    @contextmanager
    def columns(self, x: Inputs, y: Tensor) -> Generator[tuple[Tensor, Iterator[Sequence[JacobianBlock]]], None, None]:
        """Loss and one column per datum, its gradient."""
        gradients, loss = self.gradients(x, y)
        yield loss, iter([dense_columns(gradients.unsqueeze(0), self._sizes)])
