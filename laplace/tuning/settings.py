"""What a user asked of a method of tuning, and what methods are given and return."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from laplace.enums import PriorStructure
from laplace.fit import Fit
from laplace.network.parameters import expand_groups
from laplace.predictive import Options
from laplace.prior import fix_prior_prec_structure
from laplace.tuning.cached import CachedData
from laplace.tuning.marglik import BOUNDS
from laplace.tuning.problem import Problem
from laplace.tuning.result import Tuning
from laplace.tuning.scores import seed_of

Noise: TypeAlias = Literal["keep", "scalar", "per_output"]
Collect: TypeAlias = Callable[["Iterable[Any] | None", str], CachedData]
"""From a user's loader, and what its data are called, to linearized data after their one pass; ``None``: those kept."""
Found: TypeAlias = tuple[Tuning, Fit]


@dataclass(frozen=True)
class Settings:
    """What a user asked for; loaders, ``noise`` and ``refit`` are checked where they are used."""

    options: Options
    """How the predictions that are scored are made."""
    structure: PriorStructure
    """How many precisions the prior has: one, one per parameter group, or one per weight."""
    n_steps: int
    loss: Any
    """The score to minimize; ``None`` is the negative log predictive density."""
    noise: Any
    """Whether the noise is chosen, too."""
    val_loader: Any
    progress_bar: bool
    """Show progress bars."""
    train_loader: Any = None
    start: Tensor | None = None
    """Prior precisions to start from."""
    grid: Tensor | None = None
    """Prior precisions to try."""
    bounds: tuple[float, float] = BOUNDS
    lr: float = 0.1
    n_folds: int = 5
    """Number of folds of cross-validation."""
    refit: Any = None
    """Whether the head is moved to its mode under the prior that was chosen; ``None``: where the method does that."""

    def repeated(self, device: torch.device) -> Callable[[], Options]:
        """The same random numbers whenever asked: scores are then smooth functions of hyperparameters."""
        seed, options = seed_of(self.options.generator), self.options
        return lambda: replace(options, generator=torch.Generator(device).manual_seed(seed))


def spread(structure: PriorStructure, precision: Tensor, problem: Problem) -> Tensor:
    """Precisions in the shape of a prior structure."""
    sizes, mean = problem.sizes, problem.fit.mean
    if structure is PriorStructure.DIAG and precision.numel() == len(sizes):
        precision = expand_groups(precision.reshape(-1), sizes)
    return fix_prior_prec_structure(precision, structure, len(sizes), sum(sizes), mean.device, mean.dtype)


__all__ = ["Collect", "Found", "Noise", "Settings", "spread"]
