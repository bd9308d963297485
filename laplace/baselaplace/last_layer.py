"""What estimators of a last layer have beside their constructors: the extractor, and its options as attributes."""

from __future__ import annotations

from typing import Any

from torch import nn

from laplace import checks
from laplace.enums import FeatureReduction, choose
from laplace.errors import UnsupportedError
from laplace.network import FeatureExtractor
from laplace.network.failures import checked_model
from laplace.network.outputs import Reading
from laplace.types import FeatureReductionLike


def as_extractor(
    model: nn.Module,
    last_layer_name: str | None,
    enable_backprop: bool,
    feature_reduction: FeatureReductionLike | None,
    dict_key_x: str,
    dict_key_y: str,
    reading: Reading,
) -> FeatureExtractor:
    """A feature extractor around a model; what one was told before holds, unless the call says otherwise.

    Parameters
    ----------
    model
        The trained network, or a ``FeatureExtractor`` around it. Its outputs must be those of its last linear layer.
    last_layer_name
        Name of the last layer; found by one forward pass when ``None``. It may be a ``Linear``, a convolution (also
        transposed), a ``Conv1D`` of transformers, or a linear layer with LoRA.
    feature_reduction
        How the model reduces features over positions: ``"pick_first"``, ``"pick_last"``, ``"average"``; ``None`` when
        it does not.

    Raises
    ------
    UnsupportedError
        If the name is no text, or the reduction does not exist.
    """
    enable_backprop = checks.flag("enable_backprop", enable_backprop)
    dict_key_x, dict_key_y = checks.key("dict_key_x", dict_key_x), checks.key("dict_key_y", dict_key_y)
    if not isinstance(last_layer_name, (str, type(None))):
        msg = f"last_layer_name must be the name of a module, as in model.named_modules(); got {last_layer_name!r}."
        raise UnsupportedError(msg)
    if feature_reduction is not None:
        feature_reduction = choose(FeatureReduction, feature_reduction, "feature_reduction")
    if isinstance(model, FeatureExtractor):
        reading = model.reading if reading == Reading() else reading
        last_layer_name = last_layer_name or model.last_layer_name
        feature_reduction = feature_reduction or model.feature_reduction
        enable_backprop = enable_backprop or model.enable_backprop
        dict_key_x = model.dict_key_x if dict_key_x == "input_ids" else dict_key_x
        dict_key_y = model.dict_key_y if dict_key_y == "labels" else dict_key_y
        model = model.model
    return FeatureExtractor(
        checked_model(model),
        last_layer_name,
        enable_backprop,
        feature_reduction,
        dict_key_x=dict_key_x,
        dict_key_y=dict_key_y,
        reading=reading,
    )


@property
def last_layer_name(self: Any) -> str | None:
    """Name of the last layer; ``None`` before it is known."""
    return self.model.last_layer_name


@property
def feature_reduction(self: Any) -> FeatureReduction | None:
    """How the model reduces features over positions; ``None`` when it does not."""
    return self.model.feature_reduction


@property
def enable_backprop(self: Any) -> bool:
    """Whether predictions are differentiable with respect to the inputs; assign to change it."""
    return self.model.enable_backprop


@enable_backprop.setter
def enable_backprop(self: Any, value: bool) -> None:
    """Check and keep it."""
    self.model.enable_backprop = checks.flag("enable_backprop", value)


__all__ = ["as_extractor", "enable_backprop", "feature_reduction", "last_layer_name"]
