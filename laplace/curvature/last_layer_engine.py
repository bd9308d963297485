"""The engine of the built-in back ends for the last layer: features and outputs of a batch, into the closed forms."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from laplace.curvature import last_layer, pairs
from laplace.curvature.curvature import CurvatureInterface
from laplace.likelihoods import Positions
from laplace.network.modes import full_precision
from laplace.structures import FullCurvature, Kron
from laplace.types import Inputs


class LastLayerEngine:
    """Curvature of the last layer: one forward pass a batch, no backward pass.

    Parameters
    ----------
    backend
        Gives the model and the output Hessians.
    """

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
            wide = phi.dtype if phi.device.type == "mps" else torch.float64  # which that device does not have
            hessian = self.backend.output_hessian(positions.to(wide))
            return loss, self._closed_forms.kron(phi.to(wide), hessian, self._has_bias)

    @property
    def _closed_forms(self) -> ModuleType:
        """``diag``, ``kron`` and ``full``: of a linear layer, or of a score head that compares the items of a pair."""
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
        """By the closed form; by gradients a datum where those of its positions add up before they are squared."""
        with self._rows(x, y) as (loss, phi, positions):
            if n_axes == 2:
                FullCurvature.check_memory(self.backend.params, phi.dtype)
            if not self.backend.adds_over_positions or positions.datum is None:
                return loss, closed_form(phi, self.backend.output_hessian(positions), self._has_bias)
            total = phi.new_zeros([sum(parameter.numel() for parameter in self.backend.params)] * n_axes)
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
        model: Any = self.backend.model
        with torch.no_grad():
            f, phi = model.forward_with_features(x)
            with full_precision(f.device):
                positions = self.backend.positions(f, y)
                yield (
                    self.backend.loss(positions),
                    positions.select(phi.to(positions.f.dtype)),
                    positions,
                )
