"""Leave-one-out scores of hyperparameters, from the training data alone: no validation data, no refit.

What each datum added to the posterior is subtracted again in closed form (``tuning/removal.py``). A datum is a row of
the loader: all its positions are left out together, and each is scored by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.enums import CurvatureKind, PredType
from laplace.errors import UnsupportedError
from laplace.likelihoods import AbstractLikelihood, Positions
from laplace.predictive.base import Linearization
from laplace.predictive.linearization import NetworkLinearization
from laplace.predictive.pushforward import Options
from laplace.prior import GaussianPrior
from laplace.structures import AbstractCurvature, AbstractPrecision, DiagPrecision, FullPrecision
from laplace.structures.basis import Basis
from laplace.tuning.cached import CachedData
from laplace.tuning.grouped import Grouping
from laplace.tuning.head import HeadData, posteriors
from laplace.tuning.removal import Terms, from_dense, from_diagonal
from laplace.tuning.scores import Score
from laplace.types import Scalar


@dataclass(frozen=True)
class LeftOut(Linearization):
    """Outputs at training inputs as the posterior without the datum at hand has them, whatever precision is asked."""

    f: Tensor
    """Means, ``[batch, *positions, C]``."""
    moment: Float[Tensor, "rows outputs"] | Float[Tensor, "rows outputs outputs"]
    """Variances ``[rows, C]`` of independent outputs, or covariances ``[rows, C, C]``."""

    def variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs"]:  # noqa: ARG002
        """Diagonals."""
        moment = self.moment if self.moment.dim() == 2 else self.moment.diagonal(dim1=1, dim2=2)
        return moment.to(dtype)

    def covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs outputs"]:  # noqa: ARG002
        """As matrices."""
        return (torch.diag_embed(self.moment) if self.moment.dim() == 2 else self.moment).to(dtype)

    def joint_covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "joint joint"]:  # noqa: ARG002
        """There is none: every datum has a posterior of its own."""
        raise UnsupportedError(_NO_FUNCTIONS)

    def pair_variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "pairs one"]:
        """The variance of the first logit, Δ; the second is zero."""
        return self.variance(precision, dtype)[:, :1]

    def rotated(self, basis: Basis, dtype: torch.dtype) -> LeftOut:  # noqa: ARG002
        """The same: outputs have no coordinates."""
        return self

    def functions(
        self,
        precision: AbstractPrecision,  # noqa: ARG002
        n_samples: int,  # noqa: ARG002
        generator: torch.Generator | None,  # noqa: ARG002
        dtype: torch.dtype,  # noqa: ARG002
    ) -> Iterator[Float[Tensor, "samples rows outputs"]]:
        """There are none: every datum has a posterior of its own."""
        raise UnsupportedError(_NO_FUNCTIONS)


_NO_FUNCTIONS = (
    "Leave-one-out scores are made of a mean and a covariance for each datum; functions that are coherent over data do "
    'not exist. Use pred_type="glm" without joint=True (and link_approx="mc" to sample logits).'
)


def leave_one_out_score(
    data: CachedData,
    score: Score,
    precision: AbstractPrecision,
    likelihood: AbstractLikelihood,
    fresh_options: Callable[[], Options],
    dtype: torch.dtype,
    *,
    kind: CurvatureKind = CurvatureKind.GGN,
) -> Scalar:
    """Score a posterior by how it predicts each training datum without that datum.

    The covariance without a datum is exact for the structure where the curvature is the generalized Gauss–Newton matrix
    (or the empirical Fisher) at the data as collected. The mean is exact for a linear model with Gaussian likelihood
    and full structure at its optimum under this very prior, else one Newton step in the metric of the structure.

    The trained weights stay where they are. The stronger the prior, the less they move without a datum: the score tends
    to the training loss and rewards strong priors, whatever the data say. So compare noise, temperatures, structures or
    models by it; compare priors only by ``refitted_leave_one_out_scores``. Cost of a batch: full, that of its
    predictive covariances and O(B (T C)³); diagonal, O(B T C D) for a last layer and O(B (T C)² P) for a whole network.

    References
    ----------
    Rad & Maleki (2020), "A scalable estimate of the out-of-sample prediction error via approximate leave-one-out
    cross-validation". arXiv:1801.10243; Nickl, Xu, Tailor, Möllenhoff & Khan (2023), "The memory perturbation
    equation". arXiv:2310.19273

    Raises
    ------
    UnsupportedError
        If the structure is no sum over data, or predictions are to be sampled through weights.
    NotPositiveDefiniteError
        If the posterior without some datum is none.
    """
    if fresh_options().pred_type is not PredType.GLM:
        raise UnsupportedError(_NO_FUNCTIONS)
    without = leave_one_out(data, precision, likelihood, dtype, kind=kind)
    return without.scores(score, [precision], [likelihood], fresh_options, dtype)[0]


def refitted_leave_one_out_scores(
    data: HeadData,
    score: Score,
    priors: Sequence[GaussianPrior],
    likelihood: AbstractLikelihood,
    structure: type[AbstractCurvature],
    fresh_options: Callable[[], Options],
    *,
    initial: Float[Tensor, " params"] | None = None,
) -> Float[Tensor, " priors"]:
    """Score priors over a last layer, ``[priors]``: each by its own mode, from which every datum is left out.

    Scores are in the unit of ``score`` (by default nats per position); lower is better.

    The features are those of the trained network and have seen all data, as in ``cross_validation_scores``: the score
    is optimistic, the more the longer the network was trained.

    With the full structure and a Gaussian likelihood exactly cross-validation with a fold for each datum, else the
    first order of it. One prior costs a few Newton steps (``newton.mode``) and one ``leave_one_out_score``, whose
    references hold here, too.
    """
    scores = torch.empty(len(priors), dtype=torch.float64)
    for index, head, theta, precision in posteriors(data, priors, likelihood, structure, initial):
        at_mode = data.at(head.outputs(theta))
        value = leave_one_out_score(at_mode, score, precision, likelihood, fresh_options, data.phi.dtype)
        scores[index] = float(value)
    return scores


def leave_one_out(
    data: CachedData,
    precision: AbstractPrecision,
    likelihood: AbstractLikelihood,
    dtype: torch.dtype,
    *,
    kind: CurvatureKind = CurvatureKind.GGN,
) -> CachedData:
    """The same data, each datum as the posterior without it has its outputs."""
    if isinstance(precision, DiagPrecision):
        remove = partial(from_diagonal, precision=precision, dtype=dtype)
    elif isinstance(precision, FullPrecision):
        remove = partial(from_dense, precision=precision, dtype=dtype)
    else:
        msg = (
            'Leaving one datum out needs a posterior precision that is a sum over data: hessian_structure="full" or '
            f'"diag"; got {type(precision).__name__}. A Kronecker product of sums is no sum of what each datum added, '
            'so that none can be subtracted. Use method="marglik", validation data (method="gridsearch"), or refit '
            'with hessian_structure="diag".'
        )
        raise UnsupportedError(msg)
    return CachedData([_without(*batch, remove, likelihood, kind, dtype) for batch in data.batches])


def _without(
    get: Callable[[], Linearization],
    positions: Positions,
    remove: Callable[[Linearization, Terms], tuple[Tensor, Tensor]],
    likelihood: AbstractLikelihood,
    kind: CurvatureKind,
    dtype: torch.dtype,
) -> tuple[Callable[[], Linearization], Positions]:
    """How to get a batch without each of its data; rows of features are first put back to the data they are part of."""
    groups = Grouping.of(positions.datum) if positions.datum is not None and _of_features(get()) else None
    grouped = positions if groups is None else groups.positions(positions)

    def left_out() -> Linearization:
        inputs = get()
        if groups is not None and isinstance(inputs, NetworkLinearization):
            f, phi = groups.grid(positions.f), groups.grid(positions.select(inputs.head[0].phi))
            inputs = NetworkLinearization.of_head(f, phi, [block.shape for block in inputs.head])
        shift, moment = remove(inputs, Terms.of(inputs, grouped.to(dtype), likelihood, kind))
        return LeftOut(inputs.f.to(dtype) + shift.reshape(inputs.f.shape), moment)

    return left_out, grouped


def _of_features(inputs: Linearization) -> bool:
    """Whether rows of the batch may lie elsewhere than their data."""
    return isinstance(inputs, NetworkLinearization) and inputs.is_linear
