"""What training VaLLA reads of its data: statistics of batches at the inducing points, kept while memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace.errors import InputError, numbered
from laplace.gp.derivatives import Jacobian
from laplace.gp.nystrom import feature_gram
from laplace.gp.posterior import FeaturePrecision, PriorResidual
from laplace.gp.training import Parameters
from laplace.gp.variational import InducingMap, Statistics, needs_covariance
from laplace.likelihoods import AbstractLikelihood, Positions
from laplace.network import Batch
from laplace.predictive import Options
from laplace.tuning import CachedData, choose_score
from laplace.types import Inputs, Scalar

KEPT_ELEMENTS = 2**29
"""Numbers kept of training data: 2 GB in float32."""


@dataclass(frozen=True)
class Sums:
    """What one pass over the data gives."""

    kept: list[Statistics]
    """Statistics of all batches; empty where they are too large to keep."""
    gram: Tensor
    """``Σ φᵀ Λ φ`` at unit noise and temperature, ``[M, M]``."""
    nll: Scalar
    """Negative log-likelihood, in nats."""
    n_data: int
    n_positions: int


@dataclass(frozen=True)
class Source:
    """Training data, as the objective sees them."""

    read: Callable[[], Iterator[Batch]]
    """Batches of the loader, from the start."""
    jacobian: Callable[[Inputs, Tensor], tuple[Jacobian, Positions]]
    """From inputs and targets to derivatives and unmasked positions."""
    features: InducingMap
    """Features of the inducing points."""
    likelihood: AbstractLikelihood
    """Likelihood of the data, at the noise and temperature where training starts."""
    alpha: float
    n_samples: int

    def statistics(self, batch: Batch) -> Statistics:
        """What training needs of a batch."""
        at, positions = self.jacobian(batch.x, batch.y)
        phi = self.features.features(at)
        rest = PriorResidual(at, phi)
        left = rest.covariance if needs_covariance(self.likelihood, self.alpha, self.n_samples) else rest.variance
        if positions.kept is not None:
            phi, left = phi[positions.kept], left[positions.kept]
        # Targets are copied, since batches are kept and loaders may fill the same tensor again.
        return Statistics(positions.f, positions.y.clone(), phi, left)

    def sums(self, batches: Iterable[Batch]) -> Sums:
        """One pass."""
        kept: list[Statistics] | None = []
        left, n = KEPT_ELEMENTS, len(self.features.kernel_root)
        gram = self.features.kernel_root.new_zeros(n, n, dtype=torch.float64)
        nll, n_data, n_positions = torch.zeros_like(gram[0, 0]), 0, 0
        for index, batch in enumerate(batches):
            with numbered(index, batch.x):
                some = self.statistics(batch)
            n_data, n_positions = n_data + len(batch.y), n_positions + len(some.f)
            if not len(some.f):
                continue
            gram = gram + feature_gram(some.phi, self.likelihood.observed(some.f, some.y), self.likelihood)
            nll = nll + self.likelihood.nll(some.f, some.y)
            left -= some.size
            kept = None if kept is None or left < 0 else [*kept, some]
        if not n_positions:
            what = f"all {n_data} rows of training data are masked" if n_data else "the training loader is empty"
            msg = f"There is nothing to learn from: {what}."
            raise InputError(msg)
        return Sums(kept or [], gram.to(self.features.kernel_root), nll.to(gram.dtype), n_data, n_positions)

    def again_and_again(self) -> Iterator[Statistics]:
        """Batches without end, made again each time."""
        while True:
            empty = True
            for batch in self.read():
                some = self.statistics(batch)
                if len(some.f):
                    empty = False
                    yield some
            if empty:
                msg = "Training goes over the loader more than once, and it yields nothing any more. Pass a DataLoader."
                raise InputError(msg)


def scored(
    data: CachedData,
    likelihood_of: Callable[[Tensor | None], AbstractLikelihood],
    options: Options,
    dtype: torch.dtype,
) -> Callable[[Parameters], float]:
    """The mean negative log predictive density of validation data, as a function of what is trained."""

    def score(now: Parameters) -> float:
        likelihood = likelihood_of(None if now.log_sigma is None else now.log_sigma.exp())
        precision = FeaturePrecision.of(now.root @ now.root.T, now.log_delta.exp())
        measure = choose_score(None, likelihood, options.pred_type)
        return float(data.scores(measure, [precision], [likelihood], lambda: options, dtype)[0])

    return score


__all__ = ["Source", "Sums", "scored"]
