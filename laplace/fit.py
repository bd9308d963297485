"""What ``fit`` learned, as one immutable value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.errors import InputError, UnsupportedError
from laplace.structures import AbstractCurvature
from laplace.types import Scalar


@dataclass(frozen=True)
class Fit:
    """Everything that ``fit`` learned. Replaced as a whole, so that a failing fit changes nothing.

    Attributes
    ----------
    mean
        The weights at which the curvature was taken, ``[P]``.
    curvature
        Of the data term at unit noise and temperature.
    nll
        Negative log-likelihood at unit noise and temperature, summed, in nats.
    n_data
        Rows that the loaders yielded.
    n_positions
        Unmasked positions in them.
    n_outputs
        C.
    output_nll
        The same negative log-likelihood for each output of a regression; ``None`` where it is not known.
    head_bias
        Whether the random weights are those of a linear head with a bias; ``None`` if they are not of a head.
    """

    mean: Float[Tensor, " params"]
    curvature: AbstractCurvature
    nll: Scalar
    n_data: int
    n_positions: int
    n_outputs: int
    output_nll: Float[Tensor, " outputs"] | None = None
    head_bias: bool | None = None

    @property
    def nll_of_outputs(self) -> Float[Tensor, " outputs"]:
        """The negative log-likelihood of each output, ``[C]``.

        Raises
        ------
        UnsupportedError
            If the back end gave their sum alone.
        """
        if self.output_nll is None:
            msg = (
                "A noise for each output needs the loss of each output; the back end gave one number for all. Use a "
                "built-in back end (backend=None)."
            )
            raise UnsupportedError(msg)
        return self.output_nll

    def scaled(self, scale: Tensor) -> AbstractCurvature:
        """The curvature at some noise and temperature.

        Parameters
        ----------
        scale
            Factor of the curvature: ``[]``, or ``[C]`` for a noise of each output. The weights of a linear head belong
            to outputs, so that the second is exact for a last layer: ``H_ck √(s_c s_k)`` between outputs c and k.

        Raises
        ------
        UnsupportedError
            If outputs have different noise and share weights.
        """
        if scale.dim() == 0:
            return self.curvature * scale
        if self.head_bias is None:
            msg = (
                "A noise for each output scales the weights of a linear head output by output; weights below it are "
                "shared by outputs, and fit has summed their curvature. Pass one sigma_noise, or use the last layer."
            )
            raise UnsupportedError(msg)
        n_features = len(self.mean) // self.n_outputs - int(self.head_bias)
        weight = scale.repeat_interleave(n_features)
        return self.curvature.scale_weights(torch.cat([weight, scale]) if self.head_bias else weight)

    def merge(self, other: Fit) -> Fit:
        """The fit to the union of two data sets (``override=False``).

        Parameters
        ----------
        other
            The later fit.

        Returns
        -------
        A new fit, at the weights of the later one.

        Raises
        ------
        InputError
            If the two were made at different numbers of weights or outputs.
        """
        if (len(self.mean), self.n_outputs) != (len(other.mean), other.n_outputs):
            msg = (
                f"override=False adds to a fit of {len(self.mean)} weights and {self.n_outputs} outputs; the new one "
                f"has {len(other.mean)} and {other.n_outputs}. Pass override=True to start again."
            )
            raise InputError(msg)
        by_output = None
        if self.output_nll is not None and other.output_nll is not None:
            by_output = self.output_nll + other.output_nll
        return Fit(
            other.mean,
            self.curvature.merge(other.curvature),
            self.nll + other.nll,
            self.n_data + other.n_data,
            self.n_positions + other.n_positions,
            self.n_outputs,
            by_output,
            other.head_bias,
        )
