"""Binary classification: one output, the logit of a Bernoulli distribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from laplace.enums import Likelihood, LinkApprox
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.likelihoods import quadrature, softmax
from laplace.likelihoods.base import Ask, Link, Positions, check_outputs, datum_index
from laplace.likelihoods.output_hessian import OutputHessian
from laplace.likelihoods.predictions import PredictsProbabilities
from laplace.types import Outputs, Scalar, Targets


@dataclass(frozen=True)
class BernoulliLikelihood(PredictsProbabilities):
    """−log p(y|f) = softplus(f) − y f, tempered by 1/T; y is 0 or 1.

    Attributes
    ----------
    temperature
        T.
    output_temperature
        What the logit is divided by before the link, when predicting.
    """

    temperature: float | Tensor = 1.0
    output_temperature: float | Tensor = 1.0

    name: ClassVar[str] = Likelihood.BINARY.value
    links: ClassVar[Mapping[LinkApprox, Callable[..., Tensor]]] = {
        LinkApprox.PROBIT: softmax.probit,
        LinkApprox.MC: softmax.mc,
    }
    variance_links: ClassVar[frozenset[LinkApprox]] = frozenset(links)
    unlinked: ClassVar[str] = 'is made for several classes; for a single logit use "probit" or "mc".'

    # -- fitting ------------------------------------------------------------------------------------------------------

    def nll(self, f: Outputs, y: Targets) -> Scalar:
        """Cross-entropy summed over rows."""
        return F.softplus((1 - 2 * y) * f).sum()

    def gradient(self, f: Outputs, y: Targets) -> Outputs:
        """σ(f) − y, ``[rows, 1]``; of a confident output without the difference, which would leave no digits."""
        return torch.where(y > 0.5, -torch.sigmoid(-f), torch.sigmoid(f))

    def hessian(self, f: Outputs) -> OutputHessian:
        """p (1 − p), ``[rows, 1]``."""
        return OutputHessian(1, diagonal=_spread(f))

    def hessian_root(self, f: Outputs) -> Float[Tensor, "rows outputs columns"]:
        """Its root, ``[rows, 1, 1]``."""
        return _spread(f).sqrt().unsqueeze(-1)

    def sample_gradient(self, f: Outputs, n_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Gradients at labels drawn from the probabilities, ``[samples, rows, 1]``."""
        uniform = torch.rand(n_samples, *f.shape, dtype=f.dtype, device=f.device, generator=generator)
        return torch.where(uniform < f.sigmoid(), -torch.sigmoid(-f), f.sigmoid())

    def n_groups(self, n_outputs: int) -> int:  # noqa: ARG002 - there is one
        """Two."""
        return 2

    def group_of(self, y: Targets) -> Tensor:
        """0 or 1."""
        return (y[:, 0] > 0.5).long()

    def torch_loss(self) -> tuple[nn.Module, float]:
        """``BCEWithLogitsLoss`` and 1."""
        return nn.BCEWithLogitsLoss(reduction="sum"), 1.0

    # -- predicting: of two classes with the logits (0, f) ------------------------------------------------------------

    def logits(self, f: Tensor) -> Tensor:
        """(0, f), ``[..., 2]``."""
        return torch.cat([torch.zeros_like(f), f], -1)

    def link(self, name: LinkApprox, n_samples: int, generator: torch.Generator | None) -> Link:
        """To log probabilities of 0 and 1, ``[rows, 2]``."""
        link = self.links[name]
        if name is LinkApprox.MC:
            link = partial(link, n_samples=n_samples, generator=generator)
        T = self.output_temperature

        def linked(mean: Outputs, cov: Tensor) -> Tensor:
            variance = cov.reshape(mean.shape)
            return link(self.logits(mean / T), self.logits(variance / T**2))

        return linked

    def expectation(self, f: Tensor) -> Tensor:
        """The probability of 1, ``[..., 1]``."""
        return (f / self.output_temperature).sigmoid()

    def predict(self, mean: Tensor, cov: Tensor, link: Link) -> Float[Tensor, "rows one"]:
        """The probability of 1, ``[rows, 1]``."""
        return link(mean, cov)[:, 1:].exp()

    def label(self, y: Targets) -> Tensor:
        """The two probabilities of the label, ``[rows, 2]``."""
        return torch.cat([1 - y, y], -1)

    def probabilities(self, prediction: Tensor) -> Float[Tensor, "rows classes"]:
        """Of 0 and 1, ``[rows, 2]``."""
        return torch.cat([1 - prediction, prediction], -1)

    # -- variational inference ----------------------------------------------------------------------------------------

    def energy_asks(self, alpha: float) -> Ask:  # noqa: ARG002
        """There is one output."""
        return Ask.VARIANCE

    def energy(self, mean: Outputs, cov: Tensor, y: Targets, alpha: float) -> Float[Tensor, " rows"]:
        """By quadrature: to rounding for standard deviations of f up to 1, to 1e-6 nats at 3."""
        variance, sign = cov.reshape(mean.shape), 2 * y - 1
        if alpha == 0:
            return self.scale * quadrature.mean(lambda f: F.softplus(-sign * f), mean, variance).squeeze(-1)
        power = alpha * self.scale
        found = quadrature.log_mean_exp(
            lambda f: power * F.logsigmoid(sign * f),
            lambda f: power * sign * torch.sigmoid(-sign * f),
            lambda f: power * _spread(f),
            mean,
            variance,
        )
        return -found.squeeze(-1) / alpha

    # -- data ---------------------------------------------------------------------------------------------------------

    def flatten(self, f: Tensor, y: Tensor) -> Positions:
        """Check targets, 0 or 1 in ``[batch, *positions]`` or ``[batch, *positions, 1]``, and flatten positions."""
        check_one_output(f.shape[-1])
        if y.shape not in (f.shape, f.shape[:-1]):
            msg = f"Binary targets must have the shape {list(f.shape[:-1])} or {list(f.shape)}; got {list(y.shape)}."
            raise ShapeError(msg)
        if y.is_complex() or not bool(((y == 0) | (y == 1)).all()):
            msg = 'likelihood="binary" takes targets that are 0 or 1, of any type; others came.'
            raise InputError(msg)
        check_outputs(f)
        flat = f.reshape(-1, 1)
        return Positions(flat, y.reshape(-1, 1).to(f.dtype), datum=datum_index(len(f), len(flat), f.device))

    def check_head(self, n_outputs: int) -> None:
        """Raise unless there is one output."""
        check_one_output(n_outputs)

    def count(self, y: Tensor, n_outputs: int) -> int:  # noqa: ARG002
        """Number of targets."""
        return y.numel()


def check_one_output(n_outputs: int) -> None:
    """Raise unless the model has one output."""
    if n_outputs != 1:
        msg = (
            f'likelihood="binary" is one logit for each target, and the model has {n_outputs} outputs. For classes of '
            'which one is right use "classification".'
        )
        raise UnsupportedError(msg)


def _spread(f: Tensor) -> Tensor:
    """p (1 − p), with all digits where p is near 0 or 1."""
    return torch.sigmoid(f) * torch.sigmoid(-f)
