"""The engine of the built-in back ends for the last layer: closed forms of the features and outputs of a batch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from laplace import linalg
from laplace.curvature import columns as by_columns
from laplace.curvature import last_layer, pairs
from laplace.curvature.curvature import CurvatureInterface
from laplace.curvature.replay import Features
from laplace.curvature.structured import Basis
from laplace.likelihoods import Positions
from laplace.network.modes import full_precision
from laplace.structures import FullCurvature, Kron
from laplace.structures.jacobian import JacobianBlock
from laplace.types import Inputs


class LastLayerEngine:
    """Curvature of the last layer: one forward pass per batch, no backward pass."""

    def __init__(self, backend: CurvatureInterface) -> None:
        self.backend = backend

    def full(self, x: Inputs, y: Tensor) -> tuple[Tensor, Tensor]:
        """Loss ``[]`` and dense curvature ``[P, P]``: O(rows · (C D)²), see ``curvature.last_layer.full``."""

        def add(total: Tensor, gradients: Tensor) -> Tensor:
            return total.addmm_(gradients.T, gradients)

        return self._dense(x, y, self._closed_forms.full, 2, add)

    def diag(self, x: Inputs, y: Tensor) -> tuple[Tensor, Tensor]:
        """Loss ``[]`` and diagonal ``[P]``: O(rows · C D)."""

        def add(total: Tensor, gradients: Tensor) -> Tensor:
            return total.add_(gradients.square().sum(0))

        return self._dense(x, y, self._closed_forms.diag, 1, add)

    def kron(self, x: Inputs, y: Tensor) -> tuple[Tensor, Kron]:
        """Loss ``[]`` and Kronecker factors, raw sums in float64: O(rows · (C² + D²))."""
        with self._rows(x, y) as (loss, phi, positions):
            wide = phi.dtype if phi.device.type == "mps" else torch.float64  # MPS has no float64
            hessian = self.backend.output_hessian(positions.to(wide))
            return loss, self._closed_forms.kron(phi.to(wide), hessian, self._has_bias)

    def blockdiag(self, x: Inputs, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Loss ``[]`` and the blocks of weight and bias: O(rows · (C D)²)."""
        with self._rows(x, y) as (loss, phi, positions):
            if not self.backend.adds_over_positions or positions.datum is None:
                hessian = self.backend.output_hessian(positions)
                return loss, self._closed_forms.blockdiag(phi, hessian, self._has_bias)
            return loss, by_columns.blockdiag(self._datum_columns(phi, positions), self._sizes, phi)

    def ekfac(
        self, x: Inputs, y: Tensor, basis: Basis, shapes: Sequence[tuple[int, ...]]
    ) -> tuple[Tensor, list[Tensor]]:
        """Loss ``[]`` and the diagonal of the curvature in a basis, computed in float64: O(rows · (C² + D² + C D))."""
        with self._rows(x, y) as (loss, phi, positions):
            if self.backend.adds_over_positions and positions.datum is not None:
                return loss, by_columns.ekfac(self._datum_columns(phi, positions), basis, shapes, phi)
            wide = linalg.wide_dtype(phi)
            sides = [[None if side is None else side.to(wide) for side in group] for group in basis]
            hessian = self.backend.output_hessian(positions.to(wide))
            diagonals = self._closed_forms.ekfac(phi.to(wide), hessian, self._has_bias, sides)
            return loss, [diagonal.to(phi.dtype) for diagonal in diagonals]

    def lowrank(self, x: Inputs, y: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss ``[]``, products of the curvature with directions ``[P, k]``, and its trace: O(rows · C · D · k)."""
        with self._rows(x, y) as (loss, phi, positions):
            narrow = directions.to(phi.dtype)
            if self.backend.adds_over_positions and positions.datum is not None:
                return loss, *by_columns.lowrank(self._datum_columns(phi, positions), narrow, self._sizes)
            hessian = self.backend.output_hessian(positions)
            return loss, *self._closed_forms.lowrank(phi, hessian, self._has_bias, narrow)

    def features(self, x: Inputs) -> Features:
        """Outputs and features, which may take the place of the inputs in every method here."""
        if isinstance(x, Features):
            return x
        with torch.no_grad():
            return Features(*self.backend.model.forward_with_features(x))

    @property
    def _sizes(self) -> list[int]:
        return [parameter.numel() for parameter in self.backend.params]

    def _datum_columns(self, phi: Tensor, positions: Positions) -> Iterator[list[JacobianBlock]]:
        """One column per datum: its gradient, summed over its positions."""
        for gradients in self._datum_gradients(phi, positions):
            yield by_columns.dense_columns(gradients.unsqueeze(0), self._sizes)

    @property
    def _closed_forms(self) -> ModuleType:
        """The module of closed forms: of a linear layer, or of a score head that compares the items of a pair."""
        return last_layer if self.backend.output_likelihood.n_items == 1 else pairs

    @property
    def _has_bias(self) -> bool:
        return len(self.backend.params) == 2

    def _dense(
        self,
        x: Inputs,
        y: Tensor,
        closed_form: Callable[..., Tensor],
        n_axes: int,
        add: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Loss and curvature by the closed form; by gradients of each datum if its positions add up before squaring."""
        with self._rows(x, y) as (loss, phi, positions):
            if n_axes == 2:
                FullCurvature.check_memory(self.backend.params, phi.dtype)
            if not self.backend.adds_over_positions or positions.datum is None:
                return loss, closed_form(phi, self.backend.output_hessian(positions), self._has_bias)
            total = phi.new_zeros([sum(self._sizes)] * n_axes)
            for gradients in self._datum_gradients(phi, positions):
                total = add(total, gradients)
            return loss, total

    def _datum_gradients(self, phi: Tensor, positions: Positions) -> Iterator[Tensor]:
        assert positions.datum is not None, "one position a datum needs no sums"
        gradient = self.backend.output_likelihood.gradient(positions.f, positions.y)
        return last_layer.per_datum_gradients(phi, gradient, positions.datum, self._has_bias)

    @contextmanager
    def _rows(self, x: Inputs, y: Tensor) -> Generator[tuple[Tensor, Tensor, Positions], None, None]:
        """Loss, features and outputs of the unmasked positions; the body runs in full precision and builds no graph."""
        with torch.no_grad():
            f, phi = self.features(x)
            with full_precision(f.device):
                positions = self.backend.positions(f, y)
                yield (
                    self.backend.loss(positions),
                    positions.select(phi.to(positions.f.dtype)),
                    positions,
                )
