"""What the outputs mean (``likelihood=``, ``sigma_noise=``, ``temperature=``): output space only, no weights."""

from __future__ import annotations

from typing import Any

import torch

from laplace.enums import Likelihood, choose
from laplace.errors import UnsupportedError
from laplace.likelihoods.base import AbstractLikelihood, OutputHessian, Positions
from laplace.likelihoods.categorical import CategoricalLikelihood
from laplace.likelihoods.gaussian import GaussianLikelihood

LIKELIHOODS: dict[Likelihood, type[AbstractLikelihood]] = {
    Likelihood.REGRESSION: GaussianLikelihood,
    Likelihood.CLASSIFICATION: CategoricalLikelihood,
}
"""Which class implements which name."""


def resolve(
    likelihood: Likelihood | str, sigma_noise: float | torch.Tensor = 1.0, temperature: float | torch.Tensor = 1.0
) -> AbstractLikelihood:
    """Turn the name of a likelihood into the likelihood: the only place that reads the name.

    Parameters
    ----------
    likelihood
        ``"regression"`` or ``"classification"``.
    sigma_noise
        Standard deviation of the observation noise, in target units; only regression has one.
    temperature
        T of the tempered likelihood ``p(y|f)^(1/T)``.

    Returns
    -------
    The likelihood with this noise and temperature.

    Raises
    ------
    UnsupportedError
        If the name is unknown, or its likelihood is not available.
    """
    name = choose(Likelihood, likelihood, "likelihood")
    if name not in LIKELIHOODS:
        known = ", ".join(repr(member.value) for member in LIKELIHOODS)
        msg = f"likelihood={name.value!r} is not available for last-layer approximations; use one of {known}."
        raise UnsupportedError(msg)
    cls = LIKELIHOODS[name]
    options: dict[str, Any] = {"temperature": temperature}
    if cls.has_noise:
        options["sigma_noise"] = torch.as_tensor(sigma_noise)
    return cls(**options)


__all__ = [
    "LIKELIHOODS",
    "AbstractLikelihood",
    "CategoricalLikelihood",
    "GaussianLikelihood",
    "OutputHessian",
    "Positions",
    "resolve",
]
