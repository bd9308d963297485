"""``RandomWeights``: which weights are random and how outputs depend on them: by default all weights.

``LastLayer`` (``baselaplace/last_layer.py``) overrides what is said here about the whole network.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace import checks
from laplace.baselaplace.base import BaseLaplace
from laplace.curvature import CurvatureInterface
from laplace.enums import PredType
from laplace.errors import NotFittedError, UnsupportedError, warn
from laplace.network import ParameterSubset, WholeNetwork
from laplace.predictive import JacobianLinearization, Linearization
from laplace.prior import GaussianPrior
from laplace.types import Inputs


class RandomWeights(BaseLaplace):
    """The random weights of a network, their prior, and the outputs linearized in them."""

    @cached_property
    def _whole(self) -> WholeNetwork:
        return WholeNetwork(self.model, dict_key_x=self.dict_key_x, dict_key_y=self.dict_key_y)

    @property
    def _network(self) -> nn.Module:
        """The user's model."""
        return self.model

    def _select_parameters(self) -> ParameterSubset | None:
        """The random weights; ``None`` while they are not known."""
        return self._whole.subset

    def _known_parameters(self, what: str) -> ParameterSubset:
        subset = self._select_parameters()
        if subset is None:
            msg = (
                f"{what} needs the last layer, which is found by the first batch: name it (last_layer_name=), or call "
                "fit(train_loader) first."
            )
            raise NotFittedError(msg)
        return subset

    def _count_outputs(self) -> int:
        """C, once the model has run."""
        assert self.backend.n_outputs is not None, "fit has run the model"
        return self.backend.n_outputs

    @property
    def params(self) -> list[Tensor]:
        """The random parameters."""
        return list(self._known_parameters("params").parameters)

    @property
    def n_params(self) -> int:
        """P, the number of random weights."""
        return self._known_parameters("n_params").n_params

    @property
    def n_layers(self) -> int:
        """Number of parameter groups."""
        return self._known_parameters("n_layers").n_layers

    # -- prior --------------------------------------------------------------------------------------------------------

    def _check_prior(self, precision: Tensor, mean: Tensor) -> None:
        subset = self._select_parameters()
        if subset is not None:
            self._fits_structure(GaussianPrior(mean, precision, subset.sizes))

    def _fits_structure(self, prior: GaussianPrior) -> None:
        """Raise if the structure cannot take a prior; structure classes use it."""

    @property
    def _prior(self) -> GaussianPrior:
        sizes = self._known_parameters("The prior").sizes
        mean, precision = (p.to(self._device, self._dtype) for p in (self._prior_mean, self._prior_precision))
        return GaussianPrior(mean, precision, sizes)

    @property
    def prior_precision_diag(self) -> Float[Tensor, " params"]:
        """Prior precision of each weight, ``[P]``."""
        return self._prior.diagonal().clone()

    # -- back end and outputs -----------------------------------------------------------------------------------------

    def _chosen_indices(self) -> dict[str, Tensor]:
        """What a back end is told about single weights."""
        return {}

    def _make_backend(self) -> CurvatureInterface:
        options = dict(self._backend_kwargs)
        if "subnetwork_indices" in options:
            msg = (
                "backend_kwargs cannot hold subnetwork_indices: pass them to the estimator, "
                'Laplace(..., subset_of_weights="subnetwork", subnetwork_indices=...).'
            )
            raise UnsupportedError(msg)
        if self._curvature_dtype is not None:
            options.setdefault("curvature_dtype", self._curvature_dtype)
        if not self._last_layer:
            self._whole.check_still_random()
        backend = self._backend_cls(
            self.model,
            self.likelihood,
            last_layer=self._last_layer,
            dict_key_x=self.dict_key_x,
            dict_key_y=self.dict_key_y,
            **self._chosen_indices(),
            **options,
        )
        self._check_backend(backend)
        return backend

    def _check_backend(self, backend: CurvatureInterface) -> None:
        """Raise if the back end does not provide what is needed."""

    @property
    def _center(self) -> Float[Tensor, " params"]:
        """The weights that outputs are linearized at: those of the fit, if there is one."""
        fit = self.__dict__.get("_fit")
        return self._known_parameters("Linearized outputs").vector() if fit is None else fit.mean

    def _left_behind(self, mean: Tensor) -> bool:
        """Whether the model was moved, or brought to another precision, since a fit learned this mean."""
        return mean.dtype != self._dtype or mean.device != self._device

    @abstractmethod
    def _follow_model(self) -> None:
        """Bring what was learned, and the hyperparameters, to where the model is, and to its precision."""

    def _linearize(self, x: Inputs, pred_type: PredType = PredType.GLM, **model_kwargs: Any) -> Linearization:
        """Outputs at ``x`` and how they depend on the random weights."""

        def evaluate(theta: Tensor) -> Tensor:
            return self._whole.at(theta, x, **model_kwargs)

        self._warn_if_moved()
        if pred_type is PredType.NN:
            return JacobianLinearization(self._whole(x, **model_kwargs), None, evaluate, self._center)
        differentiable = self.enable_backprop and torch.is_grad_enabled()
        derivatives = self.backend.derivatives(x, differentiable, **model_kwargs)
        return JacobianLinearization(derivatives.f, derivatives, evaluate, self._center)

    def _checked_jacobians(self, jacobians: Any) -> Tensor:
        """Jacobians of a user in the precision of the posterior; their shape is checked where they are used."""
        return checks.tensor("Jacobians", jacobians, "a tensor [batch, outputs, P]").to(self._device, self._dtype)

    def _warn_if_moved(self) -> None:
        """Warn when weights are not what they were in ``fit``: outputs and posterior then belong to different ones."""
        fit = self.__dict__.get("_fit")
        if fit is None:
            return
        if not self._known_parameters("fit").equals(fit.mean):
            which = "weights of the last layer" if self._last_layer else "random weights"
            msg = (
                f"The {which} have changed since fit, or la.mean was assigned: predictions are centered at the weights "
                "of the model, their uncertainty belongs to la.mean. Fit again."
            )
            warn(msg, UserWarning)
