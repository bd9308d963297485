"""``PackageInterface``: what back ends share that let another package compute (``backend=BackPackGGN`` and so on).

The package works on a private copy of the model, made for one batch and thrown away with whatever was left on it; of a
last layer it sees that layer alone, with features for inputs. Loss, checks of the data, masks and precision are ours.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from laplace.curvature.all_weights import AllWeightsEngine
from laplace.curvature.capabilities import Capabilities, alternatives
from laplace.curvature.interface import CurvatureInterface
from laplace.curvature.private_batch import (
    PrivateBatch,
    PrivateHead,
    PrivateNetwork,
    PrivatePairs,
    flat,
    outputs_of_known,
    private_head,
    scored_items,
)
from laplace.curvature.structured import check_count, without_count
from laplace.enums import HessianStructure, Likelihood, SubsetOfWeights
from laplace.errors import UnsupportedError
from laplace.likelihoods import Positions, with_loss
from laplace.network import heads
from laplace.network.batches import differentiable, rows_of
from laplace.network.modes import full_precision
from laplace.optional import require
from laplace.structures import FullCurvature, Kron
from laplace.types import Inputs, Jacobians


class PackageInterface(CurvatureInterface):
    """A back end whose curvature another package computes; see ``CurvatureInterface`` for the parameters.

    Of a subnetwork the package computes the parameter tensors that hold a chosen weight; the others are frozen to it.

    Raises
    ------
    BackendUnavailableError
        If the package is not installed.
    """

    weighs_outputs: ClassVar[bool] = False

    package: ClassVar[str]
    """The name it is imported by."""
    extra: ClassVar[str]
    """The extra of this library that installs it."""
    structures: ClassVar[frozenset[HessianStructure]] = frozenset(
        {HessianStructure.FULL, HessianStructure.DIAG, HessianStructure.KRON}
    )
    likelihoods: ClassVar[frozenset[Likelihood]] = with_loss(nn.CrossEntropyLoss, nn.MSELoss)
    subsets: ClassVar[frozenset[SubsetOfWeights]] = frozenset(SubsetOfWeights)
    takes_positions: ClassVar[bool] = False

    def _check_capabilities(self) -> None:
        super()._check_capabilities()
        require(self.package, self.extra)

    # -- what subclasses let their package compute --------------------------------------------------------------------

    def _full(self, batch: PrivateBatch) -> Float[Tensor, "params params"]:
        """The dense curvature."""
        raise self.cannot(HessianStructure.FULL)

    def _diag(self, batch: PrivateBatch) -> Float[Tensor, " params"]:
        """Its diagonal."""
        raise self.cannot(HessianStructure.DIAG)

    def _kron(self, batch: PrivateBatch) -> list[list[Tensor]]:
        """For each weight G and the sum over data of A, for each bias G."""
        raise self.cannot(HessianStructure.KRON)

    @abstractmethod
    def _jacobians(self, batch: PrivateBatch) -> Jacobians:
        """Jacobians of the outputs, ``[rows, C, P]``."""

    @abstractmethod
    def _gradients(self, batch: PrivateBatch) -> Float[Tensor, "rows params"]:
        """Gradients of the negative log-likelihood of each row."""

    # -- the interface ------------------------------------------------------------------------------------------------

    def full(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss ``[]`` and dense curvature ``[P, P]`` of a batch, by the package."""
        FullCurvature.check_memory(self.params, self._compute_dtype)
        with self._private(x, y, HessianStructure.FULL, without_count(kwargs)) as (loss, batch):
            matrix = self._full(batch) if len(batch.y) else batch.zeros(2)
            return loss, self._for_all(self._restrict(self._restrict(matrix).mT).mT, 2)

    def diag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss ``[]`` and diagonal of the curvature ``[P]`` of a batch, by the package."""
        with self._private(x, y, HessianStructure.DIAG, without_count(kwargs)) as (loss, batch):
            return loss, self._for_all(self._restrict(self._diag(batch) if len(batch.y) else batch.zeros(1)), 1)

    def kron(self, x: Inputs, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Kron]:
        """Loss ``[]`` and Kronecker factors by the package; the inputs' side divided by ``N`` (1 for raw sums)."""
        check_count(N)
        with self._private(x, y, HessianStructure.KRON, kwargs) as (loss, batch):
            if not len(batch.y):
                matrices = [part.reshape(shape) for part, shape in zip(self.params, self.shapes, strict=True)]
                return loss, Kron.init_from_model(matrices, loss.device, batch.f.dtype)
            factors = self._kron(batch)
            left_out = [parameter.numel() for parameter in self.params[len(factors) :]]
            factors += [[batch.f.new_zeros(size, size)] for size in left_out]
            rows = len(batch.y) * batch.items
            sums = Kron(factors, [rows] * len(factors), torch.finfo(batch.f.dtype).eps)
            return loss, sums if N == 1 else sums.divide_inputs(N * batch.items)

    def _for_all(self, values: Tensor, n_axes: int) -> Tensor:
        """With zeros for the bias of a last layer where it was not given to the package, along the last axes."""
        left_out = len(self.zeros()) - values.shape[-1]
        return F.pad(values, (0, left_out) * n_axes) if left_out else values

    def jacobians(self, x: Inputs, enable_backprop: bool = False) -> tuple[Jacobians, Tensor]:
        """Jacobians ``[rows, C, P]`` and outputs ``[rows, C]``, by the package; of a last layer, from its features."""
        if self.last_layer:
            return self.last_layer_jacobians(x, enable_backprop)
        if enable_backprop:
            return self._built_in.jacobians(x, enable_backprop)
        with self._private(x, None, None) as (_, batch):
            J = self._jacobians(batch)
            if self._check_is_due():
                mix = mixing(batch.f)
                self._compare(x, batch.datum, torch.einsum("nc,ncp->np", mix, J), mix)
            return self._restrict(J), batch.f

    def derivatives(self, x: Inputs, enable_backprop: bool = False, **model_kwargs: Any) -> Any:
        """Outputs and their derivatives for predictions, by the package; with a graph by the built-in engine."""
        if enable_backprop and not self.last_layer:
            return self._built_in.record(x, create_graph=True, **model_kwargs)
        return super().derivatives(x, enable_backprop, **model_kwargs)

    @cached_property
    def _built_in(self) -> AllWeightsEngine:
        """Gives Jacobians that can be differentiated: they do not depend on who computes the curvature."""
        assert self.network is not None, "a last layer has features"
        return AllWeightsEngine(self, self.network, reduce=False)

    def gradients(self, x: Inputs, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the negative log-likelihood of each datum, ``[batch, P]``, and the summed loss."""
        with self._private(x, y, None) as (loss, batch):
            if not len(batch.y):
                return self._for_all(self._restrict(batch.zeros(1).repeat(batch.n_data, 1)), 1), loss
            return self._for_all(self._restrict(batch.sum_positions(self._gradients(batch))), 1), loss

    def _check_options(self, structure: HessianStructure | None, options: Mapping[str, Any]) -> None:
        """Raise for options of a method that the package does not have, or has under our names."""
        self._refuse(dict(options))

    # -- what it can take ---------------------------------------------------------------------------------------------

    @classmethod
    def objection(cls, structure: HessianStructure | None, layer: Any, x: Tensor) -> str | None:  # noqa: ARG003
        """Why a layer of a known kind cannot be taken with an input of this shape; ``None`` when it can."""
        return None

    def _takers_of_any_layer(self, structure: HessianStructure | None) -> str:
        """Back ends that provide a structure for whatever layers there are."""

        def can(cls: type[Capabilities]) -> bool:
            return cls.known_layers(structure) is None and (structure is None or cls.can(structure, self.subset))

        return alternatives(self, can)

    @property
    def _compute_dtype(self) -> torch.dtype:
        return self.curvature_dtype or torch.promote_types(self.params[0].dtype, torch.float32)

    @contextmanager
    def _private(
        self, x: Inputs, y: Tensor | None, structure: HessianStructure | None, options: dict[str, Any] | None = None
    ) -> Generator[tuple[Tensor, PrivateBatch], None, None]:
        """Loss and private batch; in the body autograd is on and autocast off, whatever the caller has set."""
        if structure is not None and not self.provides(structure):
            raise self.cannot(structure)
        self._check_options(structure, options or {})
        prepare = self._private_head if self.last_layer else self._private_network
        with torch.inference_mode(False):
            with torch.no_grad():
                positions, batch = prepare(x, y, structure)
                batch = replace(batch, options=options or {})
                loss = batch.f.new_zeros(()) if y is None else self.output_likelihood.nll(positions.f, positions.y)
            # Attention in a form that has all derivatives.
            with torch.enable_grad(), full_precision(batch.f.device), sdpa_kernel(SDPBackend.MATH), quiet_hooks():
                if y is not None and not self.last_layer and len(batch.y) and self._check_is_due():
                    self._check_gradients(x, y, structure)
                yield loss, batch

    # -- does the package see what the model does? --------------------------------------------------------------------

    _n_passes = 0

    def _check_is_due(self) -> bool:
        """Whether to compare with autograd: at passes 1, 4, 16, 64 and so on."""
        self._n_passes += 1
        return self._n_passes.bit_count() == 1 and self._n_passes.bit_length() % 2 == 1

    def _check_gradients(self, x: Inputs, y: Tensor, structure: HessianStructure | None) -> None:
        """Compare gradients of each row by the package with those of the user's own model."""
        with torch.no_grad():
            _, batch = self._private_network(x, y, None)
        weights = mixing(batch.f[:, :1])
        rows = weights * self._gradients(batch)
        self._compare(x, batch.datum, rows, weights * self.output_likelihood.gradient(batch.f, batch.y))

    def _compare(self, x: Inputs, datum: Tensor, rows: Tensor, direction: Tensor) -> None:
        """Compare a weighted sum of the derivatives of rows with that of the user's own model, by autograd.

        What hooks cannot see ends up here: functions that hold on to the model, data in another order, scripts.

        Raises
        ------
        UnsupportedError
            If they differ by more than rounding.
        """
        f = self.outputs(differentiable(x))
        f = f.reshape(-1, direction.shape[-1])
        total = (f[datum].to(direction) * direction).sum()
        parts = torch.autograd.grad(total, self.params, allow_unused=True)
        zeros = [torch.zeros_like(parameter) for parameter in self.params]
        expected = flat([zero if part is None else part for part, zero in zip(parts, zeros, strict=True)]).to(rows)
        size = float(rows.abs().sum(0).maximum(expected.abs()).max())
        error = float((rows.sum(0) - expected).abs().max())
        if not error <= max(1e-3, 16 * torch.finfo(f.dtype).eps) * size:
            msg = (
                f"{self.package} computes other gradients for this model than autograd does (they differ by "
                f"{error / size:.1%}): something in it is not seen by the package's hooks, or rows of the batch change "
                f"places inside. Use one of {self._takers_of_any_layer(None)}."
            )
            raise UnsupportedError(msg)

    # -- the private batch --------------------------------------------------------------------------------------------

    def _private_head(
        self, x: Inputs, y: Tensor | None, structure: HessianStructure | None
    ) -> tuple[Positions, PrivateBatch]:
        """The last layer and its features, one row an unmasked position."""
        assert y is not None, "Jacobians of a last layer need no package"
        f, phi = self.model.forward_with_features(x)
        positions, likelihood = self.positions(f, y), self.output_likelihood
        rows, constant = likelihood.head_rows(positions, phi.to(self._compute_dtype))
        # The package would take a bias that cancels for one that is added.
        weight, *bias = heads.head_of(self._head).parameters(self._head)
        layer = private_head(weight, bias[0] if bias and constant else None, self._compute_dtype)
        return positions, self._batch(PrivateHead(layer, likelihood.of_head), layer, rows, positions, len(f))

    def _private_network(
        self, x: Inputs, y: Tensor | None, structure: HessianStructure | None
    ) -> tuple[Positions, PrivateBatch]:
        """A copy of the network and the rows of its inputs that are not masked."""
        assert self.network is not None, "all weights are random"
        self.network.check_still_random()
        dtype = self._compute_dtype
        model = PrivateNetwork(self.network, dtype)
        x = differentiable(x)
        if dtype != self.params[0].dtype:
            x = tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, x)
        known = self.known_layers(structure)
        able = self._takers_of_any_layer(structure)
        with full_precision(self.params[0].device), sdpa_kernel(SDPBackend.MATH):
            objection, originals = partial(self.objection, structure), list(self.network.model.parameters())
            items, scores = self.output_likelihood.arranged((x, None), partial(scored_items, model))
            f = outputs_of_known(model, items, known, originals, objection, type(self).__name__, able)
            size = float(f.abs().max()) if f.numel() else 0.0
            if scores is not None and not torch.allclose(f.flatten(), scores.flatten(), rtol=0, atol=1e-3 * size):
                msg = (
                    f"{type(self).__name__} runs the items of pairs as rows, and this model gives them other scores "
                    f"then. Use one of {able}."
                )
                raise UnsupportedError(msg)
        if f.dim() != 2:
            able = alternatives(self, lambda cls: cls.takes_positions)
            msg = f"{type(self).__name__} takes outputs [batch, C]; got {list(f.shape)}. {able} take positions."
            raise UnsupportedError(msg)
        self.n_outputs = f.shape[1]
        if scores is not None and y is not None:
            positions = self.positions(f.reshape(-1, 2), y)
            return positions, self._batch(PrivatePairs(model), model.model, x, positions, len(y), items=2)
        positions = Positions(f, f) if y is None else self.positions(f, y)
        rows = items if positions.kept is None else rows_of(items, positions.kept, len(f))
        return positions, self._batch(model, model.model, rows, positions, len(f))

    def _batch(
        self, model: nn.Module, bare: nn.Module, x: Inputs, positions: Positions, n_data: int, items: int = 1
    ) -> PrivateBatch:
        """What counts of a batch, and whose it is."""
        datum = positions.datum if positions.datum is not None else positions.kept
        if datum is None:
            datum = torch.arange(n_data, device=positions.f.device)
        labels = self.output_likelihood.hard_targets(positions.y)
        return PrivateBatch(model, bare, x, positions.y, labels, positions.f, datum, n_data, items)


def mixing(f: Tensor) -> Tensor:
    """Fixed numbers in the shape of ``f``, all different, by which to add rows up."""
    return (1 + 2.3 * torch.arange(f.numel(), dtype=f.dtype, device=f.device).square()).cos().reshape(f.shape)


UNMENTIONED = (
    ("Using a non-full backward hook", FutureWarning),
    ("Full backward hook is firing", UserWarning),
    ("Extension saving to .* does not have an extension for Module", UserWarning),  # of a container
)
"""Warnings about the hooks of packages, about which users can do nothing; which layers are known is checked before."""


@contextmanager
def quiet_hooks() -> Generator[None, None, None]:
    """Keep these warnings from users."""
    with warnings.catch_warnings():
        for message, category in UNMENTIONED:
            warnings.filterwarnings("ignore", message, category)
        yield


@contextmanager
def seeded(seed: int, device: torch.device) -> Generator[None, None, None]:
    """Draw from PyTorch's own generators, which packages use, without a trace on them."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
