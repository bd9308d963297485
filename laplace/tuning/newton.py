"""The mode of a linear head's weights by Newton's method: a convex problem, solved from features alone.

θ* = argmin  s · nll(θ) + ½ (θ − μ)ᵀ diag(δ) (θ − μ),    f = W φ + b
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import linalg
from laplace.curvature import last_layer
from laplace.errors import InputError, NumericalWarning, warn
from laplace.likelihoods import AbstractLikelihood, OutputHessian
from laplace.network.parameters import split_sizes
from laplace.prior import GaussianPrior
from laplace.structures.head_block import HeadBlock, head_blocks
from laplace.types import Features, Outputs, Scalar, Targets

DENSE_PARAMS = 512
"""Up to so many weights the Hessian is built and factorized; beyond, it only multiplies vectors."""
ROUNDINGS = 32
"""A decrease by less than so many rounding units of the loss is left to one last step."""
MAX_STEPS = 100
MAX_PRODUCTS = 200
"""Newton steps, and products with the Hessian for one of them."""


@dataclass(frozen=True)
class Head:
    """The regularized loss of a linear head on fixed features; weights in public order."""

    phi: Features
    """Features, ``[rows, D]``."""
    y: Targets
    """Targets of the same rows."""
    shapes: Sequence[tuple[int, ...]]
    """Shapes of its parameter groups, ``(C, D)`` and, with a bias, ``(C,)``."""
    likelihood: AbstractLikelihood
    """With its noise and temperature."""
    prior: GaussianPrior
    """Over the head's weights."""

    def outputs(self, theta: Float[Tensor, " params"], phi: Features | None = None) -> Outputs:
        """W φ + b, ``[rows, C]``."""
        phi = self.phi if phi is None else phi
        weight, *offset = (part.view(shape) for part, shape in zip(self._split(theta), self.shapes, strict=True))
        return torch.addmm(offset[0], phi, weight.T) if offset else phi @ weight.T

    def _split(self, theta: Float[Tensor, " params"]) -> tuple[Tensor, ...]:
        return split_sizes(theta, [math.prod(shape) for shape in self.shapes])

    def blocks(self, phi: Features) -> list[HeadBlock]:
        """The derivatives of the outputs at some features, one block for each parameter group."""
        return head_blocks(phi, self.shapes)

    def pull_back(self, outputs: Outputs) -> Float[Tensor, " params"]:
        """Jᵀ times a vector of outputs."""
        weight = (outputs.T @ self.phi).flatten()
        return weight if len(self.shapes) == 1 else torch.cat([weight, outputs.sum(0)])

    def objective(self, theta: Float[Tensor, " params"], f: Outputs | None = None) -> Scalar:
        """The regularized loss, in nats; with the outputs at these weights where they are known."""
        f = self.outputs(theta) if f is None else f
        return self.likelihood.scaled_nll(f, self.y) + 0.5 * self.prior.scatter(theta)

    def output_gradient(self, f: Outputs) -> Outputs:
        """The gradient of its first term in the outputs."""
        return self.likelihood.scale.to(f) * self.likelihood.gradient(f, self.y)

    def gradient(self, theta: Float[Tensor, " params"], f: Outputs) -> Float[Tensor, " params"]:
        """Its gradient, with the outputs at these weights."""
        return self.pull_back(self.output_gradient(f)) + self.prior.diagonal() * (theta - self.prior.mean)

    def output_hessian(self, f: Outputs) -> OutputHessian:
        """The Hessians of its first term in the outputs."""
        return scaled(self.likelihood.hessian(self.likelihood.observed(f, self.y)), self.likelihood.scale.to(f))

    def newton_direction(
        self, hessian: OutputHessian, gradient: Float[Tensor, " params"], tolerance: float | Scalar
    ) -> Float[Tensor, " params"]:
        """``−H⁻¹ g`` by a Cholesky factor, or nearly by conjugate gradients where there are many weights.

        Parameters
        ----------
        hessian
            Of the rows, at the noise and temperature of the likelihood.
        gradient
            Of the regularized loss.
        tolerance
            Of conjugate gradients, relative to the gradient.
        """
        delta = self.prior.diagonal()
        if len(gradient) <= DENSE_PARAMS:
            matrix = last_layer.full(self.blocks(self.phi), hessian) + torch.diag(delta)
            factor = linalg.cholesky(matrix, "Hessian of the head")
            return -torch.cholesky_solve(gradient.unsqueeze(1), factor).squeeze(1)
        diagonal = last_layer.diag(self.blocks(self.phi), hessian) + delta

        def product(v: Tensor) -> Tensor:
            return self.pull_back(multiply(hessian, self.outputs(v))) + delta * v

        return -conjugate_gradients(product, gradient, diagonal, tolerance)


def scaled(hessian: OutputHessian, scale: Float[Tensor, "*outputs"]) -> OutputHessian:
    """``√s Λ √s`` for each row."""
    diagonal, root, total = hessian.diagonal, hessian.root, hessian.total
    return replace(
        hessian,
        diagonal=None if diagonal is None else scale * diagonal,
        root=None if root is None else scale.sqrt().reshape(-1, 1) * root,
        total=None if total is None else scale * total,
    )


def multiply(hessian: OutputHessian, v: Outputs) -> Outputs:
    """``Λ v`` for each row, in O(rows · C k)."""
    total = torch.zeros_like(v) if hessian.diagonal is None else hessian.diagonal * v
    if hessian.root is None:
        return total
    inner = torch.einsum("nck,nc->nk", hessian.root, v)
    return total + hessian.sign * torch.einsum("nck,nk->nc", hessian.root, inner)


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    right: Float[Tensor, " n"],
    diagonal: Float[Tensor, " n"],
    tolerance: float | Scalar,
) -> Float[Tensor, " n"]:
    """Solve ``A x = b`` for positive definite A by products with it, with its diagonal for a preconditioner."""
    x, residual = torch.zeros_like(right), right
    z = residual / diagonal
    direction, size = z, residual @ z
    target = tolerance**2 * size
    for _ in range(MAX_PRODUCTS):
        if bool(size <= target):
            break
        image = product(direction)
        step = size / (direction @ image)
        x, residual = x + step * direction, residual - step * image
        z = residual / diagonal
        before, size = size, residual @ z
        direction = z + size / before * direction
    return x


def mode(head: Head, initial: Float[Tensor, " params"] | None = None) -> Float[Tensor, " params"]:
    """The weights of a head that minimize its regularized loss.

    Exact up to rounding: the problem is convex, and steps are halved until they descend. A Gaussian likelihood takes
    one step. A step costs O(rows · P²) with up to ``DENSE_PARAMS`` weights, else O(rows · C · D) a product.

    References
    ----------
    Nocedal & Wright (2006), "Numerical optimization", algorithm 7.1 (line search Newton–CG); Boyd & Vandenberghe
    (2004), "Convex optimization", section 9.5 (the decrement as criterion to stop).

    Raises
    ------
    InputError
        If the loss is not finite at the start.
    """
    theta = head.prior.mean.expand(head.prior.n_params).to(head.phi) if initial is None else initial
    value = head.objective(theta)
    check_start(value)
    eps, first, left = torch.finfo(theta.dtype).eps, torch.zeros_like(value), float("inf")
    for _ in range(MAX_STEPS):
        f = head.outputs(theta)
        gradient = head.gradient(theta, f)
        norm = torch.linalg.vector_norm(gradient)
        first = first.maximum(norm)
        # Solved more exactly the nearer the optimum is: the convergence is superlinear then.
        tolerance = (norm / first.clamp(min=torch.finfo(norm.dtype).tiny)).sqrt().clamp(max=0.1).nan_to_num(0.1)
        direction = head.newton_direction(head.output_hessian(f), gradient, tolerance)
        slope, loss = torch.stack([gradient @ direction, value]).tolist()
        left = -0.5 * slope
        if left <= ROUNDINGS * eps * max(1.0, abs(loss)):
            return theta + direction
        found = _descend(head, theta, direction, loss, slope)
        if found is None:
            break
        theta, value = found
    if not left <= eps**0.5 * max(1.0, abs(float(value))):  # also where it is NaN
        warn_of_rest(left)
    return theta


def check_start(value: Scalar) -> None:
    """Raise unless the loss is finite where a method starts."""
    if not bool(torch.isfinite(value)):
        msg = f"The loss of the head is {float(value)} where its weights start; check the features and targets."
        raise InputError(msg)


def warn_of_rest(left: float) -> None:
    """Say how far above the optimum a method ended."""
    msg = (
        f"The weights of the head are about {left:.2e} nats above the optimum, and steps end there. A larger prior "
        "precision, features of unit size or float64 help."
    )
    warn(msg, NumericalWarning)


def _descend(
    head: Head, theta: Tensor, direction: Tensor, value: float, slope: float
) -> tuple[Float[Tensor, " params"], Scalar] | None:
    """Halve the step until the loss decreases enough; ``None`` where rounding hides any decrease."""
    step = 1.0
    while step > torch.finfo(theta.dtype).eps:
        candidate = theta + step * direction
        reached = head.objective(candidate)
        if float(reached) <= value + 1e-4 * step * slope:  # also false where it is NaN
            return candidate, reached
        step /= 2
    return None
