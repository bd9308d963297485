"""``LastLayer``: the weights of the last linear layer are random, the rest of the network is a fixed feature map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from laplace import checks
from laplace.baselaplace.checkpoint import Checkpointed
from laplace.baselaplace.statefile import move
from laplace.enums import FeatureReduction, PredType, choose
from laplace.errors import StateError, UnsupportedError
from laplace.network import FeatureExtractor, ParameterSubset, evaluating
from laplace.network.failures import check_model
from laplace.network.threads import together
from laplace.predictive import FeatureLinearization, Linearization
from laplace.schema import Known, Table, check_entries, optional, text
from laplace.types import Inputs


def as_extractor(
    model: nn.Module,
    last_layer_name: str | None,
    enable_backprop: bool,
    feature_reduction: FeatureReduction | str | None,
    dict_key_x: str,
    dict_key_y: str,
) -> FeatureExtractor:
    """A feature extractor around a model; what one was told before holds, unless the call says otherwise.

    Parameters
    ----------
    model
        The network, or an extractor around it.
    last_layer_name, enable_backprop, feature_reduction, dict_key_x, dict_key_y
        As in ``LLLaplace``.

    Raises
    ------
    UnsupportedError
        If it is no module.
    """
    enable_backprop = checks.flag("enable_backprop", enable_backprop)
    dict_key_x, dict_key_y = checks.key("dict_key_x", dict_key_x), checks.key("dict_key_y", dict_key_y)
    if not isinstance(last_layer_name, (str, type(None))):
        msg = f"last_layer_name must be the name of a module, as in model.named_modules(); got {last_layer_name!r}."
        raise UnsupportedError(msg)
    if feature_reduction is not None:
        feature_reduction = choose(FeatureReduction, feature_reduction, "feature_reduction")
    if isinstance(model, FeatureExtractor):
        last_layer_name = last_layer_name or model.last_layer_name
        feature_reduction = feature_reduction or model.feature_reduction
        enable_backprop = enable_backprop or model.enable_backprop
        dict_key_x = model.dict_key_x if dict_key_x == "input_ids" else dict_key_x
        dict_key_y = model.dict_key_y if dict_key_y == "labels" else dict_key_y
        model = model.model
    check_model(model)
    return FeatureExtractor(
        model, last_layer_name, enable_backprop, feature_reduction, dict_key_x=dict_key_x, dict_key_y=dict_key_y
    )


_NAME: Table = {"last_layer_name": text}


class LastLayer(Checkpointed):
    """Which weights are random: those of the last linear layer, whose inputs are features."""

    model: FeatureExtractor

    _last_layer: ClassVar[bool] = True
    state_entries: ClassVar[Table] = {"feature_reduction": optional(text), **_NAME}

    @property
    def enable_backprop(self) -> bool:
        """Whether predictions are differentiable with respect to the inputs; assign to change it."""
        return self.model.enable_backprop

    @enable_backprop.setter
    def enable_backprop(self, value: bool) -> None:
        self.model.enable_backprop = checks.flag("enable_backprop", value)

    def _as_model(self, model: nn.Module) -> FeatureExtractor:
        kept = self.model
        if not isinstance(model, FeatureExtractor):
            keys = kept.dict_key_x, kept.dict_key_y
            return as_extractor(model, kept.last_layer_name, kept.enable_backprop, kept.feature_reduction, *keys)
        if model.last_layer_name is None and kept.last_layer_name is not None:
            model.set_last_layer(kept.last_layer_name)
        return model

    @property
    def last_layer_name(self) -> str | None:
        """Name of the last layer; ``None`` before it is known."""
        return self.model.last_layer_name

    @property
    def feature_reduction(self) -> FeatureReduction | None:
        """How the model reduces features over positions; ``None`` when it does not."""
        return self.model.feature_reduction

    @property
    def _first_parameter(self) -> Tensor:
        """The head decides device and precision, once it is known: the backbone may have others."""
        layer = self.model.last_layer
        return super()._first_parameter if layer is None else layer.weight

    def _select_parameters(self) -> ParameterSubset | None:
        layer = self.model.last_layer
        if layer is None:
            return None
        with together(layer):
            return ParameterSubset.last_layer(layer)

    @property
    def _network(self) -> nn.Module:
        return self.model.model

    def _identity(self) -> dict[str, Any]:
        reduction = self.model.feature_reduction
        return {**super()._identity(), "feature_reduction": None if reduction is None else reduction.value}

    def _choices(self) -> dict[str, Any]:
        return {**super()._choices(), "last_layer_name": self.model.last_layer_name}

    @property
    def _changed_by_loading(self) -> tuple[object, ...]:
        return (self, self.model)

    def _sizes_in(self, state: Mapping[str, Any]) -> tuple[int, ...]:
        return ParameterSubset.last_layer(self._layer_in(state)).sizes

    def _layer_in(self, state: Mapping[str, Any]) -> nn.Linear:
        """The layer that a state was saved for."""
        check_entries({key: state[key] for key in state if key in _NAME}, _NAME, {})
        name, known = state["last_layer_name"], self.model.last_layer_name
        if known not in (None, name):
            msg = f"The state was saved for the last layer {name!r}; this object was constructed with {known!r}."
            raise StateError(msg)
        layer = dict(self._network.named_modules()).get(name)
        if not isinstance(layer, nn.Linear):
            msg = f"The state was saved for the last layer {name!r}; the model has no linear layer of that name."
            raise StateError(msg)
        return layer

    def _know_weights(self, state: Mapping[str, Any]) -> None:
        name, known, data = state["_last_layer_name"], self.model.last_layer_name, state["data"]
        if known is not None or name is not None:
            self._layer_in({"last_layer_name": known if name is None else name})
        if known is None and name is not None:
            self.model.set_last_layer(name)
        elif known is None:
            if data is None:
                msg = (
                    "The state of laplace-torch does not say which layer is the last: construct with last_layer_name=."
                )
                raise StateError(msg)
            with evaluating(self.model), torch.no_grad():
                self.model.find_last_layer(move(data[0] if isinstance(data, (list, tuple)) else data, self._device))

    def _known_of(self, state: Mapping[str, Any]) -> Known:
        layer = self._layer_in(state)
        return {**super()._known_of(state), "C": layer.out_features, "bias": layer.bias is not None}

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore(state)
        if self.model.last_layer_name is None:
            self.model.set_last_layer(state["last_layer_name"])

    def _linearize(self, x: Inputs, pred_type: PredType = PredType.GLM, **model_kwargs: Any) -> Linearization:  # noqa: ARG002
        f, phi = self.model.forward_with_features(x, **model_kwargs)
        assert self.model.last_layer is not None, "the forward pass finds it"
        self._warn_if_moved()
        return FeatureLinearization(f, phi, bias=self.model.last_layer.bias is not None)

    def _count_outputs(self) -> int:
        assert self.model.last_layer is not None, "fit has run the model"
        return self.model.last_layer.out_features
