"""The density of features: a mixture of one Gaussian for each class, and scores made of its distances.

```
S_w  = (Σ_c M_c − n_c μ_c μ_cᵀ) / Σ_c (n_c − 1)
S_c  = ((n_c − 1) OAS(M_c/(n_c − 1) − …) + κ S_w) / (n_c − 1 + κ)
g(φ) = −log Σ_c π_c N(φ; μ_c, S_c),   π_c = n_c / n
```

A class with one row has S_w, one without rows is left out. In the tied form every class has S_w.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace.density.covariance import RESOLUTION, Factor, factorize, oas_weight, shrunk
from laplace.density.sums import MAX_MOMENTS, ClassSums, normalized, reason_against
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.linalg import chunk_elements, lasting, piece_elements, some_rows

KAPPA = 10.0
"""κ: how many rows the shared covariance counts for in that of a class."""
ROWS_AT_A_TIME = 256
"""At least, where memory allows: a factor is read once for all of them."""


def _few(numbers: list[int]) -> str:
    """Some numbers in words."""
    return ", ".join(map(str, numbers[:10])) + (f" and {len(numbers) - 10} more" if len(numbers) > 10 else "")


@dataclass(frozen=True)
class FeatureDensity:
    """A mixture of Gaussians over features, one for each class that has rows.

    Factors are computed when they are first needed, and kept. All methods take features in any precision, with any
    axes before that of features, compute in float64, and can be differentiated.

    Raises
    ------
    UnsupportedError
        If there are too many features, no class has two rows, or no feature varies within a class.
    InputError
        If features were not finite.
    """

    sums: ClassSums

    def __post_init__(self) -> None:
        sums = self.sums
        reason = reason_against(sums.n_features)
        if reason is not None:
            raise UnsupportedError(reason)
        if not bool(torch.isfinite(self._raw_square).all()):
            msg = (
                "Features must be finite, and their squares, too: there is no density of the features of the training "
                "data, which are not. Check the inputs of the last layer for overflow."
            )
            raise InputError(msg)
        if self._freedom <= 0:
            msg = (
                f"A feature density needs a class with two rows or more; got {float(sums.counts.sum()):g} rows in "
                f"{len(self.present)} classes. Fit more rows."
            )
            raise UnsupportedError(msg)
        within = self._raw_square - (sums.sums[self.present] * self.means).sum(0)
        if float(within.sum()) <= RESOLUTION * float(self._raw_square.sum()):
            msg = (
                "The features of the training data are constant within every class: there is no feature density. "
                "Check that the inputs of the last layer depend on those of the model."
            )
            raise UnsupportedError(msg)

    # -- what the sums say --------------------------------------------------------------------------------------------

    @cached_property
    @lasting
    def present(self) -> Int[Tensor, " present"]:
        """Which classes have rows."""
        return self.sums.counts.nonzero().flatten()

    @cached_property
    @lasting
    def means(self) -> Float[Tensor, "present features"]:
        """μ_c of the classes that have rows."""
        return self.sums.sums[self.present] / self._counts.unsqueeze(1)

    @cached_property
    @lasting
    def log_shares(self) -> Float[Tensor, " present"]:
        """log π_c of the classes that have rows."""
        return self._counts.log() - self._counts.sum().log()

    @property
    def _counts(self) -> Float[Tensor, " present"]:
        return self.sums.counts[self.present]

    @property
    def _freedom(self) -> float:
        """Σ (n_c − 1) over classes that have more than one row."""
        return float((self.sums.counts - 1).clamp(min=0).sum())

    @cached_property
    @lasting
    def _raw_square(self) -> Float[Tensor, " features"]:
        """Σ φ² of each feature over all rows."""
        return self.sums.moments.diagonal(dim1=-2, dim2=-1).sum(0)

    # -- covariances and their factors --------------------------------------------------------------------------------

    def _factorize(self, covariance: Float[Tensor, "features features"], rows: float) -> Factor:
        return factorize(covariance, rows, self._raw_square / self._counts.sum())

    @property
    @lasting
    def shared_covariance(self) -> Float[Tensor, "features features"]:
        """S_w, before it is shrunk where it is singular."""
        return (self.sums.moments.sum(0) - self.sums.sums[self.present].mT @ self.means) / self._freedom

    def _class_covariance(self, index: int, shared: Tensor) -> Float[Tensor, "features features"]:
        """S_c of a class with more than one row."""
        mean, count = self.means[index], float(self._counts[index])
        own = self.sums.moments[int(self.present[index])] / (count - 1)
        own.addr_(mean, mean, alpha=-count / (count - 1))
        own = shrunk(own, oas_weight(own, count - 1))
        return ((count - 1) * own + KAPPA * shared) / (count - 1 + KAPPA)

    @cached_property
    @lasting
    @torch.no_grad()
    def shared_factor(self) -> Factor:
        """Of S_w."""
        return self._factorize(self.shared_covariance, self._freedom)

    @cached_property
    @lasting
    @torch.no_grad()
    def factors(self) -> tuple[Factor, ...]:
        """Of S_c, for each class that has rows; one in the tied form."""
        if self.sums.tied:
            return (self.shared_factor,)
        shared, found = self.shared_covariance, []
        for index, count in enumerate(self._counts.tolist()):
            if count > 1:
                found.append(self._factorize(self._class_covariance(index, shared), count - 1 + KAPPA))
            else:
                found.append(self.shared_factor)
        return tuple(found)

    @cached_property
    @lasting
    @torch.no_grad()
    def background(self) -> tuple[Float[Tensor, " features"], Factor]:
        """Mean and factor of one Gaussian for all rows, whatever their class."""
        n = float(self._counts.sum())
        total = self.sums.sums.sum(0)
        covariance = torch.addr(self.sums.moments.sum(0), total, total, alpha=-1 / n) / (n - 1)
        return total / n, self._factorize(covariance, n - 1)

    @cached_property
    @lasting
    @torch.no_grad()
    def _white_means(self) -> Float[Tensor, "present features"]:
        """Means of classes less that of all rows, whitened by S_w."""
        return self.shared_factor.whiten(self.means - self._center)

    @cached_property
    @lasting
    def _center(self) -> Float[Tensor, " features"]:
        """Mean of all rows: distances to means lose nothing where all means are far from zero."""
        return self.sums.sums.sum(0) / self._counts.sum()

    @cached_property
    @lasting
    def _log_scales(self) -> Float[Tensor, " present"]:
        """Logarithms of shares times densities at the means."""
        halves = torch.stack([factor.half_log_det for factor in self.factors])
        return self.log_shares - halves - self.sums.n_features / 2 * math.log(2 * math.pi)

    # -- scores -------------------------------------------------------------------------------------------------------

    def g(self, phi: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows"]:
        """−log of the density, in nats; higher is more foreign.

        Exact. Time O(rows · C · D²), in the tied form O(rows · (C + D) D); memory is bounded.
        """

        def piece(rows: Tensor) -> Tensor:
            return -torch.logsumexp(self._log_scales - self._squares(rows) / 2, 1)

        return self._by_piece(phi, piece)

    def relative(self, phi: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows"]:
        """The relative Mahalanobis score, min_c d_c² − d₀²; higher is more foreign.

        Classes share S_w here, and d₀ is the distance in one Gaussian for all rows (Ren et al. 2021, A simple fix to
        Mahalanobis distance for improving near-OOD detection, arXiv:2106.09022).
        """

        def piece(rows: Tensor) -> Tensor:
            mean, factor = self.background
            return self._shared_squares(rows).amin(1) - factor.whiten(rows - mean).square().sum(1)

        return self._by_piece(phi, piece)

    def distance(self, phi: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows"]:
        """The Mahalanobis distance, not squared, to the nearest class; regression has one."""
        return self._by_piece(phi, lambda rows: self._squares(rows).amin(1).sqrt())

    def _squares(self, rows: Float[Tensor, "rows features"]) -> Float[Tensor, "rows present"]:
        """Squared distances to all classes."""
        if self.sums.tied:
            return self._shared_squares(rows)
        pairs = zip(self.factors, self.means, strict=True)
        return torch.stack([factor.whiten(rows - mean).square().sum(1) for factor, mean in pairs], 1)

    def _shared_squares(self, rows: Float[Tensor, "rows features"]) -> Float[Tensor, "rows present"]:
        """The same where all have S_w: rows are whitened once."""
        white, means = self.shared_factor.whiten(rows - self._center), self._white_means
        squares = white.square().sum(1, keepdim=True) + means.square().sum(1) - 2 * white @ means.mT
        return squares.clamp(min=0)

    def _by_piece(self, phi: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A function of rows, so many at a time that temporaries stay small."""
        if phi.dim() == 0 or phi.shape[-1] != self.sums.n_features:
            msg = f"Expected {self.sums.n_features} features for each row, as in fit; got the shape {list(phi.shape)}."
            raise ShapeError(msg)
        rows = phi.reshape(-1, phi.shape[-1])
        width = max(rows.shape[1], len(self.present))
        size = max(1, piece_elements(phi.device) // width, min(ROWS_AT_A_TIME, chunk_elements(phi.device) // width))
        return torch.cat([function(self._prepared(part)) for (part,) in some_rows(size, rows)]).view(phi.shape[:-1])

    def _prepared(self, rows: Tensor) -> Tensor:
        """Rows in the precision of the sums, and normalized where they are."""
        rows = rows.to(self.sums.sums)
        return normalized(rows) if self.sums.normalized else rows

    # -- in words -----------------------------------------------------------------------------------------------------

    @property
    def notes(self) -> tuple[str, ...]:
        """What differs from the plain formula, in sentences: the tied form, classes left out, singular covariances."""
        counts, C, D = self.sums.counts.tolist(), self.sums.n_classes, self.sums.n_features
        found: list[str] = []
        if self.sums.tied:
            found.append(
                f"All {C} classes share one covariance, as {C} of {D} × {D} would be more than {MAX_MOMENTS} numbers."
            )
        empty = [c for c, count in enumerate(counts) if count == 0]
        if empty:
            found.append(f"The density leaves classes out that have no rows: {_few(empty)}.")
        single = [c for c, count in enumerate(counts) if 0 < count <= 1]
        if single and not self.sums.tied:
            found.append(f"Classes with one row have the covariance that all share: {_few(single)}.")
        return (*found, *self._of_singular())

    def _of_singular(self) -> list[str]:
        """A sentence about covariances that were shrunk."""
        weights = [factor.weight for factor in self.factors if factor.weight]
        return [_singular(f"{len(weights)} of {len(self.factors)} class covariances", max(weights))] if weights else []

    @property
    def relative_notes(self) -> tuple[str, ...]:
        """The same of the relative score, which has two covariances."""
        pairs = {"The covariance that classes share": self.shared_factor, "The one of all rows": self.background[1]}
        return tuple(_singular(name, factor.weight) for name, factor in pairs.items() if factor.weight)


def _singular(what: str, weight: float) -> str:
    """What was done about singular covariances."""
    return (
        f"{what} had no inverse (some features are constant or determined by others, or there are few rows): shrunk "
        f"toward one variance for all features, with a weight of up to {weight:.1e} (Chen et al. 2010)."
    )


__all__ = ["KAPPA", "FeatureDensity"]
