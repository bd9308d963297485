"""From weights to predictions (``pred_type=``, ``joint=``, ``diagonal_output=``, ``n_samples=``).

``predict`` and ``functional_samples`` combine a ``Linearization`` (``predictive/linearization.py``), which is
everything about some inputs that does not depend on the posterior, with a posterior precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import free_memory
from laplace.enums import LinkApprox, PredType
from laplace.likelihoods import AbstractLikelihood, Ask, Link
from laplace.likelihoods.draws import draw
from laplace.predictive.linearization import Linearization
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
    """Predict at linearized inputs: probabilities ``[batch, *positions, C]``, or mean and (co)variance."""
    likelihood = likelihood.for_targets() if options.fitting else likelihood
    if asked(likelihood, options) is Ask.JOINT:
        _require(inputs.f.numel() ** 2, inputs, dtype, "The covariance of all outputs of all rows")
        mean, cov = likelihood.predict_joint(inputs.mean(dtype), inputs.joint_covariance(precision, dtype))
        return mean.to(inputs.f.dtype), cov.to(inputs.f.dtype)
    mean, cov, link = moments(inputs, precision, likelihood, options, dtype)
    result = likelihood.predict(mean, cov, link)
    if isinstance(result, Tensor):
        return inputs.restore(result)
    return inputs.restore(result[0]), inputs.restore(result[1])


def asked(likelihood: AbstractLikelihood, options: Options) -> Ask:
    """What a prediction is made of."""
    return likelihood.asks(
        options.pred_type, options.link, joint=options.joint, diagonal_output=options.diagonal_output
    )


def moments(
    inputs: Linearization,
    precision: AbstractPrecision,
    likelihood: AbstractLikelihood,
    options: Options,
    dtype: torch.dtype,
) -> Moments:
    """Mean and (co)variance of the outputs, whichever the link needs and no more, and the link to apply to them."""
    (only,) = moments_of_each(inputs, [precision], [likelihood], lambda: options, dtype)
    return only


def moments_of_each(
    inputs: Linearization,
    precisions: Sequence[AbstractPrecision],
    likelihoods: Sequence[AbstractLikelihood],
    fresh_options: Callable[[], Options],
    dtype: torch.dtype,
) -> Iterator[Moments]:
    """Moments under several posteriors, sharing what they can: mean ``[rows, C]``, (co)variance and link for each."""
    options = fresh_options()
    if options.fitting:
        likelihoods = [likelihood.for_targets() for likelihood in likelihoods]
    ask = asked(likelihoods[0], options)
    if ask is Ask.VARIANCE:
        mean = inputs.mean(dtype)
        for variance, likelihood in zip(inputs.variances(precisions, dtype), likelihoods, strict=True):
            yield mean, variance, _link(likelihood, fresh_options())
        return
    for precision, likelihood in zip(precisions, likelihoods, strict=True):
        options = fresh_options()
        if ask is Ask.FUNCTIONS:
            functions = _functions(inputs, precision, options, dtype)
            yield likelihood.average(functions, options.n_samples, inputs.mean(dtype))
        else:
            _require(inputs.f.numel() * inputs.n_outputs, inputs, dtype, "The covariances of the outputs of each row")
            yield inputs.mean(dtype), inputs.covariance(precision, dtype), _link(likelihood, options)


def _require(numbers: Any, inputs: Linearization, dtype: torch.dtype, what: str) -> None:
    """Raise if there is no room for a matrix and its root; in a graph their size is a symbol."""
    if not torch.compiler.is_compiling():
        free_memory.require(2 * numbers * dtype.itemsize, inputs.f.device, what, free_memory.FOR_PREDICTIONS)


def _link(likelihood: AbstractLikelihood, options: Options) -> Link:
    """The link of these options."""
    return likelihood.link(options.link, options.n_samples, options.generator)


def functional_samples(
    inputs: Linearization, precision: AbstractPrecision, options: Options, dtype: torch.dtype
) -> Float[Tensor, "samples batch ..."]:
    """Samples of the outputs, ``[samples, batch, *positions, C]``.

    Functions drawn through the weights, coherent over inputs; with ``diagonal_output`` each output from its own
    marginal, in function space.
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


def output_moments(
    inputs: Linearization, precision: AbstractPrecision, dtype: torch.dtype, joint: bool, diagonal: bool
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of outputs before any link, in the precision of the outputs."""
    if joint:
        return inputs.f.flatten(), inputs.joint_covariance(precision, dtype).to(inputs.f.dtype)
    spread = inputs.variance(precision, dtype) if diagonal else inputs.covariance(precision, dtype)
    return inputs.f, inputs.restore(spread)


def samples_of_moments(mean: Tensor, cov: Tensor, options: Options, diagonal: bool) -> Tensor:
    """Samples of outputs with a mean and a covariance."""
    n = mean.shape[-1]
    if cov.dim() > mean.dim():
        cov = cov.diagonal(dim1=-2, dim2=-1) if diagonal else cov
    flat = cov.reshape(-1, n) if cov.shape == mean.shape else cov.reshape(-1, n, n)
    parts = draw(mean.reshape(-1, n), flat, options.n_samples, options.generator)
    return torch.cat([part.reshape(-1, *mean.shape) for part in parts])
