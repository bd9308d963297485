"""What every curvature back end provides (``backend=``, ``backend_kwargs=``), and how GGN and empirical Fisher follow.

A back end sees the model and the likelihood, never the prior. Subclass ``GGNInterface`` or ``EFInterface``, provide
``jacobians`` or ``gradients``, and the dense and diagonal structures follow; override ``full``, ``diag`` or ``kron``
where a better way exists. All of them return the negative log-likelihood at unit noise together with the curvature at
unit noise, summed over the batch.
"""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from laplace.enums import CurvatureKind, HessianStructure, Likelihood, choose
from laplace.errors import InputError, UnsupportedError
from laplace.likelihoods import AbstractLikelihood, OutputHessian, Positions, resolve
from laplace.network.feature_extractor import FeatureExtractor
from laplace.structures import Kron
from laplace.structures.base import head_jacobians
from laplace.types import Inputs, Jacobians


class CurvatureInterface(ABC):
    """Access to derivatives of a model and its likelihood.

    Parameters
    ----------
    model
        The network; a ``FeatureExtractor`` around it when ``last_layer``.
    likelihood
        Name of the likelihood.
    last_layer
        Only the weights of the last layer are random.
    subnetwork_indices
        Indices of the random weights among all of them.
    dict_key_x, dict_key_y
        Entries of mapping inputs that hold inputs and targets.
    curvature_dtype
        Precision the curvature is computed in; by default that of the model, at least float32.

    Raises
    ------
    UnsupportedError
        If the likelihood, or the choice of weights, is not available in this back end.
    """

    kind: ClassVar[CurvatureKind] = CurvatureKind.GGN
    """Decides how the curvature scales with the observation noise."""
    structures: ClassVar[frozenset[HessianStructure]] = frozenset(
        {HessianStructure.FULL, HessianStructure.DIAG, HessianStructure.KRON}
    )
    """Structures this back end can provide."""
    finds_last_layer: ClassVar[bool] = False
    """Whether its first forward pass may find the last layer; else that is found, by one pass, before."""
    accepts_fisher_kwargs: ClassVar[bool] = False
    """Whether ``asdl_fisher_kwargs`` have a meaning; they are then passed to ``full``, ``diag`` and ``kron``."""

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        *,
        curvature_dtype: torch.dtype | None = None,
    ) -> None:
        if not last_layer or subnetwork_indices is not None:
            msg = (
                f"{type(self).__name__} provides the curvature of the last layer: construct it with last_layer=True "
                "and without subnetwork_indices."
            )
            raise UnsupportedError(msg)
        if not isinstance(model, FeatureExtractor):
            msg = f"With last_layer=True the model must be a FeatureExtractor; got {type(model).__name__}."
            raise UnsupportedError(msg)
        self.model = model
        self.likelihood = choose(Likelihood, likelihood, "likelihood")
        self.last_layer = last_layer
        self.subnetwork_indices = subnetwork_indices
        self.dict_key_x = dict_key_x
        self.dict_key_y = dict_key_y
        self.curvature_dtype = curvature_dtype
        self.output_likelihood: AbstractLikelihood = resolve(self.likelihood)
        self.lossfunc, self.factor = self.output_likelihood.torch_loss()

    @property
    def params(self) -> list[Tensor]:
        """The random parameters."""
        layer = self._head
        return [layer.weight] if layer.bias is None else [layer.weight, layer.bias]

    @property
    def _head(self) -> nn.Linear:
        layer = self.model.last_layer
        if layer is None:
            msg = "The last layer is not known yet: run one forward pass (model.find_last_layer(x)) or name it."
            raise UnsupportedError(msg)
        return layer

    def count(self, y: Tensor) -> int:
        """Number of unmasked positions among targets: what the inputs' Kronecker factor is divided by.

        Parameters
        ----------
        y
            Targets of a batch.
        """
        return self.output_likelihood.count(y, self._head.out_features)

    def last_layer_jacobians(self, x: Inputs, enable_backprop: bool = False) -> tuple[Jacobians, Tensor]:
        """Jacobians of the outputs in the last layer's weights, written out.

        Parameters
        ----------
        x
            A batch of inputs.
        enable_backprop
            Keep the graph to the inputs.

        Returns
        -------
        Jacobians ``[rows, outputs, P]`` and outputs ``[rows, outputs]``, one row a position.

        Notes
        -----
        C times the size of anything that the estimators compute: kept for user code.
        """
        with torch.set_grad_enabled(enable_backprop):
            f, phi = self.model.forward_with_features(x)
            f, phi = self._widen(f), self._widen(phi)
            f, phi = f.reshape(-1, f.shape[-1]), phi.reshape(-1, phi.shape[-1])
            return head_jacobians(phi, f.shape[-1], self._head.bias is not None), f

    def jacobians(self, x: Inputs, enable_backprop: bool = False) -> tuple[Jacobians, Tensor]:
        """Jacobians of the outputs in the random weights, ``[rows, outputs, P]``, and outputs ``[rows, outputs]``.

        Parameters
        ----------
        x
            A batch of inputs.
        enable_backprop
            Keep the graph to the inputs.
        """
        return self.last_layer_jacobians(x, enable_backprop)

    def gradients(self, x: Inputs, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the negative log-likelihood of each datum, ``[batch, P]``, and the summed loss.

        Parameters
        ----------
        x
            A batch of inputs.
        y
            Its targets.
        """
        with torch.no_grad():
            f, _ = self.model.forward_with_features(x)
            positions = self._positions(self._widen(f), y)
            J = positions.select(self.jacobians(x)[0].flatten(1)).unflatten(1, (positions.f.shape[-1], -1))
            rows = torch.einsum("nc,ncp->np", self.output_likelihood.gradient(positions.f, positions.y), J)
            if positions.datum is None:
                per_datum = rows
            else:
                per_datum = rows.new_zeros(len(f), rows.shape[1]).index_add_(0, positions.datum, rows)
            return per_datum, self.output_likelihood.nll(positions.f, positions.y)

    def output_hessian(self, positions: Positions) -> OutputHessian:
        """The matrices in the outputs whose pullback is this curvature: the likelihood's Hessian.

        Parameters
        ----------
        positions
            Outputs and targets of the unmasked positions.
        """
        return self.output_likelihood.hessian(positions.f)

    def full(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss ``[]`` and dense curvature ``[P, P]`` of a batch."""
        raise self.cannot(HessianStructure.FULL)

    def diag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss ``[]`` and diagonal of the curvature ``[P]`` of a batch."""
        raise self.cannot(HessianStructure.DIAG)

    def kron(self, x: Inputs, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Kron]:
        """Loss ``[]`` and Kronecker factors of a batch; the inputs' side is divided by ``N`` (1 for raw sums)."""
        raise self.cannot(HessianStructure.KRON)

    def cannot(self, structure: HessianStructure) -> UnsupportedError:
        """The error of asking for a structure that is not provided; it lists those that are."""
        # Whatever is still the method of the interface only raises this error.
        own = {
            name for name in ("full", "diag", "kron") if getattr(type(self), name) is not vars(CurvatureInterface)[name]
        }
        available = ", ".join(sorted(repr(s.value) for s in self.structures if s.value in own)) or "none"
        msg = f"{type(self).__name__} does not provide hessian_structure={structure.value!r}; it provides {available}."
        return UnsupportedError(msg)

    def _positions(self, f: Tensor, y: Tensor) -> Positions:
        """Outputs of the head and their targets, checked and flattened to unmasked rows."""
        self.output_likelihood.check_head(self._head.out_features)
        return self.output_likelihood.flatten(f, y)

    def _refuse(self, kwargs: dict[str, Any]) -> None:
        """Raise when a method gets options that this back end does not read."""
        if kwargs:
            msg = f"{type(self).__name__} takes no further options; got {', '.join(map(repr, kwargs))}."
            raise UnsupportedError(msg)

    def _widen(self, values: Tensor) -> Tensor:
        """Bring model outputs to the precision that curvature is computed in."""
        dtype = self.curvature_dtype or torch.promote_types(values.dtype, torch.float32)
        return values.to(dtype)


class GGNInterface(CurvatureInterface):
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
        device = next(model.parameters()).device
        if generator is not None and generator.device.type != device.type:
            msg = f"The generator is on {generator.device}, the model on {device}; create it on the model's device."
            raise InputError(msg)
        self.stochastic = stochastic
        self.num_samples = num_samples
        self.generator = generator

    def full(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss and ``Σ Jᵀ Λ J`` from Jacobians."""
        self._refuse(kwargs)
        loss, J, Lambda = self._jacobians_and_hessians(x, y)
        return loss, torch.einsum("ncp,nck,nkq->pq", J, Lambda, J)

    def diag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss and the diagonal of ``Σ Jᵀ Λ J`` from Jacobians."""
        self._refuse(kwargs)
        loss, J, Lambda = self._jacobians_and_hessians(x, y)
        return loss, torch.einsum("ncp,nck,nkp->p", J, Lambda, J)

    def output_hessian(self, positions: Positions) -> OutputHessian:
        """The likelihood's Hessian, or the mean of ``num_samples`` outer products with that expectation."""
        if not self.stochastic:
            return super().output_hessian(positions)
        draws = self.output_likelihood.sample_gradient(positions.f, self.num_samples, self.generator)
        return OutputHessian(positions.f.shape[-1], root=draws.permute(1, 2, 0) / self.num_samples**0.5)

    def _jacobians_and_hessians(self, x: Inputs, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, Jacobians and output Hessians of the unmasked positions."""
        J, f = self.jacobians(x)
        rows = y.reshape(len(f), -1) if y.is_floating_point() else y.reshape(-1)
        positions = self._positions(f, rows)
        return (
            self.output_likelihood.nll(positions.f, positions.y),
            positions.select(J.flatten(1)).unflatten(1, (positions.f.shape[-1], -1)),
            self.output_hessian(positions).dense(),
        )


class EFInterface(CurvatureInterface):
    """Empirical Fisher ``Σ g gᵀ`` with ``g`` the gradient of each datum's negative log-likelihood."""

    kind: ClassVar[CurvatureKind] = CurvatureKind.EF

    def output_hessian(self, positions: Positions) -> OutputHessian:
        """The outer product of the gradient of each position with itself."""
        gradient = self.output_likelihood.gradient(positions.f, positions.y)
        return OutputHessian(positions.f.shape[-1], root=gradient.unsqueeze(-1))

    def full(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss and ``Σ g gᵀ`` from gradients."""
        self._refuse(kwargs)
        gradients, loss = self.gradients(x, y)
        return loss, gradients.T @ gradients

    def diag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss and ``Σ g²`` from gradients."""
        self._refuse(kwargs)
        gradients, loss = self.gradients(x, y)
        return loss, gradients.square().sum(0)
