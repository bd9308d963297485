"""From weights to predictions (``pred_type=``, ``joint=``, ``diagonal_output=``, ``n_samples=``).

A ``Linearization`` is everything about some inputs that does not depend on the posterior: computed once, it serves any
prior, noise or temperature. ``predict`` and ``functional_samples`` combine it with a posterior precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.enums import LinkApprox, PredType
from laplace.errors import InputError
from laplace.likelihoods import AbstractLikelihood
from laplace.likelihoods.base import Link
from laplace.network.parameters import head_views
from laplace.predictive.gaussian import chunks, draw
from laplace.predictive.links import LINKS, VARIANCE_LINKS, average_softmax, mc
from laplace.structures import AbstractPrecision


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


@dataclass(frozen=True)
class Linearization:
    """Outputs at some inputs and the features of their last layer: ``f(θ) = f + φ (W − W*)ᵀ + (b − b*)``, exactly.

    Attributes
    ----------
    f
        Outputs, ``[batch, *positions, C]``.
    phi
        Features, ``[batch, *positions, D]``.
    bias
        Whether the layer has a bias.
    """

    f: Tensor
    phi: Tensor
    bias: bool

    @property
    def n_outputs(self) -> int:
        """C."""
        return self.f.shape[-1]

    def mean(self, dtype: torch.dtype) -> Float[Tensor, "rows outputs"]:
        """Outputs, flattened to rows."""
        return self.f.reshape(-1, self.n_outputs).to(dtype)

    def _rows(self, dtype: torch.dtype) -> Float[Tensor, "rows features"]:
        return self.phi.reshape(-1, self.phi.shape[-1]).to(dtype)

    def variance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs"]:
        """Variances of the outputs.

        Parameters
        ----------
        precision
            Posterior precision of the weights.
        dtype
            To compute in.

        Returns
        -------
        ``[rows, C]``, output units squared, without observation noise.
        """
        return precision.feature_variance(self._rows(dtype), self.n_outputs, self.bias, diagonal=True)

    def covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "rows outputs outputs"]:
        """Covariances of the outputs of each row.

        Parameters
        ----------
        precision
            Posterior precision of the weights.
        dtype
            To compute in.

        Returns
        -------
        ``[rows, C, C]``, output units squared, without observation noise.
        """
        return precision.feature_variance(self._rows(dtype), self.n_outputs, self.bias)

    def joint_covariance(self, precision: AbstractPrecision, dtype: torch.dtype) -> Float[Tensor, "joint joint"]:
        """Covariance of all outputs of all rows.

        Parameters
        ----------
        precision
            Posterior precision of the weights.
        dtype
            To compute in.

        Returns
        -------
        ``[rows·C, rows·C]``, row by row; output units squared, without observation noise.
        """
        return precision.feature_covariance(self._rows(dtype), self.n_outputs, self.bias)

    def functions(
        self, precision: AbstractPrecision, n_samples: int, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Iterator[Float[Tensor, "samples rows outputs"]]:
        """Draw whole functions, coherent over the rows of the call, in chunks of samples.

        Parameters
        ----------
        precision
            Posterior precision of the weights.
        n_samples
            How many.
        generator
            Source of randomness.
        dtype
            To compute in.

        Yields
        ------
        ``[samples, rows, C]``, ``n_samples`` in all.
        """
        phi, mean = self._rows(dtype), self.mean(dtype)
        for size in chunks(n_samples, max(precision.n_params, mean.numel())):
            weight, offset = head_views(precision.sample(size, generator), self.n_outputs, phi.shape[-1], self.bias)
            f = mean + torch.einsum("nd,scd->snc", phi, weight)
            yield f if offset is None else f + offset.unsqueeze(1)

    def pair_jacobians(self, dtype: torch.dtype) -> Float[Tensor, "pairs one params"]:
        """Derivatives of the differences f₀ − f₁ of each pair in the weights, for outputs ``[pairs, 2, 1]``.

        Parameters
        ----------
        dtype
            To compute in.

        Returns
        -------
        ``[pairs, 1, P]``: the difference of the features, and 0 for the bias.
        """
        first, second = self.phi.to(dtype).unbind(1)
        return torch.nn.functional.pad(first - second, (0, int(self.bias))).unsqueeze(1)

    def restore(self, rows: Tensor, n_leading: int = 0) -> Tensor:
        """From rows back to ``[batch, *positions]``, in the dtype of the outputs."""
        lead = rows.shape[:n_leading]
        return rows.reshape(*lead, *self.f.shape[:-1], *rows.shape[n_leading + 1 :]).to(self.f.dtype)


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
) -> tuple[Tensor, Tensor, Link]:
    """Mean and (co)variance of the outputs, whichever the link needs and no more, and the link to apply to them.

    Parameters
    ----------
    inputs, precision, likelihood, options, dtype
        As in ``predict``.

    Returns
    -------
    Mean ``[rows, C]``, variance ``[rows, C]`` or covariance ``[rows, C, C]``, and a link. Where functions are sampled
    and averaged after the link, the mean is their log probabilities already and the link leaves it alone.
    """
    has_link = likelihood.has_link or options.fitting
    if has_link and (options.joint or options.pred_type is PredType.NN):
        functions = inputs.functions(precision, options.n_samples, options.generator, dtype)
        log_probabilities = average_softmax(functions, options.n_samples)
        return log_probabilities, torch.zeros_like(log_probabilities), lambda mean, _cov: mean
    if options.pred_type is PredType.NN:
        return *_sample_moments(inputs, precision, options, dtype), link_function(options)
    variance_is_enough = has_link and (options.fitting or options.link in VARIANCE_LINKS)
    if options.diagonal_output or variance_is_enough:
        return inputs.mean(dtype), inputs.variance(precision, dtype), link_function(options)
    return inputs.mean(dtype), inputs.covariance(precision, dtype), link_function(options)


def link_function(options: Options) -> Link:
    """The link of these options, as a function of mean and (co)variance."""
    if options.link is LinkApprox.MC:
        return partial(mc, n_samples=options.n_samples, generator=options.generator)
    return LINKS[options.link]


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
        parts = inputs.functions(precision, options.n_samples, options.generator, dtype)
    return torch.cat([inputs.restore(part, 1) for part in parts])


def _sample_moments(
    inputs: Linearization, precision: AbstractPrecision, options: Options, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[rows, C]`` over functions drawn from the posterior, without keeping all of them."""
    if options.n_samples < 2:
        msg = f"A variance over samples needs n_samples of at least 2; got {options.n_samples}."
        raise InputError(msg)
    center = inputs.mean(dtype)
    total, squares = torch.zeros_like(center), torch.zeros_like(center)
    for f in inputs.functions(precision, options.n_samples, options.generator, dtype):
        deviation = f - center
        total, squares = total + deviation.sum(0), squares + deviation.square().sum(0)
    shift = total / options.n_samples
    return center + shift, (squares - options.n_samples * shift.square()) / (options.n_samples - 1)
