"""The built-in back ends (``backend=AutogradGGN``, the default, ``AutogradEF`` and ``AutogradHessian``).

Two engines do the work: closed forms for the last layer (``curvature/last_layer.py``, one forward pass per batch),
backward passes to the outputs of layers for all or for chosen weights (``curvature/all_weights.py``).
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from laplace import checks
from laplace.curvature.all_weights import AllWeightsEngine
from laplace.curvature.by_autograd import hessian_products, hessian_rows
from laplace.curvature.columns import Sums
from laplace.curvature.curvature import CurvatureInterface, EFInterface, GGNInterface, check_generator
from laplace.curvature.last_layer import LastLayerEngine
from laplace.curvature.leading import Leading
from laplace.curvature.structured import Basis, check_count, without_count
from laplace.enums import HessianStructure, KfacApprox, Likelihood, SubsetOfWeights, choose
from laplace.errors import UnsupportedError
from laplace.likelihoods import OutputHessian, Positions
from laplace.network.batches import differentiable
from laplace.network.parameters import ParameterSubset
from laplace.structures import FullCurvature, Kron
from laplace.structures.wide_kron import WideKron
from laplace.types import Inputs, Jacobians


@dataclass(frozen=True)
class HessianSums:
    """The Hessian of the loss of a batch in all or in chosen weights, a backward pass for each of its rows."""

    backend: CurvatureInterface
    """Whose it is."""
    loss: Tensor
    """With its graph."""
    subset: ParameterSubset
    """The weights."""

    def full(self) -> Tensor:
        """The Hessian ``[P, P]``."""
        return torch.stack(list(self._rows()))

    def diag(self) -> Tensor:
        """Its diagonal ``[P]``."""
        return torch.stack([row[index] for index, row in enumerate(self._rows())])

    def blockdiag(self) -> list[Tensor]:
        """Its diagonal block for each parameter group, ``[p, p]``."""
        rows, blocks, start = self._rows(), [], 0
        for size in self.subset.sizes:
            blocks.append(torch.stack([row[start : start + size] for row in itertools.islice(rows, size)]))
            start += size
        return blocks

    def lowrank(self, directions: Tensor) -> tuple[Tensor, None]:
        """Products with directions ``[P, k]``; what may be indefinite has a trace that says little."""
        products = hessian_products(self.loss, self.subset)(directions.T)
        return products.detach().to(self.loss.dtype).T, None

    def kron(self) -> NoReturn:
        """There are no factors."""
        raise self.backend.cannot(HessianStructure.KRON)

    def ekfac(self, basis: Basis, shapes: Sequence[tuple[int, ...]]) -> NoReturn:  # noqa: ARG002
        """There are none."""
        raise self.backend.cannot(HessianStructure.EKFAC)

    def _rows(self) -> Iterator[Tensor]:
        return (row.to(self.loss.dtype) for row in hessian_rows(self.loss, self.subset))


class HessianEngine(AllWeightsEngine):
    """The same with the Hessian for the curvature."""

    @contextmanager
    def sums(self, x: Inputs, y: Tensor) -> Generator[tuple[Tensor, Sums], None, None]:
        """Loss and Hessian of a batch."""
        with torch.inference_mode(False):
            # Attention in a form that has second derivatives.
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                positions = self.backend.positions(self.backend.outputs(differentiable(x)), y)
                loss = self.backend.output_likelihood.nll(positions.f, positions.y)
            yield loss.detach(), HessianSums(self.backend, loss, self.network.subset)


class AutogradInterface(CurvatureInterface):
    """Our own engines, given the output Hessian of the kind of curvature."""

    finds_last_layer: ClassVar[bool] = True
    subsets: ClassVar[frozenset[SubsetOfWeights]] = frozenset(SubsetOfWeights)
    _reduce = False

    @cached_property
    def _engine(self) -> LastLayerEngine | AllWeightsEngine:
        """Computes curvature in the chosen weights: all of them have the same methods."""
        return LastLayerEngine(self) if self.network is None else AllWeightsEngine(self, self.network, self._reduce)

    def full(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss ``[]`` and dense curvature ``[P, P]``: O(rows · P²), for all weights times the number of columns."""
        self._refuse(without_count(kwargs))
        with self._engine.sums(x, y) as (loss, sums):
            FullCurvature.check_memory([self.zeros()], loss.dtype)
            return loss, sums.full()

    def diag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss ``[]`` and diagonal ``[P]``: O(rows · P), for all weights times the number of columns."""
        self._refuse(without_count(kwargs))
        with self._engine.sums(x, y) as (loss, sums):
            return loss, sums.diag()

    def kron(self, x: Inputs, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Kron | WideKron]:
        """Loss ``[]`` and Kronecker factors; the inputs' side divided by ``N`` (times the positions of a datum).

        The factors of a last layer are summed in float64 whatever the model is: an eigenvalue that is zero but for
        rounding to float32 would count as curvature where the prior precision is smaller, and variances would come out
        too small. For all weights the sums within a batch are in the precision of the curvature, since double precision
        would cost as much as all else; eigenvalues at the level of its rounding count as zero.
        """
        self._refuse(kwargs, HessianStructure.KRON)
        check_count(N)
        with self._engine.sums(x, y) as (loss, sums):
            factors = sums.kron()
        if N == 1:
            return loss, factors
        n_data = max(int(self.count(y)), 1)
        counts = [n_data] * len(factors) if factors.counts is None else factors.counts
        return loss, factors.divide_inputs([int(count) * N / n_data for count in counts])

    def blockdiag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        """Loss ``[]`` and the diagonal block of each parameter group: O(rows · Σ p²), for all weights times columns."""
        self._refuse(kwargs, HessianStructure.BLOCKDIAG)
        with self._engine.sums(x, y) as (loss, sums):
            return loss, sums.blockdiag()

    def ekfac(
        self, x: Inputs, y: Tensor, basis: Basis, shapes: Sequence[tuple[int, ...]], **kwargs: Any
    ) -> tuple[Tensor, list[Tensor]]:
        """Loss ``[]`` and the diagonal of the curvature in a basis; for all weights one backward pass per column."""
        self._refuse(kwargs, HessianStructure.EKFAC)
        with self._engine.sums(x, y) as (loss, sums):
            return loss, sums.ekfac(basis, shapes)

    def lowrank(self, x: Inputs, y: Tensor, directions: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss ``[]``, products of the curvature with directions ``[P, k]``, and its trace; O(P k) memory."""
        self._refuse(kwargs, HessianStructure.LOWRANK)
        with self._engine.sums(x, y) as (loss, sums):
            products, trace = sums.lowrank(directions)
            return loss, products, trace

    def repeatable(
        self, batches: Iterable[tuple[Inputs, Tensor]], structure: HessianStructure
    ) -> Iterable[tuple[Inputs, Tensor]]:
        """Of a last layer the features, made in the first pass; else the batches, if they can be read again."""
        return self._engine.repeatable(batches, structure)

    def jacobians(self, x: Inputs, enable_backprop: bool = False) -> tuple[Jacobians, Tensor]:
        """Jacobians ``[rows, outputs, P]`` and outputs ``[rows, outputs]``, written out."""
        return self._engine.jacobians(x, enable_backprop)

    def gradients(self, x: Inputs, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the negative log-likelihood of each datum, ``[batch, P]``, and the summed loss."""
        return self._engine.gradients(x, y)

    def derivatives(self, x: Inputs, enable_backprop: bool = False, **model_kwargs: Any) -> Any:
        """Outputs and their derivatives in factors; for all weights one backward pass per column, when asked for."""
        return self._engine.record(x, create_graph=enable_backprop, **model_kwargs)


class AutogradGGN(AutogradInterface, GGNInterface):
    """Generalized Gauss–Newton matrix: exact, in part exact (``columns=k``), or with Λ sampled (``stochastic=True``).

    Parameters
    ----------
    *args, **kwargs
        As in ``GGNInterface``; for all weights ``stochastic=True`` takes one backward pass per sample, instead of one
        per output.
    kfac_approx
        For all weights and the Kronecker structure: ``"expand"`` treats the positions that share a weight as data,
        ``"reduce"`` averages them.
    columns
        For all weights and for a subnetwork: k backward passes per batch for the k largest columns of a root of Λ of
        each datum (of classification those of its k likeliest classes), and one for all others, mixed by random signs.
        Unbiased; in batches 1, 4, 16, … there are two mixtures, from which ``columns_error`` is estimated. ``None``:
        all columns, one pass each.
    generator
        Source of randomness for samples and signs.

    Raises
    ------
    InputError
        If ``columns`` is no positive whole number.
    UnsupportedError
        If ``columns`` is given with ``stochastic=True``, or for a last layer, which needs no backward pass.
    """

    takes_columns: ClassVar[bool] = True

    def __init__(
        self,
        *args: Any,
        kfac_approx: KfacApprox | str = KfacApprox.EXPAND,
        columns: int | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> None:
        self._reduce = choose(KfacApprox, kfac_approx, "kfac_approx") is KfacApprox.REDUCE
        if columns is None:
            super().__init__(*args, generator=generator, **kwargs)
            return
        n_columns = checks.whole("columns", columns)
        super().__init__(*args, **kwargs)
        check_generator(generator, self.model)
        if self.stochastic:
            msg = (
                "stochastic=True samples the output Hessian, columns=k takes the largest k columns of its root exactly "
                "and mixes the others: pass one of them."
            )
            raise UnsupportedError(msg)
        if self.last_layer:
            msg = (
                "columns=k saves backward passes, and a last layer takes none: its curvature is exact after one "
                "forward pass. Leave columns out, or take subset_of_weights='all'."
            )
            raise UnsupportedError(msg)
        self.generator, self.is_sampled = generator, True
        self.leading = Leading(n_columns, generator)

    @property
    def columns_error(self) -> float | None:
        """With ``columns=k`` the estimated standard error of the diagonal of the curvature, relative to its length.

        That of the latest pass over the data; it falls with the square root of their number, and ``fit`` prints it. NaN
        before the first batch, 0 where nothing is left to mix, ``None`` without ``columns``.
        """
        return None if self.leading is None else self.leading.remainder.error

    def output_hessian(self, positions: Positions) -> OutputHessian:
        """That of the likelihood, its samples, or with ``columns`` the k largest columns and a mixture."""
        if self.leading is None:
            return super().output_hessian(positions)
        root, _ = self.leading.draw(self.output_likelihood, positions)
        return OutputHessian(positions.f.shape[-1], root=root)


class AutogradHessian(AutogradInterface):
    """The Hessian of the negative log-likelihood; for the last layer, in which outputs are linear, that is the GGN.

    For all weights it is exact, takes P backward passes per batch, and may be indefinite away from a minimum: whatever
    needs a positive definite precision then raises ``NotPositiveDefiniteError``. It has no Kronecker factors.
    """

    # Not of users, which say their Fisher matrix: of ours it is the Hessian in the outputs.
    likelihoods: ClassVar[frozenset[Likelihood]] = frozenset(set(Likelihood))

    @cached_property
    def _engine(self) -> LastLayerEngine | AllWeightsEngine:
        return LastLayerEngine(self) if self.network is None else HessianEngine(self, self.network, reduce=False)

    @classmethod
    def can(cls, structure: HessianStructure, subset: SubsetOfWeights) -> bool:
        """Kronecker factors are there for the last layer only."""
        last_layer = subset is SubsetOfWeights.LAST_LAYER
        return super().can(structure, subset) and (last_layer or structure is not HessianStructure.KRON)


class AutogradEF(AutogradInterface, EFInterface):
    """Empirical Fisher: outer products of the gradients of each datum (a row of the loader).

    The Kronecker structure treats positions of a datum as independent, as its factors do everywhere.
    """
