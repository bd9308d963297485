"""Curvature by ASDL (``backend=AsdlGGN``, ``AsdlEF``, ``AsdlHessian``; ``pip install laplace-posthoc[asdl]``).

The package is called ``asdfghjkl`` where it is published and ``asdl`` where it is imported.

References
----------
Osawa, Ishikawa, Yokota, Li & Hoefler (2023), "ASDL: a unified interface for gradient preconditioning in PyTorch",
arXiv:2305.04684.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace.curvature.curvature import EFInterface, GGNInterface
from laplace.curvature.package import PackageInterface, seeded
from laplace.curvature.private_batch import PrivateBatch, flat
from laplace.enums import HessianStructure, Likelihood
from laplace.errors import UnsupportedError
from laplace.likelihoods import Positions, with_loss
from laplace.optional import require
from laplace.types import Jacobians

NORMALIZATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)

OURS = {
    "fisher_type": "the back end and backend_kwargs={'stochastic': ...}",
    "fisher_shapes": "hessian_structure=",
    "fisher_attr": "the back end",
    "loss_type": "likelihood=",
    "n_mc_samples": "backend_kwargs={'num_samples': ...}",
    "seed": "backend_kwargs={'generator': ...}",
}
"""Options of ASDL that have a name here."""


class AsdlInterface(PackageInterface):
    """What ASDL computes for all matrices: gradients and Jacobians of each datum."""

    package: ClassVar[str] = "asdl"
    extra: ClassVar[str] = "asdl"
    accepts_fisher_kwargs: ClassVar[bool] = True
    likelihoods: ClassVar[frozenset[Likelihood]] = with_loss(nn.CrossEntropyLoss, nn.MSELoss, compared=True)

    @classmethod
    def known_layers(cls, structure: HessianStructure | None) -> frozenset[type[nn.Module]]:
        """Linear layers and two-dimensional convolutions; except for Kronecker factors normalizations, too."""
        factors: frozenset[type[nn.Module]] = frozenset({nn.Linear, nn.Conv2d})
        return factors if structure is HessianStructure.KRON else factors | set(NORMALIZATIONS)

    @classmethod
    def objection(cls, structure: HessianStructure | None, layer: Any, x: Tensor) -> str | None:  # noqa: ARG003
        """Positions of linear layers and some options of convolutions are not taken into account there."""
        if not isinstance(layer, nn.Conv2d):
            if isinstance(layer, nn.LayerNorm) and layer.weight is not None and layer.bias is None:
                return "layer normalization is taken with a bias"
            n_axes = 4 if isinstance(layer, nn.BatchNorm2d) else 2
            return None if x.dim() == n_axes else f"its input is expected to have {n_axes} axes, and is {list(x.shape)}"
        plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        if not plain or layer.groups != 1 or layer.dilation != (1, 1):
            return "convolutions are taken without groups and dilation, with zeros for padding, given by numbers"
        return None

    @property
    def loss_type(self) -> str:
        """ASDL's name of the loss."""
        asdl = require("asdl", "asdl")
        names: dict[Any, str] = {nn.MSELoss: asdl.LOSS_MSE, nn.CrossEntropyLoss: asdl.LOSS_CROSS_ENTROPY}
        return names[type(self.lossfunc)]

    def _jacobians(self, batch: PrivateBatch) -> Jacobians:
        n_outputs = batch.f.shape[1]
        return torch.stack([self._batch_gradient(batch, lambda f, c=c: f[:, c].sum()) for c in range(n_outputs)], 1)

    def _gradients(self, batch: PrivateBatch) -> Float[Tensor, "rows params"]:
        return self._batch_gradient(batch, lambda f: self.output_likelihood.nll(f, batch.y))

    def _batch_gradient(self, batch: PrivateBatch, loss: Any) -> Tensor:
        """Gradients of each row of a sum over rows."""

        def closure() -> Tensor:
            batch.model.zero_grad()
            value = loss(batch.model(batch.x))
            value.backward()
            return value

        gradients = require("asdl", "asdl").batch_gradient(batch.model, closure).detach()
        return gradients.unflatten(0, (-1, batch.items)).sum(1)

    def _check_options(self, structure: HessianStructure | None, options: Mapping[str, Any]) -> None:
        """Raise for options that choose the matrix, or that ASDL does not have."""
        if not self.accepts_fisher_kwargs:
            return super()._check_options(structure, options)
        known = list(inspect.signature(require("asdl", "asdl").FisherConfig).parameters)
        for name in options:
            if name in OURS:
                msg = f"asdl_fisher_kwargs cannot set {name!r}: that is said by {OURS[name]}."
                raise UnsupportedError(msg)
            if name not in known:
                choices = ", ".join(repr(choice) for choice in known if choice not in OURS)
                msg = f"{type(self).__name__} has no option {name!r} (asdl_fisher_kwargs); ASDL knows {choices}."
                raise UnsupportedError(msg)
        return None

    # -- Fisher matrices ----------------------------------------------------------------------------------------------

    @property
    def _fisher_options(self) -> dict[str, Any]:
        """The Fisher matrix, in the words of ASDL."""
        return {}

    @property
    def _scale(self) -> float:
        """The factor that turns it into that of the negative log-likelihood."""
        return 1.0

    def _full(self, batch: PrivateBatch) -> Tensor:
        if batch.items > 1:
            return sum((gradient.T @ gradient for gradient in self._columns(batch)), batch.zeros(2))
        self._compute_fisher(batch, "SHAPE_FULL")
        return self._scale * cast(Any, batch.model).fisher.data

    def _diag(self, batch: PrivateBatch) -> Tensor:
        if batch.items > 1 or any(isinstance(layer, nn.Conv2d) for layer, _ in owners(batch)):
            # Its diagonal of a convolution is not exact where the layer has few positions (up to 60 % off).
            return sum((gradient.square().sum(0) for gradient in self._columns(batch)), batch.zeros(1))
        self._compute_fisher(batch, "SHAPE_DIAG")
        return self._scale * flat([getattr(layer.fisher.diag, name) for layer, name in owners(batch)])

    def _columns(self, batch: PrivateBatch) -> Iterator[Float[Tensor, "rows params"]]:
        """Gradients of each row, or of each pair, along the columns of the output Hessians' roots."""
        self._refuse(dict(batch.options))
        root = self.output_root(Positions(batch.f, batch.y))
        return (self._batch_gradient(batch, lambda f, r=r: (f * r).sum()) for r in root.unbind(-1))

    def _kron(self, batch: PrivateBatch) -> list[list[Tensor]]:
        self._compute_fisher(batch, "SHAPE_KRON")
        G = {id(layer): self._scale * layer.fisher.kron.B for layer, _ in owners(batch)}
        # A is a sum over data, and a mean over the positions of each.
        return [
            [G[id(layer)], layer.fisher.kron.A] if name == "weight" else [G[id(layer)]] for layer, name in owners(batch)
        ]

    def _compute_fisher(self, batch: PrivateBatch, shape: str) -> None:
        """Leave a Fisher matrix on the modules of the copy."""
        asdl = require("asdl", "asdl")
        options = {"fisher_shapes": [getattr(asdl, shape)], "loss_type": self.loss_type, "data_size": 1}
        maker = asdl.get_fisher_maker(
            batch.model, asdl.FisherConfig(**{**options, **self._fisher_options, **batch.options})
        )
        self._run(maker, batch)

    def _run(self, maker: Any, batch: PrivateBatch) -> None:
        """A forward and a backward pass of the summed loss."""
        maker.setup_loss_call(self.lossfunc, maker.setup_model_call(batch.model, batch.x), self._targets(batch))
        maker.forward_and_backward()

    def _targets(self, batch: PrivateBatch) -> Tensor:
        return batch.y


def owners(batch: PrivateBatch) -> list[tuple[Any, str]]:
    """The module that each random weight belongs to, and its name there."""
    names = [name.rpartition(".") for name, p in batch.model.named_parameters() if p.requires_grad]
    return [(batch.model.get_submodule(owner), name) for owner, _, name in names]


class AsdlGGN(AsdlInterface, GGNInterface):
    """Generalized Gauss–Newton matrix by ASDL, exact or sampled; see ``GGNInterface`` for the parameters."""

    @property
    def _fisher_options(self) -> dict[str, Any]:
        asdl = require("asdl", "asdl")
        if not self.stochastic:
            return {"fisher_type": asdl.FISHER_EXACT}
        return {"fisher_type": asdl.FISHER_MC, "n_mc_samples": self.num_samples}

    def _run(self, maker: Any, batch: PrivateBatch) -> None:
        with seeded(self._seed(), batch.f.device) if self.stochastic else nullcontext():
            super()._run(maker, batch)

    @property
    def _scale(self) -> float:
        # ASDL divides a sum over samples by the square of their number.
        return float(self.num_samples)

    def _targets(self, batch: PrivateBatch) -> Tensor:
        return batch.labels


class AsdlEF(AsdlInterface, EFInterface):
    """Empirical Fisher by ASDL; of regression it is that of the likelihood, a quarter of that of the squared error."""

    @property
    def _fisher_options(self) -> dict[str, Any]:
        return {"fisher_type": require("asdl", "asdl").FISHER_EMP}

    def _full(self, batch: PrivateBatch) -> Tensor:
        if batch.one_row_a_datum:
            return super()._full(batch)
        gradients = self._summed_gradients(batch)
        return gradients.T @ gradients

    def _diag(self, batch: PrivateBatch) -> Tensor:
        if batch.one_row_a_datum:
            return super()._diag(batch)
        return self._summed_gradients(batch).square().sum(0)

    def _summed_gradients(self, batch: PrivateBatch) -> Tensor:
        """Gradients that add up over the positions of a datum, which ASDL takes for data."""
        self._refuse(dict(batch.options))
        return batch.sum_positions(self._gradients(batch))

    @property
    def _scale(self) -> float:
        return self.factor**2


class AsdlHessian(AsdlInterface):
    """The Hessian by ASDL; it may be indefinite, see ``AutogradHessian``."""

    structures: ClassVar[frozenset[HessianStructure]] = frozenset({HessianStructure.FULL})
    accepts_fisher_kwargs: ClassVar[bool] = False

    def _full(self, batch: PrivateBatch) -> Tensor:
        asdl = require("asdl", "asdl")
        maker = asdl.HessianMaker(batch.model, asdl.HessianConfig(hessian_shapes=[asdl.SHAPE_FULL]))
        self._run(maker, batch)
        return self.factor * cast(Any, batch.model).hessian.data
