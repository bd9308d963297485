"""Closed forms for a linear score head on pairs (``likelihood="reward_modeling"``), in place of ``last_layer``.

The likelihood sees a pair by the difference of its scores, ``f₀ − f₁ = w · (φ₀ − φ₁)``: every output Hessian, exact or
a Fisher, is ``r rᵀ`` with ``r = ρ [1, −1]``. So a pair enters as one row with the features ``d = φ₀ − φ₁`` and the
curvature ``ρ²``, and the bias, which cancels, has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from laplace.curvature import last_layer
from laplace.likelihoods import OutputHessian
from laplace.structures import Kron
from laplace.types import Scalar


def diag(phi: Float[Tensor, "pairs twice"], hessian: OutputHessian, bias: bool) -> Float[Tensor, " params"]:
    """Diagonal of Σ ρ² d dᵀ, then 0 for the bias: ``[P]``.

    Exact. Time O(pairs · D).
    """
    return F.pad(last_layer.diag(*differences(phi, hessian), bias=False), (0, int(bias)))


def kron(phi: Float[Tensor, "pairs twice"], hessian: OutputHessian, bias: bool) -> Kron:
    """Factors Σ ρ² (1×1) and Σ d dᵀ, both raw sums; 0 for the bias.

    Approximate as a matrix, exact as sums. Time O(pairs · D²).
    """
    weight = last_layer.kron(*differences(phi, hessian), bias=False).kfacs
    return Kron([*weight, [phi.new_zeros(1, 1)]] if bias else weight)


def full(phi: Float[Tensor, "pairs twice"], hessian: OutputHessian, bias: bool) -> Float[Tensor, "params params"]:
    """Σ ρ² d dᵀ, dense, with a row and a column of zeros for the bias.

    Exact. Time O(pairs · D²).
    """
    return F.pad(last_layer.full(*differences(phi, hessian), bias=False), (0, int(bias), 0, int(bias)))


def blockdiag(phi: Float[Tensor, "pairs twice"], hessian: OutputHessian, bias: bool) -> list[Tensor]:
    """Σ ρ² d dᵀ, and 0 for the bias.

    Exact. Time O(pairs · D²).
    """
    weight = last_layer.blockdiag(*differences(phi, hessian), bias=False)
    return [*weight, phi.new_zeros(1, 1)] if bias else weight


def ekfac(
    phi: Float[Tensor, "pairs twice"],
    hessian: OutputHessian,
    bias: bool,
    basis: Sequence[Sequence[Tensor | None]],
) -> list[Tensor]:
    """Σ ρ² (d V)², and 0 for the bias.

    Exact. Time O(pairs · D²).
    """
    weight = last_layer.ekfac(*differences(phi, hessian), bias=False, basis=basis)
    return [*weight, phi.new_zeros(1)] if bias else weight


def lowrank(
    phi: Float[Tensor, "pairs twice"], hessian: OutputHessian, bias: bool, directions: Float[Tensor, "params k"]
) -> tuple[Float[Tensor, "params k"], Scalar]:
    """Products with Σ ρ² d dᵀ, and 0 for the bias; the trace.

    Exact. Time O(pairs · D · k).
    """
    weight = directions[: len(directions) - int(bias)]
    products, trace = last_layer.lowrank(*differences(phi, hessian), bias=False, directions=weight)
    return F.pad(products, (0, 0, 0, int(bias))), trace


def differences(
    phi: Float[Tensor, "pairs twice"], hessian: OutputHessian
) -> tuple[Float[Tensor, "pairs features"], OutputHessian]:
    """Pairs as rows of a head with one output: ``d`` and ``ρ``."""
    assert hessian.root is not None, "the likelihood and both Fishers give roots"
    assert hessian.diagonal is None, "and nothing else: it would not be a multiple of [1, −1]"
    first, second = phi.chunk(2, dim=-1)
    return first - second, OutputHessian(1, root=hessian.root[:, :1])
