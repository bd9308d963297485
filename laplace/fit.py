"""What ``fit`` learned, as one immutable value."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from laplace.errors import InputError
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
    """

    mean: Float[Tensor, " params"]
    curvature: AbstractCurvature
    nll: Scalar
    n_data: int
    n_positions: int
    n_outputs: int

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
        return Fit(
            other.mean,
            self.curvature.merge(other.curvature),
            self.nll + other.nll,
            self.n_data + other.n_data,
            self.n_positions + other.n_positions,
            self.n_outputs,
        )
