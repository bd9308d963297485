"""Methods that laplace-torch keeps private, which code that was written for it calls nevertheless."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.enums import PredType
from laplace.network import evaluating, full_precision
from laplace.predictive.pushforward import output_moments, samples_of_moments
from laplace.types import Inputs


def nn_functional_samples(
    self: Any,
    X: Inputs,
    n_samples: int = 100,
    generator: torch.Generator | None = None,
    **model_kwargs: Any,
) -> Float[Tensor, "samples batch ..."]:
    """As ``functional_samples`` with ``pred_type="nn"``."""
    options = self._options(PredType.NN, n_samples=n_samples, generator=generator)
    return self._reading.returned(self._functions(X, options, **model_kwargs), 1)


def nn_predictive_samples(
    self: Any,
    X: Inputs,
    n_samples: int = 100,
    generator: torch.Generator | None = None,
    **model_kwargs: Any,
) -> Float[Tensor, "samples batch ..."]:
    """As ``predictive_samples`` with ``pred_type="nn"``."""
    options = self._options(PredType.NN, n_samples=n_samples, generator=generator)
    samples = self._functions(X, options, adjusted=True, **model_kwargs)
    return self._reading.returned(self._output_likelihood.expectation(samples), 1)


def glm_predictive_distribution(
    self: Any, X: Inputs, joint: bool = False, diagonal_output: bool = False
) -> tuple[Tensor, Tensor]:
    """Outputs before any link, C last, and their covariances (``diagonal_output``: variances), or the joint ones."""
    posterior = self._predicting_posterior
    with evaluating(self.model, enable_backprop=self.enable_backprop):
        inputs = self._checked_linearization(X)
        with full_precision(self._device):
            return output_moments(self._adjusted(inputs), posterior, self._dtype, joint, diagonal_output)


def glm_functional_samples(
    self: Any,
    f_mu: Tensor,
    f_var: Tensor,
    n_samples: int,
    diagonal_output: bool = False,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "samples batch ..."]:
    """Samples of the Gaussian over outputs that ``_glm_predictive_distribution`` returned."""
    options = self._options(PredType.GLM, n_samples=n_samples, generator=generator)
    return samples_of_moments(f_mu, f_var, options, diagonal_output)


def glm_predictive_samples(
    self: Any,
    f_mu: Tensor,
    f_var: Tensor,
    n_samples: int,
    diagonal_output: bool = False,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "samples batch ..."]:
    """The same after the link."""
    samples = self._glm_functional_samples(f_mu, f_var, n_samples, diagonal_output, generator)
    return self._output_likelihood.expectation(samples)


__all__ = [
    "glm_functional_samples",
    "glm_predictive_distribution",
    "glm_predictive_samples",
    "nn_functional_samples",
    "nn_predictive_samples",
]
