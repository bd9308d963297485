"""From weights to predictions (``pred_type=``, ``joint=``, ``diagonal_output=``, ``n_samples=``).

``predict`` and ``functional_samples`` combine a ``Linearization`` (``predictive/linearization.py``), which is
everything about some inputs that does not depend on the posterior, with a posterior precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.enums import LinkApprox, PredType
from laplace.errors import InputError
from laplace.likelihoods import AbstractLikelihood
from laplace.likelihoods.base import Link
from laplace.predictive.gaussian import draw
from laplace.predictive.linearization import Linearization
from laplace.predictive.links import LINKS, VARIANCE_LINKS, average_softmax, mc
from laplace.structures import AbstractPrecision

Moments = tuple[Tensor, Tensor, Link]
"""Mean and (co)variance of outputs, and the link to apply to them."""


@dataclass(frozen=True)
class Options:
    """How to predict, checked: see ``BaseLaplace.__call__``."""

    pred_type: PredType = PredType.GLM
    link: LinkApprox = LinkApprox.PROBIT
    joint: bool = False
    n_samples: int = 100
    diagonal_output: bool = False
    generator: torch.Generator | None = None
    fitting: bool = False


def predict(
    inputs: Linearization,
    precision: AbstractPrecision,
    likelihood: AbstractLikelihood,
    options: Options,
    dtype: torch.dtype,
) -> Tensor | tuple[Tensor, Tensor]:
    """Predict at linearized inputs.

    Parameters
    ----------
    inputs
        Where to predict; with ``fitting``, as ``pairs.compare`` returns them.
    precision
        Posterior precision of the weights.
    likelihood
        What the outputs mean.
    options
        How to predict.
    dtype
        To compute in.

    Returns
    -------
    Class probabilities ``[batch, *positions, C]``, those of pairs ``[batch, 2]``; for regression and scores mean and
    covariance ``[…, C, C]`` (variance ``[…, C]`` with ``diagonal_output`` or ``pred_type="nn"``; ``[rows·C]`` and
    ``[rows·C, rows·C]`` with ``joint``), in units of the targets, without observation noise.
    """
    if options.joint and not (likelihood.has_link or options.fitting):
        return inputs.f.flatten(), inputs.joint_covariance(precision, dtype).to(inputs.f.dtype)
    mean, cov, link = moments(inputs, precision, likelihood, options, dtype)
    result = likelihood.predict(mean, cov, link)
    if isinstance(result, Tensor):
        return inputs.restore(result)
    return inputs.restore(result[0]), inputs.restore(result[1])


def moments(
    inputs: Linearization,
    precision: AbstractPrecision,
    likelihood: AbstractLikelihood,
    options: Options,
    dtype: torch.dtype,
) -> Moments:
    """Mean and (co)variance of the outputs, whichever the link needs and no more, and the link to apply to them.

    Parameters
    ----------
    inputs, precision, likelihood, options, dtype
        As in ``predict``.
    """
    (only,) = moments_of_each(inputs, [precision], [likelihood], lambda: options, dtype)
    return only


def moments_of_each(
    inputs: Linearization,
    precisions: Sequence[AbstractPrecision],
    likelihoods: Sequence[AbstractLikelihood],
    fresh_options: Callable[[], Options],
    dtype: torch.dtype,
) -> Iterator[Moments]:
    """The same under several posteriors of the same inputs, sharing what they can share.

    Parameters
    ----------
    inputs
        Where to predict.
    precisions, likelihoods
        One each a posterior.
    fresh_options
        How to predict, asked again for each posterior, so that samples can be the same.
    dtype
        To compute in.

    Yields
    ------
    Mean ``[rows, C]``, variance ``[rows, C]`` or covariance ``[rows, C, C]``, and a link. Where functions are sampled
    and averaged after the link, the mean is their log probabilities already and the link leaves it alone.
    """
    options, first = fresh_options(), likelihoods[0]
    has_link = first.has_link or options.fitting
    variance_is_enough = options.diagonal_output or (has_link and (options.fitting or options.link in VARIANCE_LINKS))
    sampled = options.pred_type is PredType.NN or (has_link and options.joint)
    if variance_is_enough and not sampled:
        mean = inputs.mean(dtype)
        for variance, likelihood in zip(inputs.variances(precisions, dtype), likelihoods, strict=True):
            yield mean, variance, link_function(fresh_options(), likelihood)
        return
    for precision, likelihood in zip(precisions, likelihoods, strict=True):
        options = fresh_options()
        if not sampled:
            yield inputs.mean(dtype), inputs.covariance(precision, dtype), link_function(options, likelihood)
        elif has_link:
            functions = (f / likelihood.output_temperature for f in _functions(inputs, precision, options, dtype))
            log_probabilities = average_softmax(functions, options.n_samples)
            yield log_probabilities, torch.zeros_like(log_probabilities), _already_applied
        else:
            yield *_sample_moments(inputs, precision, options, dtype), link_function(options, likelihood)


def _already_applied(mean: Tensor, _cov: Tensor) -> Tensor:
    """The link of means that are log probabilities."""
    return mean


def link_function(options: Options, likelihood: AbstractLikelihood) -> Link:
    """The link of these options, applied to logits divided by the output temperature."""
    link = LINKS[options.link]
    if options.link is LinkApprox.MC:
        link = partial(mc, n_samples=options.n_samples, generator=options.generator)
    T = likelihood.output_temperature
    if not isinstance(T, Tensor) and T == 1:
        return link
    return lambda mean, cov: link(mean / T, cov / T**2)


def functional_samples(
    inputs: Linearization, precision: AbstractPrecision, options: Options, dtype: torch.dtype
) -> Float[Tensor, "samples batch ..."]:
    """Samples of the outputs, ``[samples, batch, *positions, C]``.

    Functions drawn through the weights, coherent over inputs; with ``diagonal_output`` each output from its own
    marginal, in function space.

    Parameters
    ----------
    inputs, precision, dtype
        As in ``predict``.
    options
        Which distribution, how many, and the source of randomness.
    """
    if options.diagonal_output:
        parts = draw(inputs.mean(dtype), inputs.variance(precision, dtype), options.n_samples, options.generator)
    else:
        parts = _functions(inputs, precision, options, dtype)
    return torch.cat([inputs.restore(part, 1) for part in parts])


def _functions(
    inputs: Linearization, precision: AbstractPrecision, options: Options, dtype: torch.dtype
) -> Iterator[Float[Tensor, "samples rows outputs"]]:
    """Whole functions, of the linearized network or of the network itself."""
    draw_functions = inputs.network_functions if options.pred_type is PredType.NN else inputs.functions
    return draw_functions(precision, options.n_samples, options.generator, dtype)


def _sample_moments(
    inputs: Linearization, precision: AbstractPrecision, options: Options, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[rows, C]`` over functions drawn from the posterior, without keeping all of them."""
    if options.n_samples < 2:
        msg = f"A variance over samples needs n_samples of at least 2; got {options.n_samples}."
        raise InputError(msg)
    center = inputs.mean(dtype)
    total, squares = torch.zeros_like(center), torch.zeros_like(center)
    for f in _functions(inputs, precision, options, dtype):
        deviation = f - center
        total, squares = total + deviation.sum(0), squares + deviation.square().sum(0)
    shift = total / options.n_samples
    return center + shift, (squares - options.n_samples * shift.square()) / (options.n_samples - 1)


def output_moments(
    inputs: Linearization, precision: AbstractPrecision, dtype: torch.dtype, joint: bool, diagonal: bool
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of outputs before any link, in the precision of the outputs.

    Parameters
    ----------
    inputs
        Where.
    precision
        Posterior precision of the weights.
    dtype
        To compute in.
    joint
        ``[rows·C]`` and ``[rows·C, rows·C]``, across inputs.
    diagonal
        Variances instead of covariances.

    Returns
    -------
    ``[batch, *positions, C]``, and ``[…, C, C]`` or ``[…, C]``.
    """
    if joint:
        return inputs.f.flatten(), inputs.joint_covariance(precision, dtype).to(inputs.f.dtype)
    spread = inputs.variance(precision, dtype) if diagonal else inputs.covariance(precision, dtype)
    return inputs.f, inputs.restore(spread)


def samples_of_moments(mean: Tensor, cov: Tensor, options: Options, diagonal: bool) -> Tensor:
    """Samples of outputs with a mean and a covariance.

    Parameters
    ----------
    mean
        ``[batch, *positions, C]``, or ``[n]`` of a joint distribution.
    cov
        Covariance, with one more axis, or variance.
    options
        How many, and the generator.
    diagonal
        Use the diagonal of the covariance alone.

    Returns
    -------
    ``[samples, …]``, each in the shape of the mean.
    """
    n = mean.shape[-1]
    if cov.dim() > mean.dim():
        cov = cov.diagonal(dim1=-2, dim2=-1) if diagonal else cov
    flat = cov.reshape(-1, n) if cov.shape == mean.shape else cov.reshape(-1, n, n)
    parts = draw(mean.reshape(-1, n), flat, options.n_samples, options.generator)
    return torch.cat([part.reshape(-1, *mean.shape) for part in parts])
