"""What the outputs mean (``likelihood=``, ``sigma_noise=``, ``temperature=``): output space only, no weights."""

from __future__ import annotations

from typing import Any

import torch

from laplace.enums import Likelihood, choose
from laplace.likelihoods.base import AbstractLikelihood, OutputHessian, Positions
from laplace.likelihoods.bradley_terry import BradleyTerryLikelihood
from laplace.likelihoods.categorical import CategoricalLikelihood
from laplace.likelihoods.gaussian import GaussianLikelihood

LIKELIHOODS: dict[Likelihood, type[AbstractLikelihood]] = {
    Likelihood.REGRESSION: GaussianLikelihood,
    Likelihood.CLASSIFICATION: CategoricalLikelihood,
    Likelihood.REWARD_MODELING: BradleyTerryLikelihood,
}
"""Which class implements which name."""


def resolve(
    likelihood: Likelihood | str,
    sigma_noise: float | torch.Tensor = 1.0,
    temperature: float | torch.Tensor = 1.0,
    output_temperature: float | torch.Tensor = 1.0,
) -> AbstractLikelihood:
    """Turn the name of a likelihood into the likelihood: the only place that reads the name.

    Parameters
    ----------
    likelihood
        ``"regression"``, ``"classification"`` or ``"reward_modeling"``.
    sigma_noise
        Standard deviation of the observation noise, in target units; only regression has one.
    temperature
        T of the tempered likelihood ``p(y|f)^(1/T)``.
    output_temperature
        What logits are divided by before the link, when predicting; only likelihoods with a link have one.

    Returns
    -------
    The likelihood with this noise and temperature.

    Raises
    ------
    UnsupportedError
        If the name is unknown.
    """
    cls = LIKELIHOODS[choose(Likelihood, likelihood, "likelihood")]
    options: dict[str, Any] = {"temperature": temperature}
    if cls.has_noise:
        options["sigma_noise"] = torch.as_tensor(sigma_noise)
    else:
        options["output_temperature"] = output_temperature
    return cls(**options)


__all__ = [
    "LIKELIHOODS",
    "AbstractLikelihood",
    "BradleyTerryLikelihood",
    "CategoricalLikelihood",
    "GaussianLikelihood",
    "OutputHessian",
    "Positions",
    "resolve",
]
