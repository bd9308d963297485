"""Last-layer estimators (``subset_of_weights="last_layer"``): the weights of the last linear layer are random.

Their formulas are in ``curvature/last_layer.py`` (fit) and ``structures/head_block.py`` (predict).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from laplace.baselaplace import (
    BlockDiagLaplace,
    DiagLaplace,
    EKFACLaplace,
    FullLaplace,
    FunctionalLaplace,
    KronLaplace,
    LowRankLaplace,
    ParametricLaplace,
    last_layer,
)
from laplace.baselaplace.described import described, described_by
from laplace.baselaplace.keywords import BackendKeywords
from laplace.baselaplace.last_layer import as_extractor
from laplace.baselaplace.lowrank import checked_truncation
from laplace.baselaplace.random_weights import LastLayer
from laplace.curvature import CurvatureInterface
from laplace.likelihoods import L_co
from laplace.network import FeatureExtractor
from laplace.network.heads import head_of
from laplace.network.outputs import Reading
from laplace.types import FeatureReductionLike


@described_by(as_extractor)
class LLLaplace(ParametricLaplace[L_co]):
    """Laplace approximation of the last layer; the rest of the network is a fixed feature map.

    Raises
    ------
    UnsupportedError
        If an option does not exist or does not fit another.
    InputError
        If a hyperparameter is not finite or not positive.

    References
    ----------
    Kristiadi, Hein & Hennig (2020), "Being Bayesian, even just a bit, fixes overconfidence in ReLU networks".
    arXiv:2002.10118; Daxberger et al. (2021), "Laplace redux". arXiv:2106.14806
    """

    _weights_type = LastLayer
    model: FeatureExtractor

    @property
    def head_(self) -> nn.Module:
        """The last layer at ``mean``, a new module: after ``tune`` the head that it chose, else that of the model.

        A plain layer of the same kind (of one with adapters or a parametrization that of what multiplies features).
        """
        shapes, mean = self._fitted.head, self.mean.to(self._random_weights.first.dtype)
        assert shapes is not None and isinstance(self._random_weights, LastLayer), "of a last layer"
        (n_outputs, width), layer = shapes[0], self._random_weights.layer
        bias = mean[n_outputs * width :] if len(shapes) > 1 else None
        return head_of(layer).at(layer, mean[: n_outputs * width].reshape(n_outputs, width), bias)

    last_layer_name = last_layer.last_layer_name
    feature_reduction = last_layer.feature_reduction
    enable_backprop = last_layer.enable_backprop

    def __init__(
        self,
        model: nn.Module,
        likelihood: L_co,
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
        asdl_fisher_kwargs: dict[str, Any] | None = None,
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
            sigma_noise=sigma_noise,
            prior_precision=prior_precision,
            prior_mean=prior_mean,
            temperature=temperature,
            enable_backprop=extractor.enable_backprop,
            dict_key_x=extractor.dict_key_x,
            dict_key_y=extractor.dict_key_y,
            backend=backend,
            backend_kwargs=backend_kwargs,
            asdl_fisher_kwargs=asdl_fisher_kwargs,
            curvature_dtype=curvature_dtype,
        )


@described
class FullLLLaplace(LLLaplace[L_co], FullLaplace[L_co]):
    """Last layer with dense curvature: for these weights the exact Hessian.

    O((C D)²) memory, O((C D)³) time to factorize, once.
    """


@described
class DiagLLLaplace(LLLaplace[L_co], DiagLaplace[L_co]):
    """Last layer with diagonal curvature: O(C D) memory and time.

    Weights are independent, and so are the outputs.
    """


@described
class BlockDiagLLLaplace(LLLaplace[L_co], BlockDiagLaplace[L_co]):
    """Last layer with a dense block each for weight and bias: what correlates the two is dropped.

    O((C D)²) memory, O((C D)³) time to factorize, once.
    """


@described
class EKFACLLLaplace(LLLaplace[L_co], EKFACLaplace[L_co]):
    """Last layer in the eigenbasis of its Kronecker factors, with the exact diagonal there: O(C² + D² + C D) memory.

    The model runs once over the data, whose features are kept between the two passes.
    """


@described
class KronLLLaplace(LLLaplace[L_co], KronLaplace[L_co]):
    """Last layer with Kronecker-factored curvature: O(C² + D²) memory, O(C D + D²) beyond 4,096 outputs."""

    def __init__(
        self,
        model: nn.Module,
        likelihood: L_co,
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
        damping: bool = False,
        backend_kwargs: BackendKeywords | None = None,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
        *,
        curvature_dtype: torch.dtype | None = None,
        output_key: str | int | None = None,
        output_fn: Callable[[Any], Tensor] | None = None,
        output_dim: int | None = None,
        shift_labels: bool | None = None,
    ) -> None:
        super().__init__(
            model,
            likelihood,
            sigma_noise,
            prior_precision,
            prior_mean,
            temperature,
            enable_backprop,
            feature_reduction,
            dict_key_x,
            dict_key_y,
            backend,
            last_layer_name,
            backend_kwargs,
            asdl_fisher_kwargs,
            curvature_dtype=curvature_dtype,
            output_key=output_key,
            output_fn=output_fn,
            output_dim=output_dim,
            shift_labels=shift_labels,
        )
        self.damping = damping


@described
class LowRankLLLaplace(LLLaplace[L_co], LowRankLaplace[L_co]):
    """Last layer with the leading eigenpairs of its curvature: O(C D r) memory.

    The model runs once over the data, whose features are kept between passes.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: L_co,
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
        asdl_fisher_kwargs: dict[str, Any] | None = None,
        *,
        curvature_dtype: torch.dtype | None = None,
        output_key: str | int | None = None,
        output_fn: Callable[[Any], Tensor] | None = None,
        output_dim: int | None = None,
        shift_labels: bool | None = None,
        rank: int | None = None,
        captured_trace: float | None = None,
    ) -> None:
        super().__init__(
            model,
            likelihood,
            sigma_noise,
            prior_precision,
            prior_mean,
            temperature,
            enable_backprop,
            feature_reduction,
            dict_key_x,
            dict_key_y,
            backend,
            last_layer_name,
            backend_kwargs,
            asdl_fisher_kwargs,
            curvature_dtype=curvature_dtype,
            output_key=output_key,
            output_fn=output_fn,
            output_dim=output_dim,
            shift_labels=shift_labels,
        )
        self._truncation = checked_truncation(rank, captured_trace)


@described_by(as_extractor)
class FunctionalLLLaplace(FunctionalLaplace[L_co]):
    """Last layer as a Gaussian process: its kernel is a product of features that all outputs share.

    Notes
    -----
    Features of the subset are all that is kept; fit costs one forward pass over the data. A Gaussian likelihood needs
    one matrix of M², a softmax one of (M (C − 1))²; variances of B inputs then take O(B C min(M, D)²).
    The kernel is zero between different outputs: ``independent_outputs`` leaves out what they have in common in the
    likelihood, as ``diagonal_hessian`` does.
    """

    _weights_type = LastLayer
    model: FeatureExtractor
    last_layer_name = last_layer.last_layer_name
    feature_reduction = last_layer.feature_reduction
    enable_backprop = last_layer.enable_backprop

    def __init__(
        self,
        model: nn.Module,
        likelihood: L_co,
        n_subset: int,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        feature_reduction: FeatureReductionLike | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        last_layer_name: str | None = None,
        backend: type[CurvatureInterface] | CurvatureInterface | None = None,
        backend_kwargs: BackendKeywords | None = None,
        independent_outputs: bool = False,
        seed: int = 0,
        *,
        diagonal_hessian: bool = False,
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
            n_subset,
            sigma_noise,
            prior_precision,
            prior_mean,
            temperature,
            extractor.enable_backprop,
            extractor.dict_key_x,
            extractor.dict_key_y,
            backend,
            backend_kwargs,
            independent_outputs,
            seed,
            diagonal_hessian=diagonal_hessian,
            curvature_dtype=curvature_dtype,
        )
