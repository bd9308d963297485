"""``NetworkPosterior``: which weights are random and how outputs depend on them: by default all weights.

Last-layer estimators override what is said here about the whole network.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from laplace.baselaplace.posterior import WeightPosterior
from laplace.curvature import CurvatureInterface
from laplace.enums import PredType
from laplace.errors import UnsupportedError
from laplace.network import Batch, ParameterSubset, WholeNetwork
from laplace.predictive import JacobianLinearization, Linearization
from laplace.types import Inputs


class NetworkPosterior(WeightPosterior):
    """A posterior over all weights of a network that require a gradient."""

    _last_layer: ClassVar[bool] = False

    @cached_property
    def _whole(self) -> WholeNetwork:
        return WholeNetwork(self.model, dict_key_x=self.dict_key_x, dict_key_y=self.dict_key_y)

    @property
    def _network(self) -> nn.Module:
        """The user's model."""
        return self.model

    def _select_parameters(self) -> ParameterSubset | None:
        return self._whole.subset

    def _count_outputs(self) -> int:
        assert self.backend.n_outputs is not None, "fit has run the model"
        return self.backend.n_outputs

    def _before_first(self, batch: Batch) -> None:
        self._check_memory()
        if not self._backend_cls.finds_last_layer:
            # A back end that computes outputs in its own way may not tell how many there are.
            self.backend.outputs(batch.x)

    def _check_memory(self) -> None:
        """Raise if the curvature cannot fit the memory of the device, as soon as the weights are known."""
        subset = self._select_parameters()
        if subset is not None:
            tensors = subset.parameters if subset.choice is None else [subset.vector()]
            self.curvature_type.check_memory(tensors, self._dtype)

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
        if not backend.provides(self.curvature_type.name):
            raise backend.cannot(self.curvature_type.name)
        return backend

    def _linearize(self, x: Inputs, pred_type: PredType = PredType.GLM, **model_kwargs: Any) -> Linearization:
        def evaluate(theta: Tensor) -> Tensor:
            return self._whole.at(theta, x, **model_kwargs)

        self._warn_if_moved()
        if pred_type is PredType.NN:
            return JacobianLinearization(self._whole(x, **model_kwargs), None, evaluate, self._fitted.mean)
        differentiable = self.enable_backprop and torch.is_grad_enabled()
        derivatives = self.backend.derivatives(x, differentiable, **model_kwargs)
        return JacobianLinearization(derivatives.f, derivatives, evaluate, self._fitted.mean)

    def _warn_if_moved(self) -> None:
        """Warn when weights are not what they were in ``fit``: outputs and posterior then belong to different ones."""
        fit = self.__dict__.get("_fit")
        if fit is None:
            return
        if not self._known_parameters("fit").equals(fit.mean):
            which = "weights of the last layer" if self._last_layer else "random weights"
            msg = (
                f"The {which} have changed since fit: predictions are centered at the new ones, their uncertainty "
                "belongs to the old ones. Fit again."
            )
            warnings.warn(msg, UserWarning, stacklevel=4)
