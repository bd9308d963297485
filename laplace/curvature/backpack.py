"""Curvature by BackPACK (``backend=BackPackGGN``, ``BackPackEF``; ``pip install laplace-posthoc[backpack]``).

BackPACK computes further quantities during a backward pass through models that are made of its kinds of modules.

References
----------
Dangel, Kunstner & Hennig (2020), "BackPACK: packing more into backprop", arXiv:1912.10985.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.fx.proxy import TraceError

from laplace.curvature.curvature import EFInterface, GGNInterface
from laplace.curvature.package import PackageInterface, seeded
from laplace.curvature.private_batch import PrivateBatch, flat
from laplace.enums import HessianStructure
from laplace.errors import UnsupportedError
from laplace.network.batches import rows_of
from laplace.optional import require
from laplace.types import Inputs, Jacobians

CANNOT = (AssertionError, AttributeError, NameError, TypeError, ValueError, RuntimeError, TraceError)
"""Errors of BackPACK and its converter at operations that they do not know, and at some that they do know."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class BackPackInterface(PackageInterface):
    """What BackPACK computes for both matrices: gradients and Jacobians of each datum."""

    package: ClassVar[str] = "backpack"
    extra: ClassVar[str] = "backpack"

    @classmethod
    def known_layers(cls, structure: HessianStructure | None) -> frozenset[type[nn.Module]]:
        """Linear layers, convolutions and batch normalization; Kronecker factors of linear layers only.

        Its factors of convolutions follow another convention: the inputs' factor is a sum over positions where it
        should be a mean, which makes the block of a layer with T positions about T times too large.
        """
        if structure is HessianStructure.KRON:
            return frozenset({nn.Linear})
        return frozenset({nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, *CONVOLUTIONS})

    @classmethod
    def objection(cls, structure: HessianStructure | None, layer: Any, x: Tensor) -> str | None:
        """Positions of linear layers have other factors there, and some options of convolutions are not read."""
        if isinstance(layer, CONVOLUTIONS):
            if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
                return "convolutions are taken with zeros for padding, given by numbers"
            if layer.transposed and any(layer.output_padding):
                return "transposed convolutions are taken without output_padding"
        elif x.dim() != 2 and (structure is HessianStructure.KRON or isinstance(layer, nn.BatchNorm1d)):
            return f"its input is expected as [batch, features], and is {list(x.shape)}"
        return None

    def _jacobians(self, batch: PrivateBatch) -> Jacobians:
        model = require("backpack", "backpack").extend(batch.model)
        with self._translated():
            f = model(batch.x)
        rows: list[Tensor] = []
        for output in f.unbind(-1):
            with self._extension("BatchGrad", retain_graph=True):
                output.sum().backward(retain_graph=True)
            rows.append(flat([cast(Any, parameter).grad_batch for parameter in batch.parameters], 1))
        return torch.stack(rows, 1)

    def _gradients(self, batch: PrivateBatch) -> Float[Tensor, "rows params"]:
        return flat(self._first_order(batch, "BatchGrad", "grad_batch"), 1)

    def _first_order(self, batch: PrivateBatch, extension: str, attribute: str) -> list[Any]:
        """A quantity of each weight from a backward pass of the negative log-likelihood."""
        model = require("backpack", "backpack").extend(batch.model)
        with self._translated():
            loss = self.output_likelihood.nll(model(batch.x), batch.y)
        with self._extension(extension):
            loss.backward()
        return [getattr(parameter, attribute) for parameter in batch.parameters]

    @contextmanager
    def _extension(self, name: str, *args: Any, **options: Any) -> Generator[None, None, None]:
        """Run a backward pass with an extension of BackPACK."""
        extension = getattr(require("backpack.extensions", "backpack"), name)(*args)
        with self._translated(), require("backpack", "backpack").backpack(extension, **options):
            yield

    @contextmanager
    def _translated(self) -> Generator[None, None, None]:
        """Turn errors of BackPACK about a model into one that says what to use instead; out of memory passes."""
        try:
            yield
        except (UnsupportedError, torch.OutOfMemoryError):
            raise
        except CANNOT as error:
            able = self._takers_of_any_layer(None)
            msg = f"BackPACK cannot take this model ({type(error).__name__}: {error}). Use one of {able}."
            raise UnsupportedError(msg) from error


class BackPackGGN(BackPackInterface, GGNInterface):
    """Generalized Gauss–Newton matrix by BackPACK, exact or sampled; see ``GGNInterface`` for the parameters."""

    def _full(self, batch: PrivateBatch) -> Tensor:
        root = flat(self._second_order(batch, "SqrtGGN", "sqrt_ggn"), 2).flatten(0, 1)
        return self.factor * (root.T @ root)

    def _diag(self, batch: PrivateBatch) -> Tensor:
        return self.factor * flat(self._second_order(batch, "DiagGGN", "diag_ggn"))

    def _kron(self, batch: PrivateBatch) -> list[list[Tensor]]:
        blocks = self._second_order(batch, ("KFLR", "KFAC"), ("kflr", "kfac"))
        # G is a sum over data, A a mean.
        return [[self.factor * G, *(len(batch.y) * A for A in rest)] for G, *rest in blocks]

    def _second_order(self, batch: PrivateBatch, extension: Any, attribute: Any) -> list[Any]:
        """A quantity of each weight, exact or sampled, of the loss that BackPACK knows."""
        exact, sampled = extension if isinstance(extension, tuple) else (f"{extension}Exact", f"{extension}MC")
        field, drawn = attribute if isinstance(attribute, tuple) else (f"{attribute}_exact", f"{attribute}_mc")
        if not self.stochastic:
            return self._backward(batch, exact, field)
        with seeded(self._seed(), batch.f.device):
            return self._backward(batch, sampled, drawn, self.num_samples)

    def _backward(self, batch: PrivateBatch, extension: str, attribute: str, *args: Any) -> list[Any]:
        """A quantity of each weight after a second-order pass."""
        model = self._extended(batch)
        with self._translated():
            f = model(batch.x)
        if f.dim() != 2:
            able = self._takers_of_any_layer(None)
            msg = f"{type(self).__name__} takes models that return [batch, C]; got {list(f.shape)}. Use one of {able}."
            raise UnsupportedError(msg)
        loss = require("backpack", "backpack").extend(cast("Any", type(self.lossfunc))(reduction="sum"))(
            f, batch.labels
        )
        with self._extension(extension, *args):
            loss.backward()
        return [getattr(parameter, attribute) for parameter in batch.parameters]

    def _extended(self, batch: PrivateBatch) -> nn.Module:
        """The model as a graph of modules that BackPACK knows, sums and products between layers included."""
        extend = require("backpack", "backpack").extend
        if self.last_layer:
            return extend(batch.bare)
        if not isinstance(batch.x, Tensor):
            msg = f"{type(self).__name__} takes models of one tensor; got {type(batch.x).__name__} for inputs."
            raise UnsupportedError(msg)
        with self._translated(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = extend(batch.bare, use_converter=True)
        for warning in said:
            if "may break second-order extensions" in str(warning.message):  # wrong, or fails later
                msg = f"{warning.message} Use one of {self._takers_of_any_layer(None)}."
                raise UnsupportedError(msg)
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return model

    def _check_gradients(self, x: Inputs, y: Tensor, structure: HessianStructure | None) -> None:
        """Compare gradients, and the diagonal of two rows: second-order passes also go through what has no weights."""
        super()._check_gradients(x, y, structure)
        if structure is None:
            return
        with torch.no_grad():
            _, whole = self._private_network(x, y, None)
            few = rows_of(whole.x, slice(0, 2), len(whole.y)), whole.y[:2]
            (_, first), (_, second) = (self._private_network(*few, None) for _ in range(2))
        Lambda = self.output_likelihood.hessian(first.f).dense()
        J = self._jacobians(first)
        expected = torch.einsum("ncp,nck,nkp->p", J, Lambda, J)
        found = self.factor * flat(self._backward(second, "DiagGGNExact", "diag_ggn_exact"))
        if not torch.allclose(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max())):
            msg = (
                "BackPACK does not differentiate some module of this model rightly for second-order quantities (its "
                f"diagonal and its Jacobians contradict each other). Use one of {self._takers_of_any_layer(None)}."
            )
            raise UnsupportedError(msg)


class BackPackEF(BackPackInterface, EFInterface):
    """Empirical Fisher by BackPACK: outer products and squares of the gradients of each datum."""

    structures: ClassVar[frozenset[HessianStructure]] = frozenset({HessianStructure.FULL, HessianStructure.DIAG})

    def _full(self, batch: PrivateBatch) -> Tensor:
        gradients = batch.sum_positions(self._gradients(batch))
        return gradients.T @ gradients

    def _diag(self, batch: PrivateBatch) -> Tensor:
        if batch.one_row_a_datum:
            return flat(self._first_order(batch, "SumGradSquared", "sum_grad_squared"))
        return batch.sum_positions(self._gradients(batch)).square().sum(0)
