"""The built-in back ends (``backend=AutogradGGN``, the default, ``AutogradEF`` and ``AutogradHessian``).

Two engines do the work: closed forms for the last layer (``curvature/last_layer_engine.py``, one forward pass per
batch), backward passes to the outputs of layers for all or chosen weights (``curvature/all_weights.py``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from laplace.curvature.all_weights import AllWeightsEngine
from laplace.curvature.by_autograd import WrittenOut, hessian_products, hessian_rows
from laplace.curvature.curvature import CurvatureInterface, EFInterface, GGNInterface
from laplace.curvature.last_layer_engine import LastLayerEngine
from laplace.curvature.recording import Recording
from laplace.curvature.replay import Replay
from laplace.curvature.structured import Basis, check_count, without_count
from laplace.enums import HessianStructure, KfacApprox, Likelihood, SubsetOfWeights, choose
from laplace.network.batches import differentiable
from laplace.structures import Kron
from laplace.types import Inputs, Jacobians


class AutogradInterface(CurvatureInterface):
    """The engines of the library, given the output Hessian of the kind of curvature."""

    finds_last_layer: ClassVar[bool] = True
    subsets: ClassVar[frozenset[SubsetOfWeights]] = frozenset(SubsetOfWeights)
    _reduce = False

    @cached_property
    def _engine(self) -> LastLayerEngine | AllWeightsEngine:
        """The engine that computes curvature in the random weights."""
        return LastLayerEngine(self) if self.network is None else AllWeightsEngine(self, self.network, self._reduce)

    def full(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss ``[]`` and dense curvature ``[P, P]``: O(rows · P²), for all weights times the number of columns."""
        self._refuse(without_count(kwargs))
        return self._engine.full(x, y)

    def diag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss ``[]`` and diagonal ``[P]``: O(rows · P), for all weights times the number of columns."""
        self._refuse(without_count(kwargs))
        return self._engine.diag(x, y)

    def kron(self, x: Inputs, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Kron]:
        """Loss ``[]`` and Kronecker factors; the inputs' side divided by ``N`` (times the positions of a datum).

        The factors of a last layer are summed in float64 whatever the model is: an eigenvalue that is zero but for
        rounding to float32 would count as curvature where the prior precision is smaller, and variances would come out
        too small. For all weights the sums within a batch are in the precision of the curvature, since double precision
        would cost as much as all else; eigenvalues at the level of its rounding count as zero.
        """
        self._refuse(kwargs, HessianStructure.KRON)
        check_count(N)
        loss, sums = self._engine.kron(x, y)
        if N == 1:
            return loss, sums
        n_data = max(self.count(y), 1)
        counts = [n_data] * len(sums) if sums.counts is None else sums.counts
        return loss, sums.divide_inputs([count * N / n_data for count in counts])

    def blockdiag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        """Loss ``[]`` and the diagonal block of each parameter group: O(rows · Σ p²), for all weights times columns."""
        self._refuse(kwargs, HessianStructure.BLOCKDIAG)
        return self._engine.blockdiag(x, y)

    def ekfac(
        self, x: Inputs, y: Tensor, basis: Basis, shapes: Sequence[tuple[int, ...]], **kwargs: Any
    ) -> tuple[Tensor, list[Tensor]]:
        """Loss ``[]`` and the diagonal of the curvature in a basis; for all weights one backward pass per column."""
        self._refuse(kwargs, HessianStructure.EKFAC)
        return self._engine.ekfac(x, y, basis, shapes)

    def lowrank(self, x: Inputs, y: Tensor, directions: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss ``[]``, products of the curvature with directions ``[P, k]``, and its trace; O(P k) memory."""
        self._refuse(kwargs, HessianStructure.LOWRANK)
        return self._engine.lowrank(x, y, directions)

    def repeatable(
        self, batches: Iterable[tuple[Inputs, Tensor]], structure: HessianStructure
    ) -> Iterable[tuple[Inputs, Tensor]]:
        """Features made in the first pass, for a last layer; otherwise the batches, if they can be read again."""
        if isinstance(self._engine, LastLayerEngine):
            return Replay(batches, self._engine.features)
        return super().repeatable(batches, structure)

    def jacobians(self, x: Inputs, enable_backprop: bool = False) -> tuple[Jacobians, Tensor]:
        """Jacobians ``[rows, outputs, P]`` and outputs ``[rows, outputs]``, written out."""
        if isinstance(self._engine, LastLayerEngine):
            return self.last_layer_jacobians(x, enable_backprop)
        return self._engine.jacobians(x, enable_backprop)

    def gradients(self, x: Inputs, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the negative log-likelihood of each datum, ``[batch, P]``, and the summed loss."""
        if isinstance(self._engine, LastLayerEngine):
            return super().gradients(x, y)
        return self._engine.gradients(x, y)

    def derivatives(self, x: Inputs, enable_backprop: bool = False, **model_kwargs: Any) -> Recording | WrittenOut:
        """Outputs and their derivatives in factors; for all weights one backward pass per column, made on request."""
        if isinstance(self._engine, LastLayerEngine):
            return super().derivatives(x, enable_backprop, **model_kwargs)
        return self._engine.record(x, create_graph=enable_backprop, **model_kwargs)


class AutogradGGN(AutogradInterface, GGNInterface):
    """Generalized Gauss–Newton matrix, exact or (``stochastic=True``) with Λ sampled from the model.

    Parameters
    ----------
    *args, **kwargs
        As in ``GGNInterface``; for all weights ``stochastic=True`` takes one backward pass per sample, instead of one
        per output.
    kfac_approx
        For all weights and the Kronecker structure: ``"expand"`` treats the positions that share a weight as data,
        ``"reduce"`` averages them.
    """

    def __init__(self, *args: Any, kfac_approx: KfacApprox | str = KfacApprox.EXPAND, **kwargs: Any) -> None:
        self._reduce = choose(KfacApprox, kfac_approx, "kfac_approx") is KfacApprox.REDUCE
        super().__init__(*args, **kwargs)


class AutogradHessian(AutogradInterface):
    """The Hessian of the negative log-likelihood; for the last layer, in which outputs are linear, that is the GGN.

    For all weights it is exact, takes P backward passes per batch, and may be indefinite away from a minimum: whatever
    needs a positive definite precision then raises ``NotPositiveDefiniteError``. It has no Kronecker factors.
    """

    # Only for our likelihoods, whose Fisher matrix is the Hessian in the outputs.
    likelihoods: ClassVar[frozenset[Likelihood]] = frozenset(set(Likelihood))

    def full(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss ``[]`` and Hessian ``[P, P]``."""
        if self.last_layer:
            return super().full(x, y, **kwargs)
        self._refuse(without_count(kwargs))
        with torch.inference_mode(False):
            loss, rows = self._rows(x, y)
            return self._widen(loss.detach()), torch.stack([self._widen(row) for row in rows])

    def diag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss ``[]`` and the diagonal of the Hessian ``[P]``."""
        if self.last_layer:
            return super().diag(x, y, **kwargs)
        self._refuse(without_count(kwargs))
        with torch.inference_mode(False):
            loss, rows = self._rows(x, y)
            return self._widen(loss.detach()), torch.stack([self._widen(row[index]) for index, row in enumerate(rows)])

    def kron(self, x: Inputs, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Kron]:
        """Loss ``[]`` and Kronecker factors of the last layer; for all weights there are none."""
        if self.last_layer:
            return super().kron(x, y, N, **kwargs)
        raise self.cannot(HessianStructure.KRON)

    def blockdiag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        """Loss ``[]`` and the diagonal block of the Hessian of each parameter group, ``[p, p]``."""
        if self.last_layer:
            return super().blockdiag(x, y, **kwargs)
        self._refuse(kwargs, HessianStructure.BLOCKDIAG)
        with torch.inference_mode(False):
            loss, rows = self._rows(x, y)
            blocks, start = [], 0
            for size in (parameter.numel() for parameter in self.params):
                part = slice(start, start + size)
                blocks.append(torch.stack([self._widen(row[part]) for row in itertools.islice(rows, size)]))
                start += size
            return self._widen(loss.detach()), blocks

    def lowrank(self, x: Inputs, y: Tensor, directions: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss ``[]`` and products of the Hessian with directions ``[P, k]``, one backward pass for each.

        For all weights the Hessian may be indefinite, and its trace says nothing about its positive part: ``None``.
        """
        if self.last_layer:
            return super().lowrank(x, y, directions, **kwargs)
        self._refuse(kwargs, HessianStructure.LOWRANK)
        with torch.inference_mode(False):
            loss = self._loss(x, y)
            assert self.network is not None, "all weights are random"
            products = hessian_products(loss, self.network.subset)(directions.T)
            return self._widen(loss.detach()), self._widen(products.detach()).T, None

    @classmethod
    def can(cls, structure: HessianStructure, subset: SubsetOfWeights) -> bool:
        """Whether it provides a structure; Kronecker factors only for the last layer."""
        last_layer = subset is SubsetOfWeights.LAST_LAYER
        return super().can(structure, subset) and (last_layer or structure is not HessianStructure.KRON)

    def _loss(self, x: Inputs, y: Tensor) -> Tensor:
        """The loss, with its graph."""
        # Run attention in a form that has second derivatives.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            positions = self.positions(self.outputs(differentiable(x)), y)
            return self.output_likelihood.nll(positions.f, positions.y)

    def _rows(self, x: Inputs, y: Tensor) -> tuple[Tensor, Iterator[Tensor]]:
        """The loss and the rows of its Hessian."""
        loss = self._loss(x, y)
        assert self.network is not None, "all or chosen weights are random"
        return loss, hessian_rows(loss, self.network.subset)


class AutogradEF(AutogradInterface, EFInterface):
    """Empirical Fisher: outer products of the gradients of each datum (a row of the loader).

    The Kronecker structure treats positions of a datum as independent, as its factors do everywhere.
    """
