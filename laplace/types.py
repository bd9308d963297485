"""Glossary: what the one-letter names and the axes mean, everywhere in this library.

Symbols
    ``f`` outputs of the network, ``x`` inputs, ``y`` targets, ``J`` Jacobian of ``f`` in the random weights,
    ``phi`` features that enter the last layer, ``H`` curvature of the data term, ``theta`` weights,
    ``s`` scale of the curvature, 1/(σ² T).

Axes, always in this order
    ``samples`` S, ``batch`` B (rows of the loader), ``positions`` T, ``outputs`` C, ``features`` D, ``params`` P.
    ``rows`` N are unmasked positions of a batch, flattened: equal to B when the model has one output vector per datum.

Order of the weights
    Public vectors and matrices follow ``torch.nn.utils.parameters_to_vector``: for the last layer ``vec(W)`` row by
    row, then ``b``.

Units
    Negative log-likelihood and evidence in nats, summed over data; ``sigma_noise`` in target units; prior precision in
    1/weight²; variances of outputs in output units squared (logits² for classification), without observation noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from jaxtyping import Float, Int
from torch import Tensor

from laplace.enums import (
    FeatureReduction,
    ForeignScore,
    FunctionalApproximation,
    HessianStructure,
    KfacApprox,
    LinkApprox,
    PredType,
    PriorStructure,
    SubsetOfWeights,
    TuningMethod,
)

Scalar: TypeAlias = Float[Tensor, ""]
"""A single number, differentiable where its inputs are."""
Outputs: TypeAlias = Float[Tensor, "rows outputs"]
"""Network outputs, one row per unmasked position."""
Features: TypeAlias = Float[Tensor, "rows features"]
"""Inputs of the last layer, one row per unmasked position."""
Targets: TypeAlias = Float[Tensor, "rows ..."] | Int[Tensor, " rows"]
"""Numbers or soft labels ``[rows, targets]``, counts and exposures ``[rows, targets, 2]``; class indices ``[rows]``."""
Jacobians: TypeAlias = Float[Tensor, "batch outputs params"]
"""Derivatives of the outputs in the random weights, in output units per weight."""
Inputs: TypeAlias = Any
"""A tensor, or any nesting of tuples, lists and mappings of tensors: whatever the model takes."""
ModelKeyword: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor] | None
"""What a keyword for the model's ``forward`` holds. No option is a tensor, so that type checkers find misspelt ones."""

# What signatures say of an option: a member or its text. A text that is known at run time only is made a member first,
# ``HessianStructure(text)``: type checkers then know that there is such a name.
SubsetOfWeightsLike: TypeAlias = SubsetOfWeights | Literal["all", "last_layer", "subnetwork"]
"""What ``subset_of_weights=`` takes."""
HessianStructureLike: TypeAlias = (
    HessianStructure | Literal["full", "kron", "diag", "blockdiag", "ekfac", "lowrank", "gp"]
)
"""What ``hessian_structure=`` takes."""
FunctionalApproximationLike: TypeAlias = FunctionalApproximation | Literal["sod", "nystrom", "variational"]
"""What ``functional_approximation=`` takes."""
LinkApproxLike: TypeAlias = LinkApprox | Literal["probit", "mc", "mf1", "mf2", "bridge", "bridge_norm"]
"""What ``link_approx=`` takes."""
PredTypeLike: TypeAlias = PredType | Literal["glm", "nn", "gp"]
"""What ``pred_type=`` takes."""
ForeignScoreLike: TypeAlias = (
    ForeignScore | Literal["fisher", "density", "relative", "max_prob", "entropy", "mutual_information"]
)
"""What ``kind=`` of ``ood_score`` takes."""
PriorStructureLike: TypeAlias = PriorStructure | Literal["scalar", "layerwise", "diag"]
"""What ``prior_structure=`` takes."""
TuningMethodLike: TypeAlias = TuningMethod | Literal["marglik", "gridsearch", "loo", "elbo", "cv"]
"""What ``method=`` of ``optimize_prior_precision`` takes."""
FeatureReductionLike: TypeAlias = FeatureReduction | Literal["pick_first", "pick_last", "average"]
"""What ``feature_reduction=`` takes."""
KfacApproxLike: TypeAlias = KfacApprox | Literal["expand", "reduce"]
"""What ``kfac_approx`` of a back end takes."""

__all__ = [
    "FeatureReductionLike",
    "Features",
    "ForeignScoreLike",
    "FunctionalApproximationLike",
    "HessianStructureLike",
    "Inputs",
    "Jacobians",
    "KfacApproxLike",
    "LinkApproxLike",
    "ModelKeyword",
    "Outputs",
    "PredTypeLike",
    "PriorStructureLike",
    "Scalar",
    "SubsetOfWeightsLike",
    "Targets",
    "TuningMethodLike",
]
