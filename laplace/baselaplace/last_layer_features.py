"""ELLA and VaLLA of a last layer, whose kernel is a product of features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace.baselaplace import last_layer
from laplace.baselaplace.described import described_by
from laplace.baselaplace.ella import ELLA
from laplace.baselaplace.keywords import BackendKeywords
from laplace.baselaplace.last_layer import as_extractor
from laplace.baselaplace.random_weights import LastLayer
from laplace.baselaplace.valla import VaLLA
from laplace.curvature import CurvatureInterface
from laplace.likelihoods import L_co
from laplace.network import FeatureExtractor
from laplace.network.outputs import Reading
from laplace.types import FeatureReductionLike, Inputs


@described_by(as_extractor)
class LLELLA(ELLA[L_co]):
    """ELLA of a last layer: from features alone, without a Jacobian and without a backward pass."""

    _weights_type = LastLayer
    model: FeatureExtractor
    last_layer_name = last_layer.last_layer_name
    feature_reduction = last_layer.feature_reduction
    enable_backprop = last_layer.enable_backprop

    def __init__(
        self,
        model: nn.Module,
        likelihood: L_co,
        subsample_size: int,
        n_eigenvalues: int,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        feature_reduction: FeatureReductionLike | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | CurvatureInterface | None = None,
        last_layer_name: str | None = None,
        backend_kwargs: BackendKeywords | None = None,
        seed: int = 1234,
        *,
        curvature_dtype: torch.dtype | None = None,
        output_key: str | int | None = None,
        output_fn: Callable[[Any], Tensor] | None = None,
        output_dim: int | None = None,
        shift_labels: bool | None = None,
    ) -> None:
        how = Reading.of(output_key, output_fn, output_dim, shift_labels)
        extractor = as_extractor(
            model, last_layer_name, enable_backprop, feature_reduction, dict_key_x, dict_key_y, how
        )
        super().__init__(
            extractor,
            likelihood,
            subsample_size,
            n_eigenvalues,
            sigma_noise,
            prior_precision,
            prior_mean,
            temperature,
            extractor.enable_backprop,
            extractor.dict_key_x,
            extractor.dict_key_y,
            backend,
            backend_kwargs,
            seed,
            curvature_dtype=curvature_dtype,
        )


@described_by(as_extractor)
class LLVaLLA(VaLLA[L_co]):
    """VaLLA of a last layer: from features alone, without a Jacobian and without a backward pass."""

    _weights_type = LastLayer
    model: FeatureExtractor
    last_layer_name = last_layer.last_layer_name
    feature_reduction = last_layer.feature_reduction
    enable_backprop = last_layer.enable_backprop

    def __init__(
        self,
        model: nn.Module,
        likelihood: L_co,
        inducing_locations: Inputs,
        num_inducing: int | None = None,
        inducing_classes: Tensor | Sequence[int] | None = None,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        feature_reduction: FeatureReductionLike | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | CurvatureInterface | None = None,
        last_layer_name: str | None = None,
        backend_kwargs: BackendKeywords | None = None,
        seed: int = 0,
        alpha: float = 1.0,
        mc_softmax_samples: int = 0,
        *,
        curvature_dtype: torch.dtype | None = None,
        output_key: str | int | None = None,
        output_fn: Callable[[Any], Tensor] | None = None,
        output_dim: int | None = None,
        shift_labels: bool | None = None,
    ) -> None:
        how = Reading.of(output_key, output_fn, output_dim, shift_labels)
        extractor = as_extractor(
            model, last_layer_name, enable_backprop, feature_reduction, dict_key_x, dict_key_y, how
        )
        super().__init__(
            extractor,
            likelihood,
            inducing_locations,
            num_inducing,
            inducing_classes,
            sigma_noise,
            prior_precision,
            prior_mean,
            temperature,
            extractor.enable_backprop,
            extractor.dict_key_x,
            extractor.dict_key_y,
            backend,
            backend_kwargs,
            seed,
            alpha,
            mc_softmax_samples,
            curvature_dtype=curvature_dtype,
        )


__all__ = ["LLELLA", "LLVaLLA"]
