"""What ``fit`` learned, as one immutable value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.density import ClassSums, FeatureDensity
from laplace.errors import InputError, NotFittedError, ShapeError, UnsupportedError
from laplace.schema import Known, Table, anything, check_entries, flag, optional, tensor, whole
from laplace.structures import AbstractCurvature
from laplace.structures.remainder import remainder
from laplace.types import Scalar


@dataclass(frozen=True)
class Fit:
    """Everything that ``fit`` learned. Replaced as a whole, so that a failing fit changes nothing."""

    mean: Float[Tensor, " params"]
    """The weights at which the curvature was taken, ``[P]``."""
    curvature: AbstractCurvature
    """Curvature of the data term at unit noise and temperature."""
    nll: Scalar
    """Negative log-likelihood at unit noise and temperature, summed, in nats; NaN where it is not known, since
    weights were assigned by hand."""
    n_data: int
    """Rows that the loaders yielded; 0 where all was assigned by hand."""
    n_positions: int
    """Unmasked positions in them."""
    n_outputs: int
    """C; 0 where it is not known."""
    output_nll: Float[Tensor, " outputs"] | None = None
    """The same negative log-likelihood for each output of a regression; ``None`` where it is not known."""
    head: Sequence[tuple[int, ...]] | None = None
    """Shapes of the parameter groups of a linear head, ``(C, D)`` and, with a bias, ``(C,)``; ``None`` of other
    weights."""
    noise_shape: Float[Tensor, " outputs"] | None = None
    """Noise of each output relative to the first, where it is part of curvature and loss already."""
    trained: Float[Tensor, " params"] | None = None
    """The weights that the model had, where ``mean`` is a head that was chosen afterwards; else ``None``."""
    density: ClassSums | None = None
    """Sums of the features of each class; ``None`` where there are none."""
    averaged: bool = False
    """Whether the curvature is averaged over a Gaussian around the mean, by variational inference."""
    parts: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)
    """Digests of the fits that were merged (1) or subtracted (−1) since; not saved."""

    @property
    def feature_density(self) -> FeatureDensity | None:
        """The density that the sums say, with its factors; never copied or saved."""
        return self._density[0]

    @property
    def why_no_density(self) -> str | None:
        """Why sums make no density, in words."""
        return self._density[1]

    @cached_property
    def _density(self) -> tuple[FeatureDensity | None, str | None]:
        try:
            return None if self.density is None else FeatureDensity(self.density), None
        except UnsupportedError as error:
            return None, str(error)

    def __getstate__(self) -> dict[str, Any]:
        """The fields."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def by_hand(
        cls,
        mean: Float[Tensor, " params"],
        curvature: AbstractCurvature,
        sigma_noise: Tensor,
        head: Sequence[tuple[int, ...]] | None,
    ) -> Fit:
        """A posterior of which a user gave weights and curvature, without data.

        Where outputs share weights, the curvature is that at the relative noise of ``sigma_noise``, ``[]`` or ``[C]``.

        Raises
        ------
        ShapeError
            If there is a noise for another number of outputs.
        """
        n_outputs = (len(sigma_noise) if sigma_noise.dim() else 0) if head is None else head[0][0]
        if sigma_noise.dim() and len(sigma_noise) != n_outputs:
            msg = f"sigma_noise has {len(sigma_noise)} values, one for each output; the model has {n_outputs}."
            raise ShapeError(msg)
        shape = (sigma_noise / sigma_noise[0]).detach() if sigma_noise.dim() and head is None else None
        unknown = mean.new_full((), torch.nan)
        return cls(mean, curvature, unknown, 0, 0, n_outputs, head=head, noise_shape=shape)

    def at(self, mean: Float[Tensor, " params"]) -> Fit:
        """The same curvature around other weights, whose loss nobody computed."""
        if torch.equal(mean, self.mean):
            return self
        unknown = torch.full_like(self.nll, torch.nan)
        return replace(self, mean=mean, nll=unknown, output_nll=None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what was pickled, also where it said of a head only whether it has a bias."""
        vars(self).update({"parts": {}, **state})
        bias = vars(self).pop("head_bias", None)
        if bias is not None:
            width = len(self.mean) // self.n_outputs - int(bias)
            vars(self)["head"] = [(self.n_outputs, width), (self.n_outputs,)][: 1 + int(bias)]

    @property
    def is_unknown(self) -> bool:
        """Whether nobody computed the negative log-likelihood at these weights."""
        return bool(torch.isnan(self.nll))

    @property
    def known_nll(self) -> Scalar:
        """The negative log-likelihood."""
        if self.is_unknown:
            msg = (
                "Weights or curvature were assigned by hand (la.mean, la.H), so that the loss of the training data at "
                "these weights is not known, which evidence and log-likelihood need. Call fit(train_loader) with the "
                "model at these weights and assign la.H afterwards. Predictions, samples and validation scores "
                '(method="gridsearch", tune) need no loss.'
            )
            raise NotFittedError(msg)
        return self.nll

    def check_merge(self) -> None:
        """Raise where a later fit cannot be added."""
        self.curvature.check_merge()
        if not self.n_data:
            msg = (
                "override=False adds to what was learned from data; la.H was assigned by hand without a fit. Pass "
                "override=True to start again, or call fit first and assign la.H after it."
            )
            raise UnsupportedError(msg)
        if self.averaged:
            msg = (
                'override=False adds the curvature of new data at the mean; that of method="elbo" is averaged over the '
                "posterior of all data. Fit all data with override=True, and choose again."
            )
            raise UnsupportedError(msg)

    @property
    def nll_of_outputs(self) -> Float[Tensor, " outputs"]:
        """The negative log-likelihood of each output, ``[C]``."""
        if self.output_nll is None:
            msg = (
                "A noise for each output needs the loss of each output; the back end gave one number for all. Use a "
                "built-in back end (backend=None)."
            )
            raise UnsupportedError(msg)
        return self.output_nll

    def scaled(self, scale: Tensor) -> AbstractCurvature:
        """The curvature at some noise and temperature."""
        if self.head is None:
            return self.curvature * self.common(scale)
        if scale.dim() == 0:
            return self.curvature * scale
        each = [scale.repeat_interleave(math.prod(shape[1:])) for shape in self.head]
        return self.curvature.scale_weights(torch.cat(each))

    def common(self, scale: Tensor) -> Tensor:
        """The one factor that scales of outputs, ``[C]``, have beyond the noise that ``fit`` had."""
        if scale.dim() == 0 and self.noise_shape is None:
            return scale
        if not self.n_outputs:
            msg = "The number of outputs is not known before fit: assign one sigma_noise for all, or call fit."
            raise UnsupportedError(msg)
        shape = scale.new_ones(self.n_outputs) if self.noise_shape is None else self.noise_shape.to(scale)
        scale = scale.expand(self.n_outputs)
        relative = scale / scale[0]
        if scale.requires_grad or not any(torch.allclose(relative, shape**-power, rtol=1e-4) for power in (2, 4)):
            msg = (
                "Weights below the last layer are shared by outputs, so that fit sums their curvature with the noise "
                "that outputs have then: relative to each other it cannot change afterwards. Assign sigma_noise and "
                'call fit again, keep the proportions that it had, or use subset_of_weights="last_layer", which needs '
                "no new fit."
            )
            raise UnsupportedError(msg)
        return scale[0]

    def _check_alike(self, other: Fit) -> None:
        """Raise unless two fits have a sum."""
        if (len(self.mean), self.n_outputs) != (len(other.mean), other.n_outputs):
            msg = (
                f"override=False adds to a fit of {len(self.mean)} weights and {self.n_outputs} outputs; the new one "
                f"has {len(other.mean)} and {other.n_outputs}. Pass override=True to start again."
            )
            raise InputError(msg)
        ones = self.mean.new_ones(self.n_outputs)
        first, second = (ones if fit.noise_shape is None else fit.noise_shape for fit in (self, other))
        if not torch.allclose(first, second):
            msg = "override=False adds to a fit in which outputs had another noise relative to each other; fit again."
            raise InputError(msg)
        if not (
            (self.trained is None and other.trained is None)
            or (torch.equal(self.mean, other.mean) and _same(self.trained, other.trained))
        ):
            msg = (
                "Fits at different heads have no sum: tune chose a head for one of them. Fit both before tune, or with "
                "override=True."
            )
            raise UnsupportedError(msg)

    def merge(self, other: Fit) -> Fit:
        """The fit to the union of two data sets (``override=False``)."""
        self._check_alike(other)
        by_output, density = None, None
        if self.density is not None and other.density is not None:
            density = self.density.merge(other.density)
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
            other.head,
            other.noise_shape,
            other.trained,
            density,
            parts=self.parts,
        )

    def subtract(self, other: Fit, *, squares: bool = True) -> Fit:
        """The fit to the data that are not among those of another fit, which must be part of these.

        Curvatures that are sums of ``squares`` cannot become negative.

        Raises
        ------
        InputError
            If they are not, or no data would be left.
        """
        self._check_alike(other)
        counts = self.n_data - other.n_data, self.n_positions - other.n_positions
        if min(counts) <= 0:
            msg = (
                f"The fit is of {self.n_data} rows with {self.n_positions} targets, and {other.n_data} rows with "
                f"{other.n_positions} were to be removed: only rows that were fitted can be, and some must be left."
            )
            raise InputError(msg)
        by_output, density = None, None
        if self.density is not None and other.density is not None:
            density = self.density.subtract(other.density)
        if self.output_nll is not None and other.output_nll is not None:
            by_output = remainder(self.output_nll, other.output_nll, squares=True)
        return replace(
            self,
            curvature=self.curvature.subtract(other.curvature, squares=squares),
            nll=remainder(self.nll.reshape(1), other.nll.reshape(1), squares=True).squeeze(0),
            n_data=counts[0],
            n_positions=counts[1],
            output_nll=by_output,
            density=density,
        )


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether two tensors are equal, or both are not there."""
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)


def _density(value: Any, where: str, known: Known) -> None:
    """Sums of features, which have sizes of their own."""
    check_entries(value, ClassSums.entries, {"dtype": known["dtype"]}, where)


FIT_ENTRIES: Table = {
    "n_outputs": whole(0, "C"),
    "n_data": whole(0),
    "n_positions": whole(0),
    "mean": tensor(("P",)),
    "loss": optional(tensor((), low=0)),  # None where it is not known
    "output_loss": optional(tensor(("C",), low=0)),
    "noise_shape": optional(tensor(("C",), above=0)),
    "H": anything,
}
"""What the entries of a saved ``Fit`` must be; of the curvature (``"H"``) its structure says it (``entries``)."""
HEAD_ENTRIES: Table = {"trained": optional(tensor(("P",))), "density": optional(_density), "averaged": flag}
"""Those of a fit whose head may be chosen, and whose features have a density."""
