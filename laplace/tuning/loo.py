"""Leave-one-out scores of hyperparameters, from the training data alone: no validation data, no refit.

What each datum added to the posterior is subtracted again in closed form (``tuning/removal.py``). A datum is a row of
the loader: all its positions are left out together, and each is scored by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.enums import CurvatureKind, PredType
from laplace.errors import UnsupportedError
from laplace.likelihoods import AbstractLikelihood, Positions
from laplace.predictive.linearization import Linearization
from laplace.predictive.pushforward import Options
from laplace.prior import GaussianPrior
from laplace.structures import AbstractCurvature, AbstractPrecision, DiagPrecision, FullPrecision
from laplace.tuning.gridsearch import Loss, Validation
from laplace.tuning.head import HeadData, posteriors, same
from laplace.tuning.removal import Terms, from_dense, from_diagonal


@dataclass(frozen=True)
class LeftOut(Linearization):
    """Outputs at training inputs as the posterior without the datum at hand has them, whatever precision is asked.

    Attributes
    ----------
    f
        Means, ``[batch, *positions, C]``.
    moment
        Variances ``[rows, C]`` of independent outputs, or covariances ``[rows, C, C]``.
    """

    f: Tensor
    moment: Float[Tensor, "rows outputs"] | Float[Tensor, "rows outputs outputs"]

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
    data: Validation,
    precision: AbstractPrecision,
    likelihood: AbstractLikelihood,
    options: Options,
    loss: Loss | None,
    dtype: torch.dtype,
    *,
    kind: CurvatureKind = CurvatureKind.GGN,
) -> float:
    """Score a posterior by how it predicts each training datum without that datum.

    Parameters
    ----------
    data
        The data that the posterior was fitted to, collected: all of them, each once.
    precision
        Posterior precision, ``"full"`` or ``"diag"``.
    likelihood
        The same that scaled the precision: with its noise and temperature.
    options
        How to predict, with ``pred_type="glm"``.
    loss
        As in ``Validation.score``; ``None`` for the mean negative log predictive density.
    dtype
        To compute in.
    kind
        Which curvature the precision holds.

    Returns
    -------
    By default nats a position, to minimize.

    Raises
    ------
    UnsupportedError
        If the structure is no sum over data, or predictions are to be sampled through weights.
    NotPositiveDefiniteError
        If the posterior without some datum is none.

    Notes
    -----
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
    """
    if options.pred_type is not PredType.GLM:
        raise UnsupportedError(_NO_FUNCTIONS)
    without = leave_one_out(data, precision, likelihood, dtype, kind=kind)
    return without.score(precision, likelihood, options, loss, dtype)


def refitted_leave_one_out_scores(
    data: HeadData,
    priors: Sequence[GaussianPrior],
    likelihood: AbstractLikelihood,
    structure: type[AbstractCurvature],
    options: Options,
    loss: Loss | None = None,
    *,
    generator: torch.Generator | None = None,
    initial: Float[Tensor, " params"] | None = None,
) -> Float[Tensor, " priors"]:
    """Score priors over a last layer: each by its own mode, from which every datum is left out in closed form.

    The features are those of the trained network and have seen all data, as in ``cross_validation_scores``: the score
    is optimistic, the more the longer the network was trained.

    Parameters
    ----------
    data
        Features and targets of the training data.
    priors
        The grid, over the weights of the head.
    likelihood
        With its noise and temperature.
    structure
        Of the curvature, ``"full"`` or ``"diag"``.
    options
        How to predict, with ``pred_type="glm"``. Its generator is not used.
    loss
        As in ``Validation.score``; ``None`` for the mean negative log predictive density.
    generator
        Source of sampled predictions; each prior meets the same random numbers. A generator with seed 0 when ``None``:
        the global one is left alone.
    initial
        Weights of the head to start from, ``[P]``; the prior mean when ``None``. They change the time, not the result.

    Returns
    -------
    ``[priors]``, float64, to minimize; by default nats a position.

    Raises
    ------
    UnsupportedError
        If the structure is no sum over data, predictions are to be sampled through weights, or targets compare inputs.
    ShapeError
        If the priors are not over the weights of a head with these features.
    NotPositiveDefiniteError
        If the posterior without some datum is none.

    Warns
    -----
    NumericalWarning
        If weights did not reach their optimum.

    Notes
    -----
    With the full structure and a Gaussian likelihood exactly cross-validation with a fold for each datum, else the
    first order of it. One prior costs a few Newton steps (``newton.mode``) and one ``leave_one_out_score``.

    References
    ----------
    As in ``leave_one_out_score``.
    """
    scores = torch.empty(len(priors), dtype=torch.float64)
    source = torch.Generator().manual_seed(0) if generator is None else generator
    seed = int(torch.randint(2**62, (), generator=source, device=source.device))
    for index, head, theta, precision in posteriors(data, priors, likelihood, structure, initial):
        inputs, positions = data.by_datum(head.outputs(theta))
        at_mode = Validation([(partial(same, inputs), positions)])
        drawn = replace(options, generator=torch.Generator(data.phi.device).manual_seed(seed))
        scores[index] = leave_one_out_score(at_mode, precision, likelihood, drawn, loss, data.phi.dtype)
    return scores


def leave_one_out(
    data: Validation,
    precision: AbstractPrecision,
    likelihood: AbstractLikelihood,
    dtype: torch.dtype,
    *,
    kind: CurvatureKind = CurvatureKind.GGN,
) -> Validation:
    """The same data, each datum as the posterior without it has its outputs.

    Parameters
    ----------
    data, precision, likelihood, dtype, kind
        As in ``leave_one_out_score``.

    Returns
    -------
    Batches of ``LeftOut``, computed when they are asked for.

    Raises
    ------
    UnsupportedError
        If the structure is no sum over data.
    """
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

    def left_out(get: Callable[[], Linearization], positions: Positions) -> Linearization:
        inputs = get()
        terms = Terms.of(inputs, positions.to(dtype), likelihood, kind)
        shift, moment = remove(inputs, terms)
        return LeftOut(inputs.f.to(dtype) + shift.reshape(inputs.f.shape), moment)

    return replace(data, batches=[(partial(left_out, get, positions), positions) for get, positions in data.batches])
