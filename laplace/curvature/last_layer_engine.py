"""The engine of the built-in back ends for the last layer: features and outputs of a batch, into the closed forms."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace import linalg
from laplace.curvature import last_layer
from laplace.curvature.columns import ColumnSums
from laplace.curvature.curvature import CurvatureInterface
from laplace.curvature.replay import Features, Replay
from laplace.curvature.structured import Basis
from laplace.enums import HessianStructure
from laplace.likelihoods import OutputHessian, Positions
from laplace.network.modes import full_precision
from laplace.structures import Kron
from laplace.structures.head_block import HeadBlock
from laplace.types import Inputs, Jacobians


@dataclass(frozen=True)
class HeadSums:
    """The curvature of the last layer in a batch, by the closed forms.

    Attributes
    ----------
    backend
        Gives the output Hessians.
    positions
        Outputs and targets.
    blocks
        Derivatives of the head at the same rows, one block for each parameter group.
    """

    backend: CurvatureInterface
    positions: Positions
    blocks: Sequence[HeadBlock]

    def full(self) -> Tensor:
        """Dense curvature ``[P, P]``: O(rows · (C D)²)."""
        return last_layer.full(self.blocks, self.hessian(self.positions))

    def diag(self) -> Tensor:
        """Diagonal ``[P]``: O(rows · C D)."""
        return last_layer.diag(self.blocks, self.hessian(self.positions))

    def kron(self) -> Kron:
        """Kronecker factors, raw sums in float64: O(rows · (C² + D²))."""
        blocks, hessian = self._wide()
        return last_layer.kron(blocks, hessian, self.backend.output_likelihood.head_constant)

    def blockdiag(self) -> list[Tensor]:
        """The blocks of weight and bias: O(rows · (C D)²)."""
        return last_layer.blockdiag(self.blocks, self.hessian(self.positions))

    def ekfac(self, basis: Basis, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:  # noqa: ARG002 - of the blocks
        """The diagonal of the curvature in a basis, computed in float64: O(rows · (C² + D² + C D))."""
        blocks, hessian = self._wide()
        sides = [[None if side is None else side.to(blocks[0].phi) for side in group] for group in basis]
        return [diagonal.to(self.positions.f.dtype) for diagonal in last_layer.ekfac(blocks, hessian, sides)]

    def lowrank(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Products of the curvature with directions ``[P, k]``, and its trace: O(rows · C · D · k)."""
        return last_layer.lowrank(self.blocks, self.hessian(self.positions), directions.to(self.positions.f.dtype))

    def _wide(self) -> tuple[list[HeadBlock], OutputHessian]:
        """Blocks and output Hessians in float64."""
        wide = linalg.wide_dtype(self.positions.f)
        blocks = [HeadBlock(block.phi.to(wide), None, block.group) for block in self.blocks]
        return blocks, self.hessian(self.positions.to(wide))

    def hessian(self, positions: Positions) -> OutputHessian:
        """In the outputs of the head."""
        return self.backend.output_likelihood.head_hessian(self.backend.output_hessian(positions))


class LastLayerEngine:
    """Curvature and Jacobians of the last layer: one forward pass a batch, no backward pass.

    Parameters
    ----------
    backend
        Gives the model and the output Hessians.
    """

    def __init__(self, backend: CurvatureInterface) -> None:
        self.backend = backend

    @contextmanager
    def sums(self, x: Inputs, y: Tensor) -> Generator[tuple[Tensor, HeadSums | ColumnSums], None, None]:
        """Loss and curvature of a batch; the body runs in full precision and builds no graph."""
        with torch.no_grad():
            f, phi = self.features(x)
            with full_precision(f.device):
                positions = self.backend.positions(f, y)
                blocks = self._blocks(positions, phi)
                head, loss = HeadSums(self.backend, positions, blocks), self.backend.loss(positions)
                if not self.backend.adds_over_positions or positions.datum is None:
                    yield loss, head
                    return
                # Gradients of the positions of a datum add up before they are squared.
                root = head.hessian(positions).root
                assert root is not None, "gradients are roots"
                columns = last_layer.datum_columns(blocks, root.squeeze(-1), positions.datum)
                yield loss, ColumnSums(columns, [block.n_params for block in blocks], positions.f, head.kron)

    def jacobians(self, x: Inputs, enable_backprop: bool) -> tuple[Jacobians, Tensor]:
        """Jacobians ``[rows, outputs, P]`` and outputs ``[rows, outputs]``, written out."""
        return self.backend.last_layer_jacobians(x, enable_backprop)

    def gradients(self, x: Inputs, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the negative log-likelihood of each datum, ``[batch, P]``, and the summed loss."""
        return CurvatureInterface.gradients(self.backend, x, y)

    def record(self, x: Inputs, *, create_graph: bool = False, **model_kwargs: Any) -> Any:
        """Outputs and their derivatives, written out."""
        return CurvatureInterface.derivatives(self.backend, x, create_graph, **model_kwargs)

    def repeatable(
        self,
        batches: Iterable[tuple[Inputs, Tensor]],
        structure: HessianStructure,  # noqa: ARG002 - any
    ) -> Iterable[tuple[Inputs, Tensor]]:
        """The features, made in the first pass."""
        return Replay(batches, self.features)

    def features(self, x: Inputs) -> Features:
        """Outputs and features, which may take the place of the inputs of ``sums``."""
        if isinstance(x, Features):
            return x
        with torch.no_grad():
            return Features(*self.backend.model.forward_with_features(x))

    def _blocks(self, positions: Positions, phi: Tensor) -> list[HeadBlock]:
        """The derivatives of the head in each parameter group, at the rows of positions."""
        likelihood = self.backend.output_likelihood
        phi = likelihood.head_rows(positions, phi.to(positions.f.dtype))
        constant = likelihood.head_constant(phi.new_ones(len(phi), 1))
        shapes = [tuple(parameter.shape) for parameter in self.backend.params]
        return [HeadBlock(phi if len(shape) > 1 else constant, None, shape) for shape in shapes]
