"""The call of an estimator as type checkers see it: what comes back depends on the likelihood.

An estimator defines ``__call__`` once, for all likelihoods, under ``@typed``; its signature is that of ``call``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor
from typing_extensions import overload

from laplace.likelihoods import MomentsLike, ProbabilitiesLike
from laplace.types import Inputs, LinkApproxLike, ModelKeyword, PredTypeLike

if TYPE_CHECKING:
    from laplace.baselaplace.base import BaseLaplace

Declared = TypeVar("Declared", bound=Callable[..., Any])


@overload
def call(
    self: BaseLaplace[MomentsLike],
    x: Inputs,
    pred_type: PredTypeLike = ...,
    joint: bool = ...,
    link_approx: LinkApproxLike = ...,
    n_samples: int = ...,
    diagonal_output: bool = ...,
    generator: torch.Generator | None = ...,
    *,
    fitting: Literal[True],
    **model_kwargs: ModelKeyword,
) -> Tensor: ...
@overload
def call(
    self: BaseLaplace[ProbabilitiesLike],
    x: Inputs,
    pred_type: PredTypeLike = ...,
    joint: bool = ...,
    link_approx: LinkApproxLike = ...,
    n_samples: int = ...,
    diagonal_output: bool = ...,
    generator: torch.Generator | None = ...,
    fitting: Literal[False] = ...,
    **model_kwargs: ModelKeyword,
) -> Tensor: ...
@overload
def call(
    self: BaseLaplace[MomentsLike],
    x: Inputs,
    pred_type: PredTypeLike = ...,
    joint: bool = ...,
    link_approx: LinkApproxLike = ...,
    n_samples: int = ...,
    diagonal_output: bool = ...,
    generator: torch.Generator | None = ...,
    fitting: Literal[False] = ...,
    **model_kwargs: ModelKeyword,
) -> tuple[Tensor, Tensor]: ...
@overload
def call(
    self: BaseLaplace,
    x: Inputs,
    pred_type: PredTypeLike = ...,
    joint: bool = ...,
    link_approx: LinkApproxLike = ...,
    n_samples: int = ...,
    diagonal_output: bool = ...,
    generator: torch.Generator | None = ...,
    fitting: bool = ...,
    **model_kwargs: ModelKeyword,
) -> Tensor | tuple[Tensor, Tensor]: ...
@abstractmethod
def call(self: BaseLaplace, x: Inputs, *arguments: Any, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """Predict at a batch of inputs."""
    raise NotImplementedError


def predictive(
    self: BaseLaplace, x: Inputs, pred_type: PredTypeLike, link_approx: LinkApproxLike, n_samples: int
) -> Tensor | tuple[Tensor, Tensor]:
    """Predict; the same as calling the object.

    Kept for code written for laplace-torch.

    Parameters
    ----------
    x
        A batch of inputs.
    pred_type, link_approx, n_samples
        As in ``__call__``.

    Returns
    -------
    As ``__call__``.
    """
    return self(x, pred_type=pred_type, link_approx=link_approx, n_samples=n_samples)


def with_types_of(declared: Declared) -> Callable[[Callable[..., Any]], Declared]:  # noqa: ARG001
    """A decorator that leaves a function as it is, and tells type checkers that it has the types of another."""

    def same(function: Any) -> Declared:
        return function

    return same


typed = with_types_of(call)

__all__ = ["call", "predictive", "typed", "with_types_of"]
