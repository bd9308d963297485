"""The keywords of estimators where a function passes them on: ``**options: Unpack[KronKeywords]``.

They are described where they are taken, in the docstrings of the classes and methods; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from typing_extensions import TypedDict

from laplace.curvature import CurvatureInterface
from laplace.tuning import Loss, Noise
from laplace.types import FeatureReductionLike, Inputs, KfacApproxLike, LinkApproxLike, PredTypeLike, PriorStructureLike

ScoreLike: TypeAlias = Literal["nll", "brier", "crps"] | Loss
"""What ``tune`` minimizes."""
LossLike: TypeAlias = Literal["nll", "brier", "ece", "crps"] | Loss
"""What ``optimize_prior_precision`` minimizes on data."""
Average: TypeAlias = Literal["parameters", "mixture", False]
"""What ``tune`` makes of several heads."""


class BackendKeywords(TypedDict, total=False):
    """``backend_kwargs=`` of the back ends of this library; a class derived from it adds those of your own."""

    stochastic: bool
    num_samples: int
    generator: torch.Generator | None
    curvature_dtype: torch.dtype | None
    kfac_approx: KfacApproxLike
    columns: int | None


class Limits(TypedDict, total=False):
    """``limits=`` of ``tune``: least and largest values."""

    output_temperature: tuple[float, float]
    sigma_noise: tuple[float, float]
    prior_precision: tuple[float, float]


# -- constructors -----------------------------------------------------------------------------------------------------


class ProcessKeywords(TypedDict, total=False):
    """Of all estimators."""

    sigma_noise: float | Tensor
    prior_precision: float | Tensor
    prior_mean: float | Tensor
    temperature: float
    enable_backprop: bool
    dict_key_x: str
    dict_key_y: str
    backend: type[CurvatureInterface] | CurvatureInterface | None
    backend_kwargs: BackendKeywords | None
    curvature_dtype: torch.dtype | None
    output_key: str | int | None
    output_fn: Callable[[Any], Tensor] | None
    output_dim: int | None
    shift_labels: bool | None


class WeightsKeywords(ProcessKeywords, total=False):
    """Of posteriors over weights."""

    asdl_fisher_kwargs: dict[str, Any] | None


class HeadKeywords(TypedDict, total=False):
    """Of last layers, beside the others."""

    feature_reduction: FeatureReductionLike | None
    last_layer_name: str | None


class KronKeywords(WeightsKeywords, total=False):
    """Of ``KronLaplace``."""

    damping: bool


class LowRankKeywords(WeightsKeywords, total=False):
    """Of ``LowRankLaplace``."""

    rank: int | None
    captured_trace: float | None


class LastLayerKeywords(WeightsKeywords, HeadKeywords, total=False):
    """Of ``LLLaplace``."""


class KronLastLayerKeywords(KronKeywords, HeadKeywords, total=False):
    """Of ``KronLLLaplace``."""


class LowRankLastLayerKeywords(LowRankKeywords, HeadKeywords, total=False):
    """Of ``LowRankLLLaplace``."""


class SubnetworkKeywords(WeightsKeywords):
    """Of ``SubnetLaplace``."""

    subnetwork_indices: Tensor


class _FunctionalOptions(ProcessKeywords, total=False):
    independent_outputs: bool
    seed: int
    diagonal_hessian: bool


class FunctionalKeywords(_FunctionalOptions):
    """Of ``FunctionalLaplace``."""

    n_subset: int


class FunctionalLastLayerKeywords(FunctionalKeywords, HeadKeywords):
    """Of ``FunctionalLLLaplace``."""


class _EllaOptions(ProcessKeywords, total=False):
    seed: int


class EllaKeywords(_EllaOptions):
    """Of ``ELLA``."""

    subsample_size: int
    n_eigenvalues: int


class EllaLastLayerKeywords(EllaKeywords, HeadKeywords):
    """Of ``LLELLA``."""


class _VallaOptions(ProcessKeywords, total=False):
    num_inducing: int | None
    inducing_classes: Tensor | Sequence[int] | None
    seed: int
    alpha: float
    mc_softmax_samples: int


class VallaKeywords(_VallaOptions):
    """Of ``VaLLA``."""

    inducing_locations: Inputs


class VallaLastLayerKeywords(VallaKeywords, HeadKeywords):
    """Of ``LLVaLLA``."""


class AnyKeywords(LowRankLastLayerKeywords, total=False):
    """Of some estimator, where it is not known of which."""

    damping: bool
    subnetwork_indices: Tensor
    n_subset: int
    independent_outputs: bool
    seed: int
    diagonal_hessian: bool
    subsample_size: int
    n_eigenvalues: int
    inducing_locations: Inputs
    num_inducing: int | None
    inducing_classes: Tensor | Sequence[int] | None
    alpha: float
    mc_softmax_samples: int


# -- methods ----------------------------------------------------------------------------------------------------------


class TuneKeywords(TypedDict, total=False):
    """Of ``tune``, beside the validation data."""

    train_loader: Iterable[Any] | None
    refit: bool | None
    average: Average
    distance_aware: bool | None
    max_rows: int | None
    score: ScoreLike
    prior_structure: PriorStructureLike
    noise: Noise | None
    output_temperature: bool | None
    pred_type: PredTypeLike
    link_approx: LinkApproxLike
    n_samples: int
    limits: Limits | None
    n_steps: int
    generator: torch.Generator | None
    verbose: bool
    progress_bar: bool


class FurtherKeywords(TypedDict, total=False):
    """Of ``optimize_prior_precision``, those that are passed by name alone."""

    generator: torch.Generator | None
    noise: Noise
    bounds: tuple[float, float]
    temperature: bool
    train_loader: Iterable[Any] | None
    n_folds: int
    refit: bool | None


class OptimizeKeywords(FurtherKeywords, total=False):
    """All of ``optimize_prior_precision`` but the method."""

    pred_type: PredTypeLike
    n_steps: int
    lr: float
    init_prior_prec: float | Tensor
    prior_structure: PriorStructureLike
    val_loader: Iterable[Any] | None
    loss: LossLike | None
    log_prior_prec_min: float
    log_prior_prec_max: float
    grid_size: int
    link_approx: LinkApproxLike
    n_samples: int
    verbose: bool
    progress_bar: bool
    log_prior_prec_base: float


__all__ = [
    "AnyKeywords",
    "Average",
    "BackendKeywords",
    "EllaKeywords",
    "EllaLastLayerKeywords",
    "FunctionalKeywords",
    "FunctionalLastLayerKeywords",
    "FurtherKeywords",
    "HeadKeywords",
    "KronKeywords",
    "KronLastLayerKeywords",
    "LastLayerKeywords",
    "Limits",
    "LossLike",
    "LowRankKeywords",
    "LowRankLastLayerKeywords",
    "OptimizeKeywords",
    "ProcessKeywords",
    "ScoreLike",
    "SubnetworkKeywords",
    "TuneKeywords",
    "VallaKeywords",
    "VallaLastLayerKeywords",
    "WeightsKeywords",
]
