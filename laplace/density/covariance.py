"""Covariances from few rows: shrinkage, and Cholesky factors of matrices that may be singular.

A feature that never varied, two features that are always equal, or fewer rows than features make a covariance singular;
its Gaussian would say that what was never seen is impossible. Such a covariance is shrunk toward one variance for all
features by the weight of Chen et al. (2010), which falls with the number of rows. So a feature that was constant in n
rows gets a variance of the order of the average variance over n: what lies far is very unlikely, with a finite number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.linalg import is_exporting

RESOLUTION = 1e-12
"""Variance of a feature given the others, relative to its mean square, below which a covariance counts as singular: a
standard deviation of a millionth of the feature's size, somewhat above the rounding of float32."""
LEAST_WEIGHT = 1e-8
"""Of the shrinkage of a singular covariance."""


def oas_weight(covariance: Float[Tensor, "n n"], rows: float) -> float:
    """The weight ρ of oracle approximating shrinkage toward tr(S)/p I, with the 2/p terms of the original.

    ρ = min(1, ((1 − 2/p) tr S² + tr² S) / ((n + 1 − 2/p) (tr S² − tr² S/p))), and 1 where the denominator is 0
    (Chen, Wiesel, Eldar & Hero 2010, Shrinkage algorithms for MMSE covariance estimation).
    """
    p = len(covariance)
    of_squares, squared = float(covariance.square().sum()), float(covariance.trace()) ** 2
    below = (rows + 1 - 2 / p) * (of_squares - squared / p)
    return 1.0 if below <= 0 else min(1.0, ((1 - 2 / p) * of_squares + squared) / below)


def shrunk(covariance: Float[Tensor, "n n"], weight: float) -> Float[Tensor, "n n"]:
    """(1 − ρ) S + ρ tr(S)/p I."""
    result = (1 - weight) * covariance
    result.diagonal().add_(weight * covariance.diagonal().mean())
    return result


@dataclass(frozen=True)
class Factor:
    """The Cholesky factor of a covariance."""

    lower: Float[Tensor, "n n"]
    """L, with L Lᵀ the covariance."""
    weight: float
    """ρ, by which it was shrunk as it was singular; 0 if it was not."""

    @property
    def half_log_det(self) -> Float[Tensor, ""]:
        """½ log det S."""
        return self.lower.diagonal().log().sum()

    def whiten(self, rows: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
        """L⁻¹ φ for each row."""
        if is_exporting():  # graphs of other programs have products, and no solvers
            eye = torch.eye(len(self.lower), dtype=self.lower.dtype, device=self.lower.device)
            return rows @ torch.linalg.solve_triangular(self.lower, eye, upper=False).mT
        return torch.linalg.solve_triangular(self.lower, rows.mT, upper=False).mT


def factorize(covariance: Float[Tensor, "n n"], rows: float, mean_square: Float[Tensor, " n"]) -> Factor:
    """The Cholesky factor; a singular covariance is shrunk by the weight of ``rows``, or more if it takes more."""
    covariance, weight = (covariance + covariance.mT) / 2, 0.0
    least = max(RESOLUTION, torch.finfo(covariance.dtype).eps) * mean_square
    while True:
        lower, info = torch.linalg.cholesky_ex(shrunk(covariance, weight) if weight else covariance)
        regular = (info == 0) & (lower.diagonal().square() > least).all()
        if weight == 1 or bool(regular):
            return Factor(lower, weight)
        weight = min(1.0, 10 * weight) if weight else max(LEAST_WEIGHT, oas_weight(covariance, rows))


__all__ = ["Factor", "factorize", "oas_weight", "shrunk"]
