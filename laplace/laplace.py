"""``Laplace()``: from option names to an estimator, through one table."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from torch import nn

from laplace.baselaplace import (
    BlockDiagLaplace,
    DiagLaplace,
    EKFACLaplace,
    FullLaplace,
    KronLaplace,
    LowRankLaplace,
    ParametricLaplace,
)
from laplace.enums import FunctionalApproximation, HessianStructure, Likelihood, SubsetOfWeights, choose
from laplace.errors import UnsupportedError
from laplace.lllaplace import (
    BlockDiagLLLaplace,
    DiagLLLaplace,
    EKFACLLLaplace,
    FullLLLaplace,
    KronLLLaplace,
    LowRankLLLaplace,
)

ESTIMATORS: dict[tuple[SubsetOfWeights, HessianStructure], type[ParametricLaplace]] = {
    (SubsetOfWeights.ALL, HessianStructure.FULL): FullLaplace,
    (SubsetOfWeights.ALL, HessianStructure.KRON): KronLaplace,
    (SubsetOfWeights.ALL, HessianStructure.DIAG): DiagLaplace,
    (SubsetOfWeights.ALL, HessianStructure.BLOCKDIAG): BlockDiagLaplace,
    (SubsetOfWeights.ALL, HessianStructure.EKFAC): EKFACLaplace,
    (SubsetOfWeights.ALL, HessianStructure.LOWRANK): LowRankLaplace,
    (SubsetOfWeights.LAST_LAYER, HessianStructure.FULL): FullLLLaplace,
    (SubsetOfWeights.LAST_LAYER, HessianStructure.KRON): KronLLLaplace,
    (SubsetOfWeights.LAST_LAYER, HessianStructure.DIAG): DiagLLLaplace,
    (SubsetOfWeights.LAST_LAYER, HessianStructure.BLOCKDIAG): BlockDiagLLLaplace,
    (SubsetOfWeights.LAST_LAYER, HessianStructure.EKFAC): EKFACLLLaplace,
    (SubsetOfWeights.LAST_LAYER, HessianStructure.LOWRANK): LowRankLLLaplace,
}
"""Which class implements which combination."""


def Laplace(
    model: nn.Module,
    likelihood: Likelihood | str,
    subset_of_weights: SubsetOfWeights | str = SubsetOfWeights.LAST_LAYER,
    hessian_structure: HessianStructure | str = HessianStructure.KRON,
    *args: Any,
    functional_approximation: FunctionalApproximation | str = FunctionalApproximation.SOD,
    **kwargs: Any,
) -> ParametricLaplace:
    """Construct the estimator for a choice of weights and structure.

    Parameters
    ----------
    model
        The trained network.
    likelihood
        ``"classification"``, ``"regression"`` or ``"reward_modeling"``.
    subset_of_weights
        Which weights are random: those of the ``"last_layer"`` (a forward pass a batch), or ``"all"`` that require a
        gradient (and a backward pass for each output of a datum).
    hessian_structure
        How their curvature is stored: ``"full"``, ``"kron"``, ``"diag"``, ``"blockdiag"``, ``"ekfac"`` or
        ``"lowrank"``.
    *args, **kwargs
        Further arguments of the estimator, see ``LLLaplace`` and ``BaseLaplace``.
    functional_approximation
        Of function-space estimators; any but the default raises with other structures.

    Returns
    -------
    An estimator that is not fitted yet.

    Raises
    ------
    UnsupportedError
        If the combination does not exist; the message lists those that do.
    TypeError
        If the estimator has no such argument; the message lists those it has.
    """
    subset = choose(SubsetOfWeights, subset_of_weights, "subset_of_weights")
    structure = choose(HessianStructure, hessian_structure, "hessian_structure")
    approximation = choose(FunctionalApproximation, functional_approximation, "functional_approximation")
    if approximation is not FunctionalApproximation.SOD and structure is not HessianStructure.GP:
        msg = f'functional_approximation={approximation.value!r} needs hessian_structure="gp".'
        raise UnsupportedError(msg)
    if (subset, structure) not in ESTIMATORS:
        known = ", ".join(f"({s.value!r}, {h.value!r})" for s, h in ESTIMATORS)
        msg = (
            f"There is no estimator for subset_of_weights={subset.value!r} with "
            f"hessian_structure={structure.value!r}; available combinations: {known}."
        )
        raise UnsupportedError(msg)
    cls = ESTIMATORS[subset, structure]
    options = [name for name in inspect.signature(cls).parameters if name != "model"]
    for key in kwargs:
        if key not in options:
            near = difflib.get_close_matches(key, options, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            msg = f"{cls.__name__} has no option {key!r}; its options are {', '.join(options)}.{hint}"
            raise TypeError(msg)
    return cls(model, likelihood, *args, **kwargs)
