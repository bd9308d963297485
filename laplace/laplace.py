"""``Laplace()``: from option names to an estimator, through one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from laplace import checks, overloads
from laplace.baselaplace import (
    ELLA,
    LLELLA,
    BlockDiagLaplace,
    DiagLaplace,
    EKFACLaplace,
    FullLaplace,
    FunctionalLaplace,
    KronLaplace,
    LLVaLLA,
    LowRankLaplace,
    VaLLA,
)
from laplace.baselaplace.calling import with_types_of
from laplace.baselaplace.fitted import FittedLaplace
from laplace.enums import FunctionalApproximation, HessianStructure, SubsetOfWeights, choose
from laplace.errors import UnsupportedError
from laplace.likelihoods import LikelihoodLike
from laplace.lllaplace import (
    BlockDiagLLLaplace,
    DiagLLLaplace,
    EKFACLLLaplace,
    FullLLLaplace,
    FunctionalLLLaplace,
    KronLLLaplace,
    LowRankLLLaplace,
)
from laplace.several import SeveralHeads
from laplace.subnetlaplace import DiagSubnetLaplace, FullSubnetLaplace
from laplace.types import FunctionalApproximationLike, HessianStructureLike, SubsetOfWeightsLike

ESTIMATORS: dict[tuple[SubsetOfWeights, HessianStructure], type[FittedLaplace]] = {
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
    (SubsetOfWeights.SUBNETWORK, HessianStructure.FULL): FullSubnetLaplace,
    (SubsetOfWeights.SUBNETWORK, HessianStructure.DIAG): DiagSubnetLaplace,
}
"""Which class implements which combination."""

FUNCTIONAL: dict[tuple[SubsetOfWeights, FunctionalApproximation], type[FittedLaplace]] = {
    (SubsetOfWeights.ALL, FunctionalApproximation.SOD): FunctionalLaplace,
    (SubsetOfWeights.ALL, FunctionalApproximation.NYSTROM): ELLA,
    (SubsetOfWeights.ALL, FunctionalApproximation.VARIATIONAL): VaLLA,
    (SubsetOfWeights.LAST_LAYER, FunctionalApproximation.SOD): FunctionalLLLaplace,
    (SubsetOfWeights.LAST_LAYER, FunctionalApproximation.NYSTROM): LLELLA,
    (SubsetOfWeights.LAST_LAYER, FunctionalApproximation.VARIATIONAL): LLVaLLA,
}
"""The same for ``hessian_structure="gp"``, by how the posterior over functions is made affordable."""


@dataclass(frozen=True)
class _OfHead:
    """Constructs the estimator of a head, or of several heads."""

    subset: SubsetOfWeights
    structure: HessianStructure
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, model: nn.Module, likelihood: Any, **own: Any) -> Any:
        """With options of a head beside those that were given."""
        if clash := sorted({"output_key", "output_fn", "output_dim"} & self.kwargs.keys()):
            msg = f"{', '.join(clash)}: the outputs of several heads are found by the keys of likelihood=."
            raise UnsupportedError(msg)
        if self.args or "sigma_noise" in self.kwargs:
            msg = (
                "The noise of a head is that of its likelihood, {'price': GaussianLikelihood(sigma_noise=0.3)}, or, of "
                "last layers, la['price'].sigma_noise. Pass other options by name."
            )
            raise UnsupportedError(msg)
        make: Callable[..., Any] = Laplace
        return make(model, likelihood, self.subset, self.structure, **self.kwargs, **own)


@with_types_of(overloads.Laplace)
def Laplace(
    model: nn.Module,
    likelihood: LikelihoodLike | Mapping[Any, LikelihoodLike],
    subset_of_weights: SubsetOfWeightsLike = SubsetOfWeights.LAST_LAYER,
    hessian_structure: HessianStructureLike = HessianStructure.KRON,
    *args: Any,
    functional_approximation: FunctionalApproximationLike = FunctionalApproximation.SOD,
    **kwargs: Any,
) -> FittedLaplace | SeveralHeads:
    """Construct the estimator for a choice of weights and structure.

    Parameters
    ----------
    model
        The trained network.
    likelihood
        ``"classification"``, ``"regression"``, ``"reward_modeling"``, ``"binary"``, ``"multilabel"``, ``"poisson"``,
        ``"negative_binomial"`` or ``"heteroscedastic_regression"``, or an object.
    subset_of_weights
        Which weights are random: those of the ``"last_layer"`` (one forward pass per batch), ``"all"`` that require a
        gradient (and a backward pass for each output of a datum), or a ``"subnetwork"`` (with ``subnetwork_indices=``).
    hessian_structure
        How their curvature is stored: ``"full"``, ``"kron"``, ``"diag"``, ``"blockdiag"``, ``"ekfac"`` or
        ``"lowrank"`` (a subnetwork has ``"full"`` and ``"diag"``); ``"gp"``: not at all, the posterior is one over
        functions.
    *args, **kwargs
        Further arguments of the estimator, which describes them. Of all: ``sigma_noise``, ``prior_precision``,
        ``prior_mean``, ``temperature``, ``enable_backprop``, ``dict_key_x``, ``dict_key_y``, ``backend``,
        ``backend_kwargs``, ``curvature_dtype``, ``output_key``, ``output_fn``, ``output_dim``, ``shift_labels``
        (``BaseLaplace``). Of posteriors over weights: ``asdl_fisher_kwargs``. Of a last layer: ``last_layer_name``,
        ``feature_reduction`` (``LLLaplace``). Of a subnetwork: ``subnetwork_indices`` (``SubnetLaplace``). Of
        ``"kron"``: ``damping``. Of ``"lowrank"``: ``rank``, ``captured_trace``. Of ``"gp"``: ``n_subset``,
        ``independent_outputs``, ``diagonal_hessian``, ``seed`` (``FunctionalLaplace``); ``subsample_size``,
        ``n_eigenvalues``, ``seed`` (``ELLA``); ``inducing_locations``, ``num_inducing``, ``inducing_classes``,
        ``alpha``, ``mc_softmax_samples``, ``seed`` (``VaLLA``). Type checkers know them by name.
    functional_approximation
        With ``hessian_structure="gp"``: what the posterior is made of, a subset of the data (``"sod"``, which needs
        ``n_subset=``), Nyström features (``"nystrom"``: ``ELLA``) or inducing points (``"variational"``: ``VaLLA``).
        With other structures any but the default raises.

    Returns
    -------
    An estimator that is not fitted yet.

    Raises
    ------
    UnsupportedError
        If the combination does not exist; the message lists those that do.
    UnknownOptionError
        If the estimator has no such argument; the message lists those it has and the nearest. It is a ``TypeError``.
    """
    subset = choose(SubsetOfWeights, subset_of_weights, "subset_of_weights")
    structure = choose(HessianStructure, hessian_structure, "hessian_structure")
    approximation = choose(FunctionalApproximation, functional_approximation, "functional_approximation")
    functional = structure is HessianStructure.GP
    if approximation is not FunctionalApproximation.SOD and not functional:
        msg = f'functional_approximation={approximation.value!r} needs hessian_structure="gp".'
        raise UnsupportedError(msg)
    cls = FUNCTIONAL.get((subset, approximation)) if functional else ESTIMATORS.get((subset, structure))
    if cls is None:
        known = ", ".join(f"({s.value!r}, {h.value!r})" for s, h in ESTIMATORS)
        processes = ", ".join(f"({s.value!r}, {a.value!r})" for s, a in FUNCTIONAL)
        msg = (
            f"There is no estimator for subset_of_weights={subset.value!r} with hessian_structure={structure.value!r}"
            + (f" and functional_approximation={approximation.value!r}" if functional else "")
            + f"; available combinations: {known}; with hessian_structure='gp', of subset_of_weights and "
            f"functional_approximation: {processes}."
        )
        raise UnsupportedError(msg)
    if isinstance(likelihood, Mapping):
        fixed = {"functional_approximation": approximation} if functional else {}
        make = _OfHead(subset, structure, args, {**fixed, **kwargs})
        is_joint = subset is not SubsetOfWeights.LAST_LAYER
        return SeveralHeads(model, likelihood, make, is_joint=is_joint, dict_key_y=kwargs.get("dict_key_y", "labels"))
    options = [name for name in checks.options_of(cls) if name != "model"]
    checks.known_options(cls.__name__, kwargs, options)
    return cls(model, likelihood, *args, **kwargs)
