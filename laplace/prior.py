"""The Gaussian prior over the random weights (``prior_precision=``, ``prior_mean=``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace.enums import PriorStructure, choose
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.network.parameters import expand_groups
from laplace.types import Scalar


@dataclass(frozen=True)
class GaussianPrior:
    """N(μ, diag(δ)⁻¹), with one precision for all weights, one per parameter group, or one per weight.

    Attributes
    ----------
    mean
        μ: ``[]`` or ``[P]``.
    precision
        δ: ``[1]``, ``[n_layers]`` or ``[P]``, in 1/weight².
    sizes
        Number of weights in each parameter group.

    Raises
    ------
    ShapeError
        If mean or precision fit neither.
    """

    mean: Tensor
    precision: Tensor
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the shapes against the weights."""
        n_params, n_layers = sum(self.sizes), len(self.sizes)
        if self.precision.dim() != 1 or self.precision.numel() not in (1, n_layers, n_params):
            msg = (
                f"The prior precision must be a scalar, one value for each of the {n_layers} parameter groups "
                f"(sizes {self.sizes}), or one for each of the {n_params} weights; got {list(self.precision.shape)}."
            )
            raise ShapeError(msg)
        if self.mean.shape not in ((), (1,), (n_params,)):
            msg = (
                f"The prior mean must be a scalar or one value for each of the {n_params} weights; "
                f"got {list(self.mean.shape)}."
            )
            raise ShapeError(msg)

    @property
    def n_params(self) -> int:
        """P, the number of random weights."""
        return sum(self.sizes)

    @property
    def is_per_weight(self) -> bool:
        """Whether every weight has a precision of its own, which no coarser setting expresses."""
        return self.precision.numel() not in (1, len(self.sizes))

    def diagonal(self) -> Float[Tensor, " params"]:
        """One precision per weight, ``[P]``."""
        if self.precision.numel() == 1:
            return self.precision.expand(self.n_params)
        if self.is_per_weight:
            return self.precision
        return expand_groups(self.precision, self.sizes)

    def per_layer(self) -> Float[Tensor, " groups"]:
        """One precision per parameter group, ``[n_layers]``; raises if every weight has its own."""
        if self.is_per_weight:
            msg = (
                "A Kronecker structure takes a scalar prior precision or one value for each parameter group; got one "
                'for each weight. Use hessian_structure="diag" or "full" for that.'
            )
            raise UnsupportedError(msg)
        return self.precision.expand(len(self.sizes))

    def groups(self) -> list[GaussianPrior]:
        """The prior over each parameter group by itself."""
        per_weight = self.is_per_weight
        precisions = self.precision.split(self.sizes) if per_weight else self.precision.expand(len(self.sizes)).split(1)
        means = self.mean.split(self.sizes) if self.mean.numel() > 1 else [self.mean] * len(self.sizes)
        parts = zip(means, precisions, self.sizes, strict=True)
        return [GaussianPrior(mean, precision, (size,)) for mean, precision, size in parts]

    def logdet(self) -> Scalar:
        """Log |diag(δ)|."""
        if self.is_per_weight:
            return self.precision.log().sum()
        sizes = torch.tensor(self.sizes, dtype=self.precision.dtype, device=self.precision.device)
        return (sizes * self.precision.expand(len(self.sizes)).log()).sum()

    def scatter(self, theta: Float[Tensor, " params"]) -> Scalar:
        """(θ − μ)ᵀ diag(δ) (θ − μ)."""
        return ((theta - self.mean).square() * self.diagonal()).sum()


def parameters_per_layer(model: nn.Module) -> list[int]:
    """Number of weights in each parameter group of a model that requires a gradient.

    Parameters
    ----------
    model
        Any module.

    Returns
    -------
    One number per parameter, in the order of ``model.parameters()``.
    """
    return [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]


def expand_prior_precision(prior_prec: Tensor, model: nn.Module) -> Float[Tensor, " params"]:
    """One prior precision per weight of a model.

    Parameters
    ----------
    prior_prec
        A scalar, one value per parameter group, or one per weight.
    model
        Whose parameters that require a gradient are meant.

    Returns
    -------
    ``[P]``, in 1/weight².

    Raises
    ------
    ShapeError
        If it is neither.
    """
    sizes = tuple(parameters_per_layer(model))
    precision = prior_prec.reshape(-1)
    return GaussianPrior(precision.new_zeros(()), precision, sizes).diagonal()


def fix_prior_prec_structure(
    prior_prec_init: float | Tensor,
    prior_structure: PriorStructure | str,
    n_layers: int,
    n_params: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Float[Tensor, " values"]:
    """Initial prior precisions in the shape of a prior structure.

    Parameters
    ----------
    prior_prec_init
        One value for all, or as many as the structure has.
    prior_structure
        ``"scalar"``, ``"layerwise"`` or ``"diag"``.
    n_layers, n_params
        Numbers of parameter groups and of weights.
    device, dtype
        Device and floating-point type of the result.

    Returns
    -------
    ``[1]``, ``[n_layers]`` or ``[n_params]``.

    Raises
    ------
    UnsupportedError
        If the structure is unknown.
    InputError
        If there are neither one value nor as many as the structure has.
    """
    structure = choose(PriorStructure, prior_structure, "prior_structure")
    n_values = {PriorStructure.SCALAR: 1, PriorStructure.LAYERWISE: n_layers, PriorStructure.DIAG: n_params}[structure]
    values = torch.as_tensor(prior_prec_init, dtype=dtype, device=device).reshape(-1)
    if values.numel() not in (1, n_values):
        msg = (
            f"The initial prior precision (init_prior_prec) with prior_structure={structure.value!r} takes one "
            f"value or {n_values} of them; got {values.numel()}."
        )
        raise InputError(msg)
    return values.expand(n_values).clone()
