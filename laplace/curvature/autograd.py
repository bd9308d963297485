"""The built-in back ends (``backend=AutogradGGN``, the default, ``AutogradEF`` and ``AutogradHessian``).

For the last layer they call the closed forms of ``curvature/last_layer.py``: one forward pass a batch.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from laplace.curvature import last_layer, pairs
from laplace.curvature.curvature import CurvatureInterface, EFInterface, GGNInterface
from laplace.likelihoods import Positions
from laplace.network.modes import full_precision
from laplace.structures import Kron
from laplace.types import Inputs


class AutogradInterface(CurvatureInterface):
    """The closed forms of the last layer, given the output Hessian of the kind of curvature."""

    finds_last_layer: ClassVar[bool] = True

    def full(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss ``[]`` and dense curvature ``[P, P]``: O(rows · (C D)²), see ``curvature.last_layer.full``."""
        self._refuse(kwargs)
        with self._rows(x, y) as (loss, phi, positions):
            return loss, self._closed_forms.full(phi, self.output_hessian(positions), self._has_bias)

    def diag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss ``[]`` and diagonal ``[P]``: O(rows · C D)."""
        self._refuse(kwargs)
        with self._rows(x, y) as (loss, phi, positions):
            return loss, self._closed_forms.diag(phi, self.output_hessian(positions), self._has_bias)

    def kron(self, x: Inputs, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Kron]:
        """Loss ``[]`` and Kronecker factors: O(rows · (C² + D²)); the inputs' side divided by ``N``.

        The factors are summed in float64 whatever the model is: an eigenvalue that is zero but for rounding to float32
        would count as curvature where the prior precision is smaller, and variances would come out too small.
        """
        self._refuse(kwargs)
        with self._rows(x, y) as (loss, phi, positions):
            wide = phi.dtype if phi.device.type == "mps" else torch.float64  # which that device does not have
            hessian = self.output_hessian(positions.to(wide))
            sums = self._closed_forms.kron(phi.to(wide), hessian, self._has_bias)
            return loss, sums if N == 1 else sums.divide_inputs(N)

    @property
    def _closed_forms(self) -> ModuleType:
        """``diag``, ``kron`` and ``full``: of a linear layer, or of a score head that compares the items of a pair."""
        return last_layer if self.output_likelihood.n_items == 1 else pairs

    @property
    def _has_bias(self) -> bool:
        return self._head.bias is not None

    @contextmanager
    def _rows(self, x: Inputs, y: Tensor) -> Generator[tuple[Tensor, Tensor, Positions], None, None]:
        """Loss, features and outputs of the unmasked positions; the body runs in full precision and builds no graph."""
        with torch.no_grad():
            f, phi = self.model.forward_with_features(x)
            with full_precision(f.device):
                positions = self._positions(self._widen(f), y)
                yield (
                    self.output_likelihood.nll(positions.f, positions.y),
                    positions.select(self._widen(phi)),
                    positions,
                )


class AutogradGGN(AutogradInterface, GGNInterface):
    """Generalized Gauss–Newton matrix, exact or (``stochastic=True``) with Λ sampled from the model."""


class AutogradHessian(AutogradInterface):
    """The Hessian; for the last layer, in which outputs are linear, it equals the generalized Gauss–Newton matrix."""


class AutogradEF(AutogradInterface, EFInterface):
    """Empirical Fisher: outer products of the gradients of each datum (a row of the loader).

    The Kronecker structure treats positions of a datum as independent, as its factors do everywhere.
    """

    def full(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss ``[]`` and ``Σ g gᵀ`` ``[P, P]``, ``g`` summed over the positions of a datum first."""
        self._refuse(kwargs)
        with self._rows(x, y) as (loss, phi, positions):
            if positions.datum is None:
                return loss, self._closed_forms.full(phi, self.output_hessian(positions), self._has_bias)
            total = phi.new_zeros(self._n_params, self._n_params)
            for gradients in self._datum_gradients(phi, positions):
                total.addmm_(gradients.T, gradients)
            return loss, total

    def diag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss ``[]`` and ``Σ g²`` ``[P]``, ``g`` summed over the positions of a datum first."""
        self._refuse(kwargs)
        with self._rows(x, y) as (loss, phi, positions):
            if positions.datum is None:
                return loss, self._closed_forms.diag(phi, self.output_hessian(positions), self._has_bias)
            total = phi.new_zeros(self._n_params)
            for gradients in self._datum_gradients(phi, positions):
                total += gradients.square().sum(0)
            return loss, total

    @property
    def _n_params(self) -> int:
        return sum(parameter.numel() for parameter in self.params)

    def _datum_gradients(self, phi: Tensor, positions: Positions) -> Iterator[Tensor]:
        assert positions.datum is not None, "one position a datum needs no sums"
        gradient = self.output_likelihood.gradient(positions.f, positions.y)
        return last_layer.per_datum_gradients(phi, gradient, positions.datum, self._has_bias)
