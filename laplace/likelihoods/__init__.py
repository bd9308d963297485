"""What the outputs mean (``likelihood=``, ``sigma_noise=``, ``temperature=``): output space only, no weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from laplace.enums import Likelihood, choose
from laplace.errors import UnsupportedError
from laplace.likelihoods.base import AbstractLikelihood, Ask, Link, Positions
from laplace.likelihoods.bernoulli import BernoulliLikelihood
from laplace.likelihoods.bradley_terry import BradleyTerryLikelihood
from laplace.likelihoods.categorical import CategoricalLikelihood
from laplace.likelihoods.gaussian import GaussianLikelihood
from laplace.likelihoods.heteroscedastic import HeteroscedasticLikelihood
from laplace.likelihoods.multilabel import MultiLabelLikelihood
from laplace.likelihoods.names import L, L_co, LikelihoodLike, MomentsLike, ProbabilitiesLike
from laplace.likelihoods.negative_binomial import NegativeBinomialLikelihood
from laplace.likelihoods.output_hessian import OutputHessian
from laplace.likelihoods.poisson import PoissonLikelihood

LIKELIHOODS: dict[Likelihood, type[AbstractLikelihood]] = {
    Likelihood.REGRESSION: GaussianLikelihood,
    Likelihood.CLASSIFICATION: CategoricalLikelihood,
    Likelihood.REWARD_MODELING: BradleyTerryLikelihood,
    Likelihood.BINARY: BernoulliLikelihood,
    Likelihood.MULTILABEL: MultiLabelLikelihood,
    Likelihood.POISSON: PoissonLikelihood,
    Likelihood.NEGATIVE_BINOMIAL: NegativeBinomialLikelihood,
    Likelihood.HETEROSCEDASTIC_REGRESSION: HeteroscedasticLikelihood,
}
"""Which class implements which name."""
OF_USERS: dict[str, type[AbstractLikelihood]] = {}
"""The same of classes from elsewhere; ``register`` adds to it."""


def register(cls: Any) -> None:
    """Make a likelihood of one's own known by its name, as ``likelihood="..."`` and to saved states.

    Parameters
    ----------
    cls
        A frozen dataclass that implements ``AbstractLikelihood`` and can be made without arguments.

    Raises
    ------
    UnsupportedError
        If it is none, or another has its name.
    """
    if not (isinstance(cls, type) and issubclass(cls, AbstractLikelihood) and isinstance(vars(cls).get("name"), str)):
        msg = f"A likelihood is a subclass of AbstractLikelihood with a name of its own; got {cls!r}."
        raise UnsupportedError(msg)
    ours = {str(name): known for name, known in LIKELIHOODS.items()}
    known = ours[cls.name] if cls.name in ours else OF_USERS.setdefault(cls.name, cls)
    if known is not cls:
        msg = f"{known.__name__} is the likelihood with the name {cls.name!r}; give {cls.__name__} another."
        raise UnsupportedError(msg)


def with_loss(*losses: type[nn.Module], compared: bool = False) -> frozenset[Likelihood]:
    """The likelihoods of this library that packages can compute that know a few losses of PyTorch."""
    found = {name: (cls().torch_loss(), cls.compares) for name, cls in LIKELIHOODS.items()}
    return frozenset(
        name for name, (loss, compares) in found.items() if loss and type(loss[0]) in losses and compared >= compares
    )


def name_of(likelihood: Any) -> str:
    """The name of a likelihood, checked; a member of ``Likelihood`` where it is one of ours."""
    if isinstance(likelihood, str) and likelihood in OF_USERS:
        return likelihood
    return choose(Likelihood, likelihood, "likelihood")


def chosen(likelihood: Any) -> AbstractLikelihood:
    """A likelihood by its name, or as it is."""
    if isinstance(likelihood, AbstractLikelihood):
        register(type(likelihood))
        return likelihood
    name = name_of(likelihood)
    return LIKELIHOODS[name]() if isinstance(name, Likelihood) else OF_USERS[name]()


def resolve(
    likelihood: str,
    sigma_noise: float | torch.Tensor = 1.0,
    temperature: float | torch.Tensor = 1.0,
    output_temperature: float | torch.Tensor = 1.0,
) -> AbstractLikelihood:
    """A likelihood by its name, at given hyperparameters, of which it takes those that it has."""
    return chosen(likelihood).at(torch.as_tensor(sigma_noise), temperature, output_temperature)


__all__ = [
    "LIKELIHOODS",
    "AbstractLikelihood",
    "Ask",
    "BernoulliLikelihood",
    "BradleyTerryLikelihood",
    "CategoricalLikelihood",
    "GaussianLikelihood",
    "HeteroscedasticLikelihood",
    "L",
    "L_co",
    "LikelihoodLike",
    "Link",
    "MomentsLike",
    "MultiLabelLikelihood",
    "NegativeBinomialLikelihood",
    "OutputHessian",
    "PoissonLikelihood",
    "Positions",
    "ProbabilitiesLike",
    "chosen",
    "name_of",
    "register",
    "resolve",
    "with_loss",
]
